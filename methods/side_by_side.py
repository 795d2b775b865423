"""Finished runs on one page, in Markdown and in HTML: which modules, what budget, what accuracy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from methods import files, fingerprint, histories, results, side_by_side_page, units
from methods.causes import sentence
from methods.configuration import FILE
from methods.figures import drawable, pyplot, save
from methods.integrity import CONFIG, FINGERPRINT, FINISHED, read_json, writable
from methods.results import Read, Row
from methods.runfolder import FREE, RunFolder

_RUNS = tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """Put finished runs side by side, in report.md and in report.html.

    Attributes:
      runs: run folders of any method; one that is named twice counts once.
      out: folder of the pages.
    """

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], _RUNS]] = ()
    out: Path = Path("runs/report")


FIGURE = "side_by_side.png"
PLACES = ("model", "data", "test_data")
"""Settings that say where something lies that the fingerprint of a run tells by what it holds."""


def read(runs: Sequence[Path]) -> Read:
    """The finished models of runs; what is unfinished, damaged or no run is named, and holds nothing else up.

    Raises:
      ValueError: for no run, or if none has a finished model.
    """
    if not runs:
        raise ValueError("Nothing to put side by side: name one or more run folders.")
    found = Read([], [], [])
    for number, (run, name) in enumerate(zip(runs, _names(runs), strict=True)):
        try:
            if not (run / CONFIG).is_file():
                raise ValueError(f"{run} is no run: it has no {CONFIG}.")
            config, made = _config(run / CONFIG), _results(run)
        except (ValueError, OSError) as error:
            found.left_out.append(sentence(error) or str(error))
            continue
        if not (run / "report.md").is_file():
            found.unfinished.append(run)
        method, made_of = _method(run), _made_of(run, config)
        for at, file in enumerate(made):
            try:
                result = results.read(file)
                found.rows.append(Row(name, writable(file.stem), config, result, method, run, (number, at), made_of))
            except (ValueError, OSError) as error:
                found.left_out.append(sentence(error) or str(error))
    if not found.rows:
        raise ValueError(" ".join(found.left_out))
    # Of one task and model together, the best first; rows that are equally good stay in the order of their runs.
    order = sorted(found.rows, key=lambda row: (row.config["task"], row.config["model"], -_better(row)))
    return found._replace(rows=order)


def _names(runs: Sequence[Path]) -> list[str]:
    """The name of each folder; of folders with the same name, where they are."""
    names = [run.absolute().name for run in runs]
    return [name if names.count(name) == 1 else str(run) for run, name in zip(runs, names, strict=True)]


def _better(row: Row) -> float:
    name, value = row.worth
    return units.of(name).better(value)


def distinct(runs: Sequence[Path]) -> list[Path]:
    """The folders, each once, however often and in whatever words it is named."""
    found: dict[Path, Path] = {}
    for run in runs:
        found.setdefault(run.resolve(), run)
    return list(found.values())


def _method(run: Path) -> str:
    """The command that made a run, as its `config.yaml` tells."""
    file = run / FILE
    if not file.is_file():
        return ""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("command: "):
            return line.removeprefix("command: ").strip()[:40]
    return ""


def _results(run: Path) -> list[Path]:
    """The files of a run's models, in the order in which it trained them where that is known."""
    made = sorted(file for file in (run / "results").glob("*.json") if not file.name.startswith("."))
    if not made:
        raise ValueError(f"{run} has no finished model yet: continue it with the command that began it.")
    told = _told(run / f"{FINISHED}.json").get("arms")
    order = [str(name) for name in told] if isinstance(told, list) else []
    return sorted(made, key=lambda file: order.index(file.stem) if file.stem in order else len(order))


def _told(file: Path) -> dict[str, Any]:
    """What a file holds; {} where it is not there, or damaged."""
    try:
        told = read_json(file)
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _made_of(run: Path, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """As `Row.made_of`: what was read, versions, and settings."""
    told = _told(run / FINGERPRINT)
    if fingerprint.damaged(told):
        return None
    found = told.get("found")
    read_ = fingerprint.but_for_the_seed(told)
    used = {name: value for name, value in config.items() if name not in ("seed", *FREE, *PLACES)}
    asked = {name: value for name, value in used.items() if not isinstance(found, list) or name not in found}
    one, other = (json.dumps([each, read_], sort_keys=True, default=str) for each in (asked, used))
    return one, other


def _config(file: Path) -> dict[str, Any]:
    config = read_json(file)
    if not isinstance(config, dict) or not all(isinstance(config.get(name), str) for name in ("model", "task")):
        raise ValueError(f"{file} is of no run of this program: it names no model and no task.")
    return config


def markdown(shown: results.Table) -> str:
    """A table in Markdown, with its notes."""
    rule = "|".join("---:" if i in shown.numbers else "---" for i in range(len(shown.titles)))
    return "\n".join([_line(shown.titles), f"|{rule}|", *map(_line, shown.rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |"


MEANS = ("method", "model", "task", "seeds", "metric", "mean", "standard deviation")
"""Titles of `means`."""


def groups_over_seeds(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each model that runs have which differ in their seed alone; a seed counts once, by the first run.

    What a run was made of decides, `Row.made_of`: the same was asked for, or the same was used, as when a run repeats
    the `config.yaml` of another. A run that does not tell is in no group, and runs that share no metric are none.
    """
    groups: list[dict[str, Row]] = []
    for row in sorted(rows, key=lambda row: row.place):  # not the best of a seed, but the one that was named first
        if row.made_of is None:
            continue
        group = next((group for group in groups if _is_alike(row, next(iter(group.values())))), None)
        if group is None:
            groups.append(group := {})
        group.setdefault(_seed(row), row)
    kept = [each for group in groups if len(each := list(group.values())) > 1 and metric_of(each)]
    return sorted(kept, key=lambda group: min(rows.index(row) for row in group))


def _is_alike(one: Row, other: Row) -> bool:
    if one.made_of is None or other.made_of is None or (one.method, one.arm) != (other.method, other.arm):
        return False
    return any(a == b for a, b in zip(one.made_of, other.made_of, strict=True))


def metric_of(group: Sequence[Row]) -> str | None:
    """The metric that ranks the first of some rows, and that all of them have, in whatever order; None for none."""
    return next((name for name in group[0].metrics if all(name in row.metrics for row in group)), None)


def _seed(row: Row) -> str:
    """The seed of a run, however its file writes the number."""
    seed: Any = row.config.get("seed")
    try:
        number = float(seed)
    except (TypeError, ValueError, OverflowError):
        return json.dumps(seed, default=str)
    return str(int(number)) if number.is_integer() else str(seed)


def means(several: Sequence[Sequence[Row]]) -> list[list[str]]:
    """A line of cells for each model, as `MEANS` says."""
    lines = []
    for group in several:
        first, name = group[0], metric_of(group) or ""
        values = np.array([row.metrics[name] for row in group])
        told = [units.of(name).alone(float(value)) for value in (values.mean(), values.std(ddof=1))]
        lines.append([first.method, first.arm, first.config["task"], str(len(group)), name, *told])
    return lines


OVER_SEEDS = (
    "Over runs whose rows, model files, versions and settings are the same but for the seed. Of several runs with one "
    "seed the first counts."
)


def over_seeds(rows: Sequence[Row]) -> str:
    """Markdown: `means`; "" where no two runs differ in their seed alone."""
    several = groups_over_seeds(rows)
    if not several:
        return ""
    shown = results.Table(list(MEANS), means(several), [3, 5, 6], [])
    return f"## Means over seeds\n\n{markdown(shown)}\n\n{OVER_SEEDS}\n"


def modules(rows: list[Row]) -> tuple[list[str], np.ndarray]:
    """Names of all modules, and how much of each a model has on, `[models, modules]`; NaN where it does not say."""
    counts: dict[str, int] = {}
    for row in rows:
        for site, on in row.result.get("on", {}).items():
            counts[site] = max(counts.get(site, 0), len(on))
    names = [f"{layer}.{site}" for site, count in counts.items() for layer in range(count)]
    shares = np.full((len(rows), len(names)), np.nan)
    for place, row in enumerate(rows):
        first = 0
        for site, count in counts.items():
            on = row.result.get("on", {}).get(site, [])
            if row.result.get("on") is not None:
                shares[place, first : first + count] = 0.0
            shares[place, first : first + len(on)] = on
            first += count
    return names, shares


def figure(file: Path, rows: list[Row]) -> list[str]:
    """A line a model: modules in use, the metrics that rank, with their intervals, and parameters. What was drawn."""
    with pyplot().rc_context({"text.parse_math": False}):  # names of folders may hold any letter
        return _draw(file, rows)


def _draw(file: Path, rows: list[Row]) -> list[str]:
    plt = pyplot()
    names, shares = modules(rows)
    ranking = list(dict.fromkeys(row.worth[0] for row in rows if np.isfinite(drawable(row.worth[1]))))
    drawn = ["modules in use"] * bool(names) + ranking + ["parameters"]
    widths = [3.0] * bool(names) + [1.6] * len(ranking) + [1.0]
    size = 3.0 + 1.4 * sum(widths), 1.4 + 0.3 * len(rows)
    fig, axes = plt.subplots(
        1, len(drawn), figsize=size, width_ratios=widths, sharey=True, layout="constrained", squeeze=False
    )
    axes, places = list(axes[0]), np.arange(len(rows))
    axes[0].set_yticks(places, [f"{row.run}: {row.arm}" for row in rows], fontsize=8)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)  # from the first down
    if names:
        _draw_modules(axes.pop(0), names, shares)
    for metric, ax in zip(ranking, axes, strict=False):
        _draw_worth(ax, metric, rows)
    right = axes[-1]
    right.barh(places, [row.result["parameters"] for row in rows], color="#d0d5da")
    right.set(title="adapter parameters")
    right.ticklabel_format(axis="x", style="sci", scilimits=(0, 3))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    save(fig, file, dpi=130)
    return drawn


def _draw_modules(ax: Any, names: list[str], shares: np.ndarray) -> None:
    ax.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    sites = list(dict.fromkeys(name.split(".", 1)[1] for name in names))
    starts = [next(i for i, name in enumerate(names) if name.endswith(f".{site}")) for site in sites]
    for start in starts[1:]:
        ax.axvline(start - 0.5, color="0.3", lw=0.8)
    ends = [*starts[1:], len(names)]
    ax.set_xticks([(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)], sites, fontsize=8)
    ax.set(title="modules in use, by depth")


def _draw_worth(ax: Any, metric: str, rows: list[Row]) -> None:
    """The models that a metric ranks, with the interval where it is of that metric."""
    times = units.of(metric).times
    for place, row in enumerate(rows):
        name, value = row.worth
        if name != metric or not np.isfinite(drawable(value)):
            continue
        error = units.ends(row.result) if units.share_of(row.result) == metric else None
        ax.errorbar(times * value, place, xerr=error, fmt="o", color="#2a6f97", ms=4, capsize=2)
    ax.set(title=units.axis(metric))


def of_run(folder: RunFolder, made: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """`figure` of one run, whose results are read already; its file's name and a caption."""
    rows = [Row(folder.path.name, arm, {}, row) for arm, row in made.items()]
    return {FIGURE: ", ".join(figure(folder.path / "figures" / FIGURE, rows))}


class Reported(NamedTuple):
    """What was reported: the models, and a sentence on what was left out; None where nothing was."""

    rows: list[Row]
    left_out: str | None


def main(settings: ReportSettings) -> Reported:
    """`report.md` with a figure, and `report.html`, of `settings.runs`, in `settings.out`.

    Raises:
      ValueError: one sentence on what is wrong; and as `read`.
    """
    files.check_writable(settings.out)
    if (settings.out / CONFIG).exists():
        raise ValueError(f"{settings.out} is a run, whose own report.md this would replace: name another --out.")
    runs = distinct(settings.runs)
    rows, left_out, unfinished = found = read(runs)
    drawn, shown = figure(settings.out / "figures" / FIGURE, rows), results.table(rows)
    parts = ["# Side by side", markdown(shown), *shown.notes, over_seeds(rows).rstrip()]
    parts.append(f"![{', '.join(drawn)}](figures/{FIGURE})")
    if unfinished:
        parts.append(f"Not finished yet, so that models may be missing: {', '.join(map(str, unfinished))}.")
    if left_out:
        parts.append("Left out:\n\n" + "\n".join(f"- {sentence}" for sentence in left_out))
    files.write_text(settings.out / "report.md", "\n\n".join(part for part in parts if part) + "\n")
    named = zip(runs, _names(runs), strict=True)
    told = [histories.read(run, name) for run, name in named if (run / CONFIG).is_file()]
    several = groups_over_seeds(rows)
    page = side_by_side_page.page(found, told, several, (MEANS, means(several), OVER_SEEDS))
    files.write_text(settings.out / "report.html", page)
    return Reported(rows, f"{settings.out / 'report.md'} leaves out: {' '.join(left_out)}" if left_out else None)


class Report(NamedTuple):
    """The command that reads runs instead of making one."""

    settings: type[ReportSettings]
    presets: Mapping[str, Mapping[str, Any]]

    def unused(self, settings: ReportSettings) -> dict[str, str]:
        """No option is without effect."""
        del settings
        return {}

    def main(self, settings: ReportSettings) -> Reported:
        """As the module's `main`."""
        return main(settings)


COMMAND = Report(ReportSettings, {"demo": {}})
