"""The page of the attribution benchmark, from its record."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.attribution import bergson_report
from benchmarks.record import Record, Row
from methods import figures, files

RECORD = Path(__file__).with_name("record.jsonl")
DOCS = Path(__file__).parents[2] / "docs"
PAGE, FIGURE = "attribution-benchmark.md", "attribution-smoothness.png"
COLOURS = {"mnist": "#2a6f97", "text": "#c8553d"}
TITLES = {"mnist": "A network on MNIST", "text": "A small language model on text"}


def write(record: Record, docs: Path = DOCS) -> list[Path]:
    """The page and its figure; returns their paths."""
    draw(record, docs / "figures" / FIGURE)
    files.write_text(docs / PAGE, page(record))
    return [docs / "figures" / FIGURE, docs / PAGE]


def points(record: Record) -> list[tuple[str, str, float, float]]:
    """For each setting: case, name, smoothness, and linear datamodeling score of the unrolled influence."""
    found = []
    for row in record.find(section="smoothness"):
        of = {"case": row["case"], "setting": row["setting"]}
        lds = record.find(section="lds", score="unrolled", **of)
        if lds and lds[-1]["value"] is not None:
            found.append((row["case"], row["setting"], row["score"], lds[-1]["value"]))
    return found


def correlation(record: Record) -> tuple[float, int]:
    """Rank correlation of smoothness and linear datamodeling score over the settings, and their number."""
    from scipy.stats import spearmanr

    found = points(record)
    return float(spearmanr([p[2] for p in found], [p[3] for p in found]).statistic), len(found)


def draw(record: Record, file: Path) -> None:
    """Linear datamodeling score against smoothness, a dot a setting."""
    plt = figures.pyplot()
    fig, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    named: list[tuple[float, float]] = []
    for case, colour in COLOURS.items():
        found = [(smooth, lds, name) for of, name, smooth, lds in points(record) if of == case]
        if not found:
            continue
        ax.plot([p[0] for p in found], [p[1] for p in found], "o", color=colour, ms=6, label=TITLES[case])
        for smooth, lds, name in found:
            left = smooth > 0.6  # where there is no room on the right
            if any(abs(lds - y) < 0.035 and abs(smooth - x) < 0.3 for x, y in named):
                continue  # the table has all names
            named.append((smooth, lds))
            place = {"xytext": (-6 if left else 6, -3), "ha": "right" if left else "left"}
            ax.annotate(name, (smooth, lds), textcoords="offset points", fontsize=8, **place)
    ax.set(xlabel="smoothness of the training", ylabel="linear datamodeling score", ylim=(-0.15, 1.05))
    ax.axhline(0.95, color="black", lw=0.8, ls=":")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
    figures.save(fig, file)


def _cell(row: dict) -> str:
    if row["value"] is None:
        return "not finite"
    return f"{row['value']:.3f} ({row['low']:.2f} to {row['high']:.2f})"


def _settings(record: Record, case: str) -> str:
    lines = ["| setting | smoothness | through training | gradient product | TracIn |", "|---|---:|---:|---:|---:|"]
    for row in record.find(section="smoothness", case=case):
        of = {"section": "lds", "case": case, "setting": row["setting"]}
        cells = [found[-1] if (found := record.find(score=name, **of)) else None for name in _SHOWN]
        shown = " | ".join("-" if cell is None else _cell(cell) for cell in cells)
        lines.append(f"| {row['setting']} | {row['score']:.2f} | {shown} |")
    return "\n".join(lines)


_SHOWN = "unrolled", "gradient-product", "tracin"


def _scores(record: Record, case: str, setting: str) -> str:
    rows = record.find(section="lds", case=case, setting=setting)
    lines = ["| scores | linear datamodeling score (95 %) | seconds |", "|---|---:|---:|"]
    lines += [f"| {row['score']} | {_cell(row)} | {row['seconds']:.1f} |" for row in rows]
    return "\n".join(lines)


def _selection(record: Record) -> str:
    from benchmarks.attribution.selection import SELECTIONS

    rows = {name: record.find(section="selection", training=name) for name in SELECTIONS}
    rough = rows.pop("rough")
    rows = {name: found for name, found in rows.items() if found}
    if not rows:
        return ""
    titles = [f"{SELECTIONS[name].rows:,} rows, {SELECTIONS[name].clean:,} clean" for name in rows]
    lines = [f"| | {' | '.join(titles)} |", "|---" + "|---:" * len(rows) + "|"]
    for name, title in {"auroc": "AUROC of the weights found", "soba auroc": "AUROC of those by SOBA"}.items():
        lines.append(f"| {title} | {' | '.join(_spread(found, name, 1, 4) for found in rows.values())} |")
    for name, title in {"wrong": "rows with wrong labels", "wrong rows kept": "of them with a weight above 1"}.items():
        lines.append(f"| {title} | {' | '.join(_spread(found, name, 1, 0) for found in rows.values())} |")
    for name, title in _ARMS.items():
        lines.append(f"| test error, %: {title} | {' | '.join(_spread(f, name, 100, 2) for f in rows.values())} |")
    best = max(np.mean([row["auroc"] for row in found]) for found in rows.values())
    seeds = len(next(iter(rows.values())))
    return f"""
## Which rows to drop

Half of some images of MNIST have their labels drawn anew; others, all of them clean, validate. The weights of rows
descend through training from scratch by plain gradient descent at rate 0.3. The weights then tell rows with wrong
labels from the others: with the most clean rows AUROC {best:.3f} (goal: at least .99). Beside them SOBA on the same
rows and network, with the best of six pairs of steps by the validation loss. Means and standard deviations of {seeds}
seeds.

{chr(10).join(lines)}

Through a training that is rough (rate 0.5 with momentum 0.9, 2,000 rows) the same descent finds nothing: AUROC
{np.mean([row["auroc"] for row in rough]):.4f}.
"""


def _spread(rows: list[Row], name: str, times: float, digits: int) -> str:
    values = times * np.array([row[name] for row in rows])
    return f"{values.mean():,.{digits}f} ± {values.std():,.{digits}f}"


_ARMS = {
    "all rows": "all rows, half of them with labels drawn anew",
    "selected": "rows of weight above 1",
    "selected by soba": "the half with the larger weights by SOBA",
    "clean half": "the rows whose labels are right",
}


def page(record: Record) -> str:
    """The page in Markdown."""
    from benchmarks.attribution.cases import EVERY_SCORE

    rank, count = correlation(record)
    found = record.find(section="lds", score="unrolled")
    best = {case: max(row["value"] or 0 for row in found if row["case"] == case) for case in _cases(record)}
    parts = []
    for case in _cases(record):
        every = ""
        if (setting := EVERY_SCORE.get(case)) is not None:
            every = f"\nEvery score there is, in the setting *{setting}*:\n\n{_scores(record, case, setting)}\n"
        parts.append(f"## {TITLES[case]}\n\n{_settings(record, case)}\n{every}")
    headline = ", ".join(f"{TITLES[case].lower()}: {value:.3f}" for case, value in best.items())
    return f"""# Influence of training rows, measured

`python -m benchmarks.attribution` makes this page from its record; it goes on where it was stopped.

The *linear datamodeling score* trains a model anew on random halves of its rows, {found[0]["subsets"]} times. It is the
rank correlation of a question's loss with what the influences of the rows that were there add up to, the mean over 10
questions. 1: the influences foretell the order of all trainings. The intervals are by the bootstrap over trainings.

The smoothest settings reach the most: {headline}. Over {count} settings the rank correlation of this score with
`bilevel.smoothness` (at steps of {record.find(section="smoothness")[0]["step"]:g}) is {rank:.2f}.
In the figure a dot is a setting, and the dotted line a score of 0.95; all settings are named in the tables below.

![linear datamodeling score against smoothness](figures/{FIGURE})

{chr(10).join(parts)}{_selection(record)}{bergson_report.section(record)}"""


def _cases(record: Record) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in record.find(section="smoothness")))
