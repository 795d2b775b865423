"""Texts of which parts are learned: their tokens, and how likely these parts are to a model."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from methods.tasks.batches import Watch, by_length
from methods.tasks.encode import Encoded, TokenBatch, marks, opening, prefix
from methods.tasks.task import LanguageModelling, Row, Span, UnfitModelError, handed, place_of
from methods.tasks.tokens import tokenized

ScoreFn = Callable[[TokenBatch], tuple[Any, Any]]


class SpannedSequence(NamedTuple):
    """A text's tokens, and which of them are learned; never the first, which nothing comes before."""

    ids: list[int]
    learned: list[bool]


@dataclasses.dataclass(frozen=True)
class Modelled:
    """What `evaluate_spans` found.

    Attributes:
      task: its name.
      metrics: "loss", the mean over all learned tokens in nats; "perplexity", its exponential; "exact", the share of
        rows all of whose learned tokens are the most likely ones, each after the right ones before it, so that the
        model would write them itself.
      predictions: `[rows]`, the share of a row's learned tokens that are the most likely ones.
      right: `[rows]`, whether all of them are.
      losses: `[rows]`, the sum over a row's learned tokens, in nats.
      counts: `[rows]`, how many there are.
      cut: how many rows were longer than the model takes and lost their left end.
    """

    task: str
    metrics: dict[str, float]
    predictions: np.ndarray
    right: np.ndarray
    losses: np.ndarray
    counts: np.ndarray
    cut: int = 0


def tokenize_spans(task: LanguageModelling, rows: Sequence[Row], tokenizer: Any) -> list[SpannedSequence]:
    """Each row's tokens at their natural lengths, of its whole text at once.

    Special tokens are as `methods.tasks.encode` has them. A token that lies across the border of two parts is learned
    if one of them is. Behind the text comes the tokenizer's mark of the end, learned, where the task is `ended`.

    Raises:
      ValueError: for no rows, and for a row with nothing to learn, or nothing to predict it from.
    """
    if not rows:
        raise ValueError("There is nothing to encode: the list of rows is empty.")
    first, _ = marks(tokenizer)
    spans = [_spans(task, row, tokenizer) for row in rows]
    texts = ["".join(span.text for span in row) for row in spans]
    found: Any = tokenized(tokenizer, texts, add_special_tokens=False, return_offsets_mapping=True)
    mark = tokenizer.eos_token_id if task.ended else None
    sequences = []
    for at, (row, whole, places) in enumerate(zip(spans, found["input_ids"], found["offset_mapping"], strict=True)):
        ends = list(itertools.accumulate(len(span.text) for span in row))
        learned = [_is_learned(row, ends, *place) for place in places]
        whole = list(whole)
        ends_here = rows[at].get("ends", True)
        if mark is not None and ends_here and row[-1].learned and whole[-1:] != [mark]:
            whole, learned = [*whole, mark], [*learned, True]
        front = opening(first, whole)
        if learned[:1] == [True] and not front:
            front = [] if whole[:1] == prefix(tokenizer) else prefix(tokenizer)
        whole, learned = [*front, *whole], [False] * len(front) + learned
        learned[:1] = [False]  # nothing comes before it, so that nothing predicts it
        if not any(learned):
            raise ValueError(f"{place_of(rows[at], texts[at])} has no token to learn that another comes before.")
        sequences.append(SpannedSequence(whole, learned))
    return sequences


def _is_learned(spans: Sequence[Span], ends: Sequence[int], begin: int, end: int) -> bool:
    """Whether a token from one character to another has any of a learned part; part k ends with character `ends[k]`."""
    last = min(bisect.bisect_left(ends, end), len(spans) - 1)
    first = min(bisect.bisect_right(ends, begin), last)
    return any(span.learned for span in spans[first : last + 1])


def in_pieces(task: LanguageModelling, rows: Sequence[Row], tokenizer: Any, length: int) -> list[Row]:
    """The rows, those of more than `length` tokens in pieces, where the task cuts its rows.

    Each of several pieces has its number under `"piece"`, from 0 in the order of the text.
    """
    if task.pieces is None:
        return list(rows)
    lengths = span_lengths(task, rows, tokenizer)
    found: list[Row] = []
    for row, count in zip(rows, lengths, strict=True):
        pieces = [row] if count <= length else task.pieces(handed(task.pieces, row), tokenizer, length)
        found += pieces if len(pieces) == 1 else [piece | {"piece": at} for at, piece in enumerate(pieces)]
    return found


def text_pieces(row: Row, tokenizer: Any, length: int) -> list[Row]:
    """A row with a `text` in rows of at most `length` tokens, each as long as it can be.

    A piece ends in front of a space where there is one in its second half. Together the pieces are the text; each has
    the whole under `"of"`, and all but the last have `"ends"`, False.
    """
    text = row["text"]
    # Beside it there may be a mark of the beginning, one of the end, and the space that the piece before has left.
    room = max(1, length - len(marks(tokenizer)[0]) - 3)
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    # A character of several tokens is in all of them, and may not be torn.
    starts = [at for at, (begin, _) in enumerate(places) if at == 0 or begin >= places[at - 1][1]]
    pieces, begin = [], 0
    while begin < len(places):
        fitting = [at for at in starts if begin < at <= begin + room]
        if begin + room >= len(places):
            fitting.append(len(places))
        if not fitting:  # one character of more tokens than there is room for
            return [row]
        fitting = [at for at in fitting if len(places) - at != 1] or fitting  # one token alone may have none before it
        border = {at: _border(text, places, at) for at in (begin, *fitting)}
        at_space = [at for at in fitting if at - begin > room // 2 and text[border[at] :][:1] in (" ", "")]
        end = len(places) if fitting[-1] == len(places) else (at_space or fitting)[-1]
        whole = text[border[begin] : border[end]]
        pieces.append(row | {"text": whole, "of": text} | ({"ends": False} if end < len(places) else {}))
        begin = end
    return pieces


def _border(text: str, places: Sequence[tuple[int, int]], at: int) -> int:
    """The character that a piece begins with whose first token this is: the space in front of it, if there is one."""
    if at in (0, len(places)):
        return 0 if at == 0 else len(text)
    begin = places[at][0]
    return begin - 1 if text[begin - 1] == " " and places[at - 1][0] < begin - 1 else begin


def _spans(task: LanguageModelling, row: Row, tokenizer: Any) -> list[Span]:
    """The parts of a row. Raises ValueError, with the place of the row, where the task makes none of it."""
    where = place_of(row, next(iter(row.values()), ""))
    try:
        found = [Span(*span) for span in task.spans(handed(task.spans, row), tokenizer)]
    except UnfitModelError:
        raise
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:
        raise task.failed(task.spans, error, where) from error
    if wrong := [span for span in found if not isinstance(span.text, str) or isinstance(span.learned, str)]:
        raise ValueError(
            f"{task.culprit('spans', where)} gave {wrong[0]!r:.80}: a Span is a text, and whether it is learned."
        )
    return _merged(found)


def _merged(spans: Sequence[Span]) -> list[Span]:
    """The same text, in parts that are learned by turns; empty parts are left out."""
    merged: list[Span] = []
    for span in spans:
        if span.text and merged and merged[-1].learned == span.learned:
            merged[-1] = Span(merged[-1].text + span.text, span.learned)
        elif span.text:
            merged.append(span)
    return merged or [Span("", True)]


def encode_spans(task: LanguageModelling, rows: Sequence[Row], tokenizer: Any, length: int) -> Encoded:
    """Rows as arrays of `length` tokens, and how many were cut on the left to fit. Raises ValueError."""
    first, fill = marks(tokenizer)
    return pad_spans(tokenize_spans(task, rows, tokenizer), length, first, fill)


def span_lengths(task: LanguageModelling, rows: Sequence[Row], tokenizer: Any) -> list[int]:
    """Tokens of each row, special tokens included."""
    return [len(sequence.ids) for sequence in tokenize_spans(task, rows, tokenizer)] if rows else []


def pad_spans(sequences: Sequence[SpannedSequence], length: int, first: Sequence[int] = (), fill: int = 0) -> Encoded:
    """Sequences as arrays `[N, length]`, filled up with `fill`; what is longer keeps `first` and its right end.

    Raises:
      ValueError: if nothing that is learned is left of a text.
    """
    tokens = np.full((len(sequences), length), fill, np.int32)
    mask, answer_mask = np.zeros((len(sequences), length), bool), np.zeros((len(sequences), length), bool)
    cut = 0
    for row, (ids, learned) in enumerate(sequences):
        if len(ids) > length:
            kept = length - len(first)
            ids, learned = [*first, *ids[-kept:]], [False] * len(first) + learned[-kept:]
            learned[:1], cut = [False], cut + 1
            if not any(learned):
                raise ValueError(f"Nothing that is learned of a text is left in its last {length} tokens.")
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        answer_mask[row, : len(ids) - 1] = learned[1:]
    return Encoded(TokenBatch(tokens, mask, answer_mask), cut)


def evaluate_spans(
    score: ScoreFn,
    task: LanguageModelling,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    multiple: int = 32,
    watch: Watch = iter,
) -> Modelled:
    """The loss and the exact matches of `rows`.

    Args:
      score: from a `TokenBatch` of `batch_size` rows to log p of its learned tokens, in nats, and how many of them are
        the most likely ones, `[batch_size]` both; jit it.
      task: whose rows these are.
      rows: what to score.
      tokenizer: a `transformers.PreTrainedTokenizerFast`.
      batch_size: rows a batch; the last one is filled up with copies.
      max_length: most tokens a row, what the model takes; longer ones lose their left end. None: no limit.
      multiple: of the length of a batch.
      watch: what the batches are drawn through, such as a progress bar.

    Raises:
      ValueError: for no rows, or a score that is not finite.
    """
    sequences = tokenize_spans(task, rows, tokenizer)
    first, fill = marks(tokenizer)
    lengths = [len(ids) for ids, _ in sequences]
    longest = -(-max(lengths) // multiple) * multiple
    max_length = longest if max_length is None else min(max_length, longest)
    losses, hits, counts = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(rows), int)
    for index, length in watch(by_length(lengths, batch_size, multiple, max_length)):
        batch, _ = pad_spans([sequences[i] for i in np.resize(index, batch_size)], length, first, fill)
        log_p, most_likely = score(batch)
        losses[index], hits[index] = -np.asarray(log_p)[: len(index)], np.asarray(most_likely)[: len(index)]
        counts[index] = batch.answer_mask.sum(axis=1)[: len(index)]
    if not np.isfinite(losses).all():
        worst = int(np.argmin(np.isfinite(losses)))
        raise ValueError(f"The loss of {task.name} row {worst} is {losses[worst]}.")
    right = hits == counts
    loss = float(losses.sum() / counts.sum())
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "exact": float(right.mean())}
    cut = sum(length > max_length for length in lengths)
    return Modelled(task.name, metrics, hits / counts, right, losses, counts, cut)
