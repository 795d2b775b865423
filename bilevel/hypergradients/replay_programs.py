"""The compiled programs of a replay, none of which depends on the number of steps, and the batches they are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.data import Batches, FullBatch, Indexed, check_batch, narrow
from bilevel.differentiation.gradients import mixed_gradient, reverse_gradient
from bilevel.hypergradients.query import Keys, Query, outer_value
from bilevel.hypergradients.training import InnerState, Trace, train
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.problem.problem import Problem
from bilevel.settings.fields import register, setting
from bilevel.trees import Batch, Outer, PyTree, combine, partition, replayed, unlike

_GRADIENTS = {"mixed": mixed_gradient, "reverse": reverse_gradient}


@register
@dataclasses.dataclass(frozen=True)
class Streamed(FullBatch):
    """The batches of a function of the step; where only shapes are looked at, its first batch stands for all."""

    batch: Any = dataclasses.field(default=None, metadata=setting(lambda value: value))


@jax.jit
def start(part: Unrolled, problem: Problem, inner_state: InnerState | None, outer: Outer, keys: Keys) -> InnerState:
    return part.resume(Query(problem, part.steps, inner_state, outer, None, None, keys))


def begun(part: Unrolled, query: Query) -> InnerState:
    """The state before the first step."""
    return start(part, query.problem, query.inner_state, query.outer, replayed(query.keys))


@partial(jax.jit, static_argnames="several")
def _start_reversed(
    part: Unrolled,
    problem: Problem,
    inner_state: InnerState | None,
    moving: Outer,
    fixed: PyTree,
    keys: Keys,
    by: PyTree,
    several: bool,
) -> Outer:
    def started(moving: Outer) -> PyTree:
        return partition(start(part, problem, inner_state, combine(moving, fixed), keys))[0]

    return _each(jax.vjp(started, moving)[1], several)(by)[0]


def begun_back(part: Unrolled, query: Query, by: PyTree, several: bool = False) -> Outer:
    """What the cotangent of the state before the first step is for `outer`."""
    at = query.problem, query.inner_state, query.moving, query.fixed, replayed(query.keys)
    return _start_reversed(part, *at, by, several=several)


def _each(pullback: Callable[[PyTree], Any], several: bool) -> Callable[[PyTree], Any]:
    """A pullback of one cotangent, or of several that are stacked: what it reads was computed once for all."""
    return jax.vmap(pullback) if several else pullback


@jax.jit
def advanced(
    part: Unrolled, problem: Problem, outer: Outer, state: InnerState, batches: Batch, keys: jax.Array, first: Any
) -> tuple[InnerState, Trace]:
    """A segment forward: the state after it, and what its steps reported."""
    options = {"first": first, "gradient": _GRADIENTS[part.mode]}
    return train(problem, part.optimizer, state, outer, batches, keys, **options)


@partial(jax.jit, static_argnames="several", donate_argnames="adjoint")
def reversed_segment(
    part: Unrolled,
    problem: Problem,
    moving: Outer,
    fixed: PyTree,
    state: InnerState,
    batches: Batch,
    keys: jax.Array,
    first: Any,
    adjoint: tuple[PyTree, Outer],
    several: bool = False,
) -> tuple[PyTree, Outer]:
    """A segment backward: the adjoint before it, of the adjoint after it; or several adjoints, which are stacked.

    The adjoint after it is used up: its memory is that of the result.
    """
    own, rest = partition(state)
    options = {"first": first, "gradient": _GRADIENTS[part.mode], "checkpoint": part.checkpoint}

    def trained(own: PyTree, moving: Outer) -> PyTree:
        at = combine(own, rest), combine(moving, fixed)
        return partition(train(problem, part.optimizer, *at, batches, keys, **options)[0])[0]

    by_state, so_far = adjoint
    by_state, more = _each(jax.vjp(trained, own, moving)[1], several)(by_state)
    return by_state, jax.tree.map(jnp.add, so_far, more)


@partial(jax.jit, static_argnames="several")
def loss_differentiated(
    problem: Problem,
    steps: Any,
    moving: Outer,
    fixed: PyTree,
    state: InnerState,
    batch: Batch,
    keys: Keys,
    several: bool = False,
) -> Any:
    own, rest = partition(state)

    def loss(own: PyTree, moving: Outer, batch: Batch) -> Any:
        return outer_value(problem, steps, combine(own, rest).params, combine(moving, fixed), batch, keys)

    slope = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, aux), adjoint = (jax.vmap(slope, (None, None, 0)) if several else slope)(own, moving, batch)
    return (value, aux), adjoint


def differentiated(query: Query, state: InnerState, several: bool = False) -> Any:
    """`((value, aux), adjoint)` of the outer loss after the last step; of several batches, which are stacked."""
    outcome, adjoint = loss_differentiated(*at_the_end(query, state), several=several)
    # A gradient that is one of its arguments (w, of w^2 / 2) would be used up with it.
    return outcome, jax.tree.map(jnp.copy, adjoint)


def at_the_end(query: Query, state: InnerState) -> tuple[Any, ...]:
    steps = jnp.asarray(query.steps, jnp.int32)
    return query.problem, steps, query.moving, query.fixed, state, query.outer_batch, replayed(query.keys)


def segment_bytes(part: Unrolled, query: Query) -> int:
    """Temporary bytes of the program that takes a segment backward, by its compiler."""
    state = jax.eval_shape(lambda: begun(part, query))
    _, adjoint = jax.eval_shape(partial(differentiated, query), state)
    given = query.problem, query.moving, query.fixed, state, *slot_like(query, part.steps, 0), adjoint
    analysis: Any = reversed_segment.lower(part, *given).compile().memory_analysis()
    return getattr(analysis, "temp_size_in_bytes", 0)


def slot(query: Query, length: int, number: int) -> tuple[Batch, jax.Array, jax.Array]:
    """Batches, keys and the number of the first step of a segment; the last segment may be shorter than `length`."""
    start, stop = number * length, min((number + 1) * length, query.steps)
    batches = query.inner_batches
    if isinstance(batches, Streamed):
        each = [batch_of(batches.batch, step, batches.arrays) for step in range(start, stop)]
        batches = jax.tree.map(lambda *rows: jnp.stack([jnp.asarray(row) for row in rows]), *each)
    else:
        batches = narrow(batches, start, stop)
    return batches, replayed(query.keys.inner)[start:stop], jnp.asarray(start, jnp.int32)


def slot_like(query: Query, length: int, number: int) -> tuple[Batch, jax.Array, jax.Array]:
    """The shapes of `slot`, for which no batch is asked."""
    if isinstance(batches := query.inner_batches, Streamed):
        stack = lambda x: jnp.broadcast_to(x, (query.steps, *jnp.shape(x)))  # noqa: E731
        query = dataclasses.replace(query, inner_batches=jax.eval_shape(partial(jax.tree.map, stack), batches.arrays))
        cut = lambda batches: slot(dataclasses.replace(query, inner_batches=batches), length, number)  # noqa: E731
        return jax.eval_shape(cut, query.inner_batches)
    return jax.eval_shape(lambda: slot(query, length, number))


def batch_of(batch: Callable[[int], Any], step: int, like: Any = None) -> Any:
    """`batch(step)`, checked: arrays, of the structure, shapes and dtypes of those of the first step."""
    found, what = batch(step), f"batch({step}) of the inner batches"
    if isinstance(found, FullBatch | Indexed | Batches):
        raise ValueError(f"{what} is a {type(found).__name__}: a function of the step gives the arrays of its batch.")
    check_batch(what, found)
    if like is not None and (differs := unlike(like, jax.tree.map(jnp.asarray, found), whole=True)) is not None:
        raise ValueError(f"{what} is not like that of step 0: {differs}.")
    return found
