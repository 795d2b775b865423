"""What a run folder tells of its searches and trainings, as far as it can be read: nothing in it is changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from methods import seconds
from methods.integrity import CONFIG, FINGERPRINT, METRICS, changed_metrics, read_json, writable

TOLD = ("outer_loss", "inner_loss", "hypergradient_norm", "hvps")
"""Metrics that are no outer variables."""
LARGEST = 2**53
"""Most steps: integers up to here are floats too, which figures are drawn of."""


class Stage(NamedTuple):
    """A search or a training, by its rows in `metrics.jsonl`.

    Attributes:
      name: of the stage.
      steps: the numbers of its steps.
      series: what was logged at each of them, `[T, ...]`.
    """

    name: str
    steps: np.ndarray
    series: dict[str, np.ndarray]

    @property
    def is_search(self) -> bool:
        """Whether it looks for outer variables."""
        return "outer_loss" in self.series or "hypergradient_norm" in self.series

    @property
    def outer(self) -> dict[str, np.ndarray]:
        """What was recorded of the outer variables, `[T, entries]`."""
        return {
            name: values.reshape(len(values), -1)
            for name, values in self.series.items()
            if name not in TOLD and self.is_search
        }


class History(NamedTuple):
    """What a run folder holds.

    Attributes:
      path, name: the folder, and what the page calls it.
      config: its settings; {} if they cannot be read.
      selection: what was chosen; {} where nothing was.
      stages: searches and trainings, in their order.
      seconds: how long a stage took, where this is known.
      page: its own page; "" where there is none yet.
      missing: a sentence for each part that is not there or damaged.
    """

    path: Path
    name: str
    config: dict[str, Any]
    selection: dict[str, Any]
    stages: list[Stage]
    seconds: dict[str, float]
    page: str
    missing: list[str]


def read(path: Path, name: str) -> History:
    """What a folder tells; what it does not is in `missing`."""
    missing: list[str] = []
    config = _object(path / CONFIG, missing, needed=True)
    selection = _object(path / "selection.json", missing)
    if not (path / FINGERPRINT).is_file():
        missing.append(f"{FINGERPRINT} is not there, so that the run is in no mean over seeds.")
    spent = seconds.read(path / seconds.FILE)
    if not spent and (path / seconds.FILE).is_file():
        missing.append(f"{seconds.FILE} is damaged: it tells no seconds of any stage.")
    own = path / "report.md"
    page = own.read_text(encoding="utf-8", errors="replace") if own.is_file() else ""
    if not page:
        missing.append("The run has no page of its own yet (report.md): it is not finished.")
    stages = _stages(path / METRICS, missing)
    if stages and changed_metrics(path) is not None:
        missing.append(f"{METRICS} is not what it was when the run was finished; shown is what it holds now.")
    return History(path, name, config, selection, stages, spent, page, missing)


def _object(file: Path, missing: list[str], *, needed: bool = False) -> dict[str, Any]:
    if not file.is_file():
        if needed:
            missing.append(f"{file.name} is not there.")
        return {}
    try:
        found = read_json(file)
    except (OSError, ValueError) as error:
        missing.append(str(error) if file.name in str(error) else f"{file.name}: {error}")
        return {}
    if not isinstance(found, dict):
        missing.append(f"{file.name} is damaged: it holds a {type(found).__name__} in place of names with values.")
        return {}
    return found


def _stages(file: Path, missing: list[str]) -> list[Stage]:
    if not file.is_file():
        missing.append(f"{file.name} is not there, so that nothing is known of the steps.")
        return []
    rows: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    damaged = 0
    try:
        lines = file.read_bytes().decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        missing.append(f"{file.name} cannot be read ({error.strerror or error}).")
        return []
    for line in lines:
        row = _row(line)
        if row is None:
            damaged += 1
        else:
            rows.setdefault(row[0], {})[row[1]] = row[2]
    if damaged:
        missing.append(f"{damaged} of {len(lines)} lines of {file.name} are damaged and left out.")
    if not rows and not damaged:
        missing.append(f"{file.name} is empty.")
    return [_stage(name, steps, missing) for name, steps in rows.items()]


def _row(line: str) -> tuple[str, int, dict[str, np.ndarray]] | None:
    """`(stage, step, values)` of a line; None if it is damaged."""
    try:
        row = writable(json.loads(line))
        values = {name: np.asarray(value, float) for name, value in row.items() if name not in ("stage", "step")}
        step = int(row["step"])
        return (str(row["stage"]), step, values) if 0 < step <= LARGEST else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None


def _stage(name: str, rows: Mapping[int, Mapping[str, np.ndarray]], missing: list[str]) -> Stage:
    steps = sorted(rows)
    series: dict[str, np.ndarray] = {}
    for key in dict.fromkeys(key for step in steps for key in rows[step]):
        values = [rows[step].get(key) for step in steps]
        whole = [value for value in values if value is not None]
        if len(whole) == len(values) and len({value.shape for value in whole}) == 1:
            if whole[0].size:
                series[key] = np.stack(whole)
        else:
            missing.append(f"Stage {name!r} of {METRICS} has {key!r} at some steps only, or of several shapes.")
    return Stage(name, np.array(steps), series)


# How steady a choice is.


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """The share of what two choices have in common in all that either has; 1 where both have nothing."""
    union = np.sum(one | other)
    return float(np.sum(one & other) / union) if union else 1.0


def by_chance(first: int, second: int, count: int) -> float:
    """The mean `jaccard` of choices of `first` and of `second` out of `count` entries, both drawn at random."""
    if not first and not second:
        return 1.0
    from scipy import stats  # half a second

    common = np.arange(max(0, first + second - count), min(first, second) + 1)
    return float(stats.hypergeom.pmf(common, count, first, second) @ (common / (first + second - common)))


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; NaN where one of the two does not vary, or there are fewer than three entries."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0 or not np.isfinite([one, other]).all():
        return float("nan")
    from scipy import stats  # half a second

    return float(np.corrcoef(stats.rankdata(one), stats.rankdata(other))[0, 1])


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Which entries are the `count` largest."""
    chosen = np.zeros(len(values), bool)
    chosen[np.argsort(-values, kind="stable")[:count]] = True
    return chosen


CHOSEN = {"layers": "alpha", "rows": "rows"}
"""Entries of a selection that number the largest of a variable, and that variable."""


def steadiness(history: History, stage: Stage) -> dict[str, np.ndarray]:
    """How alike to the last step each step of a search is, `[T]` by words for what is compared.

    Gates that are on or off, and what is chosen as the largest, by `jaccard`; other variables of three or more entries
    by `rank_correlation`.
    """
    found: dict[str, np.ndarray] = {}
    outer = {name: values for name, values in stage.outer.items() if values.shape[1] > 1 and np.isfinite(values).all()}
    gates = {name: values for name, values in outer.items() if np.isin(values, (0.0, 1.0)).all()}
    if gates:
        on = np.concatenate(list(gates.values()), axis=1) > 0
        found["what is on (Jaccard)"] = np.array([jaccard(row, on[-1]) for row in on])
    for part, name in CHOSEN.items():
        chosen = history.selection.get(part)
        if name in outer and isinstance(chosen, list) and 0 < len(chosen) < outer[name].shape[1]:
            tops = [largest(row, len(chosen)) for row in outer[name]]
            found[f"the {len(chosen)} largest of {name} (Jaccard)"] = np.array([jaccard(t, tops[-1]) for t in tops])
    for name, values in outer.items():
        if name not in gates:
            ranks = np.array([rank_correlation(row, values[-1]) for row in values])
            if np.isfinite(ranks).any():
                found[f"the order of {name} (rank correlation)"] = ranks
    return found


def agreement(stages: list[Stage]) -> list[tuple[str, str, str, float]]:
    """Rank correlations of the last step of each two searches, by their names and that of the variable."""
    found = []
    for i, one in enumerate(stages):
        for other in stages[i + 1 :]:
            for name, values in one.outer.items():
                last = other.outer.get(name)
                if last is not None and last.shape[1] == values.shape[1]:
                    value = rank_correlation(values[-1], last[-1])
                    if np.isfinite(value):
                        found.append((one.name, other.name, name, value))
    return found
