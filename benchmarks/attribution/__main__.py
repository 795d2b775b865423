"""How well influences foretell trainings: linear datamodeling scores, the smoothness that predicts them, and selection.

    python -m benchmarks.attribution                 # all of it, then docs/attribution-benchmark.md
    python -m benchmarks.attribution --only mnist    # one of "mnist", "text", "selection", "bergson"
    python -m benchmarks.attribution --only bergson --python PATH    # beside bergson, which the interpreter PATH has

Every row goes to the record as soon as it is there, and is not computed again: the command goes on where it was.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import bilevel
from benchmarks.attribution import beside_bergson, report
from benchmarks.attribution.cases import CASES, EVERY_SCORE, Setting
from benchmarks.attribution.selection import SEEDS, SELECTIONS, selected
from benchmarks.record import Record, Row, machine
from methods.attribution import SCORES, Training
from methods.datamodeling import datamodeling_score, subsets

ALWAYS = "unrolled", "gradient-product", "tracin"
SUBSETS, SHARE = 50, 0.5
STEP = 0.5
"""Of the smoothness: the standard deviation of a weight that is 0 or 1 with equal odds."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Attributes:
    only: parts to run, by name; all if empty.
    out: the record.
    docs: folder of the page.
    python: an interpreter that has bergson; without one, that part is left out. See `beside_bergson`.
    """

    only: tuple[str, ...] = ()
    out: Path = report.RECORD
    docs: Path = report.DOCS
    python: str = sys.executable


def measure(case: str, setting: Setting, record: Record) -> Iterator[Row]:
    """Linear datamodeling scores and the smoothness of one setting."""
    done = {row["score"] for row in record.find(section="lds", case=case, setting=setting.name)}
    names = [name for name in (SCORES if setting.name == EVERY_SCORE.get(case) else ALWAYS) if name != "replay"]
    missing = [name for name in names if name not in done]
    training = CASES[case][0](setting)
    if not record.find(section="smoothness", case=case, setting=setting.name):
        yield {"section": "smoothness", "case": case, "setting": setting.name} | smoothness(training)
    if not missing:
        return
    kept = subsets(SUBSETS, len(training.data.arrays.number), SHARE)
    losses = np.stack([training.answers_without(~each) for each in kept])
    for name in missing:
        begun = time.perf_counter()
        row = {"section": "lds", "case": case, "setting": setting.name, "score": name}
        scores = SCORES[name](training)
        if np.isfinite(scores).all():
            found = datamodeling_score(scores, kept, losses)
            row |= {"value": found.value, "low": found.low, "high": found.high, "each": found.each.tolist()}
        else:
            row["value"] = None  # told on the page
        yield row | {"seconds": time.perf_counter() - begun, "subsets": SUBSETS, "share": SHARE}


def smoothness(training: Training) -> Row:
    """Of the training at steps as large as those to a subset."""
    found = bilevel.smoothness(
        training.problem,
        bilevel.Unrolled(training.optimizer, training.steps, checkpoint="auto"),
        inner_data=training.data,
        outer_data=bilevel.FullBatch(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), training.questions)),
        step=STEP,
        directions=3,
    )
    return {"score": found.score, "error": found.error, "step": STEP}


def main(options: Options) -> None:
    """Measures what is missing, then writes the page."""
    record = Record(options.out)
    if not record.rows:
        record.add([machine()])
    jobs: list[tuple[str, Any]] = []
    for case, (_, settings) in CASES.items():
        jobs += [(f"{case}, {setting.name}", (case, setting)) for setting in settings if wanted(options, case)]
    if wanted(options, "selection"):
        jobs += [(f"selection, {name}, seed {seed}", (name, seed)) for name in SELECTIONS for seed in range(SEEDS)]
    if wanted(options, beside_bergson.SECTION):
        if (sentence := beside_bergson.missing(options.python)) is not None:
            print(sentence, flush=True)
        else:
            jobs += [(f"beside bergson, {m}, {k} steps", (m, k)) for m, k in beside_bergson.JOBS]
    begun = time.perf_counter()
    for number, (title, job) in enumerate(jobs):
        if job in beside_bergson.JOBS:
            rows = beside_bergson.measured(*job, record, options.python)
        else:
            rows = (selected if job[0] in SELECTIONS else measure)(*job, record)
        for row in rows:
            record.add([row])
        passed = time.perf_counter() - begun
        left = passed / (number + 1) * (len(jobs) - number - 1)
        print(f"{number + 1}/{len(jobs)} {title}: {passed:.0f} s, about {left:.0f} s left", flush=True)
    report.write(record, options.docs)


def wanted(options: Options, part: str) -> bool:
    """Whether that part was asked for."""
    return not options.only or part in options.only


if __name__ == "__main__":
    main(tyro.cli(Options))
