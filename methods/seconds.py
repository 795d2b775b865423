"""How long the steps of each stage of a run took: `seconds.csv` of its folder.

A line holds a stage, the first and the last step that it is of, and the seconds that these took, compilation included.
A run that goes on from before some steps comes by them again: what is written later of a step counts, as `read` adds
up. A finished run has a line a stage.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from methods import files

FILE = "seconds.csv"
TITLES = "stage,first,last,seconds\n"


class Clock:
    """A callback of `bilevel.run` that adds a line for each of its calls.

    The seconds of a line are those since the call before, or since the clock was made.

    Args:
      path: the folder of the run.
      stage: what the steps are called.
    """

    def __init__(self, path: Path, stage: str):
        self._file, self._stage, self._last = path / FILE, stage, time.perf_counter()

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        before, self._last = self._last, time.perf_counter()
        line = _line(self._stage, step - len(next(iter(metrics.values()))) + 1, step, self._last - before)
        head = "" if self._file.exists() else TITLES
        files.append(self._file, (head + line).encode(), synced=False)  # at every step, and nothing depends on it


def read(file: Path) -> dict[str, float]:
    """How long the steps of each stage took, each step once; lines that say nothing of it are passed over."""
    return {stage: _sum(spans) for stage, spans in _spans(file).items()}


def in_short(file: Path) -> str:
    """What a file says of its stages in a line for each; empty where it says nothing."""
    lines = [_line(stage, each[0][0], each[-1][1], _sum(each)) for stage, each in _spans(file).items()]
    return "".join([TITLES, *lines]) if lines else ""


def _line(stage: str, first: int, last: int, seconds: float) -> str:
    quoted = stage.replace('"', '""')
    return f'"{quoted}",{first},{last},{seconds:.3f}\n'


def _sum(spans: Sequence[tuple[int, int, float]]) -> float:
    return sum(seconds for *_, seconds in spans)


def _spans(file: Path) -> dict[str, list[tuple[int, int, float]]]:
    """By stage, first steps, last steps and the seconds between, no step twice."""
    known: dict[str, list[tuple[int, int, float]]] = {}
    if file.is_file():
        for row in csv.reader(file.read_text(encoding="utf-8", errors="replace").splitlines()):
            try:
                stage, first, last, seconds = row[0], int(row[1]), int(row[2]), float(row[3])
            except (ValueError, IndexError):  # the titles, or damaged: nothing depends on it
                continue
            if 0 < first <= last and 0 <= seconds < float("inf"):
                known[stage] = [*_before(first, known.get(stage, [])), (first, last, seconds)]
    return known


def _before(step: int, spans: Sequence[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """Of spans of steps, in their order, those before a step; of one that it lies in, the share of the steps."""
    kept = [span for span in spans if span[1] < step]
    kept += [
        (first, step - 1, seconds * (step - first) / (last - first + 1))
        for first, last, seconds in spans
        if first < step <= last
    ]
    return kept
