"""Linear systems of implicit estimators that have no unique solution, found by taking one apart."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel.differentiation.gradients import reverse_gradient
from bilevel.hypergradients.implicit_function import AtSolution
from bilevel.hypergradients.optimality import FixedPointOf
from bilevel.hypergradients.query import Query, split_keys
from bilevel.running.replay import asked_for
from bilevel.sharding.processes import on_host
from bilevel.trees import cast_like, leaf_names, widened

LARGEST = 1024
"""Most unknowns of a system that is looked at: its matrix is formed."""


def undetermined(solver: Any, state: Any, data: Any) -> list[str]:
    """Leaves of the unknowns of a singular system, in the step from `state`, that its equations do not determine.

    Empty where the system is regular, too large to be looked at, or where there is none.
    """
    try:
        return _undetermined(solver, state, data)
    except Exception:  # a result is not lost for a warning's sake
        return []


def _undetermined(solver: Any, state: Any, data: Any) -> list[str]:
    estimator = getattr(solver, "hypergradient", None)
    if not isinstance(estimator, AtSolution) or not (asked := asked_for(solver, state, data)):
        return []
    problem, inner_state, outer, inner_batches, outer_batch, key = asked
    keys = split_keys(key, estimator.steps)
    query = Query(problem, estimator.steps, inner_state, outer, inner_batches, outer_batch, keys)
    trained, _ = estimator.trajectory(query)
    backward, condition, z = estimator.system(query, trained)
    flat, unravel = ravel_pytree(widened(z))
    if flat.size > LARGEST:
        return []

    @jax.jit
    def matrix(condition, z):
        def column(e):
            x = unravel(e)
            image = jax.jvp(lambda z: condition.residual(z, reverse_gradient), (z,), (cast_like(x, z),))[1]
            return ravel_pytree(backward.damped(image, x))[0]

        return jax.vmap(column)(jnp.eye(flat.size, dtype=flat.dtype)).T

    _, sizes, directions = np.linalg.svd(on_host(matrix(condition, z)))
    if not sizes[-1] <= 10 * flat.size * np.finfo(sizes.dtype).eps * sizes[0]:
        return []
    direction = jax.tree.leaves(unravel(jnp.asarray(directions[-1])))
    shares = [float(jnp.max(jnp.abs(x), initial=0.0)) for x in direction]
    names = zip(_names(condition, z, trained), shares, strict=True)
    return [name for name, share in names if share > 0.1 * max(shares)]


def _names(condition: Any, z: Any, trained: Any) -> list[str]:
    if not isinstance(condition, FixedPointOf):
        return leaf_names(z, "inner")
    moved = zip(leaf_names(trained.opt_state, "opt_state"), condition.moves, strict=True)
    return leaf_names(z[0], "inner") + [name for name, moves in moved if moves]
