"""Disjoint splits: the inner loss sees one, the outer loss another, and neither sees the test."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from methods.tasks.stored import load
from methods.tasks.task import Classification, Generation, LanguageModelling, Row, Task


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
      torn: those left out because other rows on their subject are outer.
      unasked: those left out because no more were asked for.
      cut: outer pieces of the one text whose beginning is in the training set; 0 where no text is in both.
    """

    train: list[Row]
    outer: list[Row]
    test: list[Row]
    dropped: int
    torn: int = 0
    unasked: int = 0
    cut: int = 0


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
        prompts.setdefault(task.asked(row).prompt, []).append(row)
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
    about: bool = False,
) -> Splits:
    """Cut published rows into three splits, no two of which share a subject.

    A subject is `task.subject(row)`, up to case and spaces. Training rows on a subject of `test_rows` are left out.
    The other subjects are shuffled by `seed`; in this order each that still fits into `outer` units is outer
    validation, and the rest is for training, `train` rows of it. Where the subjects that are left are all too large for
    the gap that remains, the smallest fills it, and subjects that are then not needed are for training; the remainder
    of its rows is in neither (`Splits.torn`). Where all that are left are texts in pieces, each larger than the whole
    outer validation, one is cut instead: its last pieces are outer, those before them for training. With `about` there
    are some more or fewer than `outer`, as many as whole subjects give; a text is then cut only where they give less
    than half.

    The test does not depend on the seed: runs are compared on the same rows. Outer validation and test are drawn in
    `units`: a prompt comes with all its references.

    Args:
      task: whose rows these are.
      train_rows: the published training set.
      test_rows: the published set to test on.
      outer: units of the outer validation.
      train: rows of the training set; None takes all that is left.
      test: units of the test; None takes all, a number the first of one fixed shuffle.
      seed: of the cut.
      about: whether there may be some more or fewer than `outer`.

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
    subjects = [rows for key, rows in _subjects(task, train_rows).items() if key not in tested]
    kept = sum(map(len, subjects))
    order = np.random.default_rng(seed).permutation(len(subjects)).tolist()
    sizes = [len(units(task, rows)) for rows in subjects]
    pieces = [_is_in_pieces(task, rows) for rows in subjects]
    if about:
        outer = _nearest(sizes, order, outer, pieces)
    chosen, gap = _draw(sizes, order, outer)
    torn = cut = 0
    border = None
    if gap and (large := _to_cut(sizes, order, outer, chosen, pieces)) is not None:
        last, before, torn = _cut(subjects[large], gap)
        subjects[large], cut, border = before, len(last), _key(task, last[0])
        chosen, subjects = [*chosen, len(subjects)], [*subjects, last]
    elif gap:
        chosen = _filled(sizes, order, outer, chosen)
        if (excess := sum(sizes[i] for i in chosen) - outer) > 0:
            last = units(task, subjects[chosen[-1]])[:-excess]
            torn = len(subjects[chosen[-1]]) - sum(map(len, last))
            subjects[chosen[-1]] = [row for unit in last for row in unit]
    taken = set(chosen)
    others = [i for i in order if i not in taken]
    rest = [row for i in others for row in subjects[i]]
    if not chosen or len(rest) < (train or 1):
        unit = " prompts" if isinstance(task, Generation) else ""
        on = f", on {len(sizes)} subjects, the rows of each of which stay together"
        on = ["", ", on one subject, and these stay together", on][min(len(sizes), 2)]
        raise TooFew(
            f"{task.name} cannot give {outer} outer{unit} and {train or 'any'} training rows: {kept} are left "
            f"without those on subjects of the test{on}."
        )
    trained = rest[:train]
    if all(_key(task, row) != border for row in trained):
        cut = 0  # of what is before the border nothing was asked for
    kept_tests = np.sort(np.random.default_rng(0).permutation(len(tests))[:test])
    result = Splits(
        trained,
        [row for i in chosen for row in subjects[i]],
        [row for i in kept_tests for row in tests[i]],
        len(train_rows) - kept,
        torn,
        len(rest) - len(trained),
        cut,
    )
    check_disjoint(task, result)
    return result


def _subjects(task: Task, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each subject, in the order of their first rows."""
    subjects: dict[str, list[Row]] = {}
    for row in rows:
        subjects.setdefault(_key(task, row), []).append(row)
    return subjects


def _draw(sizes: Sequence[int], order: Sequence[int], wanted: int) -> tuple[list[int], int]:
    """What is taken, in this order, of things of these sizes: each that still fits. And how much then lacks."""
    chosen = []
    for i in order:
        if sizes[i] <= wanted:
            chosen.append(i)
            wanted -= sizes[i]
    return chosen, wanted


def _filled(sizes: Sequence[int], order: Sequence[int], wanted: int, chosen: list[int]) -> list[int]:
    """What is taken once `chosen` lacks something: the smallest of the others, and of `chosen` what is still needed."""
    taken = set(chosen)
    others = [i for i in order if i not in taken]
    if not others:
        return chosen
    smallest, count = min(others, key=lambda i: sizes[i]), sum(sizes[i] for i in chosen)
    excess, spared = count + sizes[smallest] - wanted, set()
    for i in sorted(chosen, key=lambda i: -sizes[i]):
        if sizes[i] <= excess:
            excess -= sizes[i]
            spared.add(i)
    return [*(i for i in chosen if i not in spared), smallest]


def _to_cut(
    sizes: Sequence[int], order: Sequence[int], wanted: int, chosen: list[int], pieces: Sequence[bool]
) -> int | None:
    """The text to cut once `chosen` lacks something: the first where all that are left are larger than all of it."""
    large = [i for i in order if sizes[i] > wanted]
    return large[0] if large and len(chosen) + len(large) == len(sizes) and pieces[large[0]] else None


def _nearest(sizes: Sequence[int], order: Sequence[int], wanted: int, pieces: Sequence[bool]) -> int:
    """How much to draw in place of `wanted`, so that whole subjects are: the run that is then told repeats it.

    `wanted` itself where less than half could be drawn, and a text would be cut for the rest.
    """
    chosen, gap = _draw(sizes, order, wanted)
    if not gap or (gap > wanted - gap and _to_cut(sizes, order, wanted, chosen, pieces) is not None):
        return wanted
    found = _filled(sizes, order, wanted, chosen)
    total = sum(sizes[i] for i in found)
    return wanted - gap if chosen and (gap <= total - wanted or len(found) == len(sizes)) else total


def _is_in_pieces(task: Task, rows: Sequence[Row]) -> bool:
    return isinstance(task, LanguageModelling) and task.pieces is not None and all("piece" in row for row in rows)


def _is_cut_further(task: Task) -> bool:
    """Whether rows of one subject, which are texts, can be cut in pieces once a tokenizer is there."""
    return isinstance(task, LanguageModelling) and task.pieces is not None


def _cut(rows: Sequence[Row], count: int) -> tuple[list[Row], list[Row], int]:
    """The last `count` pieces of a text, those before them, and how many are in neither.

    A text that was given twice has each piece twice: where the border would lie between two such, one is left out.
    """
    ordered = sorted(rows, key=lambda row: row["piece"])
    last = ordered[-count:]
    before = [row for row in rows if row["piece"] < last[0]["piece"]]
    return last, before, len(rows) - len(last) - len(before)


def hold_out(task: Task, rows: Sequence[Row], units_wanted: int | None = None) -> tuple[list[Row], list[Row]]:
    """Rows for training and rows to test on, no two of which share a subject; the same ones at every call.

    Args:
      task: whose rows these are.
      rows: all there are.
      units_wanted: units of the test; None takes about a fifth. Each subject that still fits is taken, in a shuffled
        order. Where that leaves a gap, the smallest of the others is taken too, and what is then not needed is not, so
        that there may be some more; of a fifth, only if that is nearer to it than the gap, and half of the subjects
        where only one would be left, whose rows no further split could part.

    Raises:
      TooFew: if that leaves nothing to train on, or there are not so many.
    """
    groups = list(_subjects(task, rows).values())
    sizes = [len(units(task, group)) for group in groups]
    wanted = max(1, sum(sizes) // 5) if units_wanted is None else units_wanted
    order = np.random.default_rng(0).permutation(len(groups)).tolist()
    if units_wanted is None:
        wanted = _nearest(sizes, order, wanted, [False] * len(groups))
    chosen, gap = _draw(sizes, order, wanted)
    drawn = _filled(sizes, order, wanted, chosen) if gap else chosen
    if units_wanted is None and len(groups) - len(drawn) == 1 and not _is_cut_further(task):
        drawn, wanted = drawn[: max(1, len(drawn) // 2)], 1
    test = set(drawn)
    if sum(sizes[i] for i in test) < wanted or len(test) == len(groups):
        on = f"{len(rows)} rows on {len(groups)} subject{'s' * (len(groups) != 1)}"
        raise TooFew(
            f"{on} cannot be cut into rows to train on and {wanted} to test on: give more rows, or a file to test on.",
            test=True,
        )
    rest = [row for i, group in enumerate(groups) if i not in test for row in group]
    return rest, [row for i in sorted(test) for row in groups[i]]


def check_held_out(task: Task, train: Sequence[Row], test: Sequence[Row], wanted: int | None) -> None:
    """Makes sure that rows that were held out as `--test-rows` asks leave something to train and validate on.

    Args:
      task: whose rows these are.
      train, test: what `hold_out` gave.
      wanted: units of the test; None where no number was asked for.

    Raises:
      TooFew: if what is left to train on is one subject, which no further split can part, or if a subject had to be
        for the test that is larger than what was asked for, and larger than all that is left.
    """
    rows, held = len(train) + len(test), units(task, test)
    unit = "prompts" if isinstance(task, Generation) else "rows"
    lower = "give more rows, or a file to test on (--test-data)"
    if wanted is not None and wanted > 1:
        lower = f"lower --test-rows, {lower}"
    if len(_subjects(task, train)) == 1 and not _is_cut_further(task):
        raise TooFew(
            f"Of {rows} rows {len(test)} are to test on, and the other {len(train)} are on one subject, so that none "
            f"can validate what others train: {lower}.",
            test=True,
        )
    if wanted is not None and len(held) > wanted and len(units(task, train)) < len(held):
        raise TooFew(
            f"--test-rows {wanted} of {rows} rows would leave {len(train)} to train on: rows on one subject stay "
            f"together, so that {len(held)} {unit} would be kept from it for those {wanted}; {lower}.",
            test=True,
        )


def untaught(task: Task, splits: Splits) -> str:
    """A sentence on classes that outer or test rows have and no training row; "" for none."""
    if not isinstance(task, Classification) or not task.classes:
        return ""
    learned, told, missing = {row["label"] for row in splits.train}, [], set()
    for name, rows in (("test", splits.test), ("outer", splits.outer)):
        others = [row["label"] for row in rows if row["label"] not in learned]
        told += [f"{len(others):,} of {len(rows):,} {name} rows"] * bool(others)
        missing.update(others)
    if not missing:
        return ""
    names = ", ".join(repr(task.classes[label]) for label in sorted(missing)[:5])
    rest = f" and {len(missing) - 5:,} others" if len(missing) > 5 else ""
    return (
        f"{' and '.join(told)} have a class that no training row has, {names}{rest}: nothing learns it; give more rows "
        "of it."
    )


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
    """Make sure that no subject, and so no row, is in two splits; of a text that is cut, that no piece is.

    Raises:
      ValueError: with the first text that two splits share.
    """
    seen: dict[str, str] = {}
    for name in ("train", "outer", "test"):
        for key, rows in _subjects(task, getattr(splits, name)).items():
            if seen.setdefault(key, name) == name:
                continue
            if splits.cut and (seen[key], name) == ("train", "outer"):
                before = [row["piece"] for row in splits.train if _key(task, row) == key]
                if max(before) < min(row["piece"] for row in rows):
                    continue
            raise ValueError(f"{task.name} leaks: {seen[key]} and {name} share the subject {key[:60]!r}.")


def _key(task: Task, row: Row) -> str:
    return " ".join(task.subject(row).casefold().split())
