"""The gradient of the inner loss, prepared for being differentiated.

Both functions compute `grad_w f(w, outer, batch, key)`; they differ in how *its* derivative is taken.
`reverse_gradient` leaves it to reverse-over-reverse: the linearisation of a whole gradient evaluation, all its
activations, is kept until the backward pass. `mixed_gradient` carries the rule: for a cotangent v of the gradient,

    (d grad_w f / d(w, outer))^T v  =  d/de grad_(w, outer) f(w + e v, outer)   at e = 0,

one forward-mode derivative of one gradient. It holds because second derivatives commute; what is kept until the
backward pass is the point (w, outer, batch, key), not its graph. (Kemaev et al. 2025, MixFlow-MG, arXiv 2505.00793.)
Where a loss has a derivative of its own they need not commute: there `mixed_gradient` is `reverse_gradient`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from bilevel.data import resolve
from bilevel.differentiation.custom_rules import custom_rule
from bilevel.differentiation.tracing import detached, evaluate, is_marked, used
from bilevel.problem.micro_batches import MicroBatches, mean_of_parts
from bilevel.problem.problem import Problem, inner_outcome
from bilevel.trees import PyTree, cast_like, combine, is_inexact, replayed

INNER_GRADIENT = "bilevel_inner_gradient"
"""Name (`jax.ad_checkpoint.checkpoint_name`) of inner gradients worth keeping when their step is rematerialised."""


class Point(NamedTuple):
    """Everything that the inner loss reads where it is evaluated."""

    inner: PyTree  # inexact leaves only, None elsewhere
    outer: PyTree
    inner_fixed: PyTree
    outer_fixed: PyTree
    problem: Problem
    batch: PyTree
    key: Any


class Gradient(NamedTuple):
    """`grad` of the inner loss at a point, with its `value` and `aux`."""

    grad: PyTree
    value: jax.Array
    aux: PyTree
    updates: PyTree


class _Outcome(NamedTuple):
    """What the inner loss returns; the first two can be differentiated."""

    value: jax.Array
    updates: PyTree
    aux: PyTree


def _loss(point: Point) -> _Outcome:
    inner = combine(point.inner, point.inner_fixed)
    outer = combine(point.outer, point.outer_fixed)
    value, updates, aux = inner_outcome(point.problem, inner, outer, point.batch, point.key)
    return _Outcome(value, updates, jax.lax.stop_gradient(aux))


def reverse_gradient(point: Point) -> Gradient:
    """The gradient, differentiated by JAX itself."""
    if isinstance(point.problem.inner_loss, MicroBatches):
        return _by_parts(jax.checkpoint(reverse_gradient, prevent_cse=False), point)
    return _gradient_of(lambda inner: _loss(point._replace(inner=inner)), point)


def _by_parts(gradient: Callable[[Point], Gradient], point: Point) -> Gradient:
    """The gradient of a loss over `MicroBatches`, added up while it goes through them, each by `gradient`."""
    loss: Any = point.problem.inner_loss  # of `MicroBatches`
    problem = dataclasses.replace(point.problem, inner_loss=loss.loss)
    shares, batches, keys = loss.divided(resolve(point.batch), point.key)

    def step(total: PyTree, part: Any) -> tuple[PyTree, Any]:
        share, batch, key = part
        found = gradient(point._replace(problem=problem, batch=batch, key=key))
        add = lambda total, g: total + share.astype(total.dtype) * g.astype(total.dtype)  # noqa: E731
        return jax.tree.map(add, total, found.grad), (found.value, found.aux)

    # In half precision a sum of many small parts would lose them.
    wide = lambda x: x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32  # noqa: E731
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x)), point.inner)
    total, (values, aux) = jax.lax.scan(step, start, (shares, batches, keys))
    return Gradient(cast_like(total, point.inner), mean_of_parts(shares, values), aux, {})


def _gradient_of(loss: Callable[[PyTree], _Outcome], point: Point) -> Gradient:
    def pair(inner):
        outcome = loss(inner)
        return outcome.value, outcome

    (_, outcome), grad = jax.value_and_grad(pair, has_aux=True)(point.inner)
    return Gradient(grad, outcome.value, outcome.aux, outcome.updates)


def mixed_gradient(point: Point) -> Gradient:
    """The gradient, whose derivative is the forward-mode derivative of a gradient where second derivatives commute."""
    if not isinstance(point.problem.inner_loss, MicroBatches):
        result = _commuting(point)
    elif own_rule(point):
        result = None
    else:
        result = _by_parts(_commuting, point)
    if result is None:
        return reverse_gradient(point)
    # Its backward pass needs the point alone, so that a kept gradient spares its evaluation (of micro-batches it is
    # the sum that is kept). Reverse mode needs what the evaluation leaves behind, and would gain nothing.
    return result._replace(grad=jax.tree.map(_named, result.grad))


def _named(x: jax.Array) -> jax.Array:
    # By parts where it is complex: what is kept is marked by an operation that JAX has for real numbers alone.
    if jnp.iscomplexobj(x):
        return jax.lax.complex(_named(x.real), _named(x.imag))
    return checkpoint_name(x, INNER_GRADIENT)


def _commuting(point: Point) -> Any:
    """The gradient with its rule; None where second derivatives need not commute."""
    # The loss is traced once, here. What it captured from outside (values of a surrounding jit, vmap or grad, if the
    # problem was built inside one) comes out as `consts`: a custom rule sees its arguments only.
    closed, shape = jax.make_jaxpr(_loss, return_shape=True)(point)
    if _own_rule(closed, point):
        return None
    return _mixed_gradient(_Traced(detached(closed), jax.tree.structure(shape)), point, closed.consts)


def own_rule(point: Point) -> str | None:
    """The name of a function in the inner loss whose rule is not its derivative; None if second derivatives commute."""
    return _own_rule(jax.make_jaxpr(_loss)(point), point)


def _own_rule(closed: Any, point: Point) -> str | None:
    moving = jax.tree.leaves((point.inner, point.outer))  # the first of the loss's arguments
    return custom_rule(closed.jaxpr, [i < len(moving) for i in range(len(closed.in_avals))])


@dataclasses.dataclass(frozen=True, eq=False)
class _Traced:
    """`_loss` as a jaxpr whose first inputs are its constants."""

    jaxpr: Any
    structure: Any

    def __call__(self, point: Point, consts: list[Any]) -> _Outcome:
        return jax.tree.unflatten(self.structure, evaluate(self.jaxpr, *consts, *jax.tree.leaves(point)))

    def reads(self, consts: int) -> list[bool]:
        """For each leaf of `(point, consts)`, so many of them constants, whether the loss or an update reads it."""
        outcome = jax.tree.unflatten(self.structure, range(len(self.jaxpr.outvars)))
        wanted = {outcome.value, *jax.tree.leaves(outcome.updates)}
        read = used(self.jaxpr, [i in wanted for i in range(len(self.jaxpr.outvars))])
        return read[consts:] + read[:consts]


def _gradient(loss: _Traced, point: Point, consts: list[Any]) -> Gradient:
    return _gradient_of(lambda inner: loss(point._replace(inner=inner), consts), point)


_mixed_gradient = jax.custom_vjp(_gradient, nondiff_argnums=(0,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Residual:
    point: Point
    consts: list[Any]
    perturbed: tuple[bool, ...] = dataclasses.field(metadata={"static": True})


def _forward(loss: _Traced, *marked: Any):
    point, consts = jax.tree.map(lambda leaf: leaf.value, marked, is_leaf=is_marked)
    leaves = jax.tree.leaves(marked, is_leaf=is_marked)
    # Only what is being differentiated gets a cotangent: frozen weights inside `problem` never do, but a third-level
    # variable that a user put there, or captured, does. A leaf that the loss does not read gets none at all, so that
    # the absence of an influence stays visible in the trace.
    pairs = zip(leaves, loss.reads(len(consts)), strict=True)
    perturbed = tuple(read and leaf.perturbed and is_inexact(leaf.value) for leaf, read in pairs)
    return _gradient(loss, point, consts), _Residual(point, consts, perturbed)


def _backward(loss: _Traced, residual: _Residual, cotangent: Gradient):
    residual = replayed(residual)

    def is_zero(leaf):
        return isinstance(leaf, SymbolicZero)

    leaves, structure = jax.tree.flatten((residual.point, residual.consts))
    wanted = [i for i, p in enumerate(residual.perturbed) if p]
    direction = jax.tree.map(
        lambda ct: jnp.zeros(ct.shape, ct.dtype) if is_zero(ct) else ct, cotangent.grad, is_leaf=is_zero
    )

    def moved(inner):
        """The loss as a function of what is wanted, from `inner`, and where that stands."""
        point = jax.tree.leaves((residual.point._replace(inner=inner), residual.consts))

        def outcome(moving):
            full = list(point)
            for i, leaf in zip(wanted, moving, strict=True):
                full[i] = leaf
            return loss(*jax.tree.unflatten(structure, full))

        return outcome, [point[i] for i in wanted]

    def gradients(inner):
        outcome, at = moved(inner)
        return jax.grad(lambda moving: outcome(moving).value)(at)

    first, second = jax.jvp(gradients, (residual.point.inner,), (direction,))
    if not is_zero(cotangent.value):
        second = [h + cotangent.value.astype(g.dtype) * g for h, g in zip(second, first, strict=True)]
    arriving = [ct for ct in jax.tree.leaves(cotangent.updates, is_leaf=is_zero) if not is_zero(ct)]
    if arriving:
        # What training carries beside the weights is differentiated by one reverse pass of its own.
        reached = [not is_zero(ct) for ct in jax.tree.leaves(cotangent.updates, is_leaf=is_zero)]
        residual = replayed(residual)
        outcome, at = moved(residual.point.inner)
        updates = lambda moving: [  # noqa: E731
            x for x, r in zip(jax.tree.leaves(outcome(moving).updates), reached, strict=True) if r
        ]
        _, pull = jax.vjp(updates, at)
        second = [h + s for h, s in zip(second, pull(arriving)[0], strict=True)]
    result: list[Any] = [None] * len(leaves)
    for i, leaf in zip(wanted, second, strict=True):
        result[i] = leaf
    return jax.tree.unflatten(structure, result)


_mixed_gradient.defvjp(_forward, _backward, symbolic_zeros=True)
