"""Finished runs on one page: which modules, what budget, what accuracy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from methods.report import pyplot


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """Put finished runs side by side: a table and a figure.

    Attributes:
      runs: run folders of any method.
      out: folder of the page.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    out: Path = Path("runs/report")


PRESETS: dict[str, dict[str, Any]] = {"demo": {}}


class Row(NamedTuple):
    """One trained model of one run: what `results/<arm>.json` holds, and where it comes from."""

    run: str
    arm: str
    config: dict[str, Any]
    result: dict[str, Any]


def read(runs: tuple[Path, ...]) -> list[Row]:
    """Every finished model of every run, in their order.

    Raises:
      ValueError: for no run, or one without a finished model, or a damaged file.
      FileNotFoundError: for a folder that is no run.
    """
    if not runs:
        raise ValueError("Nothing to put side by side: name one or more run folders.")
    rows = []
    for run in runs:
        if not (run / "config.json").is_file():
            raise FileNotFoundError(f"{run} is no run: it has no config.json.")
        config, files = _read(run / "config.json"), sorted((run / "results").glob("*.json"))
        if not files:
            raise ValueError(f"{run} has no finished model yet: continue it with the command that began it.")
        rows += [Row(run.name, file.stem, config, _read(file)) for file in files]
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: a line a model."""
    lines = [
        "| run | model | base | task | adapter parameters | accuracy | 95 % interval | right |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        score = row.result.get("accuracy")
        cells = [row.run, row.arm, Path(row.config["model"]).name, row.config["task"], f"{row.result['parameters']:,}"]
        if score is None:  # a regression has no accuracy
            metrics = "; ".join(f"{name} {value:.3f}" for name, value in row.result.get("metrics", {}).items())
            cells += [metrics, "", ""]
        else:
            cells += [f"{100 * score['value']:.1f} %", f"{100 * score['low']:.1f} to {100 * score['high']:.1f} %"]
            cells += [f"{score['correct']}/{score['total']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
    fig.savefig(file, dpi=130)
    plt.close(fig)


def page(folder: Path, runs: tuple[Path, ...], title: str, text: str) -> None:
    """`report.md` and `figures/side_by_side.png` of some runs, in `folder`.

    Raises:
      ValueError, FileNotFoundError: as `read`.
    """
    rows = read(runs)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    figure(folder / "figures" / "side_by_side.png", rows)
    words = f"# {title}\n\n{table(rows)}\n\n![modules, accuracy, parameters](figures/side_by_side.png)\n\n{text}"
    (folder / "report.md").write_text(words, encoding="utf-8")


def main(settings: ReportSettings) -> None:
    """The page of `settings.runs`, in `settings.out`.

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong.
    """
    note = "Intervals are Wilson's 95 % binomial intervals. Runs of one task, seed and `--test-rows` share test rows.\n"
    page(settings.out, settings.runs, "Side by side", note)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged ({error}): make it again.") from None
