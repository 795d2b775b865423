r"""Losses on answers, for use inside a model's loss.

For a sequence of tokens u_1 .. u_T whose answer tokens are those in A,

    log p(answer) = sum_{t in A} log softmax(logits_{t-1})[u_t]

Everything is computed in float32 or better and can be differentiated any number of times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from methods.tasks.encode import TokenBatch

LONGEST = 128
"""Positions of a sequence whose logits are in memory at a time: 0.5 GB for 8 sequences of a vocabulary of 128k."""


class Answers(NamedTuple):
    """What is left of a batch when only the positions that predict answers are kept.

    Attributes:
      hidden: `[B, A, D]`, hidden states at those positions.
      targets: int32 `[B, A]`, the tokens to predict.
      mask: bool `[B, A]`, False where a sequence has fewer than A.
    """

    hidden: jax.Array
    targets: jax.Array
    mask: jax.Array


class Prediction(NamedTuple):
    """What a model says, and what is right: the common form of answers and of classes.

    Attributes:
      logits: `[..., C]`.
      targets: int32 `[...]`.
      mask: bool `[...]`, which of them count.
    """

    logits: jax.Array
    targets: jax.Array
    mask: jax.Array


def cross_entropy(prediction: Prediction) -> jax.Array:
    """Mean negative log-likelihood of the targets that count, in nats; NaN if none does."""
    mask = prediction.mask
    values = jnp.where(mask, log_likelihood_each(prediction.logits, prediction.targets), 0)
    return -values.sum() / mask.sum().astype(values.dtype)


def answer_prediction(
    head: Callable[[jax.Array], jax.Array], hidden: jax.Array, batch: TokenBatch, width: int
) -> Prediction:
    """The answer tokens of a batch; arguments as in `answer_loss_at`, whose value is its `cross_entropy`."""
    answers = keep_answers(hidden, batch, width)
    logits = head(answers.hidden)
    whole = extents(jnp.asarray(batch.answer_mask)) <= width
    return Prediction(jnp.where(whole[:, None, None], logits, jnp.nan), answers.targets, answers.mask)


def bidirectional_kl(first: jax.Array, second: jax.Array, mask: jax.Array) -> jax.Array:
    r"""$\frac12 [KL(P_1 \| P_2) + KL(P_2 \| P_1)]$ in nats, the mean where `mask`; 0 for equal predictions.

    Args:
      first, second: logits `[..., C]` of two passes.
      mask: bool `[...]`.

    Source: R-Drop, Liang et al. 2021, arXiv 2106.14448.
    """
    a, b = (jax.nn.log_softmax(_wide(x)) for x in (first, second))
    return _mean(0.5 * ((jnp.exp(a) - jnp.exp(b)) * (a - b)).sum(axis=-1), mask)


def jensen_shannon(first: jax.Array, second: jax.Array, mask: jax.Array) -> jax.Array:
    r"""$\frac12 [KL(P_1 \| M) + KL(P_2 \| M)]$, $M = (P_1 + P_2) / 2$, as `bidirectional_kl` otherwise."""
    a, b = (jax.nn.log_softmax(_wide(x)) for x in (first, second))
    middle = jnp.logaddexp(a, b) - jnp.log(jnp.asarray(2, a.dtype))
    return _mean(0.5 * (jnp.exp(a) * (a - middle) + jnp.exp(b) * (b - middle)).sum(axis=-1), mask)


DIVERGENCES = {"kl": bidirectional_kl, "js": jensen_shannon}
"""How far two predictions are apart, by name."""


def answer_loss(logits: jax.Array, batch: TokenBatch) -> jax.Array:
    """Mean negative log-likelihood, in nats, over all answer tokens of the batch.

    Args:
      logits: `[B, T, V]`; those at position t predict token t + 1.
      batch: arrays `[B, T]`.

    Returns:
      A scalar; NaN for a batch without any answer token.
    """
    mask = jnp.asarray(batch.answer_mask)
    total = answer_log_likelihood(logits, batch).sum()
    return -total / mask.sum().astype(total.dtype)


def answer_log_likelihood(logits: jax.Array, batch: TokenBatch) -> jax.Array:
    """log p(answer) of each sequence, `[B]`, in nats. Arguments as in `answer_loss`."""
    return _log_likelihood(logits, jnp.roll(jnp.asarray(batch.tokens), -1, axis=1), jnp.asarray(batch.answer_mask))


def label_losses(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """For each row, the cross-entropy of its class in nats, or for labels that are no integers the squared error.

    Args:
      outputs: `[B, classes]`, or `[B, 1]` for a regression.
      labels: integers or floats `[B]`.

    Returns:
      `[B]`.
    """
    if jnp.issubdtype(jnp.asarray(labels).dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.asarray(labels))
    return (outputs[:, 0] - jnp.asarray(labels).astype(outputs.dtype)) ** 2


def answer_width(batch: TokenBatch) -> int:
    """The most positions from the first to the last that predicts an answer token, of this batch; on the host."""
    return int(extents(np.asarray(batch.answer_mask)).max())


def extents(answer_mask: Any) -> Any:
    """Positions from the first that predicts an answer token to the last, both included, `[B]` of a mask `[B, T]`.

    As many as there are answer tokens, where an answer is one stretch; more, where the turns of a chat are several.
    """
    length = answer_mask.shape[-1]
    first, behind = answer_mask.argmax(axis=-1), answer_mask[..., ::-1].argmax(axis=-1)
    return (length - behind - first) * answer_mask.any(axis=-1).astype(first.dtype)


def keep_answers(hidden: jax.Array, batch: TokenBatch, width: int) -> Answers:
    """The `width` positions from the first that predicts an answer token on.

    Args:
      hidden: `[B, T, D]`, what the model's head is applied to.
      batch: arrays `[B, T]`.
      width: A, static.
    """
    tokens, mask = jnp.asarray(batch.tokens), jnp.asarray(batch.answer_mask)
    position = jnp.argmax(mask, axis=1)[:, None] + jnp.arange(width)[None, :]
    inside = position < tokens.shape[1] - 1
    position = jnp.where(inside, position, 0)
    take = lambda x, at: jnp.take_along_axis(x, at, axis=1)  # noqa: E731
    return Answers(take(hidden, position[:, :, None]), take(tokens, position + 1), take(mask, position) & inside)


def answer_loss_at(
    head: Callable[[jax.Array], jax.Array], hidden: jax.Array, batch: TokenBatch, width: int
) -> jax.Array:
    """`answer_loss(head(hidden), batch)` with logits only where an answer is predicted: B*A*V of them, not
    B*T*V.

    Args:
      head: `[B, A, D] -> [B, A, V]`.
      hidden: `[B, T, D]`.
      batch: arrays `[B, T]`.
      width: A, at least `answer_width(batch)`; with less the result is NaN, never a loss on part of an
        answer.
    """
    total = answer_log_likelihood_at(head, hidden, batch, width).sum()
    return -total / jnp.asarray(batch.answer_mask).sum().astype(total.dtype)


def answer_log_likelihood_at(
    head: Callable[[jax.Array], jax.Array], hidden: jax.Array, batch: TokenBatch, width: int
) -> jax.Array:
    """`answer_log_likelihood(head(hidden), batch)`, `[B]`, with the logits of `answer_loss_at`.

    Answers of more than `LONGEST` tokens go by blocks of as many, whose logits are computed anew in the backward pass:
    B*LONGEST*V of them are in memory at a time.
    """
    return _sums(head, hidden, batch, width, lambda *of: (_log_likelihood(*of),))[0]


def answer_scores_at(
    head: Callable[[jax.Array], jax.Array], hidden: jax.Array, batch: TokenBatch, width: int
) -> tuple[jax.Array, jax.Array]:
    """`answer_log_likelihood_at`, and how many of the answer's tokens are the most likely ones there; `[B]` both.

    Where all are, the model would write the answer itself, token by token. Of two that are equally likely, the first in
    the vocabulary is the most likely one.
    """
    log_p, hits = _sums(head, hidden, batch, width, lambda *of: (_log_likelihood(*of), _hits(*of)))
    return log_p, hits


def _sums(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    batch: TokenBatch,
    width: int,
    measure: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]],
) -> tuple[jax.Array, ...]:
    """What `measure(logits, targets, mask)` sums over the answer tokens of each sequence, `[B]` each."""
    answers = keep_answers(hidden, batch, width)
    if width <= LONGEST:
        values = measure(head(answers.hidden), answers.targets, answers.mask)
    else:
        values = _by_blocks(head, answers, measure)
    part = extents(jnp.asarray(batch.answer_mask)) > width
    return tuple(jnp.where(part, jnp.nan, value) for value in values)


def _by_blocks(
    head: Callable[[jax.Array], jax.Array],
    answers: Answers,
    measure: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]],
) -> tuple[jax.Array, ...]:
    batch, width = answers.mask.shape
    missing = -width % LONGEST

    def blocks(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(batch, -1, LONGEST, *x.shape[2:]), 1, 0)

    @partial(jax.checkpoint, prevent_cse=False)  # inside a scan nothing can be merged with it
    def add(totals: tuple[jax.Array, ...], block: Answers) -> tuple[tuple[jax.Array, ...], None]:
        found = measure(head(block.hidden), block.targets, block.mask)
        return tuple(total + value for total, value in zip(totals, found, strict=True)), None

    cut = Answers(*map(blocks, answers))
    shapes = jax.eval_shape(lambda block: measure(head(block.hidden), block.targets, block.mask), _first(cut))
    return jax.lax.scan(add, tuple(jnp.zeros(batch, shape.dtype) for shape in shapes), cut)[0]


def _first(blocks: Answers) -> Answers:
    return Answers(*(x[0] for x in blocks))


def _log_likelihood(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    values = log_likelihood_each(logits, targets)
    return jnp.where(mask, values, jnp.zeros_like(values)).sum(axis=1)


def _hits(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    right = mask & (_wide(logits).argmax(axis=-1).astype(targets.dtype) == targets)
    return right.sum(axis=1).astype(_wide(logits).dtype)


def log_likelihood_each(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log p of each target, in nats: `[...]` of logits `[..., V]` and int32 targets `[...]`."""
    logits = _wide(logits)
    # Not log_softmax: only one entry of V is wanted.
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _wide(logits: jax.Array) -> jax.Array:
    return logits if jnp.finfo(logits.dtype).bits >= 32 else logits.astype(jnp.float32)


def _mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, values, 0).sum() / mask.sum().astype(values.dtype)
