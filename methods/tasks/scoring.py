"""Accuracy on multiple-choice rows by the likelihood of each choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from methods.tasks.batches import Watch, by_length
from methods.tasks.encode import marks, pad, tokenize
from methods.tasks.task import MultipleChoice, Row

ScoreFn = Callable[[np.ndarray, np.ndarray, np.ndarray], Any]


class Accuracy(NamedTuple):
    """`correct` of `total`, as a share, with the ends of its Wilson 95 % interval."""

    value: float
    low: float
    high: float
    correct: int
    total: int

    @classmethod
    def of(cls, right: np.ndarray) -> Accuracy:
        """Of the booleans `right`, one a question."""
        correct, total = int(right.sum()), len(right)
        return cls(correct / total, *wilson(correct, total), correct, total)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
      task: its name.
      accuracy: the primary one: the largest log p per character wins (`acc_norm` of the harness).
      per_token: the same, per token.
      unnormalised: the same, by log p itself (`acc`).
      cut: how many prompts, one a choice, were cut on the left to fit.
      predictions: `[rows]`, the choice taken per character.
      right: `[rows]`, whether that is the right one.
      log_likelihoods: for each row, log p of each choice, in nats.
    """

    task: str
    accuracy: Accuracy
    per_token: Accuracy
    unnormalised: Accuracy
    cut: int
    predictions: np.ndarray
    right: np.ndarray
    log_likelihoods: list[np.ndarray]


def evaluate(
    score_fn: ScoreFn,
    task: MultipleChoice,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    multiple: int = 32,
    watch: Watch = iter,
) -> Evaluation:
    """Score every choice of every row, and compare the best with the label.

    Sequences are sorted by length into batches of `batch_size`, each padded to a multiple of `multiple` tokens: few
    shapes, and so few compilations. The last batch of a shape is filled up with copies, whose scores are dropped. The
    space before a choice does not count as a character of it.

    Args:
      score_fn: `(tokens, mask, answer_mask)`, arrays `[batch_size, T]` as in `TokenBatch`, to log p(answer)
        `[B]`; jit it.
      task: whose rows these are.
      rows: what to score.
      tokenizer: a `transformers.PreTrainedTokenizerFast`.
      batch_size: B.
      max_length: T at most, what the model takes; what is longer loses the left end of its prompt and is counted.
        None: no limit.
      multiple: of T, where it is less.
      watch: what the batches are drawn through, such as a progress bar.

    Raises:
      ValueError: for no rows, a batch larger than there are choices, a `max_length` below 1, an answer
        that does not fit, or a score that has another shape or is not finite.
    """
    pairs = [pair for row in rows for pair in task.asked(row)]
    if not 1 <= batch_size <= len(pairs):
        raise ValueError(f"A batch of {batch_size} is not within 1 and the {len(pairs)} choices there are to score.")
    if multiple < 1 or (max_length is not None and max_length < 1):
        raise ValueError(f"max_length={max_length} and multiple={multiple} must be at least 1.")
    sequences = tokenize(pairs, tokenizer)
    first, fill = marks(tokenizer)
    scores = np.zeros(len(pairs))
    lengths = [len(ids) for ids, _ in sequences]
    if max_length is None:
        max_length = -(-max(lengths) // multiple) * multiple
    for index, length in watch(by_length(lengths, batch_size, multiple, max_length)):
        full = np.resize(index, batch_size)
        batch, _ = pad([sequences[i] for i in full], length, first, fill)
        values = np.asarray(score_fn(batch.tokens, batch.mask, batch.answer_mask))
        if values.shape != (batch_size,):
            raise ValueError(f"score_fn returned shape {values.shape} for {batch_size} sequences: one score each.")
        scores[index] = values[: len(index)]
    cut = sum(length > max_length for length in lengths)
    if not np.isfinite(scores).all():
        worst = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"The log-likelihood of choice {pairs[worst].answer[:60]!r} is {scores[worst]}.")
    ends = np.cumsum([len(row["choices"]) for row in rows])[:-1]
    characters = np.array([len(pair.answer.removeprefix(" ")) for pair in pairs])
    tokens = np.array([len(ids) - start for ids, start in sequences])
    labels = np.array([row["label"] for row in rows])

    def choose(values: np.ndarray) -> np.ndarray:
        return np.array([int(np.argmax(group)) for group in np.split(values, ends)])

    predictions = choose(scores / characters)
    return Evaluation(
        task.name,
        Accuracy.of(predictions == labels),
        Accuracy.of(choose(scores / tokens) == labels),
        Accuracy.of(choose(scores) == labels),
        cut,
        predictions,
        predictions == labels,
        np.split(scores, ends),
    )


def wilson(correct: int, total: int) -> tuple[float, float]:
    r"""The Wilson 95 % score interval of a binomial share p = correct/total, by `scipy.stats.binomtest`.

        ( p + z^2/2n -+ z sqrt( p(1-p)/n + z^2/4n^2 ) ) / ( 1 + z^2/n ),    z = 1.96

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    Raises:
      ValueError: unless `0 <= correct <= total` and `total >= 1`.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} correct of {total} is not a share of anything.")
    from scipy import stats  # half a second

    interval = stats.binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
