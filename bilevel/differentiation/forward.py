r"""Gradients by forward mode: a tangent for every number of the argument, pushed through the function in chunks.

For a function of n numbers whose evaluation needs time t and memory m, the gradient takes about (1 + 1/c) n t and
(1 + c) m, with c tangents a chunk; nothing is kept for a backward pass, however long the function's loops are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.differentiation.influence import dependence, refuse_reverse_rules
from bilevel.differentiation.tracing import detached, evaluate
from bilevel.trees import PyTree, replayed


def forward_value_and_grad(
    function: Callable[[PyTree], tuple[jax.Array, PyTree]],
    moving: PyTree,
    chunk: int,
) -> tuple[tuple[jax.Array, PyTree], PyTree]:
    """`jax.value_and_grad(function, has_aux=True)(moving)`, by forward mode.

    Args:
      function: `moving -> (scalar, aux)`.
      moving: tree of inexact arrays.
      chunk: how many numbers are differentiated at once.

    Returns:
      `((value, aux), gradient)`; the gradient by a leaf that the value does not depend on is a constant 0.
    """
    leaves, structure = jax.tree.flatten(moving)
    # A complex number is two real ones; jax's gradient is the derivative by the first minus i times that by the second.
    parts = [[jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x] for x in leaves]

    def join(parts):
        return structure.unflatten([jax.lax.complex(*p) if len(p) == 2 else p[0] for p in parts])

    def push(tangents):
        return jax.jvp(lambda parts: function(join(parts)), (parts,), (tangents,), has_aux=True)

    # Traced once: for what has an influence, and for the evaluation.
    closed, shape = jax.make_jaxpr(push, return_shape=True)(parts)
    refuse_reverse_rules(closed.jaxpr)
    program = detached(closed)

    def derivative(tangents):
        leaves = evaluate(program, *replayed(closed.consts), *jax.tree.leaves(tangents))
        value, slope, aux = jax.tree.unflatten(jax.tree.structure(shape), leaves)
        return slope, (value, aux)

    reached = dependence(lambda tangents: derivative(tangents)[0], parts)[0]
    slopes, (value, aux) = _slopes(derivative, parts, reached, chunk)
    grads = [g[0] if len(g) == 1 else jax.lax.complex(g[0], -g[1]) for g in _split(slopes, parts)]
    any_reached = [any(r) for r in _split(reached, parts)]

    pairs = zip(grads, any_reached, strict=True)
    return (value, aux), structure.unflatten([g if reached else jnp.zeros_like(g) for g, reached in pairs])


def _split(flat: list[Any], parts: list[list[jax.Array]]) -> list[list[Any]]:
    items = iter(flat)
    return [[next(items) for _ in part] for part in parts]


def _slopes(derivative, parts, reached: list[bool], chunk: int) -> tuple[list[jax.Array], Any]:
    """The derivative by every number of the reached arrays in `parts` (0 by others), and what else came with it."""
    arrays, structure = jax.tree.flatten(parts)
    sizes = [x.size if r else 0 for x, r in zip(arrays, reached, strict=True)]
    total = max(1, sum(sizes))  # without any, one pass for the value
    width = -(-total // -(-total // chunk))  # equal chunks, no wider than `chunk`
    count = -(-total // width)

    def direction(number):
        tangents, start = [], 0
        for x, size in zip(arrays, sizes, strict=True):
            place = jnp.arange(x.size, dtype=number.dtype).reshape(x.shape) + start
            tangents.append((place == number).astype(x.dtype) if size else jnp.zeros_like(x))
            start += size
        return structure.unflatten(tangents)

    def body(carried, first):
        del carried  # the value is the same each time: carried, not stacked
        numbers = first + jnp.arange(width, dtype=first.dtype)
        slope, rest = jax.vmap(lambda n: derivative(direction(n)), out_axes=(0, None))(numbers)
        return rest, slope

    starts = jnp.arange(count) * width
    shape = jax.eval_shape(lambda: body(None, starts[0])[0])
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
    rest, slopes = jax.lax.scan(body, blank, starts)
    slopes, result, start = slopes.reshape(-1), [], 0
    for x, size in zip(arrays, sizes, strict=True):
        result.append(slopes[start : start + size].reshape(x.shape).astype(x.dtype) if size else jnp.zeros_like(x))
        start += size
    return result, rest
