"""The gradient of the inner loss, prepared for being differentiated.

Both functions compute `grad_w f(w, outer, batch, key)`; they differ in how *its* derivative is taken.
`reverse_gradient` leaves it to reverse-over-reverse: the linearisation of a whole gradient evaluation, all its
activations, is kept until the backward pass. `mixed_gradient` carries the rule: for a cotangent v of the gradient,

    (d grad_w f / d(w, outer))^T v  =  d/de grad_(w, outer) f(w + e v, outer)   at e = 0,

one forward-mode derivative of one gradient. It holds because second derivatives commute; what is kept until the
backward pass is the point (w, outer, batch, key), not its graph. (Kemaev et al. 2025, MixFlow-MG, arXiv 2505.00793.)
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from bilevel.problem import Problem
from bilevel.trees import PyTree, combine, is_inexact


class Point(NamedTuple):
    """Where the inner loss is evaluated: everything it reads."""

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


def _loss(point: Point) -> tuple[jax.Array, PyTree]:
    inner = combine(point.inner, point.inner_fixed)
    outer = combine(point.outer, point.outer_fixed)
    value, aux = point.problem.inner_value(inner, outer, point.batch, point.key)
    return value, jax.lax.stop_gradient(aux)


def reverse_gradient(point: Point) -> Gradient:
    """The gradient, differentiated by JAX itself."""
    function = jax.value_and_grad(lambda inner: _loss(point._replace(inner=inner)), has_aux=True)
    (value, aux), grad = function(point.inner)
    return Gradient(grad, value, aux)


@jax.custom_vjp
def mixed_gradient(point: Point) -> Gradient:
    """The gradient, whose derivative is the forward-mode derivative of a gradient."""
    return reverse_gradient(point)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Residual:
    point: Point
    perturbed: tuple[bool, ...] = dataclasses.field(metadata={"static": True})


def _forward(marked: Point):
    def is_marked(leaf):
        return type(leaf).__name__ == "CustomVJPPrimal"

    point = jax.tree.map(lambda leaf: leaf.value, marked, is_leaf=is_marked)
    leaves = jax.tree.leaves(marked, is_leaf=is_marked)
    # Only what is being differentiated gets a cotangent: frozen weights inside `problem` never do, but a third-level
    # variable that a user put there does.
    perturbed = tuple(leaf.perturbed and is_inexact(leaf.value) for leaf in leaves)
    return reverse_gradient(point), _Residual(point, perturbed)


def _backward(residual: _Residual, cotangent: Gradient):
    def is_zero(leaf):
        return isinstance(leaf, SymbolicZero)

    leaves, structure = jax.tree.flatten(residual.point)
    wanted = [i for i, p in enumerate(residual.perturbed) if p]
    direction = jax.tree.map(
        lambda ct: jnp.zeros(ct.shape, ct.dtype) if is_zero(ct) else ct, cotangent.grad, is_leaf=is_zero
    )

    def gradients(inner):
        point = jax.tree.leaves(residual.point._replace(inner=inner))

        def loss(moving):
            full = list(point)
            for i, leaf in zip(wanted, moving, strict=True):
                full[i] = leaf
            return _loss(jax.tree.unflatten(structure, full))[0]

        return jax.grad(loss)([point[i] for i in wanted])

    first, second = jax.jvp(gradients, (residual.point.inner,), (direction,))
    if not is_zero(cotangent.value):
        second = [h + cotangent.value.astype(g.dtype) * g for h, g in zip(second, first, strict=True)]
    result: list[Any] = [None] * len(leaves)
    for i, leaf in zip(wanted, second, strict=True):
        result[i] = leaf
    return (jax.tree.unflatten(structure, result),)


mixed_gradient.defvjp(_forward, _backward, symbolic_zeros=True)
