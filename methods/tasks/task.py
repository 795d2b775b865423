"""What a task is, and where its rows come from."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
"""One question: the task's text fields, `choices` (strings) and `label` (index of the right one)."""

ASSETS = Path("assets", "data")
"""What `scripts/fetch_demo.py` fills; the same layout as BILEVEL_DATA."""


class Pair(NamedTuple):
    """A prompt and one answer; the model reads `prompt + answer`, so the answer brings its own space."""

    prompt: str
    answer: str


class Hub(NamedTuple):
    """A task on the Hugging Face hub: `datasets.load_dataset(path, name)`, each record turned by `row`."""

    path: str
    name: str | None
    row: Callable[[dict[str, Any]], Row]


@dataclasses.dataclass(frozen=True)
class Task:
    """A multiple-choice task.

    Attributes:
      name: also the name of its folder, `<data>/<name>/train.jsonl`.
      fields: the text fields of a row, besides `choices` and `label`.
      pairs: the row's prompt and answer, once a choice, in the order of the choices.
      group: the text that rows on the same subject share; rows of one group never meet in two splits.
      test: the published split that is tested on (`validation` where the test labels are not public).
      hub: the hub's copy.
    """

    name: str
    fields: tuple[str, ...]
    pairs: Callable[[Row], tuple[Pair, ...]]
    group: Callable[[Row], str]
    hub: Hub
    test: str = "validation"


def training_pairs(task: Task, rows: Sequence[Row]) -> list[Pair]:
    """Prompt and right answer of every row."""
    return [task.pairs(row)[row["label"]] for row in rows]


def load(task: Task, split: str, data: str | os.PathLike[str] | None = None) -> list[Row]:
    """The rows of a published split (`train`, `validation`, `test`), checked one by one.

    Taken from the folder `data` if it is given, else from the first that has them of: the folder that the
    environment variable BILEVEL_DATA names; `assets/data`; the hub. A folder holds `<task>/<split>.jsonl`, or
    shards `<task>/<split>-00-of-02.jsonl`.

    Raises:
      FileNotFoundError: if `data` lacks the file, a shard is missing, or no source has the split.
      ValueError: for a corrupt row, with file and line.
    """
    if data is not None:
        folder = Path(data)
        files = _files(folder / task.name, split)
        if not files:
            raise FileNotFoundError(f"There is no {folder / task.name / split}.jsonl: is --data right?")
        return _read(task, files)
    tried = []
    named = os.environ.get("BILEVEL_DATA")
    for title, folder in ((f"BILEVEL_DATA={named}", named), (f"{ASSETS}", ASSETS)):
        if not folder:
            tried.append("BILEVEL_DATA (not set)")
        elif files := _files(Path(folder, task.name), split):
            return _read(task, files)
        else:
            tried.append(f"{title} (no {task.name}/{split}.jsonl in it)")
    try:
        import datasets  # half a second, and of no use with local files

        records = datasets.load_dataset(task.hub.path, task.hub.name, split=split)
    except Exception as error:  # whatever stops the hub, the remedy is the same
        tried.append(f"the hub's {task.hub.path} ({type(error).__name__})")
        raise FileNotFoundError(
            f"No {split} rows of {task.name} found after trying {', '.join(tried)}: run scripts/fetch_demo.py "
            f"or name a folder that holds {task.name}/{split}.jsonl with --data or BILEVEL_DATA."
        ) from error
    rows = (task.hub.row(dict(record)) for record in records)
    return [_checked(task, row, f"{task.hub.path} {split} row {i}") for i, row in enumerate(rows)]


def _files(folder: Path, split: str) -> list[Path]:
    whole = folder / f"{split}.jsonl"
    if whole.is_file():
        return [whole]
    shards = sorted(folder.glob(f"{split}-*-of-*.jsonl"))
    for shard in shards:
        of = re.fullmatch(r".*-of-(\d+)", shard.stem)
        if of is None or int(of[1]) != len(shards):
            raise FileNotFoundError(f"{folder} has {len(shards)} {split} shards, unlike {shard.name} says.")
    return shards


def _read(task: Task, files: Sequence[Path]) -> list[Row]:
    rows = [row for file in files for row in _lines(task, file)]
    if not rows:
        raise ValueError(f"{files[0]} is empty: {task.name} needs at least one row.")
    return rows


def _lines(task: Task, file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # bad JSON or bad UTF-8
                raise ValueError(f"{where} is not a JSON row ({error}).") from error
            yield _checked(task, row, where)


def _checked(task: Task, row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object but {type(row).__name__}.")
    for field in task.fields:
        if not isinstance(row.get(field), str):
            raise ValueError(f"{where} has no text {field!r}, which {task.name} needs.")
    choices, label = row.get("choices"), row.get("label")
    if not isinstance(choices, list) or not _texts(choices) or len(choices) < 2:
        raise ValueError(f"{where} has no 'choices', a list of at least two texts.")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise ValueError(f"{where} has label {label!r}, which is out of range: 0 to {len(choices) - 1}.")
    try:
        task.pairs(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return row


def _texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) and value for value in values)
