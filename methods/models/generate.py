"""Greedy decoding with a cache of keys and values: the prompts in one pass, then one token a step."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from methods import processes
from methods.models import hooks
from methods.models.causal import Causal
from methods.models.loading import Pretrained


class Generated(NamedTuple):
    """What follows each of B prompts.

    tokens: int32 [B, N]. mask: bool [B, N], True up to the first stop token, which is left out; all that follows it
    means nothing.
    """

    tokens: np.ndarray
    mask: np.ndarray


def greedy(
    pretrained: Pretrained,
    tokens: Any,
    mask: Any = None,
    max_new_tokens: int = 64,
    stop: Sequence[int] = (),
    adapt: hooks.Hook = hooks.identity,
) -> Generated:
    """The most likely next token, N = `max_new_tokens` times or until every sequence has stopped.

    The same tokens as from argmax over the model's logits of the sequence so far, at the cost of one token each (up to
    rounding: where two logits are as good as equal, either may come first). One compilation for each [B, T], N and
    number of stop tokens.

    Args:
      pretrained: a decoder.
      tokens: integers [B, T], the prompts.
      mask: bool [B, T], True at tokens that count; padding anywhere. None: all count.
      max_new_tokens: N, at least 1.
      stop: token ids, each of which ends its sequence; none: all sequences have N tokens.
      adapt: the hook; in a step it sees T = 1 token, and T + N slots on the last axis of the attention maps.

    Raises:
      ValueError: for a model that is no decoder, a prompt without tokens, fewer than one new token, or more tokens
        than the model has positions; and as `Causal.hidden`.
    """
    model, config = pretrained.model, pretrained.config
    if not isinstance(model, Causal):
        raise ValueError(f"{type(model).__name__} does not predict next tokens: decoding needs a causal model.")
    tokens = np.asarray(tokens)
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if mask.shape == tokens.shape and not mask.any(axis=-1).all():
        raise ValueError(f"prompt {int(np.argmin(mask.any(axis=-1)))} has no token: there is nothing to continue.")
    if tokens.shape[-1] + max_new_tokens > config.max_positions:
        raise ValueError(
            f"prompts of {tokens.shape[-1]} tokens and max_new_tokens={max_new_tokens} are more than the model's "
            f"{config.max_positions} positions: shorten the prompts or generate less."
        )
    ends = jnp.asarray(np.asarray(tuple(stop), np.int32))
    generated = _greedy(model, max_new_tokens, pretrained.weights, tokens, mask, ends, adapt)
    return Generated(*map(processes.whole, generated))


@partial(jax.jit, static_argnums=(0, 1))
def _greedy(model, count, weights, tokens, mask, ends, adapt):
    variables = {"params": weights}

    def extend(tokens, mask, cache):
        hidden, cache = model.apply(variables, tokens, mask, cache, adapt, method="extend")
        token = jnp.argmax(model.apply(variables, hidden[:, -1], method="head"), axis=-1).astype(jnp.int32)
        return token, cache

    def step(state):
        at, token, running, cache, out, kept = state
        running = running & ~(token[:, None] == ends[None, :]).any(axis=1)
        out, kept = out.at[:, at].set(token), kept.at[:, at].set(running)
        # Stopped sequences go on unseen; nothing of another sequence depends on them.
        token, cache = extend(token[:, None], jnp.ones_like(token, bool)[:, None], cache)
        return at + jnp.int32(1), token, running, cache, out, kept

    def wanted(state):
        return (state[0] < count) & state[2].any()

    if tokens.ndim == 2 and mask.shape == tokens.shape and mask.dtype == jnp.bool_:
        # Padding to the left, whatever it was: all sequences end in the same slot. Else `extend` says what is wrong.
        order = jnp.argsort(mask, axis=1, stable=True)
        tokens, mask = jnp.take_along_axis(tokens, order, axis=1), jnp.take_along_axis(mask, order, axis=1)
    batch, length = tokens.shape[0], tokens.shape[-1]
    cache = model.apply(variables, batch, length + count, method="empty_cache")
    token, cache = extend(tokens, mask, cache)
    out, kept = jnp.zeros((batch, count), jnp.int32), jnp.zeros((batch, count), bool)
    state = (jnp.int32(0), token, jnp.ones(batch, bool), cache, out, kept)
    return jax.lax.while_loop(wanted, step, state)[4:]
