"""Rows of one's own: which columns a file can have, and the task that they make.

A *format* is what the columns of a file are called; `FORMATS` lists them. A file is of the first format all of whose
columns it has, or of the one that is asked for by name. Columns with other names are renamed by `--columns`; columns
that the format does not know are not read, which is said.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from methods.tasks.chats import chat_row, chat_task
from methods.tasks.language import text_pieces
from methods.tasks.records import Record
from methods.tasks.task import (
    Classification,
    LanguageModelling,
    MultipleChoice,
    Pair,
    Row,
    Span,
    Task,
    check_choices,
    check_encodable,
    place_of,
)

MOST_CLASSES = 1000
"""Of labels that are integers: more are rather numbers to be predicted, which are written 3.0."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LARGEST = 3.4e38
"""Of a label that is a number: float32 holds it."""
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_COMMA = re.compile(r"[+-]?[0-9]+(?:,[0-9]+)?")
_NO_NUMBER = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)


class Format(NamedTuple):
    """What the columns of a file are called, and what is made of them.

    Attributes:
      columns: those that every row has; `a|b` is either of the two.
      optional: those that a row may have.
      row: `row(record, where)`, a row of the task. Raises ValueError, with `where`, for a record that makes none.
      task: `task(rows)`, the task that all training rows make. Raises ValueError.
      final: `final(task, row, where)`, the row as the task has it. Raises ValueError, with `where`.
      about: a line on what it is for.
    """

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    row: Callable[[Record, str], Row]
    task: Callable[[Sequence[Row]], Task]
    about: str
    final: Callable[[Any, Row, str], Row] = lambda task, row, where: row

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a column of this format can have."""
        return tuple(name for column in (*self.columns, *self.optional) for name in column.split("|"))

    def fits(self, columns: Sequence[str]) -> bool:
        """Whether a file with these columns has all that the format needs."""
        return all(any(name in columns for name in column.split("|")) for column in self.columns)


# Prompts and answers -------------------------------------------------------------------------------------------------


def _prompt_row(record: Record, where: str) -> Row:
    if "completion" in record and "answer" in record:
        raise ValueError(f"{where} has both 'completion' and 'answer', only one of which is learned: rename the other.")
    name = "completion" if "completion" in record else "answer"
    prompt, completion = _text(record, "prompt", where), _text(record, name, where)
    if not completion.strip():
        raise ValueError(f"{where} has an empty {name!r}, which nothing can be learned from.")
    return {"prompt": prompt, "completion": completion}


def _prompt_task(rows: Sequence[Row]) -> Task:
    joined = sum(not _apart(row["prompt"], row["completion"]) for row in rows)
    if joined:
        warnings.warn(
            f"{joined:,} of {len(rows):,} rows have neither space nor line break between prompt and completion, and "
            "are joined as they are: end the prompts with one if the model shall see them apart.",
            stacklevel=2,
        )
    spans = lambda row, tokenizer: [Span(row["prompt"], False), Span(row["completion"], True)]  # noqa: E731
    return LanguageModelling(name="prompts", fields=("prompt", "completion"), spans=spans)


def _apart(prompt: str, completion: str) -> bool:
    return not prompt or prompt[-1].isspace() or completion[0].isspace()


def _alpaca_row(record: Record, where: str) -> Row:
    row = {name: _text(record, name, where) for name in ("instruction", "output")}
    given = record.get("input")
    row["input"] = "" if given is None else _text(record, "input", where)
    if not row["output"].strip():
        raise ValueError(f"{where} has an empty 'output', which nothing can be learned from.")
    return row


def _alpaca_spans(row: Row, tokenizer: Any) -> list[Span]:
    """The prompt of Stanford Alpaca (Taori et al., 2023), with the sentence on the input where there is one."""
    del tokenizer
    with_input = ", paired with an input that provides further context" if row["input"].strip() else ""
    given = f"### Input:\n{row['input']}\n\n" if row["input"].strip() else ""
    prompt = (
        f"Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"
    )
    return [Span(prompt, False), Span(row["output"], True)]


def _alpaca_task(rows: Sequence[Row]) -> Task:
    del rows
    subject = lambda row: f"{row['instruction']} {row['input']}"  # noqa: E731
    fields = ("instruction", "input", "output")
    return LanguageModelling(name="alpaca", fields=fields, group=subject, spans=_alpaca_spans)


def _text_row(record: Record, where: str) -> Row:
    text = _text(record, "text", where)
    if not text.strip():
        raise ValueError(f"{where} has an empty 'text', which nothing can be learned from.")
    return {"text": text}


def _text_task(rows: Sequence[Row]) -> Task:
    del rows
    spans = lambda row, tokenizer: [Span(row["text"], True)]  # noqa: E731
    whole = lambda row: row.get("of", row["text"])  # noqa: E731
    return LanguageModelling(name="text", fields=("text",), group=whole, spans=spans, pieces=text_pieces)


# Labels and choices --------------------------------------------------------------------------------------------------


def _label_row(record: Record, where: str) -> Row:
    row: Row = {"text": _text(record, "text", where)}
    if record.get("pair") is not None:
        row["pair"] = _text(record, "pair", where)
    if empty := [name for name, text in row.items() if not text.strip()]:
        raise ValueError(f"{where} has an empty {empty[0]!r}, of which nothing can be told.")
    given = record.get("label")
    label = given.strip() if isinstance(given, str) else given  # " 1" beside "1" is the same class
    if not isinstance(label, (str, int, float)) or label == "" or label in (math.inf, -math.inf) or label != label:
        raise ValueError(f"{where} has the label {given!r}, which is no text and no number.")
    return row | {"label": label}


def _label_task(rows: Sequence[Row]) -> Task:
    pairs = sum("pair" in row for row in rows)
    if pairs not in (0, len(rows)):
        fewer = 2 * pairs <= len(rows)
        odd = next(row for row in rows if ("pair" in row) == fewer)
        raise ValueError(
            f"{place_of(odd, odd['text'])} has {'a' if fewer else 'no'} second text 'pair', where {pairs:,} of "
            f"{len(rows):,} rows have one: give all of them one, or none."
        )
    fields, labels = ("text", "pair")[: 1 + bool(pairs)], [row["label"] for row in rows]
    kinds = {type(label) for label in labels}
    if (kinds == {str} and _are_numbers(labels)) or kinds in ({float}, {float, int}):
        return Classification(
            name="labels",
            fields=fields,
            classes=(),
            metrics=("pearson", "spearman"),
            bounds=(-math.inf, math.inf),
        )
    if len(kinds) > 1:
        usual, *_, rare = [kind for kind, _ in Counter(map(type, labels)).most_common()]
        odd, other = (next(row for row in rows if type(row["label"]) is kind) for kind in (rare, usual))
        raise ValueError(
            f"{place_of(odd, odd['text'])} has the label {odd['label']!r}, a {_KINDS[rare]}, where others have such as "
            f"{other['label']!r}, a {_KINDS[usual]}: write all of them the same way."
        )
    classes = sorted(set(labels))
    if kinds == {str}:
        _tell_alike(classes)
    if len(classes) < 2:
        raise ValueError(f"Every row has the label {classes[0]!r}: there is nothing to tell apart.")
    if len(classes) > min(MOST_CLASSES, len(rows) // 2):
        raise ValueError(
            f"{len(rows)} rows have {len(classes)} different labels, too many to be classes; where these are numbers "
            "to be predicted, at least one of them must have a decimal point."
        )
    return Classification(
        name="labels",
        fields=fields,
        classes=tuple(map(str, classes)),
        metrics=("accuracy",),
    )


_KINDS = {str: "text", int: "whole number", float: "number with a fraction", bool: "truth value"}
"""Of labels, as a sentence calls them."""


def _are_numbers(labels: Sequence[str]) -> bool:
    """Whether texts, which all values of a CSV file are, are numbers of which any has a fraction or an exponent.

    A spreadsheet writes 2 for 2.0: not every one of them needs to.

    Raises:
      ValueError: for such numbers beside one that is not finite.
    """
    others = [label for label in labels if not _NUMBER.fullmatch(label)]
    fraction = next((label for label in labels if _NUMBER.fullmatch(label) and not _WHOLE.fullmatch(label)), None)
    if fraction is not None and others and all(_NO_NUMBER.fullmatch(label) for label in others):
        raise ValueError(
            f"A row has the label {others[0]!r}, where others have numbers such as {fraction}: leave it out, or give "
            "it a number."
        )
    return fraction is not None and not others


def _tell_alike(classes: Sequence[str]) -> None:
    """Warns of classes that look like one, or like numbers with a decimal comma."""
    known: dict[str, str] = {}
    for name in classes:
        other = known.setdefault(" ".join(name.casefold().split()), name)
        if other != name:
            warnings.warn(
                f"The labels {other!r} and {name!r} are two classes, though they differ in case or spaces alone.",
                stacklevel=2,
            )
            return
    if all(map(_COMMA.fullmatch, classes)) and (comma := next((name for name in classes if "," in name), None)):
        point = comma.replace(",", ".")
        warnings.warn(
            f"Labels such as {comma!r} are classes; a number to be predicted is written {point}.", stacklevel=2
        )


def _label_final(task: Classification, row: Row, where: str) -> Row:
    """The row with the number of its class in place of the label, or with the label as a float."""
    label, classes = row["label"], task.classes
    if ("pair" in row) != ("pair" in task.fields):
        has, others = ("a", "have none") if "pair" in row else ("no", "have one")
        raise ValueError(f"{where} has {has} second text 'pair', where the training rows {others}.")
    if classes and str(label) not in classes:
        raise ValueError(
            f"{where} has the label {label!r}, which no training row has: {', '.join(classes[:20])}. Mend it, or name "
            "other rows to test on with --test-data."
        )
    if classes:
        return row | {"label": classes.index(str(label))}
    if isinstance(label, bool) or (isinstance(label, str) and not _NUMBER.fullmatch(label)):
        raise ValueError(f"{where} has the label {label!r}, where the training rows have numbers.")
    try:
        value = float(label)
    except OverflowError:  # an integer of hundreds of digits
        value = math.inf
    if not abs(value) <= LARGEST:
        raise ValueError(f"{where} has the label {str(label)[:40]!r}, which is no number that float32 holds.")
    return row | {"label": value}


def _choice_row(record: Record, where: str) -> Row:
    if "question" in record and "prompt" in record:
        raise ValueError(f"{where} has both 'question' and 'prompt': rename one by --columns.")
    if "label" in record and "answer" in record:
        raise ValueError(f"{where} has both 'label' and 'answer': rename one by --columns.")
    question = _text(record, "question" if "question" in record else "prompt", where)
    choices, given = record.get("choices"), record.get("label", record.get("answer"))
    row = {"question": question, "choices": choices, "label": 0}
    check_choices(row, where)
    if isinstance(given, str):
        texts = [i for i, choice in enumerate(choices or ()) if choice == given]
        letter = LETTERS.find(given) if len(given) == 1 else -1
        found = texts or ([letter] if 0 <= letter < len(choices or ()) else [])
        if not found:
            raise ValueError(f"{where} has the answer {given[:60]!r}, which is no choice of its, and no letter of one.")
        given = found[0]
    if not isinstance(given, int) or isinstance(given, bool):
        raise ValueError(f"{where} has the answer {given!r}, which is the number of no choice, from 0, nor its text.")
    row["label"] = given
    check_choices(row, where)
    right = row["choices"][given]
    if row["choices"].count(right) > 1:
        raise ValueError(
            f"{where} has the right answer {right[:60]!r} among its choices more than once, so that saying it "
            "would be right and wrong: leave one out."
        )
    return row


def _choice_task(rows: Sequence[Row]) -> Task:
    del rows

    def pairs(row: Row) -> tuple[Pair, ...]:
        return tuple(Pair(f"Question: {row['question']}\nAnswer:", f" {choice}") for choice in row["choices"])

    return MultipleChoice(name="choices", fields=("question",), pairs=pairs)


def _text(record: Record, name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        what = "no" if value is None else f"{type(value).__name__} as its"
        raise ValueError(f"{where} has {what} {name!r}, which must be a text.")
    check_encodable(value, name, where)
    return value


FORMATS: dict[str, Format] = {
    "chat": Format(("messages",), (), chat_row, chat_task, "turns of a chat; the assistant's are learned"),
    "alpaca": Format(("instruction", "output"), ("input",), _alpaca_row, _alpaca_task, "instructions and outputs"),
    "choices": Format(
        ("question|prompt", "choices", "label|answer"), (), _choice_row, _choice_task, "questions with several answers"
    ),
    "prompts": Format(("prompt", "completion|answer"), (), _prompt_row, _prompt_task, "prompts and what follows them"),
    "labels": Format(
        ("text", "label"), ("pair",), _label_row, _label_task, "texts, or pairs of texts, with a label", _label_final
    ),
    "text": Format(("text",), (), _text_row, _text_task, "texts, all of which is learned"),
}
"""By name, in the order in which a file is tried for them."""


def recognised(record: Mapping[str, Any], where: str, known: Mapping[str, Format] = FORMATS) -> str:
    """The name of the format that records with these columns are of.

    Raises:
      ValueError: for none; the sentence lists them all.
    """
    for name, format in known.items():
        if format.fits(list(record)):
            return name
    listed = "; ".join(f"{', '.join(format.columns)} ({name})" for name, format in known.items())
    raise ValueError(
        f"{where} has the columns {', '.join(record)[:200]}, which are of no format that is known: {listed}. Say which "
        "column is which with --columns, such as prompt=question,answer=response."
    )


def renaming(columns: str | None) -> dict[str, str]:
    """`{name in the file: name in the format}` of `--columns`, such as prompt=question,answer=response.

    Raises:
      ValueError: for another form, for a name that no format has, and for one that is given twice.
    """
    names: dict[str, str] = {}
    known = sorted({name for format in FORMATS.values() for name in format.names})
    for part in (columns or "").split(",") if columns is not None else ():
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not (ours and equals and theirs):
            raise ValueError(f"--columns {columns!r} must be such as prompt=question,answer=response.")
        if ours not in known:
            raise ValueError(f"--columns names {ours!r}, which no format has: the names are {', '.join(known)}.")
        if theirs in names or ours in names.values():
            raise ValueError(f"--columns {columns!r} names {theirs if theirs in names else ours!r} twice.")
        names[theirs] = ours
    return names


def renamed(record: Record, names: Mapping[str, str], where: str) -> Record:
    """A record under the names of the formats.

    Raises:
      ValueError: where a column that is to be renamed is not there, or its new name is there already.
    """
    if missing := [name for name in names if name not in record]:
        raise ValueError(f"{where} has no column {missing[0]!r}, which --columns names: {', '.join(record)[:200]}.")
    taken = [new for old, new in names.items() if new in record and new not in names]
    if taken:
        raise ValueError(f"{where} has a column {taken[0]!r} already, which --columns gives another.")
    return {names.get(name, name): value for name, value in record.items()}
