"""Where the rows of a task lie: a folder of JSON Lines files, or the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from methods.tasks.records import from_hub, json_lines
from methods.tasks.task import UNREADABLE, Classification, Row, Task, shown

ASSETS = Path("assets", "data")
"""What `scripts/fetch_demo.py` fills; the same layout as BILEVEL_DATA."""


def load(task: Task, split: str, data: str | os.PathLike[str] | None = None) -> list[Row]:
    """The rows of a published split (`train`, `validation`, `test`), checked one by one.

    Taken from the folder `data` if it is given, else from the first that has them of: the folder that the
    environment variable BILEVEL_DATA names; `assets/data`; the hub. A folder holds `<task>/<split>.jsonl`, or
    shards `<task>/<split>-00-of-02.jsonl`. Where a copy's training rows were taken out of a published split, what
    they left of it is `<task>/<split>_heldout.jsonl`, which is then read instead of the whole.

    Raises:
      FileNotFoundError: if `data` lacks the file, a shard is missing, or no source has the split.
      ValueError: for a corrupt row, with file and line.
    """
    name = task.folder or task.name
    if data is not None:
        folder = Path(data)
        files = _files(folder / name, split)
        if not files:
            here = _files(folder, split) or folder.name == name
            advice = "is --data right? Rows of your own are in a file, or in a folder with train.jsonl"
            if here:
                advice = f"name the folder that holds {name}/, {folder.absolute().parent}"
            raise FileNotFoundError(f"There is no {folder / name / split}.jsonl: {advice}")
        return _read(task, files)
    tried = []
    named = os.environ.get("BILEVEL_DATA")
    for title, folder in ((f"BILEVEL_DATA={named}", named), (f"{ASSETS}", ASSETS)):
        if not folder:
            tried.append("BILEVEL_DATA (not set)")
        elif files := _files(Path(folder, name), split):
            return _read(task, files)
        else:
            tried.append(f"{title} (no {name}/{split}.jsonl in it)")
    if task.hub is None:
        raise _not_found(task, split, tried)
    try:
        records = from_hub(task.hub.path, task.hub.name, split)
    except Exception as error:  # whatever stops the hub, the remedy is the same
        tried.append(f"the hub's {task.hub.path} ({type(error).__name__})")
        raise _not_found(task, split, tried) from error
    try:
        rows = list(records.map(task.hub.row, remove_columns=records.column_names))  # kept in the cache of `datasets`
    except UNREADABLE as error:
        raise ValueError(
            f"A {split} record of the hub's {task.hub.path} is no row of {task.name} ({type(error).__name__}: {error})."
        ) from error
    for i, row in enumerate(rows):
        task.check(row, f"{task.hub.path} {split} row {i}")
    return rows


def _not_found(task: Task, split: str, tried: list[str]) -> FileNotFoundError:
    return FileNotFoundError(
        f"No {split} rows of {task.name} found after trying {', '.join(tried)}: name a folder that holds "
        f"{task.folder or task.name}/{split}.jsonl with --data or BILEVEL_DATA."
    )


def _files(folder: Path, split: str) -> list[Path]:
    for whole in (folder / f"{split}_heldout.jsonl", folder / f"{split}.jsonl"):
        if whole.is_file():
            return [whole]
    shards = sorted(folder.glob(f"{split}-*-of-*.jsonl"))
    for shard in shards:
        of = re.fullmatch(r".*-of-(\d+)", shard.stem)
        if of is None or int(of[1]) != len(shards):
            raise FileNotFoundError(f"{folder} has {len(shards)} {split} shards, unlike {shard.name} says.")
    return shards


def _read(task: Task, files: Sequence[Path]) -> list[Row]:
    rows = []
    for file in files:
        before = len(rows)
        rows.extend(_rows(task, file))
        if len(rows) == before:
            raise ValueError(f"{file} is empty: {task.name} needs at least one row.")
    return rows


def _rows(task: Task, file: Path) -> Iterator[Row]:
    for where, stored in json_lines(file):
        yield from unfolded(task, stored, where)


def unfolded(task: Task, stored: Row, where: str) -> list[Row]:
    """The rows of a task that one stored object holds. Raises ValueError, with `where`, where it holds none."""
    rows = task.given("unfold", stored, where)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{task.culprit('unfold', where)} gave {shown(rows)}: it must give a list of rows.")
    if not rows:
        raise ValueError(f"{where} holds no question: {task.name} needs at least one.")
    if isinstance(task, Classification):
        rows = [task.numbered(row) for row in rows]
    for row in rows:
        task.check(row, where)
    return rows
