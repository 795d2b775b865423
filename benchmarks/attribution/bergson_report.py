"""The part of the attribution benchmark's page that stands beside bergson, from the record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from benchmarks.attribution.beside_bergson import JOBS, OURS, PEER, SECTION
from benchmarks.record import Record, Row

TITLES = {"llama": "Llama", "gpt2": "GPT-2"}


class Goal(NamedTuple):
    """Attributes:
    text: what is wanted.
    limit: what a number must not exceed, or must at least reach (`is_least`).
    of: a row of ours and bergson's of the same run -> the number; None where it was not measured.
    shown: how a number is written.
    is_least: whether more is better.
    """

    text: str
    limit: float
    of: Callable[[Row, Row], float | None]
    shown: Callable[[float], str]
    is_least: bool = False

    def is_met(self, number: float) -> bool:
        return number >= self.limit if self.is_least else number <= self.limit


def beyond(row: Row) -> int | None:
    """Bytes that the computation took beyond what the process held before it; None where no kernel told."""
    memory = row["memory"]
    return None if memory is None else memory["peak"] - memory["before"]


def in_all(row: Row) -> int | None:
    """Bytes that the process held at the peak of the computation; None where no kernel told."""
    return None if row["memory"] is None else row["memory"]["peak"]


def _share(of: Callable[[Row], int | None], own: Row, theirs: Row) -> float | None:
    ours, whole = of(own), of(theirs)
    return None if ours is None or whole is None else ours / whole


GOALS = (
    Goal("seconds, of bergson's", 0.5, lambda own, theirs: own["seconds"] / theirs["seconds"], "{:.2f}".format),
    Goal(
        "seconds of the processor, of bergson's",
        0.5,
        lambda own, theirs: own["processor_seconds"] / theirs["processor_seconds"],
        "{:.2f}".format,
    ),
    Goal("memory beyond what was there, of bergson's", 0.8, partial(_share, beyond), "{:.2f}".format),
    Goal("memory in all, of bergson's", 0.8, partial(_share, in_all), "{:.2f}".format),
    Goal(
        "correlation with bergson's scores",
        0.999,
        lambda own, theirs: 1 - own["correlation_below_1"],
        lambda number: _near_one(1 - number),
        is_least=True,
    ),
)


def section(record: Record) -> str:
    """In Markdown; empty where nothing was measured."""
    rows = record.find(section=SECTION)
    if not rows:
        return ""
    sizes, adam = rows[0]["sizes"], rows[0]["adam"]
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    first, second = adam["betas"]
    return f"""
## Beside bergson

`python -m benchmarks.attribution --only bergson --python PATH`, on {when}; PATH is an interpreter that has bergson.
Versions: {_versions(rows)}.

[bergson](https://github.com/EleutherAI/bergson) differentiates through training too (MAGIC, in torch). Both read the
same files: a model of {sizes["layers"]} layers of width {sizes["width"]} with random weights, all of them trained, and
the tokens of K batches, {sizes["batch"]} rows of {sizes["tokens"]} tokens each. Adam's rate is {adam["rate"]:g}, its
betas {first:g} and {second:g}, eps {adam["eps"]:g}, eps_root {adam["eps_root"]:g}; there is no weight decay. Everything
is float32 on one core, a process after the other. bergson keeps its checkpoints on the disk, by its schedule "sqrt".
`bilevel.Unrolled` has `checkpoint="sqrt"`, `bilevel.Replay` its defaults. Head and embedding are not tied: bergson
trains a tied matrix as two, and then its scores are those of another training.

Seconds are of the training and its derivative, the least where it was repeated; compiling is apart. Seconds of the
processor leave out what it did for other programs, and waiting for the disk. Memory is resident: *beyond* what the
process held before the computation, *in all* at its peak, and *earlier*, the peak of what came before: imports, and
compiling.

{_table(rows)}
{_left_out(rows)}
{_goals(rows)}
"""


def _left_out(rows: list[Row]) -> str:
    """A sentence on what is asked for and not measured, between empty lines."""
    there = {(row["model"], row["steps"]) for row in rows}
    names = [f"{TITLES[model]} at K = {steps}" for model, steps in JOBS if (model, steps) not in there]
    return f"\nNot measured: {', '.join(names)}.\n" if names else ""


def _versions(rows: list[Row]) -> str:
    found: dict[str, Any] = {}
    for row in rows:
        found |= row["versions"]
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))


def _table(rows: list[Row]) -> str:
    lines = [
        "| model | weights | K | computed by | seconds | of the processor | compiling "
        "| MB beyond | MB in all | MB earlier | 1 - correlation | 1 - cosine |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        compiling = f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "-"
        earlier = (row["memory"] or {}).get("earlier")
        memory = [_megabytes(count) for count in (beyond(row), in_all(row), earlier)]
        near = ["-"] * 2
        if row["side"] != PEER:
            near = [f"{row[k]:.0e}" for k in ("correlation_below_1", "cosine_below_1")]
        side = row["side"] if row["side"] == PEER else f"`{row['side']}`"
        cells = [TITLES[row["model"]], f"{row['weights']:,}", str(row["steps"]), side]
        cells += [f"{row[k]:.1f}" for k in ("seconds", "processor_seconds")]
        lines.append("| " + " | ".join([*cells, compiling, *memory, *near]) + " |")
    return "\n".join(lines)


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.0f}"


def _near_one(below: float) -> str:
    """A number that is `below` less than 1, with the nines it has."""
    digits = 3
    while digits < 12 and float(f"{1 - below:.{digits}f}") == 1 and below > 0:
        digits += 1
    return f"{1 - below:.{digits}f}"


def _goals(rows: list[Row]) -> str:
    lines = ["| wanted | computed by | measured | |", "|---|---|---|---|"]
    for each in judged(rows):
        word = "met" if each.met == each.count else f"met in {each.met} of {each.count}" if each.met else "missed"
        lines.append(f"| {each.wanted} | `{each.way}` | {each.measured} | {word} |")
    return "\n".join(lines)


class Judged(NamedTuple):
    """A goal, what it was computed by, what was measured, and in how many of the runs it was met."""

    wanted: str
    way: str
    measured: str
    met: int
    count: int


def judged(rows: list[Row]) -> Iterator[Judged]:
    """Every goal of which there is a measurement, for each way of ours."""
    for goal in GOALS:
        for way in OURS:
            numbers = list(_measured(goal, way, rows))
            if not numbers:
                continue
            wanted = f"{goal.text}: {'at least' if goal.is_least else 'at most'} {goal.limit:g}"
            each = "; ".join(f"{title} {goal.shown(number)}" for title, number in numbers)
            yield Judged(wanted, way, each, sum(goal.is_met(number) for _, number in numbers), len(numbers))


def _measured(goal: Goal, way: str, rows: list[Row]) -> Iterator[tuple[str, float]]:
    theirs = {(row["model"], row["steps"]): row for row in rows if row["side"] == PEER}
    for row in rows:
        of = row["model"], row["steps"]
        if row["side"] == way and of in theirs and (number := goal.of(row, theirs[of])) is not None:
            yield f"{TITLES[row['model']]}, K = {row['steps']}:", number
