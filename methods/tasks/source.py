"""What `--task` and `--data` name together: a task, its rows to train on and its rows to test on."""

from __future__ import annotations

import importlib.util
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from methods.tasks import own
from methods.tasks.encode import marks, pad, tokenize
from methods.tasks.generation import METRICS as WRITTEN_METRICS
from methods.tasks.language import pad_spans, tokenize_spans
from methods.tasks.metrics import METRICS
from methods.tasks.own import FORMATS, Format
from methods.tasks.places import Where, are_the_same, beside, is_own, lacks_train, tested_on, trained_on
from methods.tasks.registry import TASKS, get
from methods.tasks.splits import check_held_out, hold_out
from methods.tasks.stored import load, unfolded
from methods.tasks.task import (
    Classification,
    Generation,
    LanguageModelling,
    MultipleChoice,
    Placed,
    Row,
    Task,
    place_of,
)

DEFAULT = "piqa"
"""The task where neither one nor rows of one's own are named."""


class Source(NamedTuple):
    """A task and its rows.

    Attributes:
      task: the task.
      train: the rows that the inner and the outer loss are cut from.
      test: the rows that only the last test sees.
      trained_on, tested_on: where the rows are from, in words, the second with a comma at its end.
    """

    task: Task
    train: list[Row]
    test: list[Row]
    trained_on: str
    tested_on: str


def find(task: str) -> Task:
    """The task called so, or that which FILE.py:NAME names.

    Raises:
      ValueError, FileNotFoundError: if there is none; and whatever the file is that does not run.
    """
    file, colon, name = task.rpartition(":")
    if not (colon and file.endswith(".py")):
        if task.endswith(".py"):
            raise ValueError(f"--task {task} names a file: name the task in it too, as {task}:TASK.")
        return get(task)
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {file}, which --task names.")
    spec = importlib.util.spec_from_file_location(f"bilevel_task_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # of a name that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses in it are looked for
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what a file does, `sys.exit` included, is the file's fault
        lines = [n for frame, n in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == spec.origin]
        reason = f"{type(error).__name__}: {error}" + (f", line {lines[-1]}" if lines else "")
        raise ValueError(f"{file}, which --task names, fails when it is run ({reason}).") from error
    found = getattr(module, name, None)
    if not isinstance(found, Task):
        what = "has nothing" if found is None else f"has a {type(found).__name__}, and no task,"
        raise ValueError(f"{file} {what} called {name}: it must be a task, such as methods.tasks.Generation(...).")
    _check_metrics(found)
    return found


def file_of(task: str | None) -> Path | None:
    """The file that --task FILE.py:NAME names; None for another task."""
    file, colon, _ = (task or "").rpartition(":")
    return Path(file) if colon and file.endswith(".py") else None


def _check_metrics(task: Task) -> None:
    """Raises ValueError for a task of one's own with metrics that are not known, or with none."""
    if isinstance(task, (Classification, Generation)):
        registry: Any = METRICS if isinstance(task, Classification) else WRITTEN_METRICS
        unknown = [name for name in task.metrics if name not in registry]
        if unknown or not task.metrics:
            what = f"the metric {unknown[0]!r}, which is unknown" if unknown else "no metric"
            raise ValueError(f"The task {task.name} has {what}: choose from {', '.join(registry)}.")


def check_test(task: Task, rows: list[Row], tokenizer: Any, positions: int) -> None:
    """Makes sure, before anything is trained, that every test row can be tested.

    Raises:
      ValueError: for an answer, or a text of which nothing that is learned is left, that does not fit into the model's
        positions; with its place.
    """
    first, fill = marks(tokenizer)
    if isinstance(task, LanguageModelling):
        for row, sequence in zip(rows, tokenize_spans(task, rows, tokenizer), strict=True):
            try:
                pad_spans([sequence], positions, first, fill)
            except ValueError as error:
                raise ValueError(f"{place_of(row, next(iter(row.values())))}, a test row: {error}") from error
    elif isinstance(task, MultipleChoice):
        for row in rows:
            try:
                pad(tokenize(task.asked(row), tokenizer), positions, first, fill)
            except ValueError as error:
                raise ValueError(f"{place_of(row, row[task.fields[0]])}, a test row: {error}") from error


def read_source(
    task: str | None,
    data: str | None,
    *,
    test_data: str | None = None,
    columns: str | None = None,
    test: int | None = None,
) -> Source:
    """The rows that the options of a command name.

    Args:
      task: a name in `TASKS` or `FORMATS`, FILE.py:NAME, or None for what the columns of the rows say.
      data: a file, a folder, or the name of a data set on the hub; None for where built-in tasks lie.
      test_data: a file or a data set to test on; None takes what lies beside the training rows, or holds some out.
      columns: as `own.renaming`.
      test: units to hold out; None for a fifth.

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong, with file and line where it is a row.
    """
    if data is not None and task is None and not is_own(data) and lacks_train(Path(data)):
        raise FileNotFoundError(
            f"{data} has no file called train: call its file of training rows train.jsonl or the like, or name that "
            "file itself with --data. The rows of a built-in task are in a folder there, of the name that --task has."
        )
    if data is None or not is_own(data) or (task in TASKS and Path(data).is_dir()):
        for option, value in (("--test-data", test_data), ("--columns", columns)):
            if value is not None:
                raise ValueError(f"{option} is about rows of your own: name their file with --data.")
        if task in FORMATS:
            raise ValueError(f"--task {task} is about rows of your own: name their file with --data.")
        found = find(DEFAULT if task is None else task)
        published = "the published training set", f"the published {found.test} set,"
        return Source(found, load(found, "train", data), load(found, found.test, data), *published)
    if task is not None and task not in FORMATS:
        fixed = find(task)
        if columns is not None:
            raise ValueError(f"--columns is for the formats alone, but the rows are of {fixed.name}: leave it out.")
        rows = lambda where: _of_task(fixed, where)  # noqa: E731
        return _cut(fixed, rows(where := trained_on(data)), where.title, data, test_data, rows, test)
    names = own.renaming(columns)
    where = trained_on(data)
    name, format, raw, places = _raw(where, names, task)
    made = format.task(raw)
    train: list[Row] = [Placed(format.final(made, row, place), place) for row, place in zip(raw, places, strict=True)]

    def tested(where: Where) -> list[Row]:
        _, _, rows, at = _raw(where, names, name)
        return [Placed(format.final(made, row, place), place) for row, place in zip(rows, at, strict=True)]

    return _cut(made, train, where.title, data, test_data, tested, test)


def _cut(
    task: Task,
    rows: list[Row],
    title: str,
    data: str,
    test_data: str | None,
    tested: Callable[[Where], list[Row]],
    test: int | None,
) -> Source:
    """A source whose test is a file of its own, or lies beside the training rows, or is held out of them."""
    if test_data is not None:
        if are_the_same(data, test_data):
            raise ValueError(f"--test-data {test_data} is --data itself: name other rows, or leave it out.")
        where = tested_on(test_data)
        return Source(task, rows, tested(where), title, f"{where.title},")
    where = beside(data)
    if where is not None:
        return Source(task, rows, tested(where), title, f"{where.title},")
    kept, held = hold_out(task, rows, test)
    check_held_out(task, kept, held, test)
    return Source(task, kept, held, title, f"{title}, held out,")


def _raw(where: Where, names: dict[str, str], task: str | None) -> tuple[str, Format, list[Row], list[str]]:
    """The format of the records, their rows before a task is made of them, and the place of each."""
    records = [(place, own.renamed(record, names, place)) for place, record in where.records]
    if not records:
        raise ValueError(f"{where.title} is empty: there must be at least one row.")
    # By the columns of all rows: of one that lacks its label the others still tell that there is to be one.
    columns = dict.fromkeys(column for _, record in records for column in record)
    name = own.recognised(columns, records[0][0]) if task is None else task
    rows, places, unread, format = [], [], {}, FORMATS[name]
    for place, record in records:
        if not format.fits(list(record)):
            missing = next(c for c in format.columns if not any(n in record for n in c.split("|")))
            raise ValueError(
                f"{place} has no column {missing.replace('|', ' or ')!r}, which rows of the format {name} have; it has "
                f"{', '.join(record)[:200]}."
            )
        unread |= dict.fromkeys(column for column in record if column not in format.names)
        rows.append(Placed(format.row(record, place), place))
        places.append(place)
    if unread:
        warnings.warn(
            f"Columns of {where.title} that are not read: {', '.join(unread)[:200]}. Where one says which rows belong "
            "together, a task of your own with group= keeps them on one side of every split.",
            stacklevel=2,
        )
    return name, format, rows, places


def _of_task(task: Task, where: Where) -> list[Row]:
    """The rows of a task that has names for its columns itself."""
    rows: list[Row] = [Placed(row, at) for at, record in where.records for row in unfolded(task, record, at)]
    if not rows:
        raise ValueError(f"{where.title} is empty: {task.name} needs at least one row.")
    return rows
