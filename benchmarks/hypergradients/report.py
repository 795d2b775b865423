"""The page of tables, and its figures, from a record.

python -m benchmarks.hypergradients.report [--record benchmarks/hypergradients/record.jsonl] [--out docs]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import tyro
from matplotlib.ticker import LogLocator

from benchmarks.hypergradients import side_by_side
from benchmarks.hypergradients.goals import disagreements, goals
from benchmarks.record import Record, Row

RECORD = Path(__file__).with_name("record.jsonl")
PAGE = "hypergradient-benchmark.md"
EXACT = ("mixed, none", "mixed, step", "mixed, sqrt", "mixed, binomial", "reverse, none", "reverse, step", "forward")
"""Drawn for time and memory; the table has all."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Attributes: record: the rows. out: where page and figures go."""

    record: Path = RECORD
    out: Path = Path("docs")


def line(row: Row) -> str:
    """A row, for a terminal."""
    where = ", ".join(str(row[k]) for k in ("section", "problem", "steps") if k in row)
    numbers = {"seconds": "s", "temporary": "bytes", "resident": "bytes resident", "error": "error"}
    found = [f"{row[k]:.3g} {unit}" for k, unit in numbers.items() if row.get(k) is not None]
    found += [f"{k.replace('_', ' ')}: {row[k]}" for k in ("failed", "left_out") if k in row]
    return f"{where}: {row.get('name', '')}  {', '.join(found)}"


def write(record: Record, out: Path) -> list[Path]:
    """Writes page and figures into `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "hypergradient-schedules.png": _schedules,
        "hypergradient-bias.png": _bias,
        "hypergradient-peers.png": _peers_figure,
        "hypergradient-front.png": _front_figure,
    }
    written = []
    for name, draw in figures.items():
        figure = draw(record)
        if figure is not None:
            figure.savefig(out / name, dpi=120)
            plt.close(figure)
            written.append(out / name)
    (out / PAGE).write_text(page(record, [path.name for path in written]), encoding="utf-8")
    return [*written, out / PAGE]


def page(record: Record, figures: Iterable[str]) -> str:
    """The page, in Markdown."""
    figures = set(figures)

    def figure(name: str, text: str) -> str:
        return f"![{text}]({name})\n" if name in figures else ""

    parts = [
        "# Hypergradients measured\n",
        _machine(record),
        "Written by `python -m benchmarks.hypergradients`; `benchmarks/hypergradients/README.md` says how everything "
        "is measured. [Which hypergradient](which-hypergradient.md) draws the conclusions.\n",
        "## Goals\n",
        _goals(record),
        "## Every estimator against K\n",
        figure("hypergradient-schedules.png", "Time and memory of the exact estimators against K"),
        figure("hypergradient-bias.png", "Bias of the others against K, and against their cost"),
        *_estimators(record),
        "## Beside other libraries\n",
        figure("hypergradient-front.png", "Memory and time of several libraries"),
        figure("hypergradient-peers.png", "Time and resident memory of several libraries against K"),
        *_peers(record),
        "## Transformer\n",
        _transformer(record),
    ]
    return "\n".join(part for part in parts if part)


def _machine(record: Record) -> str:
    found = record.find(section="machine")
    if not found:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in found[0]["versions"].items())
    return f"{found[0].get('date', '')} CPU, {found[0]['system']}; {versions}. Cores: {_cores(record)}.\n".lstrip()


def _cores(record: Record) -> str:
    found = dict.fromkeys((row["section"], row["cores"]) for row in record.rows if "cores" in row)
    return ", ".join(f"{cores} for {section}" for section, cores in found)


def _goals(record: Record) -> str:
    body = []
    for goal in goals(record):
        measured = " / ".join(f"{x:.2f}" for x in goal.measured)
        wanted = f"{'at least' if goal.is_least else 'at most'} {goal.wanted:g}"
        body.append((goal.text, goal.where, measured, wanted, "yes" if goal.is_met else "**no**", goal.limit))
    return _table(("goal", "where", "measured", "wanted", "met", "limit"), body, align="---")


def _estimators(record: Record) -> Iterable[str]:
    for problem in dict.fromkeys(row["problem"] for row in record.find(section="estimators")):
        rows = record.find(section="estimators", problem=problem)
        lengths = sorted({row["steps"] for row in rows})
        found = {(row["name"], row["steps"]): row for row in rows}
        first = found.get(("training", lengths[0]))
        if first is None:
            continue
        yield (
            f"**{problem[0].upper() + problem[1:]}**: {first['outer_numbers']} outer numbers, a state of "
            f"{first['state'] / 1e6:.3f} MB; one inner gradient needs {first['step_temporary'] / 1e6:.2f} MB. Time "
            "over that of the same training; temporary MB; relative error against the exact derivative of it.\n"
        )
        body = []
        for name in dict.fromkeys(row["name"] for row in rows if row["name"] not in ("training", "all")):
            line = [found.get((name, k)) for k in lengths]
            times = [_cell(row, "ratio", "{:.2f}".format) for row in line]
            sizes = [_cell(row, "temporary", _megabytes) for row in line]
            errors = [_cell(row, "error", "{:.0e}".format) for row in line]
            shown = side_by_side.written(name, "log2(K)")
            body.append((shown, *(" / ".join(cells) for cells in (times, sizes, errors))))
        yield _table(("K = " + " / ".join(map(str, lengths)), "time / training", "temporary MB", "error"), body)


def _peers(record: Record) -> Iterable[str]:
    for problem, steps in dict.fromkeys((row["problem"], row["steps"]) for row in record.find(section="peers")):
        body = [
            (
                side_by_side.written(row["name"], math.isqrt(steps)),
                _cell(row, "seconds", "{:.3g}".format),
                _cell(row, "resident", _megabytes),
                _cell(row, "temporary", _megabytes),
                _cell(row, "compile_seconds", "{:.1f}".format),
                "reference" if row["name"] == side_by_side.REFERENCE else _cell(row, "error", "{:.0e}".format),
            )
            for row in record.find(section="peers", problem=problem, steps=steps)
        ]
        yield f"**{problem[0].upper() + problem[1:]}**, float32, K = {steps}:\n"
        yield _table(("", "seconds", "resident MB", "temporary MB", "compile s", "difference"), body)
    rows = record.find(section="agreement")
    if not rows:
        return
    wrong = [f"{row['name']} on the {row['problem']} problem ({row['error']:.0e})" for row in disagreements(record)]
    yield f"Relative difference from the hypergradient of {side_by_side.REFERENCE}, float64, K = {rows[0]['steps']}:\n"
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    found = {(row["name"], row["problem"]): row for row in rows}
    body = [
        (
            side_by_side.written(name, math.isqrt(rows[0]["steps"])),
            *(_cell(found.get((name, problem)), "error", "{:.0e}".format) for problem in problems),
        )
        for name in dict.fromkeys(row["name"] for row in rows)
    ]
    yield _table(("", *problems), body)
    limit = f"to {side_by_side.MISMATCH:g}"
    yield f"All agree {limit}.\n" if not wrong else f"All agree {limit}, but for: {', '.join(wrong)}.\n"


def front(record: Record) -> list[Row]:
    """What the front of the repository shows: the libraries at the largest K of data weighting, least memory first."""
    rows = [r for r in record.find(section="peers", problem="data weighting") if r.get("resident") and "seconds" in r]
    longest = max((row["steps"] for row in rows), default=0)
    shown = [row for row in rows if row["steps"] == longest and not row["name"].startswith(_LEFT_OUT)]
    return sorted(shown, key=lambda row: row["resident"])


_LEFT_OUT = ("bilevel, mixed, none", "bilevel, mixed, step", "bilevel, reverse")
"""Schedules of ours that the page alone has."""


def schedule(row: Row) -> str:
    """The schedule of a row of ours, as a user gives it to `Unrolled`: `"sqrt"`, `Binomial(16)`."""
    name = row["name"].rpartition(", ")[2]
    return side_by_side.written(name, math.isqrt(row["steps"])) if name == "binomial" else f'"{name}"'


def front_table(record: Record) -> str:
    """`front` as a table, with its date, machine and command."""
    rows, (where,) = front(record), record.find(section="machine")
    least, versions = rows[0]["resident"], where["versions"]

    def name(row: Row) -> str:
        library, _, how = row["name"].partition(", ")
        if library == "bilevel":
            return f"**bilevel**, `{schedule(row)}`"
        version = f" {versions[library]}" if library in versions else ""
        return f"{library}{version}" + (f", {how}" if how else "")

    body = [
        (name(row), _megabytes(row["resident"]), f"{row['resident'] / least:.1f}", f"{row['seconds']:.2f}")
        for row in rows
    ]
    head = ("library", "memory, MB", "of the least", "seconds")
    cores = {row["cores"] for row in rows if "cores" in row}
    return (
        f"{_table(head, body)}\nAn MLP of 134,000 parameters, K = {rows[0]['steps']} steps of Adam, a weight for each "
        f"of 64 rows, float32, {_counted(cores)} of a CPU ({where['system']}); memory is the peak of what is resident "
        f"beyond the start. {where['date']}, by `python -m benchmarks.hypergradients`.\n"
    )


def _counted(cores: set[int]) -> str:
    return " or ".join(f"{n} core{'s' if n > 1 else ''}" for n in sorted(cores))


def _transformer(record: Record) -> str:
    body = []
    for row in record.find(section="transformer"):
        if row["name"] == "training":
            continue
        ratio = f"{row['ratio']:.2f}"
        body.append((row["name"], row["blocks"], ratio, _megabytes(row["temporary"]), f"{row['compile_seconds']:.1f}"))
    parts = (
        [_table(("8 blocks, K = 4", "blocks", "time / training", "temporary MB", "compile s"), body)] if body else []
    )
    depths = [f"{row['name']} {row['compile_seconds']:.1f} s" for row in record.find(section="depth")]
    if depths:
        parts.append(f"Compile time against depth: {', '.join(depths)}.\n")
    for row in record.find(section="pretrained"):
        parts.append(
            f"{row['name']}, 8 x 64 tokens, K = 4, mixed, step: {_megabytes(row['temporary'])} MB, compiled in "
            f"{row['compile_seconds']:.1f} s, {row['ratio']:.2f} times the training.\n"
        )
    return "\n".join(parts)


def _cell(row: Row | None, field: str, show: Callable[[float], str]) -> str:
    """A measured number, or a dash for what there is not."""
    value = row.get(field) if row else None
    return "–" if value is None else show(value)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e8 else f"{size / 1e6:.3g}"


def _table(head: Iterable[str], body: Iterable[Iterable[str]], align: str = "---:") -> str:
    """A table whose first column is text, and the others aligned like `align`."""
    head = list(head)
    rule = ["---" if i == 0 else align for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body)) + "\n"


def _series(record: Record, problem: str, name: str, field: str, unit: float = 1.0) -> tuple[list[int], list[float]]:
    """K, and `unit` times what was measured there."""
    rows = [r for r in record.find(section="estimators", problem=problem, name=name) if field in r]
    points = sorted((row["steps"], unit * row[field]) for row in rows)
    return [k for k, _ in points], [v for _, v in points]


def _grid(rows: int, columns: int, height: float) -> tuple[Any, Any]:
    return plt.subplots(rows, columns, figsize=(3 * columns, height), layout="constrained", squeeze=False)


def _schedules(record: Record) -> Any:
    problems = list(dict.fromkeys(row["problem"] for row in record.find(section="estimators")))
    if not problems:
        return None
    figure, axes = _grid(2, len(problems), 6.6)
    for column, problem in enumerate(problems):
        for i, name in enumerate(EXACT):
            shown = side_by_side.written(name, "log2(K)")
            style = {"color": f"C{i}", "marker": "o", "ms": 3, "lw": 1.3, "label": shown}
            style["ls"] = "--" if name.startswith("reverse") else "-"
            for axis, (field, *scale) in zip(axes[:, column], (("ratio",), ("temporary", 1e-6)), strict=True):
                series = _series(record, problem, name, field, *scale)
                if len(series[0]):  # what was not measured has no place in the legend
                    axis.plot(*series, **style)
        axes[0, column].set(title=problem, yscale="log")
        axes[1, column].set(yscale="log", xlabel="K")
    axes[0, 0].set_ylabel("time / training")
    axes[1, 0].set_ylabel("temporary memory, MB")
    _finish(figure, axes)
    return figure


def _bias(record: Record) -> Any:
    problems = list(dict.fromkeys(row["problem"] for row in record.find(section="estimators")))
    biased = [
        name
        for name in dict.fromkeys(row["name"] for row in record.find(section="estimators"))
        if name.split(",")[0] not in ("mixed", "reverse", "forward", "training", "all")
    ]
    if not biased:
        return None
    figure, axes = _grid(2, len(problems), 6.8)
    for column, problem in enumerate(problems):
        lengths = sorted({row["steps"] for row in record.find(section="estimators", problem=problem)})
        k = 64 if 64 in lengths else lengths[-1]
        for i, name in enumerate(biased):
            style = {"color": f"C{i % 10}", "marker": "os^v"[i // 10 + i % 2 * 2], "ms": 4}
            axes[0, column].plot(*_series(record, problem, name, "error"), lw=1.2, label=name, **style)
            row = record.one(section="estimators", problem=problem, steps=k, name=name)
            if row:
                axes[1, column].plot(row["ratio"], row["error"], ls="", **style)
        axes[0, column].set(title=problem, xscale="log", yscale="log", xlabel="K")
        axes[1, column].set(xscale="log", yscale="log", xlabel=f"time / training, K = {k}")
    axes[0, 0].set_ylabel("relative error")
    axes[1, 0].set_ylabel("relative error")
    _finish(figure, axes[:1], also=axes[1:])
    return figure


def _peers_figure(record: Record) -> Any:
    rows = [r for r in record.find(section="peers", problem="data weighting") if "seconds" in r]
    if not rows:
        return None
    figure, axes = _grid(1, 2, 4.6)
    figure.set_size_inches(9, 5.4)
    for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        points = sorted((r["steps"], r["seconds"], r["resident"] or float("nan")) for r in rows if r["name"] == name)
        ks, seconds, resident = zip(*points, strict=True)
        style = {"color": plt.get_cmap("tab20")(i), "ms": 4, "lw": 1.3, "label": side_by_side.written(name, "sqrt(K)")}
        style |= {"marker": "o", "ls": "-"} if name.startswith("bilevel") else {"marker": "s", "ls": "--"}
        axes[0, 0].plot(ks, seconds, **style)
        axes[0, 1].plot(ks, [size / 1e6 for size in resident], **style)
    for axis, label in zip(axes[0], ("seconds", "peak resident memory, MB"), strict=True):
        axis.set(yscale="log", xlabel="K", ylabel=label)
    _finish(figure, axes)
    return figure


def _front_figure(record: Record) -> Any:
    """Memory and time as bars, ours in colour."""
    rows = front(record)[::-1]
    if not rows:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(8, 0.6 + 0.34 * len(rows)), sharey=True, layout="constrained")
    short = (row["name"].replace("bilevel, mixed, ", "bilevel, ") for row in rows)
    names = [side_by_side.written(name, math.isqrt(row["steps"])) for name, row in zip(short, rows, strict=True)]
    colours = ["#c8553d" if name.startswith("bilevel") else "#9fb8c8" for name in names]
    for axis, (field, unit, show, title) in zip(
        axes,
        (("resident", 1e-6, "{:,.0f}", "peak memory, MB"), ("seconds", 1.0, "{:.2f}", "time, seconds")),
        strict=True,
    ):
        values = [unit * row[field] for row in rows]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [show.format(value) for value in values], padding=3, fontsize=9)
        axis.set(title=title, xlim=(0, 1.18 * max(values)))
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.set_xticks([])
    return figure


def _finish(figure: Any, axes: Any, also: Any = ()) -> None:
    """Logarithmic K with its values as ticks, a light frame, one legend below."""
    for axis in axes.flat:
        ks = sorted({int(k) for line in axis.lines for k in line.get_xdata()})
        axis.set_xscale("log")
        axis.set_xticks(ks, [str(k) for k in ks], minor=False)
        axis.minorticks_off()
        low, high = axis.get_ylim()
        if axis.get_yscale() == "log" and high < 300 * low:  # the powers of ten would be one number, or none
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
    for axis in [*axes.flat, *(axis for row in also for axis in row)]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.6)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


if __name__ == "__main__":
    given = tyro.cli(Options)
    for path in write(Record(given.record), given.out):
        print(f"wrote {path}")
