"""Hypergradients measured: every estimator against K, other libraries side by side, and a transformer.

    python -m benchmarks.hypergradients [--quick] [--minutes 10] [--sections peers]

Rows go to `--record`; what is there is not measured again, so a run that was stopped is continued by the same command.
At the end the page of tables and its figures are written to `--out` (`report`). `README.md` says what is measured and
how other libraries are installed; one that is not here is named and left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from benchmarks.hypergradients import estimators, report, side_by_side
from benchmarks.hypergradients.measure import relative_error
from benchmarks.record import Record, Row, machine

Job = dict[str, Any]

SECTIONS = ("estimators", "peers", "transformer", "depth")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      sections: of estimators, peers, transformer, depth.
      steps: K of the estimators. peer_steps: of the other libraries.
      repeats: timing rounds; the least time counts.
      seconds: an estimator whose call would take longer at the next K, going by the last, is left out there.
      gigabytes: and so is one whose temporary memory would be larger.
      minutes: begin no job after so many; None for no end.
      model: a pretrained model (GGUF, folder or hub name) to measure as well.
      quick: a small K, small transformers, one timing round: does it run?
      record: the rows; out: where page and figures go.
    """

    sections: tuple[str, ...] = SECTIONS
    steps: tuple[int, ...] = (4, 64, 1024)
    peer_steps: tuple[int, ...] = (64, 256)
    repeats: int = 3
    seconds: float = 5.0
    gigabytes: float = 3.0
    minutes: float | None = None
    model: str | None = None
    quick: bool = False
    record: Path = Path("runs/hypergradients/record.jsonl")
    out: Path = Path("runs/hypergradients")

    def __post_init__(self):
        unknown = set(self.sections) - set(SECTIONS)
        if unknown:
            raise ValueError(f"sections: {', '.join(unknown)} is not one of {', '.join(SECTIONS)}.")


def jobs(options: Options, record: Record) -> Iterator[Job]:
    """What is to be measured and not in the record, each in a process of its own."""
    repeats = options.repeats
    if "estimators" in options.sections:
        for problem in estimators.PROBLEMS:
            for steps in options.steps:
                job = {"section": "estimators", "problem": problem, "steps": steps}
                if not record.find(**job):
                    yield job | {"skip": _too_large(options, record, problem, steps), "repeats": repeats}
    if "peers" in options.sections:
        lengths = options.peer_steps
        for problem, steps in [*(("data weighting", k) for k in lengths), ("transformer", lengths[0])]:
            for name, contender in side_by_side.CONTENDERS.items():
                job = {"section": "peers", "problem": problem, "steps": steps, "name": name}
                possible = side_by_side.installed(contender) and side_by_side.can_solve(contender, problem)
                if possible and not record.find(**job):
                    yield job | {"repeats": repeats}
        # Whether they agree is seen in few steps, before the training amplifies rounding.
        for problem in ("quadratic", "data weighting", "transformer"):
            job = {"section": "agreement", "problem": problem, "steps": 16}
            if not record.find(**job):
                yield job
    if "transformer" in options.sections and not record.find(section="transformer"):
        size = {"blocks": 2, "width": 32, "tokens": 16} if options.quick else {}
        yield {"section": "transformer", "repeats": repeats, **size}
    if "depth" in options.sections and not record.find(section="depth"):
        yield {"section": "depth", **({"depths": (1, 2)} if options.quick else {})}
    if options.model and not record.find(section="pretrained"):
        yield {"section": "pretrained", "model": options.model, "repeats": 1}


def _too_large(options: Options, record: Record, problem: str, steps: int) -> list[str]:
    """Estimators that would take too long or too much memory, going by the largest K that was measured."""
    before = [k for k in options.steps if k < steps]
    if not before:
        return []
    rows = record.find(section="estimators", problem=problem, steps=before[-1])
    growth = steps / before[-1]
    return [
        row["name"]
        for row in rows
        if row["name"] not in ("training", estimators.REFERENCE)
        and (
            "left_out" in row
            or row.get("seconds", 0.0) * growth > options.seconds
            or row.get("temporary", 0) * growth > 1e9 * options.gigabytes
        )
    ]


def run(job: Job, record: Record) -> list[Row]:
    """The rows of a job, run in a process of its own; one that fails gives a row that says so."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.hypergradients.work", json.dumps(job)]
    try:
        # Unfiltered, so that the last line of a traceback is the error and not a remark on filtering.
        environment = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        message = (
            done.stderr.strip().splitlines()[-1][:300] if done.returncode and done.stderr.strip() else "no message"
        )
    except subprocess.TimeoutExpired:
        done, message = None, "no answer in 900 seconds"
    label = {k: job[k] for k in ("section", "problem", "steps") if k in job}
    if done is None or done.returncode:
        return [label | {"name": job.get("name", "all"), "failed": message}]
    rows = [label | json.loads(line) for line in done.stdout.splitlines()]
    rows += [
        label | {"name": name, "left_out": "by its time or memory at the K before"} for name in job.get("skip", [])
    ]
    if job["section"] == "peers":
        _compare(rows[0], label, record)
    return rows


def _compare(row: Row, label: Row, record: Record) -> None:
    """Sets the error against the reference's hypergradient, the only one that is kept."""
    if row["name"] == side_by_side.REFERENCE:
        return
    reference = record.one(**label, name=side_by_side.REFERENCE)
    grad = row.pop("grad")
    if reference is not None:
        row["error"] = relative_error(grad, reference["grad"])


def main(options: Options) -> None:
    if options.quick:
        options = dataclasses.replace(options, steps=(4, 8), peer_steps=(4,), repeats=1)
    console, record, begun = Console(), Record(options.record), time.monotonic()
    missing = sorted({c.file for c in side_by_side.CONTENDERS.values() if not side_by_side.installed(c)})
    if missing and "peers" in options.sections:
        console.print(f"Not installed, so left out: {', '.join(missing)} (benchmarks/hypergradients/README.md).")
    if not record.find(section="machine"):
        record.add([machine()])
    while (job := next(jobs(options, record), None)) is not None:
        if options.minutes is not None and time.monotonic() - begun > 60 * options.minutes:
            console.print("Time is up; the same command goes on from here.")
            break
        rows = run(job, record)
        record.add(rows)
        for row in rows:
            console.print(report.line(row))
    for path in report.write(record, options.out):
        console.print(f"wrote {path}")


if __name__ == "__main__":
    main(tyro.cli(Options))
