"""What a task is, and where its rows come from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
"""One example: the task's text fields and its label or answer, as the kind of task says."""

MOST_BYTES = 4_000_000
"""Of a row: no text that long fits any model."""
ASSETS = Path("assets", "data")
"""What `scripts/fetch_demo.py` fills; the same layout as BILEVEL_DATA."""


_UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError)
"""What a task's own functions raise on a row that is not theirs."""


class Pair(NamedTuple):
    """A prompt and one answer; the model reads `prompt + answer`, so the answer brings its own space."""

    prompt: str
    answer: str


class Hub(NamedTuple):
    """A task on the Hugging Face hub: `datasets.load_dataset(path, name)`, mapped by `row`."""

    path: str
    name: str | None
    row: Callable[[dict[str, Any]], Row]


@dataclasses.dataclass(frozen=True)
class Task:
    """What all kinds of task share: their rows, and which of these belong together.

    Attributes:
      name: what it is called.
      fields: the text fields of a row.
      group: the text that rows on the same subject share; rows of one group never meet in two splits.
      hub: the hub's copy; None if there is none that we read.
      test: the published split that is tested on (`validation` where the test labels are not public).
      folder: of a local copy, `<data>/<folder>/train.jsonl`; None is the name.
      unfold: the rows of one stored object, where a file holds several in one.
    """

    name: str
    fields: tuple[str, ...]
    group: Callable[[Row], str]
    hub: Hub | None
    test: str = dataclasses.field(default="validation", kw_only=True)
    folder: str | None = dataclasses.field(default=None, kw_only=True)
    unfold: Callable[[Row], list[Row]] = dataclasses.field(default=lambda row: [row], kw_only=True)

    def check(self, row: Row, where: str) -> None:
        """Raises ValueError, with `where` and what is wrong, unless the row is one of this task."""
        for field in self.fields:
            if not isinstance(row.get(field), str):
                raise ValueError(f"{where} has no text {field!r}, which {self.name} needs.")
            _check_encodable(row[field], field, where)


@dataclasses.dataclass(frozen=True)
class MultipleChoice(Task):
    """The most likely of several answers. A row has `choices` (texts) and `label`, the index of the right one.

    Attributes:
      pairs: the row's prompt and answer, once a choice, in the order of the choices.
    """

    pairs: Callable[[Row], tuple[Pair, ...]]

    def check(self, row: Row, where: str) -> None:
        super().check(row, where)
        check_choices(row, where)
        try:
            self.pairs(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """A class, or a number, for one text or a pair of texts (`fields`). A row has `label`.

    Attributes:
      classes: their names, in the order of the labels 0, 1, ...; empty for a regression.
      metrics: names in `methods.tasks.metrics.METRICS`; the first is the one that chooses the best model.
      bounds: least and largest label of a regression.
    """

    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    bounds: tuple[float, float] = dataclasses.field(default=(0.0, 1.0), kw_only=True)

    @property
    def outputs(self) -> int:
        """How many numbers a head answers with: one a class, or the one of a regression."""
        return len(self.classes) or 1

    def check(self, row: Row, where: str) -> None:
        super().check(row, where)
        low, high = self.bounds
        label: Any = row.get("label")
        if self.classes:
            _check_class(label, len(self.classes), where)
        elif not _is_number(label) or not low <= label <= high:
            raise ValueError(f"{where} has label {label!r}, which is out of range: {low:g} to {high:g}.")


@dataclasses.dataclass(frozen=True)
class Generation(Task):
    """A text that the model writes.

    Attributes:
      pair: the row's prompt, and the answer to train on.
      target: what a written text is compared with.
      extract: the answer in a written text, None if there is none.
      metrics: names in `methods.tasks.generation.METRICS`; the first is the one that chooses the best model.
      stop: texts that end an answer; the first is what an answer is trained on with.
      choose: whether an answer is one of the row's `choices`, whose index `label` is then checked.
    """

    pair: Callable[[Row], Pair]
    target: Callable[[Row], Any]
    extract: Callable[[str, Row], Any]
    metrics: tuple[str, ...]
    stop: tuple[str, ...] = dataclasses.field(default=("\n\n",), kw_only=True)
    choose: bool = dataclasses.field(default=False, kw_only=True)

    def check(self, row: Row, where: str) -> None:
        super().check(row, where)
        if self.choose:
            check_choices(row, where)
        try:
            pair, target = self.pair(row), self.target(row)
        except _UNREADABLE as error:
            raise ValueError(f"{where} is no row of {self.name} ({type(error).__name__}: {error}).") from error
        if not pair.answer.strip():
            raise ValueError(f"{where} has an empty answer, which nothing can be trained on or compared with.")
        if isinstance(target, float) and not math.isfinite(target):
            raise ValueError(f"{where} has the answer {target}, which is no finite number.")


def training_pairs(task: MultipleChoice | Generation, rows: Sequence[Row], *, stopped: bool = True) -> list[Pair]:
    """Prompt and right answer of every row.

    Behind a written answer comes the text that ends it, for the model to learn; not so if not `stopped`, where a token
    behind it says that.
    """
    if isinstance(task, Generation):
        return [Pair(prompt, answer + task.stop[0] * stopped) for prompt, answer in map(task.pair, rows)]
    return [task.pairs(row)[row["label"]] for row in rows]


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
            advice = f"name the folder that holds {name}/, {folder.absolute().parent}" if here else "is --data right?"
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
        import datasets  # half a second, and of no use with local files

        with _asked_once(task.hub.path):
            records: Any = datasets.load_dataset(task.hub.path, task.hub.name, split=split)
    except Exception as error:  # whatever stops the hub, the remedy is the same
        tried.append(f"the hub's {task.hub.path} ({type(error).__name__})")
        raise _not_found(task, split, tried) from error
    try:
        rows = list(records.map(task.hub.row, remove_columns=records.column_names))  # kept in the cache of `datasets`
    except _UNREADABLE as error:
        raise ValueError(
            f"A {split} record of the hub's {task.hub.path} is no row of {task.name} ({type(error).__name__}: {error})."
        ) from error
    for i, row in enumerate(rows):
        task.check(row, f"{task.hub.path} {split} row {i}")
    return rows


@contextlib.contextmanager
def _asked_once(path: str) -> Iterator[None]:
    """Where the hub does not answer one question about a data set, only what is in the cache is loaded inside.

    `datasets` would ask again for half a minute where there is no network.
    """
    import huggingface_hub
    from datasets import config
    from huggingface_hub import constants

    flags = [(constants, "HF_HUB_OFFLINE"), (config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in flags]
    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=10)
    except Exception:  # whatever stops the hub
        for module, name in flags:
            setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(flags, before, strict=True):
            setattr(module, name, value)


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
        rows.extend(_lines(task, file))
        if len(rows) == before:
            raise ValueError(f"{file} is empty: {task.name} needs at least one row.")
    return rows


def _lines(task: Task, file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        # Never more of a line than a row can have: what comes from a stranger may be of any size.
        for number, line in enumerate(iter(partial(lines.readline, MOST_BYTES + 1), b""), 1):
            where = f"{file} line {number}"
            if len(line) > MOST_BYTES:
                raise ValueError(f"{where} is longer than a row can be, {MOST_BYTES / 1e6:.0f} MB.")
            try:
                stored = json.loads(line)
            except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, or brackets without end
                raise ValueError(f"{where} is not a JSON row ({error}).") from error
            if not isinstance(stored, dict):
                raise ValueError(f"{where} is not a JSON object but {type(stored).__name__}.")
            try:
                rows = task.unfold(stored)
            except _UNREADABLE as error:
                raise ValueError(f"{where} is no row of {task.name} ({type(error).__name__}: {error}).") from error
            if not rows:
                raise ValueError(f"{where} holds no question: {task.name} needs at least one.")
            for row in rows:
                task.check(row, where)
                yield row


def check_choices(row: Row, where: str) -> None:
    """Raises ValueError, with `where`, unless a row has `choices`, two texts or more, and the `label` of one."""
    choices = row.get("choices")
    if not isinstance(choices, list) or not _texts(choices) or len(choices) < 2:
        raise ValueError(f"{where} has no 'choices', a list of at least two texts.")
    for choice in choices:
        _check_encodable(choice, "choices", where)
    _check_class(row.get("label"), len(choices), where)


def _check_class(label: Any, classes: int, where: str) -> None:
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < classes:
        raise ValueError(f"{where} has label {label!r}, which is out of range: 0 to {classes - 1}.")


def _check_encodable(text: str, field: str, where: str) -> None:
    """JSON can write half of a character, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has a damaged character in {field!r} ({error.reason}).") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)
