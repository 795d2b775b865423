"""What a task is: its rows, what they ask of a model, and how well a model does."""

from __future__ import annotations

import copy
import dataclasses
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
"""One example: the task's text fields and its label or answer, as the kind of task says."""

UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError)
"""What a task's own functions raise on a row that is not theirs."""


class Pair(NamedTuple):
    """A prompt and one answer; the model reads `prompt + answer`, so the answer brings its own space."""

    prompt: str
    answer: str


class Placed(dict):
    """A row that knows where it is from: `where`, a file and a line."""

    def __init__(self, row: Row, where: str):
        super().__init__(row)
        self.where = where


def place_of(row: Row, text: Any) -> str:
    """Where a row is from, or what it begins with where that is not known."""
    return getattr(row, "where", None) or f"The text {str(text)[:60]!r}"


class UnfitModelError(ValueError):
    """What `spans` raise for a model that cannot read rows of the task, whichever row it is."""


class Span(NamedTuple):
    """A part of a text, and whether the model learns to write it; what it does not learn it only reads."""

    text: str
    learned: bool


class Hub(NamedTuple):
    """A task on the Hugging Face hub: `datasets.load_dataset(path, name)`, mapped by `row`."""

    path: str
    name: str | None
    row: Callable[[dict[str, Any]], Row]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What all kinds of task share: their rows, and which of these belong together.

    Attributes:
      name: what it is called.
      fields: the text fields of a row.
      group: the text that rows on the same subject share; rows of one group never meet in two splits. None: the text
        of the first field.
      hub: the hub's copy; None if there is none that we read.
      test: the published split that is tested on (`validation` where the test labels are not public).
      folder: of a local copy, `<data>/<folder>/train.jsonl`; None is the name.
      unfold: the rows of one stored object, where a file holds several in one.
    """

    name: str
    fields: tuple[str, ...]
    group: Callable[[Row], str] | None = None
    hub: Hub | None = None
    test: str = "validation"
    folder: str | None = None
    unfold: Callable[[Row], list[Row]] = lambda row: [row]

    def __post_init__(self):
        self._check_text("name")
        self._check_text("test")
        self._check_texts("fields")
        self._check_function("unfold")
        if self.group is not None:
            self._check_function("group")
        elif not self.fields:
            raise ValueError(f"The task {self.name!r} names no text field, so that it needs group=.")

    def subject(self, row: Row) -> str:
        """What the row is about: rows of one subject never meet in two splits. Raises ValueError, with its place."""
        if self.group is None:
            return row[self.fields[0]]
        where = place_of(row, next(iter(row.values()), ""))
        found = self.given("group", row, where)
        if not isinstance(found, str):
            raise ValueError(f"{self.culprit('group', where)} gave {shown(found)}: a subject must be a text.")
        return found

    def check(self, row: Row, where: str) -> None:
        """Raises ValueError, with `where` and what is wrong, unless the row is one of this task."""
        for field in self.fields:
            if not isinstance(row.get(field), str):
                raise ValueError(f"{where} has no text {field!r}, which {self.name} needs.")
            check_encodable(row[field], field, where)
        self.subject(Placed(row, where))

    def given(self, option: str, row: Row, where: str) -> Any:
        """What the task's own function `option` makes of a row.

        Raises:
          ValueError: with `where`, whatever the function raises.
        """
        function = getattr(self, option)
        try:
            return function(handed(function, row))
        except Exception as error:
            raise self.failed(function, error, where) from error

    def failed(self, function: Callable[..., Any], error: Exception, where: str) -> ValueError:
        """What is told where a function of this task fails on a row: ours on a row that is damaged, a user's also by
        a mistake of its own.
        """
        at = line_of(function, error)
        mend = f" in {at}): mend the row, or the task" if at else ")"
        return ValueError(f"{where} is no row of {self.name} ({type(error).__name__}: {error}{mend}.")

    def culprit(self, option: str, where: str) -> str:
        """The beginning of a sentence on what a function of this task gave for a row."""
        at = line_of(getattr(self, option))
        return f"{where}: {option}= of the task {self.name}{f', in {at},' if at else ''}"

    def _check_text(self, field: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, str) or not value:
            raise ValueError(f"A task has {field}={value!r}, which must be a text.")

    def _check_texts(self, field: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, (tuple, list)) or not all(isinstance(text, str) and text for text in value):
            remedy = f": {field}=({value!r},)" if isinstance(value, str) else ""
            raise ValueError(f"The task {self.name!r} has {field}={value!r}, which must be a tuple of texts{remedy}.")

    def _check_function(self, field: str) -> None:
        if not callable(value := getattr(self, field)):
            raise ValueError(f"The task {self.name!r} has {field}={value!r}, which must be a function of a row.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultipleChoice(Task):
    """The most likely of several answers. A row has `choices` (texts) and `label`, the index of the right one.

    Attributes:
      pairs: the row's prompt and answer, once a choice, in the order of the choices.
    """

    pairs: Callable[[Row], tuple[Pair, ...]]

    def __post_init__(self):
        super().__post_init__()
        self._check_function("pairs")

    def check(self, row: Row, where: str) -> None:
        super().check(row, where)
        check_choices(row, where)
        self.asked(row, where)

    def asked(self, row: Row, where: str | None = None) -> tuple[Pair, ...]:
        """The pairs of a row. Raises ValueError, with its place, unless there is one for each of its choices."""
        where = place_of(row, next(iter(row.values()), "")) if where is None else where
        try:
            found = self.pairs(handed(self.pairs, row))
        except ValueError as error:  # which says by itself what is wrong
            raise ValueError(f"{where}: {error}") from error
        except Exception as error:
            raise self.failed(self.pairs, error, where) from error
        if not isinstance(found, (tuple, list)) or not all(map(_is_pair, found)):
            raise ValueError(
                f"{self.culprit('pairs', where)} gave {shown(found)}: it must give a Pair of two texts a choice."
            )
        if len(found) != (count := len(row["choices"])):
            raise ValueError(
                f"{self.culprit('pairs', where)} gave {len(found)} for {count} choices: it must give a Pair for each."
            )
        return tuple(Pair(*pair) for pair in found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """A class, or a number, for one text or a pair of texts (`fields`). A row has `label`: a number, or a class's name.

    Attributes:
      classes: their names, in the order of the labels 0, 1, ...; empty for a regression.
      metrics: names in `methods.tasks.METRICS`; the first leads every table.
      bounds: least and largest label of a regression.
    """

    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        super().__post_init__()
        self._check_texts("classes")
        self._check_texts("metrics")
        value: Any = self.bounds
        if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(is_number, value)):
            raise ValueError(f"The task {self.name!r} has bounds={value!r}, which must be the least and largest label.")

    @property
    def outputs(self) -> int:
        """How many numbers a head answers with: one a class, or the one of a regression."""
        return len(self.classes) or 1

    def numbered(self, row: Row) -> Row:
        """The row with the number of its class in place of the class's name."""
        label = row.get("label")
        named = isinstance(label, str) and self.classes.count(label) == 1
        return row | {"label": self.classes.index(label)} if named else row

    def check(self, row: Row, where: str) -> None:
        super().check(row, where)
        low, high = self.bounds
        label: Any = row.get("label")
        if self.classes and isinstance(label, str):
            known = ", ".join(self.classes[:20])
            raise ValueError(f"{where} has label {label[:60]!r}, which is no class ({known}) and no number of one.")
        if self.classes:
            _check_class(label, len(self.classes), where)
        elif not is_number(label) or not low <= label <= high:
            raise ValueError(f"{where} has label {label!r}, which is out of range: {low:g} to {high:g}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation(Task):
    """A text that the model writes.

    Attributes:
      pair: the row's prompt, and the answer to train on.
      target: what a written text is compared with.
      extract: the answer in a written text, None if there is none.
      metrics: names in `methods.tasks.generation.METRICS`; the first leads every table.
      stop: texts that end an answer; the first is what an answer is trained on with.
      choose: whether an answer is one of the row's `choices`, whose index `label` is then checked.
    """

    pair: Callable[[Row], Pair]
    target: Callable[[Row], Any]
    extract: Callable[[str, Row], Any]
    metrics: tuple[str, ...]
    stop: tuple[str, ...] = ("\n\n",)
    choose: bool = False

    def __post_init__(self):
        super().__post_init__()
        for option in ("pair", "target", "extract"):
            self._check_function(option)
        self._check_texts("metrics")
        self._check_texts("stop")
        if not self.stop:
            raise ValueError(f"The task {self.name!r} has no text that ends an answer: stop=('\\n\\n',), for example.")

    def check(self, row: Row, where: str) -> None:
        super().check(row, where)
        if self.choose:
            check_choices(row, where)
        pair, target = self.asked(row, where), self.given("target", row, where)
        if not pair.answer.strip():
            raise ValueError(f"{where} has an empty answer, which nothing can be trained on or compared with.")
        if isinstance(target, float) and not math.isfinite(target):
            raise ValueError(f"{where} has the answer {target}, which is no finite number.")

    def asked(self, row: Row, where: str | None = None) -> Pair:
        """The prompt and the answer of a row. Raises ValueError, with its place, unless they are two texts."""
        where = place_of(row, next(iter(row.values()), "")) if where is None else where
        found = self.given("pair", row, where)
        if not _is_pair(found):
            raise ValueError(f"{self.culprit('pair', where)} gave {shown(found)}: it must give a Pair of two texts.")
        return Pair(*found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelling(Task):
    """Texts, parts of which the model learns to write; it is tested by how likely these parts are to it.

    Attributes:
      spans: `spans(row, tokenizer)`, the text in its parts, in order.
      ended: whether the tokenizer's mark of the end follows each text and is learned; not behind a row whose `"ends"`
        is False, which goes on in another.
      pieces: `pieces(row, tokenizer, length)`, rows for training of at most `length` tokens in place of one that has
        more; None: such a row is left out.
    """

    spans: Callable[[Row, Any], Sequence[Span]]
    ended: bool = True
    pieces: Callable[[Row, Any, int], Sequence[Row]] | None = None

    def __post_init__(self):
        super().__post_init__()
        self._check_function("spans")
        if self.pieces is not None:
            self._check_function("pieces")


def training_pairs(task: MultipleChoice | Generation, rows: Sequence[Row], *, stopped: bool = True) -> list[Pair]:
    """Prompt and right answer of every row.

    Behind a written answer comes the text that ends it, for the model to learn; not so if not `stopped`, where a token
    behind it says that.
    """
    if isinstance(task, Generation):
        return [Pair(prompt, answer + task.stop[0] * stopped) for prompt, answer in map(task.asked, rows)]
    return [task.asked(row)[row["label"]] for row in rows]


def check_choices(row: Row, where: str) -> None:
    """Raises ValueError, with `where`, unless a row has `choices`, two texts or more, and the `label` of one."""
    choices = row.get("choices")
    if not isinstance(choices, list) or not _texts(choices) or len(choices) < 2:
        raise ValueError(f"{where} has no 'choices', a list of at least two texts.")
    for choice in choices:
        check_encodable(choice, "choices", where)
    _check_class(row.get("label"), len(choices), where)


def _check_class(label: Any, classes: int, where: str) -> None:
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < classes:
        raise ValueError(f"{where} has label {label!r}, which is out of range: 0 to {classes - 1}.")


def check_encodable(text: str, field: str, where: str) -> None:
    """Raises ValueError, with `where`, for half of a character, which JSON can write and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has a damaged character in {field!r} ({error.reason}).") from error


def is_number(value: Any) -> bool:
    """Whether a value is a number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(text, str) for text in value)


def shown(value: Any) -> str:
    """A value in a sentence on it."""
    return "None" if value is None else f"the {type(value).__name__} {value!r:.80}"


def handed(function: Callable[..., Any], row: Row) -> Row:
    """The row that a function of a task is given: a copy, unless it is one of ours, since a user's may change it.

    Functions are called several times on a row, and each call has to see what the others saw.
    """
    return row if _is_ours(getattr(function, "__code__", None)) else copy.deepcopy(row)


def _is_ours(code: Any) -> bool:
    return code is not None and Path(code.co_filename).parent == Path(__file__).parent


def line_of(function: Callable[..., Any], error: BaseException | None = None) -> str:
    """The file and the line where a function of a user's is, or where an error left it; "" for one of ours."""
    code = getattr(function, "__code__", None)
    if code is None or _is_ours(code):
        return ""
    lines = [code.co_firstlineno]
    steps = traceback.walk_tb(None if error is None else error.__traceback__)
    lines += [line for frame, line in steps if frame.f_code.co_filename == code.co_filename]
    return f"{code.co_filename} line {lines[-1]}"


def _texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)
