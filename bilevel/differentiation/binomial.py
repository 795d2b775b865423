r"""Binomial checkpointing: a loop of K steps differentiated in reverse with c kept states.

The states of c steps are kept on the way forward. On the way back, the state before step t is recomputed from the
nearest kept one, and slots that became free are filled again on the way. With

$$ \beta(c, p) = \binom{c + p}{c} $$

steps, no step is evaluated more than p times before its derivative is taken, and no schedule with c states needs fewer
evaluations in all. The number of steps is known, so the schedule is computed beforehand (offline) and handed to a
loop as data: the step is compiled three times, whatever K is.

Limits: one reverse derivative; neither forward mode nor a derivative of the derivative.

References:
  Griewank & Walther 2000, Algorithm 799 (revolve), ACM TOMS 26(1); Griewank 1992 (treeverse).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from bilevel.differentiation.tracing import detached, evaluate, is_marked
from bilevel.trees import combine, is_inexact, partition


class Move(NamedTuple):
    """Load the state in slot `source`, which is that before step `start`, advance it `count` steps, store it."""

    source: int
    start: int
    count: int
    target: int


def schedule(length: int, slots: int) -> list[list[Move]]:
    """For t = length - 1, ..., 0, the moves that put the state before step t into slot `slots`.

    Slot 0 holds the state before step 0 from the beginning; slots 1 to `slots - 1` are free for kept states.
    """
    groups: list[list[Move]] = [[]]
    for move in _reversal(0, length, 0, slots):
        groups[-1].append(move)
        if move.target == slots:
            groups.append([])
    return groups[:-1]


def _reversal(start: int, length: int, slot: int, slots: int) -> Iterator[Move]:
    """Moves to reverse `length` steps from `start`, whose state is in `slot`; higher slots are free."""
    while length > 1 and slot + 1 < slots:
        count = advance(length, slots - slot)
        yield Move(slot, start, count, slot + 1)
        yield from _reversal(start + count, length - count, slot + 1, slots)
        length = count
    for t in reversed(range(length)):
        yield Move(slot, start, t, slots)


def advance(length: int, slots: int) -> int:
    """How far to go before keeping the next state: the first part and the rest then need no more than the whole.

    With p the repetitions that `length` steps need, the rest (one slot fewer) must fit beta(slots - 1, p) and the
    first part beta(slots, p - 1); within these bounds every choice costs the same, and the longest is taken that
    leaves the rest at p repetitions or p - 1.
    """
    p = repetitions(length, slots)
    return min(math.comb(slots + p - 1, slots), length - math.comb(slots + p - 2, slots - 1))


def repetitions(length: int, slots: int) -> int:
    """The smallest p with `length <= beta(slots, p)`."""
    p = 0
    while math.comb(slots + p, slots) < length:
        p += 1
    return p


def evaluations(length: int, slots: int) -> int:
    """Steps evaluated on the way back, besides those inside derivatives; those kept on the way forward not counted."""
    groups = schedule(length, slots)
    return sum(move.count for group in groups for move in group) - sum(move.count for move in groups[0][:-1])


def scan(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, length: int, slots: int):
    """`jax.lax.scan(step, carry, xs)`, differentiated with `slots` kept states. The outputs carry no derivative."""
    x = jax.tree.map(lambda x: x[0], xs)
    # What the step captured (weights, outer variables, data) comes out as `consts`: a custom rule sees arguments only.
    closed, shape = jax.make_jaxpr(step, return_shape=True)(carry, x)
    traced = _Traced(detached(closed), jax.tree.structure(shape), length, min(slots, length))
    try:
        return _scan(traced, closed.consts, carry, xs)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise ValueError(f"Binomial checkpoints allow no forward-mode derivative: {REMEDY}") from None


REMEDY = "use checkpoint='sqrt' or Levels(n), which can be differentiated in every way."
"""What to do where a schedule can be differentiated once alone."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Traced:
    """The step as a jaxpr whose first inputs are its constants, and the loop it is in."""

    jaxpr: Any
    structure: Any
    length: int
    slots: int

    def __call__(self, consts, carry, x):
        return jax.tree.unflatten(self.structure, evaluate(self.jaxpr, *consts, *jax.tree.leaves((carry, x))))


def _primal(step: _Traced, consts, carry, xs):
    return jax.lax.scan(lambda c, x: step(consts, c, x), carry, xs, length=step.length)


_scan = jax.custom_vjp(_primal, nondiff_argnums=(0,))


def not_differentiable(what: str) -> Callable[[jax.Array], jax.Array]:
    """The identity, which says that `what` no third level where it is differentiated."""

    @jax.custom_jvp
    def final(x):
        return x

    @final.defjvp
    def _(primals, tangents):
        raise ValueError(f"{what} no derivative of the hypergradient (no third level): {REMEDY}")

    return final


_final = not_differentiable("Binomial checkpoints allow")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Residual:
    states: Any
    consts: Any
    xs: Any
    perturbed: tuple[bool, ...] = dataclasses.field(metadata={"static": True})  # leaves of (consts, xs)


def _write(states, slot, state):
    return jax.tree.map(lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, slot, 0), states, state)


def _read(stack, index):
    return jax.tree.map(lambda s: jax.lax.dynamic_index_in_dim(s, index, 0, keepdims=False), stack)


def _forward(step: _Traced, *marked):
    consts, carry, xs = jax.tree.map(lambda leaf: leaf.value, marked, is_leaf=is_marked)
    # As in gradients.py: frozen weights get no cotangent, only what is being differentiated does.
    leaves = jax.tree.leaves((marked[0], marked[2]), is_leaf=is_marked)
    perturbed = tuple(leaf.perturbed and is_inexact(leaf.value) for leaf in leaves)
    consts, carry, xs = jax.tree.map(lambda x: _final(x) if is_inexact(x) else x, (consts, carry, xs))

    slot = np.full(step.length, step.slots, np.int32)  # the last slot is where states go that nobody keeps
    slot[0] = 0
    for move in schedule(step.length, step.slots)[0][:-1]:
        slot[move.start + move.count] = move.target

    def body(loop, x):
        states, carry = loop
        slot, x = x
        states = _write(states, slot, carry)
        carry, y = step(consts, carry, x)
        return (states, carry), y

    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (step.slots + 1, *x.shape)), carry)  # keys have no zeros
    (states, carry), ys = jax.lax.scan(body, (states, carry), (slot, xs), length=step.length)
    return (carry, ys), _Residual(states, consts, xs, perturbed)


def _backward(step: _Traced, residual: _Residual, cotangent):
    states, consts, xs = residual.states, residual.consts, residual.xs
    groups = schedule(step.length, step.slots)
    groups[0] = groups[0][-1:]  # the rest was done on the way forward
    moves = Move(*np.array([move for group in groups for move in group], np.int32).T)
    ends = np.cumsum([len(group) for group in groups]).astype(np.int32)
    starts = np.concatenate([np.zeros(1, np.int32), ends[:-1]])
    times = np.arange(step.length, dtype=np.int32)[::-1]

    def move(i, states):
        source, start, count, target = _read(moves, i)
        carry = _read(states, source)
        carry = jax.lax.fori_loop(start, start + count, lambda t, c: step(consts, c, _read(xs, t))[0], carry)
        return _write(states, target, carry)

    def split(leaves, wanted):
        return [x if w else None for x, w in zip(leaves, wanted, strict=True)]

    const_leaves = jax.tree.leaves(consts)
    wants_const, wants_x = residual.perturbed[: len(const_leaves)], residual.perturbed[len(const_leaves) :]

    def body(loop, item):
        states, ct, ct_consts = loop
        start, end, t = item
        states = jax.lax.fori_loop(start, end, move, states)
        moving, fixed = partition(_read(states, step.slots))
        x_now = jax.tree.leaves(_read(xs, t))

        def advance(moving, some_consts, some_x):
            every_const = combine(some_consts, const_leaves)
            every_x = jax.tree.unflatten(jax.tree.structure(xs), combine(some_x, x_now))
            return partition(step(every_const, combine(moving, fixed), every_x)[0])[0]

        _, pullback = jax.vjp(advance, moving, split(const_leaves, wants_const), split(x_now, wants_x))
        ct, more, ct_x = pullback(ct)
        return (states, ct, jax.tree.map(jnp.add, ct_consts, more)), ct_x

    ct = jax.tree.map(_instantiate, cotangent[0], residual.states, is_leaf=lambda c: isinstance(c, SymbolicZero))
    zeros = jax.tree.map(jnp.zeros_like, split(const_leaves, wants_const))
    loop, ct_xs = jax.lax.scan(body, (states, ct, zeros), (starts, ends, times), length=step.length)
    ct_xs = jax.tree.map(lambda x: x[::-1], ct_xs)
    return loop[2], loop[1], jax.tree.unflatten(jax.tree.structure(xs), ct_xs)


def _instantiate(ct, like):
    if not is_inexact(like):
        return None
    return jnp.zeros(like.shape[1:], like.dtype) if isinstance(ct, SymbolicZero) else _final(ct)


_scan.defvjp(_forward, _backward, symbolic_zeros=True)
