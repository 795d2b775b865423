"""The page of the documentation and its figures, from records/.

python benchmarks/solvers/report.py [--records benchmarks/solvers/records] [--out docs]
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
PAGE = "solver-benchmark.md"
METRICS = {
    "quadratic": ("value", "squared norm of the gradient of h", "log"),
    "ijcnn1": ("value_func", "validation loss h", "linear"),
    "mnist": ("test_error", "test error, 50 % of the labels redrawn", "log"),
    "mnist-0.7": ("test_error", "test error, 70 % of the labels redrawn", "log"),
    "mnist-0.9": ("test_error", "test error, 90 % of the labels redrawn", "log"),
    "covtype-subset": ("test_error", "test error on the balanced subset", "log"),
    "lora": ("val_loss", "validation loss", "log"),
}
"""Data set -> metric, what it is called, scale."""
AXES = {"seconds": "seconds", "calls": "oracle calls, in batches of 64"}
GROUPS = {
    "one step at a time": ("SOBA", "MA-SOBA", "FSLA", "TTSA", "SUSTAIN", "MRBO"),
    "variance reduced, double loop": ("SABA", "SRBA", "VRBO", "AmIGO", "StocBiO", "BSA"),
    "unrolled and implicit": ("UD 1", "UD 10", "UD 100", "UD 100 cold", "Implicit CG", "Implicit Neumann"),
    "first order, black box": ("F2SA", "BOME", "PZOBO", "Optuna"),
}
"""Panels of a figure: the table has all solvers."""
SIZE, DPI = (9, 7), 100
"""Two panels side by side: the smallest letters, of 10 points, are 11 pixels high in a column of 720."""
TYPE = {"font.size": 11, "axes.titlesize": 12, "legend.fontsize": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=HERE / "records")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs")
    args = parser.parse_args()
    for path in write(args.records, args.out):
        print(f"wrote {path}")


def write(records: Path, out: Path) -> list[Path]:
    """Writes page and figures into `out`; returns their paths. What was not recorded is left out."""
    out.mkdir(parents=True, exist_ok=True)
    plt.switch_backend("agg")
    plt.rcParams.update(TYPE)
    written, parts = [], []

    def add(name, figure, text):
        figure.savefig(out / name, dpi=DPI)
        plt.close(figure)
        written.append(out / name)
        parts.append(f"![{text}]({name})\n")

    found = {data: runs(records / data) for data in METRICS}
    for data, recorded in found.items():
        if not recorded:
            continue
        seeds = max(record["seeds"] for record in recorded.values())
        parts.append(f"## {data}\n\nMedian and quartiles of {METRICS[data][1]} over {seeds} seeds.\n")
        for x, label in AXES.items():
            add(f"solvers-{data}-{x}.png", curves(data, recorded, x), f"{data} against {label}")
        parts.append(ends(data, recorded))
    speed, conditioning = (read(records / f"{name}.json") for name in ("speed", "conditioning"))
    if conditioning:
        parts.append("## Unrolled or implicit\n")
        text = (
            "Relative error of one hypergradient against that at the minimiser, unrolled above and implicit (CG, at "
            "most 10 iterations) below, medians over 10 seeds; blue where unrolled is closer."
        )
        parts.append(text + "\n")
        add("solvers-conditioning.png", heat_maps(conditioning), "Errors over condition number and inner steps")
    if speed:
        parts.append("## Beside benchmark_bilevel\n")
        parts.append(
            "Microseconds an iteration, both synchronised, in turns in one process; medians. A batch here is 64 rows "
            "drawn one by one, there 64 neighbours.\n"
        )
        rows = [(r["data"], r["solver"], f"{r['theirs']:.1f}", f"{r['ours']:.1f}", f"{r['ratio']:.2f}") for r in speed]
        parts.append(table(("data", "solver", "benchmark_bilevel", "bilevel", "ratio"), rows))
    head = (
        "# Solvers measured\n\nWritten by `python benchmarks/solvers/report.py` from `benchmarks/solvers/records`; the "
        "README there says how everything is measured. [Which solver](which-solver.md) says what the problems are and "
        "draws the conclusions. h is the outer loss at the exact solution of the inner problem, as a function of the "
        "outer variable.\n"
    )
    (out / PAGE).write_text("\n".join([head, *parts]), encoding="utf-8")
    return [*written, out / PAGE]


def read(file):
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def runs(folder):
    """Label -> record, solvers in the order of GROUPS and then of their names."""
    order = [name for group in GROUPS.values() for name in group]
    found = {file.stem.replace("_", " "): read(file) for file in sorted(folder.glob("*.json"))}
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def levels(record, metric):
    """Quartiles `[3, points]`, NaN where a seed has diverged."""
    return np.array([record["metrics"][metric][level] for level in ("low", "median", "high")], float)


def curves(data, found, x):
    """The metric against `x`: median and quartiles, a panel a group of solvers."""
    metric, label, scale = METRICS[data]
    figure, axes = plt.subplots(2, 2, figsize=SIZE, sharex=True, sharey=True, layout="constrained")
    for axis, (title, members) in zip(axes.flat, GROUPS.items(), strict=True):
        for i, name in enumerate(member for member in members if member in found):
            low, median, high = levels(found[name], metric)
            at = np.array(found[name][x], float)
            axis.plot(at[1:], median[1:], label=name, color=f"C{i}", marker=".", markersize=5, linewidth=1.8)
            axis.fill_between(at[1:], low[1:], high[1:], color=f"C{i}", alpha=0.2, linewidth=0)
        axis.set(title=title, xscale="log", yscale=scale)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.6)
        if axis.lines:
            axis.legend(frameon=False)
    figure.supxlabel(AXES[x])
    figure.supylabel(label)
    return figure


def heat_maps(record):
    """Which of unrolled and implicit is closer: the ratio of their errors, over condition number and K."""
    panels = len(record["errors"])
    figure, axes = plt.subplots(panels, 1, figsize=(9, 3.2 * panels), sharex=True, squeeze=False, layout="constrained")
    for axis, (title, errors) in zip(axes.flat, record["errors"].items(), strict=True):
        unrolled, implicit = (np.array(errors[name], float).T for name in ("unrolled", "implicit"))
        ratio = np.log10(unrolled / implicit)
        image = axis.imshow(ratio, cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
        for (i, j), error in np.ndenumerate(unrolled):
            style = {"ha": "center", "va": "center", "fontsize": 10, "color": "w" if abs(ratio[i, j]) > 1.2 else "k"}
            axis.text(j, i, f"{short(error)}\n{short(implicit[i, j])}", **style)
        axis.set_xticks(range(len(record["steps"])), [str(k) for k in record["steps"]])
        axis.set_yticks(range(len(record["conditions"])), [f"{c:.0f}" for c in record["conditions"]])
        axis.set(title=title)
    figure.supxlabel("inner steps K")
    figure.supylabel("condition number")
    figure.colorbar(image, ax=axes, label="log10 of error, unrolled over implicit")
    return figure


def short(x):
    return f"{x:.2f}" if 0.005 <= x < 100 else f"{x:.0e}"


def ends(data, found):
    """What each solver had reached at the end of its budget: a table."""
    rows = []
    for name, record in found.items():
        low, median, high = levels(record, METRICS[data][0])[:, -1]
        reached = "diverged" if np.isnan(median) else f"{median:.3g} ({low:.3g} to {high:.3g})"
        rows.append((name, reached, f"{record['seconds'][-1]:.3g}", f"{record['calls'][-1]:.3g}"))
    return table(("solver", f"{METRICS[data][1]}, at the end", "seconds", "oracle calls"), rows)


SHOWN = {
    "quadratic": ("quadratic, ‖∇h‖²", "{:.2g}"),
    "ijcnn1": ("ijcnn1, h", "{:.3f}"),
    "mnist": ("mnist .5", "{:.3f}"),
    "mnist-0.7": ("mnist .7", "{:.3f}"),
    "mnist-0.9": ("mnist .9", "{:.3f}"),
    "covtype-subset": ("covtype-subset", "{:.3f}"),
    "lora": ("lora, validation loss", "{:.2g}"),
}
"""Data set -> its column in the table of `Which solver`, and how its numbers are written."""
CHOSEN = (
    *("SABA", "SRBA", "SOBA", "AmIGO", "StocBiO", "F2SA", "UD 1", "UD 10", "UD 100"),
    *("Implicit CG", "Implicit Nystrom", "Optuna"),
)


def chosen_table(records: Path) -> str:
    """The medians of some solvers at the end of their budget, on all data sets: the table of `Which solver`."""
    found = {data: runs(records / data) for data in SHOWN}

    def cell(name, data):
        if name not in found[data]:
            return "–"
        return SHOWN[data][1].format(levels(found[data][name], METRICS[data][0])[1, -1])

    return table(("", *(head for head, _ in SHOWN.values())), [(n, *(cell(n, data) for data in SHOWN)) for n in CHOSEN])


def joined_table(record: dict) -> str:
    """The table of the page *With Optuna*, from joined.json."""
    alone, reached, end = record["alone"], record["reached"], record["end"]

    def row(*cells) -> str:
        return f"| {' | '.join(cells)} |"

    def most(name: str) -> str:
        return f"{reached[name]['median']:,.0f} (at most {reached[name]['most']:,.0f})"

    calls = f"{alone['gradient_calls']:,.0f}"
    share = {name: alone["gradient_calls"] / reached[name]["most"] for name in reached}
    return "\n".join([
        row(f"ijcnn1, {record['seeds']} seeds", "outer loss", "gradient calls", "all oracle calls"),
        "|---|---:|---:|---:|",
        row("Optuna alone, at its end", f"{alone['value_func']:.3f}", calls, calls),
        row("joined, until it is there", f"{alone['value_func']:.3f}", *map(most, reached)),
        row("joined, fewer calls even at worst, by a factor of", "", *(f"{share[name]:.0f}" for name in reached)),
        row("joined, at its end", *(f"{end['value_func']:.3f}", f"{end['gradient_calls']:,.0f}"),
            f"{end['oracle_calls']:,.0f}"),
    ])  # fmt: skip


def table(head, rows):
    """Markdown."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)) + "\n"


if __name__ == "__main__":
    main()
