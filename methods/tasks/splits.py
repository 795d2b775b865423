"""Disjoint splits: the inner loss sees one, the outer loss another, and neither sees the test."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from methods.tasks.stored import load
from methods.tasks.task import Generation, Row, Task


class TooFew(ValueError):
    """A split wants more rows, or prompts, than there are; `test`: whether it is that of the test."""

    def __init__(self, sentence: str, *, test: bool = False):
        super().__init__(sentence)
        self.test = test


class Splits(NamedTuple):
    """Rows of the inner loss, of the outer loss, and of the test.

    Attributes:
      train: from the published training set.
      outer: the outer validation, from the published training set too.
      test: from the published validation (or test) set, which no loop sees.
      dropped: published training rows left out because the test has the same subject.
    """

    train: list[Row]
    outer: list[Row]
    test: list[Row]
    dropped: int


def units(task: Task, rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in the units that are evaluated, in the order of their first rows.

    What a model writes after a prompt is compared with all the answers that this prompt has, so that the rows of one
    prompt are one unit. For every other task it is the row: a question with all its choices, a text with its label.
    A sample is drawn of units; a sample of rows would tear references from their prompts.
    """
    if not isinstance(task, Generation):
        return [[row] for row in rows]
    prompts: dict[str, list[Row]] = {}
    for row in rows:
        prompts.setdefault(task.pair(row).prompt, []).append(row)
    return list(prompts.values())


def split(
    task: Task,
    train_rows: Sequence[Row],
    test_rows: Sequence[Row],
    *,
    outer: int,
    train: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> Splits:
    """Cut published rows into three splits, no two of which share a subject.

    A subject is `task.subject(row)`, up to case and spaces. Training rows on a subject of `test_rows` are left out;
    the rest is shuffled, subject by subject, by `seed`; the first `outer` units are the outer validation, the next
    `train` rows the training set (what the last outer subject has left over is in neither). The test does not depend
    on the seed: runs are compared on the same rows. Outer validation and test are drawn in `units`: a prompt comes
    with all its references.

    Args:
      task: whose rows these are.
      train_rows: the published training set.
      test_rows: the published set to test on.
      outer: units of the outer validation.
      train: rows of the training set; None takes all that is left.
      test: units of the test; None takes all, a number the first of one fixed shuffle.
      seed: of the cut.

    Raises:
      TooFew: if a size is below 1 or there are not so many.
    """
    tests = units(task, test_rows)
    available = len(train_rows), len(units(task, train_rows)), len(tests)
    for name, size, most in zip(("train", "outer", "test"), (train, outer, test), available, strict=True):
        if size is not None and not 1 <= size <= most:
            unit = "prompts" if isinstance(task, Generation) and name != "train" else "rows"
            sentence = f"{task.name} cannot give {name}={size} {unit}: it must be between 1 and {most}."
            raise TooFew(sentence, test=name == "test")
    tested = {_key(task, row) for row in test_rows}
    groups: dict[str, list[Row]] = {}
    for row in train_rows:
        if (key := _key(task, row)) not in tested:
            groups.setdefault(key, []).append(row)
    subjects, kept = list(groups.values()), sum(map(len, groups.values()))
    outer_units: list[list[Row]] = []
    rest: list[Row] = []
    for i in np.random.default_rng(seed).permutation(len(subjects)):
        if len(outer_units) < outer:
            outer_units.extend(units(task, subjects[i]))
        else:
            rest.extend(subjects[i])
    if len(outer_units) < outer or len(rest) < (train or 1):
        unit = " prompts" if isinstance(task, Generation) else ""
        raise TooFew(
            f"{task.name} cannot give {outer} outer{unit} and {train or 'any'} training rows: {kept} are left "
            "without those on subjects of the test, and rows on one subject stay together."
        )
    chosen = np.sort(np.random.default_rng(0).permutation(len(tests))[:test])
    result = Splits(
        rest[:train],
        [row for unit in outer_units[:outer] for row in unit],
        [row for i in chosen for row in tests[i]],
        len(train_rows) - kept,
    )
    check_disjoint(task, result)
    return result


def hold_out(task: Task, rows: Sequence[Row], units_wanted: int | None = None) -> tuple[list[Row], list[Row]]:
    """Rows for training and rows to test on, no two of which share a subject; the same ones at every call.

    Args:
      task: whose rows these are.
      rows: all there are.
      units_wanted: units of the test; None takes a fifth. Whole subjects are taken until there are so many, so that
        there may be some more.

    Raises:
      TooFew: if that leaves nothing to train on, or there are not so many.
    """
    subjects: dict[str, list[Row]] = {}
    for row in rows:
        subjects.setdefault(_key(task, row), []).append(row)
    groups, test, count = list(subjects.values()), set(), 0
    wanted = max(1, len(units(task, rows)) // 5) if units_wanted is None else units_wanted
    for i in np.random.default_rng(0).permutation(len(groups)):
        if count >= wanted:
            break
        test.add(int(i))
        count += len(units(task, groups[i]))
    rest = [row for i, group in enumerate(groups) if i not in test for row in group]
    if count < wanted or not rest:
        on = f"{len(rows)} rows on {len(groups)} subject{'s' * (len(groups) != 1)}"
        raise TooFew(
            f"{on} cannot be cut into rows to train on and {wanted} to test on: give more rows, or a file to test on.",
            test=True,
        )
    return rest, [row for i in sorted(test) for row in groups[i]]


def load_splits(
    task: Task,
    *,
    outer: int,
    train: int | None = None,
    test: int | None = None,
    seed: int = 0,
    data: str | os.PathLike[str] | None = None,
) -> Splits:
    """`split` of the published training set and of the published set `task.test`, both by `load`."""
    train_rows, test_rows = load(task, "train", data), load(task, task.test, data)
    return split(task, train_rows, test_rows, outer=outer, train=train, test=test, seed=seed)


def check_disjoint(task: Task, splits: Splits) -> None:
    """Make sure that no subject, and so no row, is in two splits.

    Raises:
      ValueError: with the first text that two splits share.
    """
    seen: dict[str, str] = {}
    for name in ("train", "outer", "test"):
        for key in {_key(task, row) for row in getattr(splits, name)}:
            if seen.setdefault(key, name) != name:
                raise ValueError(f"{task.name} leaks: {seen[key]} and {name} share the subject {key[:60]!r}.")


def _key(task: Task, row: Row) -> str:
    return " ".join(task.subject(row).casefold().split())
