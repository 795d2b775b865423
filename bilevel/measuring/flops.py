"""Floating-point operations, counted in traced programs: a compiler's own analysis counts a loop's body once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import slots
from bilevel.differentiation.tracing import executed, jaxprs, operation, times_run, without_unused
from bilevel.hypergradients.base import Hypergradient
from bilevel.hypergradients.per_task import PerTask
from bilevel.hypergradients.query import split_keys
from bilevel.problem.problem import Problem, split_inner
from bilevel.trees import PyTree, at_step, combine


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of `function(*arguments)`, counted in its jaxpr.

    A matrix product of (m, k) and (k, n) counts 2 m k n, every other operation on floating-point numbers one for each
    element of its largest argument or result; moving data counts nothing. The body of a `scan` counts as often as it
    runs (`cost_analysis` counts it once), of a `cond` the dearest branch counts, of a `while_loop` one turn. What no
    result is computed from counts nothing, since a compiler leaves it out: of `jax.grad`, for one, the value.

    Examples:
      >>> import numpy as np
      >>> from bilevel.extend import flops
      >>> flops(lambda a, b: a @ b, np.ones((2, 3)), np.ones((3, 4)))  # 2 * 2 * 3 * 4
      48.0
    """
    return operations(jax.make_jaxpr(function)(*arguments).jaxpr)


def gradient_flops(
    problem: Problem, hypergradient: Hypergradient, outer: PyTree, inner_batches: PyTree, key: jax.Array
) -> float:
    """Floating-point operations of one gradient of the inner loss (of `PerTask`: of one task's), the unit of costs.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.extend import flops, gradient_flops
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> arguments = jax.numpy.zeros(()), bilevel.FullBatch(train), jax.random.key(0)
      >>> gradient = gradient_flops(problem, bilevel.Unrolled(optax.sgd(0.5), steps=20), *arguments)
      >>> loss = flops(problem.inner_loss, jax.numpy.zeros(2), jax.numpy.zeros(()), train, None)
      >>> loss < gradient < 5 * loss
      True
    """

    def gradient(problem, outer, inner_batches, key):
        value, at = _first_loss(problem, hypergradient, outer, inner_batches, key)
        return jax.grad(value)(at)

    return flops(gradient, problem, outer, inner_batches, key)


def hvp_flops(
    problem: Problem, hypergradient: Hypergradient, outer: PyTree, inner_batches: PyTree, key: jax.Array
) -> float:
    """Floating-point operations of one Hessian-vector product of the inner loss, forward over reverse."""

    def product(problem, outer, inner_batches, key):
        value, at = _first_loss(problem, hypergradient, outer, inner_batches, key)
        return jax.jvp(jax.grad(value), (at,), (at,))[1]

    return flops(product, problem, outer, inner_batches, key)


def _first_loss(problem, hypergradient, outer, inner_batches, key):
    """The inner loss of the first step as a function of what is trained, and where that starts."""
    if isinstance(hypergradient, PerTask):
        hypergradient, inner_batches, _, key = hypergradient.first_task(inner_batches, key)
    xs, bind = slots(inner_batches, hypergradient.steps)
    batch = bind(jax.tree.map(lambda x: x[0], xs))
    moving, fixed = split_inner(problem, problem.start_inner(key, outer))
    at = at_step(outer, 0)
    keys = split_keys(key, hypergradient.steps).inner
    return lambda moving: problem.inner_value(combine(moving, fixed), at, batch, keys[0])[0], moving


_MOVES = frozenset(
    "broadcast_in_dim reshape transpose squeeze slice dynamic_slice dynamic_update_slice gather concatenate pad rev "
    "copy convert_element_type bitcast_convert_type iota stop_gradient device_put name select_n "
    "optimization_barrier split pvary pcast".split()
)


def operations(jaxpr: Any) -> float:
    """Counts the floating-point operations of a jaxpr, as `flops` does for a function."""
    return float(_counted(without_unused(jaxpr)))


def _counted(jaxpr: Any) -> float:
    return sum(_cost(eqn) for eqn in jaxpr.eqns if operation(eqn) not in _MOVES)


def _cost(eqn: Any) -> float:
    if operation(eqn) == "cond":
        return max(_counted(branch.jaxpr) for branch in eqn.params["branches"])
    inside = list(jaxprs(eqn.params))
    if inside and not _is_reduction(eqn):
        return times_run(eqn) * sum(_counted(jaxpr) for jaxpr in executed(eqn))
    out = sum(_elements(v) for v in eqn.outvars)
    if operation(eqn) == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    if operation(eqn) == "ragged_dot_general":
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (contracted, _), _ = numbers.dot_dimension_numbers
        # Groups of rows that are summed over give a product each, of their own rows alone.
        groups = eqn.invars[2].aval.shape[-1] if numbers.lhs_ragged_dimensions[0] in contracted else 1
        return 2 * out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted) / max(groups, 1)
    if operation(eqn) == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
        return 2 * out * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    return max([out, *(_elements(v) for v in eqn.invars)])


def has_while(jaxpr: Any) -> bool:
    """Whether `jaxpr` holds a loop that ends by a condition, so that its length is not in the program."""
    return any(operation(eqn) == "while" or any(map(has_while, jaxprs(eqn.params))) for eqn in jaxpr.eqns)


def _is_reduction(eqn: Any) -> bool:
    return operation(eqn).startswith(("reduce", "scatter", "cum", "arg", "sort"))


def _elements(variable: Any) -> int:
    aval = variable.aval
    inexact = hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, np.inexact)
    return math.prod(aval.shape) if inexact else 0
