"""Labelled texts to arrays, and the metrics of a model that answers them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from methods.tasks.batches import by_length, cut
from methods.tasks.metrics import METRICS, checked
from methods.tasks.task import Classification, Row
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


@dataclasses.dataclass(frozen=True)
class Classified:
    """What `evaluate_labelled` found.

    Attributes:
      task: its name.
      metrics: `{name: value}`, the task's own, the first being the primary one.
      outputs: `[rows, outputs]`, the logits or the one number of each row.
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
      ValueError: for no rows, or a length that the special tokens alone fill.
    """
    if not rows:
        raise ValueError("There is nothing to encode: the list of rows is empty.")
    if length <= (special := tokenizer.num_special_tokens_to_add(pair=len(task.fields) > 1)):
        raise ValueError(f"A length of {length} tokens leaves no room for text beside {special} special tokens.")
    encoded = _tokenize(task, rows, tokenizer, truncation="longest_first", max_length=length)
    tokens = np.full((len(rows), length), tokenizer.pad_token_id or 0, np.int32)
    types, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, (ids, kinds) in enumerate(zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)):
        tokens[i, : len(ids)], types[i, : len(ids)], mask[i, : len(ids)] = ids, kinds, True
    labels = np.array([row["label"] for row in rows], np.int32 if task.classes else np.float32)
    return LabelledBatch(tokens, mask, types, labels)


def fits(task: Classification, rows: Sequence[Row], tokenizer: Any, length: int) -> list[bool]:
    """Whether each row has at most `length` tokens, special tokens included."""
    return [count <= length for count in _lengths(task, rows, tokenizer)]


def evaluate_labelled(
    answer: Callable[[LabelledBatch], Any],
    task: Classification,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    multiple: int = 32,
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

    Raises:
      ValueError: for no rows, or an answer that has another shape or is not finite, or a metric that is not.
    """
    lengths = _lengths(task, rows, tokenizer)
    longest = -(-max(lengths, default=1) // multiple) * multiple
    max_length = longest if max_length is None else min(max_length, longest)  # no array is longer than its texts
    whole = encode_labelled(task, rows, tokenizer, max_length)
    outputs = np.zeros((len(rows), task.outputs))
    for index, length in by_length(whole.mask.sum(axis=1), batch_size, multiple, max_length):
        full = np.resize(index, batch_size)
        values = np.asarray(answer(cut(whole, full, length)))
        if values.shape != (batch_size, task.outputs):
            raise ValueError(
                f"The model answers {task.name} with shape {values.shape}, not {(batch_size, task.outputs)}: "
                "its head is of another task."
            )
        outputs[index] = values[: len(index)]
    if not np.isfinite(outputs).all():
        worst = int(np.argmin(np.isfinite(outputs).all(axis=1)))
        raise ValueError(f"The model's answer to {task.name} row {worst} is {outputs[worst].tolist()}.")
    predictions = outputs.argmax(axis=1) if task.classes else outputs[:, 0]
    values = checked(task.name, {name: METRICS[name](predictions, whole.labels) for name in task.metrics})
    shortened = sum(length > max_length for length in lengths)
    return Classified(task.name, values, outputs, predictions, whole.labels, shortened)


def _lengths(task: Classification, rows: Sequence[Row], tokenizer: Any) -> list[int]:
    """Tokens of each row, special tokens included."""
    return [len(ids) for ids in _tokenize(task, rows, tokenizer, verbose=False)["input_ids"]] if rows else []


def _tokenize(task: Classification, rows: Sequence[Row], tokenizer: Any, **options: Any) -> Any:
    texts = [[row[field] for row in rows] for field in task.fields]
    return tokenized(tokenizer, *texts, return_token_type_ids=True, **options)
