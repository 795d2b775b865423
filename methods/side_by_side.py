"""Finished runs on one page, in Markdown and in HTML: which modules, what budget, what accuracy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from methods import files, histories, side_by_side_page
from methods.causes import sentence
from methods.configuration import FILE
from methods.figures import pyplot, save
from methods.pages import UNITS
from methods.ranges import finite
from methods.runfolder import CONFIG, RunFolder, read_json


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """Put finished runs side by side, in report.md and in report.html.

    Attributes:
      runs: run folders of any method.
      out: folder of the pages.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    out: Path = Path("runs/report")


FIGURE = "side_by_side.png"


class Row(NamedTuple):
    """One trained model of one run: what `results/<arm>.json` holds, and where it comes from.

    Attributes:
      run: the name of its folder.
      arm: its own name.
      config: the settings of the run.
      result: what it is worth.
      method: the command that made the run; "" where that is not known.
      path: the folder; None where that does not matter.
    """

    run: str
    arm: str
    config: dict[str, Any]
    result: dict[str, Any]
    method: str = ""
    path: Path | None = None

    @property
    def worth(self) -> tuple[str, float]:
        """The first metric and its value; accuracy where a result names no metrics."""
        for name, value in (self.result.get("metrics") or {}).items():
            return name, float(value)
        return "accuracy", float((self.result.get("accuracy") or {"value": float("nan")})["value"])


class Read(NamedTuple):
    """What was found in run folders.

    Attributes:
      rows: every finished model, run by run.
      left_out: a sentence for each folder, or file in it, that gives none.
      unfinished: runs whose own page is not written yet, so that models may be missing.
    """

    rows: list[Row]
    left_out: list[str]
    unfinished: list[Path]


def read(runs: Sequence[Path]) -> Read:
    """The finished models of runs; what is unfinished, damaged or no run is named, and holds nothing else up.

    Raises:
      ValueError: for no run, or if none has a finished model.
    """
    if not runs:
        raise ValueError("Nothing to put side by side: name one or more run folders.")
    found = Read([], [], [])
    for run, name in zip(runs, _names(runs), strict=True):
        try:
            if not (run / CONFIG).is_file():
                raise ValueError(f"{run} is no run: it has no {CONFIG}.")
            config, results = _config(run / CONFIG), _results(run)
        except (ValueError, OSError) as error:
            found.left_out.append(sentence(error) or str(error))
            continue
        if not (run / "report.md").is_file():
            found.unfinished.append(run)
        for file in results:
            try:
                found.rows.append(Row(name, file.stem, config, _result(file), _method(run), run))
            except (ValueError, OSError) as error:
                found.left_out.append(sentence(error) or str(error))
    if not found.rows:
        raise ValueError("; ".join(found.left_out))
    # Of one task and model together, the best first; rows that are equally good stay in the order of their runs.
    order = sorted(found.rows, key=lambda row: (row.config["task"], row.config["model"], _rank(row)))
    return found._replace(rows=order)


def _names(runs: Sequence[Path]) -> list[str]:
    """The name of each folder; of folders with the same name, where they are."""
    names = [run.absolute().name for run in runs]
    return [name if names.count(name) == 1 else str(run) for run, name in zip(runs, names, strict=True)]


def _rank(row: Row) -> float:
    """Less is better."""
    name, value = row.worth
    if not np.isfinite(value):
        return np.inf
    return value if name in UNITS else -value


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
    results = sorted(file for file in (run / "results").glob("*.json") if not file.name.startswith("."))
    if not results:
        raise ValueError(f"{run} has no finished model yet: continue it with the command that began it.")
    return results


def _config(file: Path) -> dict[str, Any]:
    config = read_json(file)
    if not isinstance(config, dict) or not all(isinstance(config.get(name), str) for name in ("model", "task")):
        raise ValueError(f"{file} is of no run of this program: it names no model and no task.")
    return config


def _result(file: Path) -> dict[str, Any]:
    """A result, all of which that the page shows is what it should be."""
    result = read_json(file)
    if not isinstance(result, dict) or not isinstance(result.get("parameters"), int):
        raise ValueError(f"{file} is no result of this program: it counts no parameters.")
    score, metrics, on = (result.get(name) for name in ("accuracy", "metrics", "on"))
    parts = ("value", "low", "high", "correct", "total")
    if score is not None and not (isinstance(score, Mapping) and all(finite(score.get(name)) for name in parts)):
        raise ValueError(f"{file} is no result of this program: its accuracy lacks one of {', '.join(parts)}.")
    if metrics is not None and not (
        isinstance(metrics, Mapping) and all(isinstance(value, (int, float)) for value in metrics.values())
    ):
        raise ValueError(f"{file} is no result of this program: its metrics are no numbers.")
    if on is not None and not (
        isinstance(on, Mapping) and all(isinstance(each, list) and all(map(finite, each)) for each in on.values())
    ):
        raise ValueError(f"{file} is no result of this program: its modules are no lists of numbers.")
    return result


def table(rows: list[Row]) -> str:
    """Markdown: a line a model."""
    lines = [
        "| run | method | model | base | task | adapter parameters | accuracy | 95 % interval | right |",
        "|---|---|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        score = row.result.get("accuracy")
        names = row.run, row.method, row.arm, Path(row.config["model"]).name, row.config["task"]
        cells = [" ".join(name.replace("|", r"\|").split()) for name in names] + [f"{row.result['parameters']:,}"]
        if score is None or row.worth[0] in UNITS:  # a regression has no accuracy, and texts are rarely exact
            metrics = "; ".join(f"{name} {value:.3f}" for name, value in row.result.get("metrics", {}).items())
            cells += [metrics, "", ""]
        else:
            cells += [f"{100 * score['value']:.1f} %", f"{100 * score['low']:.1f} to {100 * score['high']:.1f} %"]
            cells += [f"{score['correct']}/{score['total']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


MEANS = ("method", "model", "task", "seeds", "metric", "mean", "standard deviation")
"""Titles of `means`."""


def groups_over_seeds(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each model that runs have which differ in their seed alone."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        other = {name: value for name, value in row.config.items() if name != "seed"}
        groups.setdefault((row.method, row.arm, json.dumps(other, sort_keys=True, default=str)), []).append(row)
    return [group for group in groups.values() if len({row.config.get("seed") for row in group}) > 1]


def means(several: Sequence[Sequence[Row]]) -> list[list[str]]:
    """A line of cells for each model, as `MEANS` says."""
    lines = []
    for group in several:
        name, values = group[0].worth[0], np.array([row.worth[1] for row in group])
        first, times = group[0], 1 if name in UNITS else 100
        unit = "" if name in UNITS else " %"
        told = [f"{times * value:.{3 if name in UNITS else 1}f}{unit}" for value in (values.mean(), values.std(ddof=1))]
        lines.append([first.method, first.arm, first.config["task"], str(len(group)), name, *told])
    return lines


def over_seeds(rows: Sequence[Row]) -> str:
    """Markdown: `means`; "" where no two runs differ in their seed alone."""
    several = groups_over_seeds(rows)
    if not several:
        return ""
    lines = [f"| {' | '.join(MEANS)} |", "|---|---|---|---:|---|---:|---:|"]
    lines += [f"| {' | '.join(cell.replace('|', ' ') for cell in cells)} |" for cells in means(several)]
    return "Means over seeds, of runs that differ in nothing else:\n\n" + "\n".join(lines) + "\n"


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


def figure(file: Path, rows: list[Row]) -> None:
    """Modules in use, a line a model; beside it accuracy with its interval, and the parameters."""
    with pyplot().rc_context({"text.parse_math": False}):  # names of folders may hold any letter
        _draw(file, rows)


def _draw(file: Path, rows: list[Row]) -> None:
    plt = pyplot()
    names, shares = modules(rows)
    height = 1.4 + 0.3 * len(rows)
    fig, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, height), width_ratios=[3, 1.6, 1], sharey=True, layout="constrained"
    )
    places = np.arange(len(rows))
    if names:
        left.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        sites = list(dict.fromkeys(name.split(".", 1)[1] for name in names))
        starts = [next(i for i, name in enumerate(names) if name.endswith(f".{site}")) for site in sites]
        for start in starts[1:]:
            left.axvline(start - 0.5, color="0.3", lw=0.8)
        ends = [*starts[1:], len(names)]
        left.set_xticks([(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)], sites, fontsize=8)
    left.set(title="modules in use, by depth")
    left.set_yticks(places, [f"{row.run}: {row.arm}" for row in rows], fontsize=8)
    for place, row in enumerate(rows):
        if (score := row.result.get("accuracy")) is not None:
            low, high = score["value"] - score["low"], score["high"] - score["value"]
            error = 100 * np.array([[low], [high]])
            middle.errorbar(100 * score["value"], place, xerr=error, fmt="o", color="#2a6f97", ms=4, capsize=2)
    middle.set(title="accuracy, %")
    right.barh(places, [row.result["parameters"] for row in rows], color="#d0d5da")
    right.set(title="adapter parameters")
    right.ticklabel_format(axis="x", style="sci", scilimits=(0, 3))
    for ax in (middle, right):
        ax.spines[["top", "right"]].set_visible(False)
    save(fig, file, dpi=130)


def of_run(folder: RunFolder, results: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """`figure` of one run, whose results are read already; its file's name and a caption."""
    figure(folder.path / "figures" / FIGURE, [Row(folder.path.name, arm, {}, row) for arm, row in results.items()])
    return {FIGURE: "modules in use, accuracy, parameters"}


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
    rows, left_out, unfinished = read(settings.runs)
    figure(settings.out / "figures" / FIGURE, rows)
    words = f"""# Side by side

{table(rows)}

{over_seeds(rows)}
![modules, accuracy, parameters](figures/{FIGURE})

Intervals are Wilson's 95 % binomial intervals. Runs of one task, seed and `--test-rows` share test rows.
"""
    if unfinished:
        words += f"\nNot finished yet, so that models may be missing: {', '.join(map(str, unfinished))}.\n"
    if left_out:
        words += "\nLeft out:\n\n" + "".join(f"- {sentence}\n" for sentence in left_out)
    files.write_text(settings.out / "report.md", words)
    named = zip(settings.runs, _names(settings.runs), strict=True)
    told = [histories.read(run, name) for run, name in named if (run / CONFIG).is_file()]
    several = groups_over_seeds(rows)
    found = Read(rows, left_out, unfinished)
    page = side_by_side_page.page(found, told, several, (MEANS, means(several)))
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

    def main(self, settings: ReportSettings, command: str = "") -> Reported:
        """As the module's `main`."""
        del command
        return main(settings)


COMMAND = Report(ReportSettings, {"demo": {}})
