"""What record.py runs: for each data set, label -> (solver file, settings).

Step sizes on ijcnn1 and mnist are those that benchmark_bilevel tuned for its figures, where it has them; those on the
other data sets are the same for all solvers whose steps decay, and for all whose steps do not.
"""

DATA = {
    "quadratic": ("quadratic", {}),
    "ijcnn1": ("ijcnn1", {}),
    "mnist": ("mnist", {"ratio": 0.5}),
    "mnist-0.7": ("mnist", {"ratio": 0.7}),
    "mnist-0.9": ("mnist", {"ratio": 0.9}),
    "covtype-subset": ("covtype_subset", {}),
    "lora": ("lora", {}),
}
"""Name of a record folder -> data set file and parameters."""
BUDGET = dict(zip(DATA, (1e5, 2e6, 2e4, 2e4, 2e4, 2e5, 1.5e3), strict=True))
"""Oracle calls of 64 rows."""
SUBSET = ["SOBA", "SABA", "SRBA", "AmIGO", "StocBiO", "F2SA", "UD 1", "UD 10", "UD 100", "Implicit CG", "Optuna"]


def _steps(step_size, outer_ratio, **settings):
    return {"step_size": step_size, "outer_ratio": outer_ratio} | settings


RUNS = {
    "quadratic": {
        "SOBA": ("soba", _steps(0.3, 1.0)),
        "MA-SOBA": ("ma_soba", _steps(0.3, 1.0)),
        "SABA": ("saba", _steps(0.1, 1.0)),
        "SRBA": ("srba", _steps(0.1, 1.0)),
        "AmIGO": ("amigo", _steps(0.1, 1.0)),
        "StocBiO": ("stocbio", _steps(0.1, 1.0)),
        "BSA": ("bsa", _steps(0.3, 1.0)),
        "TTSA": ("ttsa", _steps(0.3, 1.0)),
        "FSLA": ("fsla", _steps(0.3, 1.0)),
        "MRBO": ("mrbo", _steps(0.1, 1.0)),
        "VRBO": ("vrbo", _steps(0.1, 1.0)),
        "SUSTAIN": ("sustain", _steps(0.1, 1.0)),
        "F2SA": ("f2sa", _steps(0.1, 3.0)),
        "BOME": ("bome", _steps(0.1, 1.0)),
        "PZOBO": ("pzobo", _steps(0.1, 1.0)),
        "UD 1": ("nested", _steps(0.1, 1.0, inner_steps=1)),
        "UD 10": ("nested", _steps(0.1, 1.0, inner_steps=10)),
        "UD 100": ("nested", _steps(0.1, 1.0, inner_steps=100)),
        "UD 100 cold": ("nested", _steps(0.1, 1.0, inner_steps=100, start="cold")),
        "Optuna": ("optuna", {}),
    },
    "ijcnn1": {
        "SOBA": ("soba", _steps(0.03125, 0.01)),
        "MA-SOBA": ("ma_soba", _steps(0.03125, 0.01)),
        "SABA": ("saba", _steps(0.125, 1.0)),
        "SRBA": ("srba", _steps(0.25, 1.0)),
        "AmIGO": ("amigo", _steps(0.125, 0.3162)),
        "StocBiO": ("stocbio", _steps(0.125, 1.0)),
        "BSA": ("bsa", _steps(0.5, 0.01)),
        "TTSA": ("ttsa", _steps(0.5, 0.03162)),
        "FSLA": ("fsla", _steps(0.03125, 0.01)),
        "MRBO": ("mrbo", _steps(0.5, 0.03162)),
        "VRBO": ("vrbo", _steps(0.0625, 1.0)),
        "SUSTAIN": ("sustain", _steps(0.5, 0.1)),
        "F2SA": ("f2sa", _steps(0.1, 0.1)),
        "BOME": ("bome", _steps(0.5, 0.1)),
        "PZOBO": ("pzobo", _steps(0.5, 0.3162, smoothing=0.01)),
        "UD 1": ("nested", _steps(0.5, 0.5, inner_steps=1)),
        "UD 10": ("nested", _steps(0.5, 0.5, inner_steps=10)),
        "UD 100": ("nested", _steps(0.5, 0.1, inner_steps=100)),
        "UD 100 cold": ("nested", _steps(0.5, 0.1, inner_steps=100, start="cold")),
        "Optuna": ("optuna", {}),
    },
    "mnist": {
        "SOBA": ("soba", _steps(1.0, 1e-4)),
        "MA-SOBA": ("ma_soba", _steps(1.0, 1e-4)),
        "SABA": ("saba", _steps(0.1, 1e-3)),
        "SRBA": ("srba", _steps(0.001, 1e-5, period_frac=512.0)),
        "AmIGO": ("amigo", _steps(0.001, 1e-5)),
        "StocBiO": ("stocbio", _steps(0.01, 1e-5)),
        "BSA": ("bsa", _steps(0.1, 1e-5)),
        "TTSA": ("ttsa", _steps(0.1, 1e-5)),
        "FSLA": ("fsla", _steps(1.0, 1e-4)),
        "MRBO": ("mrbo", _steps(0.1, 1e-4)),
        "VRBO": ("vrbo", _steps(0.1, 1e-4)),
        "SUSTAIN": ("sustain", _steps(0.1, 1e-4)),
        "F2SA": ("f2sa", _steps(0.1, 1e-4)),
        "BOME": ("bome", _steps(0.01, 1e-3)),
        "PZOBO": ("pzobo", _steps(0.01, 0.01, smoothing=0.01)),
        "UD 1": ("nested", _steps(0.1, 1e-4, inner_steps=1)),
        "UD 10": ("nested", _steps(0.1, 1e-4, inner_steps=10)),
        "UD 100": ("nested", _steps(0.1, 1e-4, inner_steps=100)),
        "UD 100 cold": ("nested", _steps(0.1, 1e-4, inner_steps=100, start="cold")),
    },
}

RUNS["mnist-0.7"] = RUNS["mnist"] | {
    "SABA": ("saba", _steps(0.01, 1e-4)),
    "FSLA": ("fsla", _steps(1.0, 1e-5)),
}
RUNS["mnist-0.9"] = RUNS["mnist"] | {
    "SOBA": ("soba", _steps(1.0, 1e-3)),
    "MA-SOBA": ("ma_soba", _steps(1.0, 1e-3)),
    "FSLA": ("fsla", _steps(1.0, 1e-3)),
    "MRBO": ("mrbo", _steps(1.0, 1e-2)),
    "VRBO": ("vrbo", _steps(0.1, 1e-3)),
    "PZOBO": ("pzobo", _steps(1.0, 0.01, smoothing=0.1)),
}
RUNS["covtype-subset"] = {
    label: (file, settings | _steps(0.1, 0.1)) for label, (file, settings) in RUNS["ijcnn1"].items() if settings
}
RUNS["covtype-subset"] |= {
    label: (RUNS["covtype-subset"][label][0], _steps(0.3, 0.03))
    for label in ("SOBA", "MA-SOBA", "FSLA", "BSA", "TTSA", "MRBO", "SUSTAIN")
}
RUNS["covtype-subset"]["Optuna"] = "optuna", {}
RUNS["lora"] = {
    label: (file, settings | _steps(0.5, 0.01)) for label, (file, settings) in RUNS["quadratic"].items() if settings
}
RUNS["lora"] |= {label: (RUNS["lora"][label][0], _steps(2.0, 0.01)) for label in ("SOBA", "MA-SOBA", "FSLA")}

LINEAR_SOLVERS = "CG", "NormalCG", "GMRES", "BiCGStab", "Neumann", "Nystrom", "Dense"
"""Dense holds a matrix of the inner dimension squared: not for mnist and lora."""
for _data, _runs in RUNS.items():
    for _solver in LINEAR_SOLVERS[:-1] if _data.startswith(("mnist", "lora")) else LINEAR_SOLVERS:
        _runs[f"Implicit {_solver}"] = "implicit", _runs["UD 10"][1] | {"linear_solver": _solver}
