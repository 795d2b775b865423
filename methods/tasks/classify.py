"""Labelled texts, and choices, to arrays, and the metrics of a model that answers them with numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from methods.tasks.batches import Watch, by_length, cut, row_lengths
from methods.tasks.metrics import METRICS, checked
from methods.tasks.task import Classification, MultipleChoice, Row, place_of
from methods.tasks.tokens import tokenized


class LabelledBatch(NamedTuple):
    """N texts, or pairs of texts, of T tokens, padded on the right, and their labels.

    Attributes:
      tokens: int32 `[N, T]`.
      mask: bool `[N, T]`, True at a token, False at padding.
      types: int32 `[N, T]`, the segment a token belongs to (1 in the second text, where the tokenizer tells them
        apart).
      labels: int32 `[N]`, or float32 `[N]` for a regression.
    """

    tokens: Any
    mask: Any
    types: Any
    labels: Any


class ChoiceBatch(NamedTuple):
    """N questions with C choices each, every choice a pair of texts of T tokens: the prompt, and the choice.

    A question with fewer choices is filled up with empty ones, where `mask` is False throughout.

    Attributes:
      tokens: int32 `[N, C, T]`.
      mask: bool `[N, C, T]`.
      types: int32 `[N, C, T]`, as in `LabelledBatch`.
      labels: int32 `[N]`, the right choice.
    """

    tokens: Any
    mask: Any
    types: Any
    labels: Any


@dataclasses.dataclass(frozen=True)
class Classified:
    """What `evaluate_labelled` or `evaluate_choices` found.

    Attributes:
      task: its name.
      metrics: `{name: value}`, the task's own, the first being the primary one.
      outputs: `[rows, outputs]`, the logits or the one number of each row, or the score of each choice, -inf where
        there is none.
      predictions: `[rows]`, the largest logit's class, or the number.
      labels: `[rows]`.
      cut: how many rows were longer than the model takes and lost tokens from the end of their longer text.
    """

    task: str
    metrics: dict[str, float]
    outputs: np.ndarray
    predictions: np.ndarray
    labels: np.ndarray
    cut: int = 0

    @property
    def right(self) -> np.ndarray | None:
        """`[rows]`, whether the class is the right one; None for a regression."""
        return None if np.issubdtype(self.labels.dtype, np.inexact) else self.predictions == self.labels


def encode_labelled(task: Classification, rows: Sequence[Row], tokenizer: Any, length: int) -> LabelledBatch:
    """Rows as arrays of `length` tokens, special tokens included.

    What is longer loses tokens from the end of its longer text; `fits` tells which rows do not.

    Args:
      task: whose rows these are.
      rows: what to encode.
      tokenizer: a `transformers.PreTrainedTokenizerFast`.
      length: T.

    Raises:
      ValueError: for no rows, a length that the special tokens alone fill, or a text of no token.
    """
    _check_length(rows, tokenizer, length, pair=len(task.fields) > 1)
    encoded = _tokenize(_texts(task, rows), tokenizer, truncation="longest_first", max_length=length)
    _check_tokens(rows, encoded["input_ids"])
    labels = np.array([row["label"] for row in rows], np.int32 if task.classes else np.float32)
    return LabelledBatch(*_padded(encoded, tokenizer, length), labels)


def encode_choices(task: MultipleChoice, rows: Sequence[Row], tokenizer: Any, length: int) -> ChoiceBatch:
    """Questions as arrays of `length` tokens a choice, special tokens included.

    The prompt is the first text of the pair and the choice the second, its leading space left out. What is longer loses
    tokens from the end of its longer text; `choices_fit` tells which rows do not.

    Args:
      task: whose rows these are.
      rows: what to encode.
      tokenizer: a `transformers.PreTrainedTokenizerFast`.
      length: T.

    Raises:
      ValueError: for no rows, a length that the special tokens alone fill, or a text of no token.
    """
    _check_length(rows, tokenizer, length, pair=True)
    encoded = _tokenize(_choices(task, rows), tokenizer, truncation="longest_first", max_length=length)
    counts = [len(row["choices"]) for row in rows]
    _check_tokens([row for row in rows for _ in row["choices"]], encoded["input_ids"])
    there = np.arange(max(counts)) < np.array(counts)[:, None]
    arrays = []
    for flat, fill in zip(_padded(encoded, tokenizer, length), (tokenizer.pad_token_id or 0, False, 0), strict=True):
        each = np.full((*there.shape, length), fill, flat.dtype)
        each[there] = flat  # in the order of rows, and of the choices of each
        arrays.append(each)
    tokens, mask, types = arrays
    return ChoiceBatch(tokens, mask, types, np.array([row["label"] for row in rows], np.int32))


def fits(task: Classification, rows: Sequence[Row], tokenizer: Any, length: int) -> list[bool]:
    """Whether each row has at most `length` tokens, special tokens included."""
    return [count <= length for count in _lengths(_texts(task, rows), tokenizer)]


def choices_fit(task: MultipleChoice, rows: Sequence[Row], tokenizer: Any, length: int) -> list[bool]:
    """Whether every choice of a row, with its prompt, has at most `length` tokens, special tokens included."""
    return [longest <= length for longest in _longest(task, rows, tokenizer)]


def check_tokens(task: Classification | MultipleChoice, rows: Sequence[Row], tokenizer: Any) -> None:
    """Raises ValueError, with the place of the row, where a text has no token, as an empty one of some tokenizers."""
    if not rows:
        return
    if isinstance(task, Classification):
        _check_tokens(rows, _tokenize(_texts(task, rows), tokenizer, verbose=False)["input_ids"])
    else:
        of = [row for row in rows for _ in row["choices"]]
        _check_tokens(of, _tokenize(_choices(task, rows), tokenizer, verbose=False)["input_ids"])


def _check_tokens(rows: Sequence[Row], ids: Sequence[Sequence[int]]) -> None:
    for row, tokens in zip(rows, ids, strict=True):
        if not tokens:
            raise ValueError(f"{place_of(row, next(iter(row.values())))} has a text of no token: leave it out.")


def evaluate_labelled(
    answer: Callable[[LabelledBatch], Any],
    task: Classification,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    multiple: int = 32,
    watch: Watch = iter,
) -> Classified:
    """The task's metrics over `rows`.

    Rows are sorted by length into batches of `batch_size`, each padded to a multiple of `multiple` tokens: few shapes,
    and so few compilations. The last batch of a shape is filled up with copies.

    Args:
      answer: from a batch of `batch_size` rows to `[batch_size, outputs]`; jit it.
      task: whose rows these are.
      rows: what to answer.
      tokenizer: a `transformers.PreTrainedTokenizerFast`.
      batch_size: rows a batch.
      max_length: most tokens a row, what the model takes; longer ones lose their end and are counted. None: no limit.
      multiple: of the length of a batch.
      watch: what the batches are drawn through, such as a progress bar.

    Raises:
      ValueError: for no rows, or an answer that has another shape or is not finite, or a metric that is not.
    """
    lengths = _lengths(_texts(task, rows), tokenizer)
    length = _array_length(lengths, max_length, multiple)
    whole = encode_labelled(task, rows, tokenizer, length)
    outputs = _answers(answer, task, whole, task.outputs, batch_size, multiple, watch)
    predictions = outputs.argmax(axis=1) if task.classes else outputs[:, 0]
    values = checked(task.name, {name: METRICS[name](predictions, whole.labels) for name in task.metrics})
    shortened = sum(each > length for each in lengths)
    return Classified(task.name, values, outputs, predictions, whole.labels, shortened)


def evaluate_choices(
    answer: Callable[[ChoiceBatch], Any],
    task: MultipleChoice,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    multiple: int = 32,
    watch: Watch = iter,
) -> Classified:
    """The share of `rows` whose right choice has the highest score.

    Args:
      answer: from a batch of `batch_size` rows to the score of each choice, `[batch_size, C]`; jit it.
      task: whose rows these are.
      rows: what to answer.
      tokenizer, batch_size, max_length, multiple, watch: as of `evaluate_labelled`.

    Raises:
      ValueError: as `evaluate_labelled`.
    """
    lengths = _longest(task, rows, tokenizer)
    length = _array_length(lengths, max_length, multiple)
    whole = encode_choices(task, rows, tokenizer, length)
    outputs = _answers(answer, task, whole, whole.mask.shape[1], batch_size, multiple, watch)
    outputs = np.where(whole.mask.any(axis=2), outputs, -np.inf)
    predictions = outputs.argmax(axis=1)
    values = {"accuracy": float((predictions == whole.labels).mean())}
    shortened = sum(each > length for each in lengths)
    return Classified(task.name, values, outputs, predictions, whole.labels, shortened)


def _array_length(lengths: Sequence[int], most: int | None, multiple: int) -> int:
    """T of an array of texts of these lengths, of which no more than `most` tokens are kept."""
    longest = -(-max(lengths, default=1) // multiple) * multiple
    return longest if most is None else min(most, longest)


def _answers(
    answer: Callable[[Any], Any], task: Any, whole: Any, count: int, batch_size: int, multiple: int, watch: Watch
) -> np.ndarray:
    """The `count` numbers by which the model answers each row of a batch of all rows."""
    outputs = np.zeros((len(whole.labels), count))
    for index, length in watch(by_length(row_lengths(whole.mask), batch_size, multiple, whole.mask.shape[-1])):
        full = np.resize(index, batch_size)
        values = np.asarray(answer(cut(whole, full, length)))
        if values.shape != (batch_size, count):
            raise ValueError(
                f"The model answers {task.name} with shape {values.shape}, not {(batch_size, count)}: "
                "its head is of another task."
            )
        outputs[index] = values[: len(index)]
    if not np.isfinite(outputs).all():
        worst = int(np.argmin(np.isfinite(outputs).all(axis=1)))
        raise ValueError(f"The model's answer to {task.name} row {worst} is {outputs[worst].tolist()}.")
    return outputs


def _check_length(rows: Sequence[Row], tokenizer: Any, length: int, *, pair: bool) -> None:
    if not rows:
        raise ValueError("There is nothing to encode: the list of rows is empty.")
    if length <= (special := tokenizer.num_special_tokens_to_add(pair=pair)):
        raise ValueError(f"A length of {length} tokens leaves no room for text beside {special} special tokens.")


def _texts(task: Classification, rows: Sequence[Row]) -> list[list[str]]:
    """The texts of rows, a column a field."""
    return [[row[field] for row in rows] for field in task.fields]


def _choices(task: MultipleChoice, rows: Sequence[Row]) -> list[list[str]]:
    """The texts of the choices of rows, one after another: a column of prompts, and one of choices."""
    pairs = [pair for row in rows for pair in task.asked(row)]
    return [[pair.prompt for pair in pairs], [pair.answer.removeprefix(" ") for pair in pairs]]


def _lengths(texts: list[list[str]], tokenizer: Any) -> list[int]:
    """Tokens of each row of columns of texts, special tokens included."""
    return [len(ids) for ids in _tokenize(texts, tokenizer, verbose=False)["input_ids"]] if texts[0] else []


def _longest(task: MultipleChoice, rows: Sequence[Row], tokenizer: Any) -> list[int]:
    """Tokens of the longest choice of each row, with its prompt and special tokens."""
    lengths = iter(_lengths(_choices(task, rows), tokenizer))
    return [max(next(lengths) for _ in row["choices"]) for row in rows]


def _tokenize(texts: list[list[str]], tokenizer: Any, **options: Any) -> Any:
    return tokenized(tokenizer, *texts, return_token_type_ids=True, **options)


def _padded(encoded: Any, tokenizer: Any, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mask and types, `[N, length]` each."""
    count = len(encoded["input_ids"])
    tokens = np.full((count, length), tokenizer.pad_token_id or 0, np.int32)
    types, mask = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
    for i, (ids, kinds) in enumerate(zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)):
        tokens[i, : len(ids)], types[i, : len(ids)], mask[i, : len(ids)] = ids, kinds, True
    return tokens, mask, types
