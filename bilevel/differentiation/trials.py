"""What an optimizer does, found out by some updates of made-up numbers.

Its trace is asked first (frozen.py). Numbers may show what a trace does not: that an entry stays where it is, that
parameters move where the gradient is 0. They are random, of both signs and of several sizes, and the optimizer's step
counts are moved on in between, so that a schedule that begins at 0 is seen later on.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from bilevel.differentiation import optimizers
from bilevel.differentiation.optimizers import Optimizer
from bilevel.trees import PyTree, is_inexact, is_key

_JUMPS = (0,) * 8 + (3, 0, 0, 26, 0, 251, 0, 3_001, 0, 30_011, 0, 300_007, 0, 0, 0)
"""By how many steps the counts of the optimizer are moved on before each update."""

_SIZES = (1.0, 0.3, 5.0, 1.0, 2.0, 0.3, 5.0, 1.0, 100.0, 1.0, 1e6)
"""Sizes of parameters, one after the other, and then again."""

_SMALL = 100
"""Units in the last place, of the largest entry of its leaf, up to which an update may be rounding."""

_LARGE = 20_000_000
"""Entries of parameters beyond which nothing is tried out."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """What was seen.

    Attributes:
      still: for each leaf, which entries no update by a random gradient has moved.
      drifts: whether an update moved something where all gradients were 0, or kept something in its state to do so.
      turns: whether updates moved something at every second step only, or at every third or fourth.
    """

    still: tuple[np.ndarray, ...]
    drifts: bool
    turns: bool


def trial(optimizer: Optimizer, params: PyTree, outer: PyTree) -> Trial | None:
    """Tries an optimizer out on parameters like `params`; a function of `outer`, at an outer variable like it.

    None where nothing can be said: it cannot be called with made-up numbers, or holds values of a trace.
    """
    seen = () if isinstance(optimizer, optax.GradientTransformation) else (outer,)
    leaves, structure = jax.tree.flatten((params, seen))
    if sum(np.size(x) for x in jax.tree.leaves(params)) > _LARGE:
        return None
    kinds = tuple(_kind(x) for x in leaves)
    try:
        return _tried(optimizer, structure, kinds)
    except Exception:  # an optimizer that cannot be tried out stays what its trace says
        return None


def _kind(leaf: Any) -> tuple[Any, ...]:
    if is_key(leaf):
        return jnp.shape(leaf), str(jax.random.key_impl(leaf)), True
    return jnp.shape(leaf), jnp.result_type(leaf), False


@functools.lru_cache(maxsize=64)
def _tried(optimizer: Optimizer, structure: Any, kinds: tuple[tuple[Any, ...], ...]) -> Trial | None:
    rng = np.random.default_rng(0)

    def sample(shape, kind, of_keys):
        if of_keys:
            return jnp.broadcast_to(jax.random.key(0, impl=kind), shape)
        inexact = jnp.issubdtype(kind, jnp.inexact)
        return jnp.asarray(rng.uniform(0.2, 0.8, shape) if inexact else np.ones(shape), kind)

    # Inside a trace, but of no traced value.
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params, seen = jax.tree.unflatten(structure, [sample(*kind) for kind in kinds])
        transform = optimizers.transformation(optimizer, *(seen or (None,)))
        update = jax.jit(
            lambda grads, state, params: transform.update(grads, state, params, value=jnp.ones(()), grad=grads)
        )
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(update(params, transform.init(params), params))):
            return None
        by_gradient, _ = _run(update, transform.init(params), params, rng, 1.0)
        at_rest, kept = _run(update, transform.init(params), params, rng, 0.0)
    still = tuple(np.all([_is_still(u) for u in column], axis=0) for column in zip(*by_gradient, strict=True))
    if all(entries.all() for entries in still):  # it takes turns that are longer than this
        still = tuple(np.zeros_like(entries) for entries in still)
    drifts = kept or any(_moves(u) for updates in at_rest for u in updates)
    moved = [i for i, updates in enumerate(by_gradient[:8]) if any(map(_moves, updates))]
    every = moved[1] - moved[0] if len(moved) > 1 else 1
    return Trial(still, drifts, every > 1 and moved == list(range(moved[0], 8, every)))


def _run(
    update: Any, state: PyTree, like: PyTree, rng: np.random.Generator, size: float
) -> tuple[list[list[np.ndarray]], bool]:
    """The updates one after the other, by random gradients of this size, and whether numbers in the state changed."""
    leaves, structure = jax.tree.flatten(like)
    found, first = [], state

    def draw(scale):
        return structure.unflatten([jnp.asarray(scale * rng.normal(size=x.shape), x.dtype) for x in leaves])

    counts: set[int] = set()
    for i, jump in enumerate(_JUMPS):
        before, whole = jax.tree.flatten(state)
        before = [x + jump if k in counts else x for k, x in enumerate(before)]
        updates, state = update(draw(size), whole.unflatten(before), draw(_SIZES[i % len(_SIZES)]))
        after = jax.tree.leaves(state)
        counts |= {k for k, (a, b) in enumerate(zip(before, after, strict=True)) if _counts(a) and b == a + 1}
        found.append([np.asarray(u) for u in jax.tree.leaves(updates)])
        if i == 0:
            first = state
    pairs = zip(*map(jax.tree.leaves, (first, state)), strict=True)
    return found, any(_moves(np.asarray(b) - np.asarray(a)) for a, b in pairs if _holds(a))


def _moves(change: np.ndarray) -> bool:
    """Whether something moved; where a number is not finite, the optimizer cannot work with what it was given."""
    return bool((np.isfinite(change) & (change != 0)).any())


def _holds(leaf: Any) -> bool:
    return np.ndim(leaf) > 0 and is_inexact(leaf)


def _counts(leaf: Any) -> bool:
    return np.ndim(leaf) == 0 and not is_key(leaf) and bool(jnp.issubdtype(jnp.result_type(leaf), jnp.integer))


def _is_still(update: np.ndarray) -> np.ndarray:
    sizes = np.abs(update)
    return sizes <= _SMALL * float(jnp.finfo(update.dtype).eps) * sizes.max(initial=0.0)
