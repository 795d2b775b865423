"""What record.py runs: for each data set, label -> (solver file, settings).

Step sizes on ijcnn1 and mnist are those that benchmark_bilevel tuned for its figures, where it has them.
"""

DATA = {"quadratic": ("quadratic", {}), "ijcnn1": ("ijcnn1", {}), "mnist": ("mnist", {"ratio": 0.5})}
"""Name of a record folder -> data set file and parameters."""
BUDGET = {"quadratic": 1e5, "ijcnn1": 2e5, "mnist": 2e4}
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
        "F2SA": ("f2sa", _steps(0.1, 1.0)),
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
        "SRBA": ("srba", _steps(0.001, 1e-5)),
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

LINEAR_SOLVERS = "CG", "NormalCG", "GMRES", "BiCGStab", "Neumann", "Nystrom", "Dense"
for _data, (_like, _solvers) in {
    "quadratic": ("UD 10", LINEAR_SOLVERS),
    "ijcnn1": ("UD 10", LINEAR_SOLVERS),
    "mnist": ("UD 10", LINEAR_SOLVERS[:-1]),
}.items():
    for _solver in _solvers:
        RUNS[_data][f"Implicit {_solver}"] = "implicit", RUNS[_data][_like][1] | {"linear_solver": _solver}
