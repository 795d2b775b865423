"""Updates of inner optimizers that are so steep at a gradient of exactly 0 that a hypergradient is of no use."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import slots
from bilevel.differentiation import optimizers
from bilevel.differentiation.influence import SteepUpdateWarning
from bilevel.hypergradients.one_step import OneStep
from bilevel.hypergradients.query import Query, split_keys
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.problem.problem import inner_outcome, split_inner
from bilevel.running.chunks import chunk
from bilevel.running.replay import asked_for
from bilevel.trees import at_step, combine, leaf_names, partition

STEEP = 1e3
"""Norm from which a hypergradient is looked into."""
AMPLIFIED = 1e2
"""Growth of a perturbation from which an update counts as steep."""

REMEDY = "start training elsewhere, or give the optimizer a larger eps (as in optax.adam(rate, eps=1e-3))"


def may_be_steep(rows: dict[str, np.ndarray]) -> bool:
    """Whether a hypergradient of a chunk is so large that it has to be looked into."""
    return bool(np.max(rows.get("hypergradient_norm", np.zeros(1))) > STEEP)


def warn_if_steep(solver, record, capacity, before, data, rows) -> None:
    """Warns if a hypergradient of a chunk, which `may_be_steep`, is so for a steep update.

    Args, Warns:
      As for `bilevel.running.diagnosis.refuse_failed`; SteepUpdateWarning, names the inner leaf.
    """
    norms = rows["hypergradient_norm"]
    at, state = int(np.argmax(norms > STEEP)), before
    if at:
        state = chunk(solver, record, capacity, before, data, at)[0]
    if names := steep_leaves(solver, state, data):
        warnings.warn(
            f"The hypergradient has norm {norms[at]:.2g}: {why(names)}; {REMEDY}.", SteepUpdateWarning, stacklevel=3
        )


def why(names: list[str]) -> str:
    """What is wrong at the inner leaves of these names."""
    return (
        f"the inner gradient of {', '.join(names)} is exactly 0 but depends on outer, and there the optimizer's update "
        "has a slope of about 1 / eps"
    )


def steep_leaves(solver: Any, state: Any, data: Any) -> list[str]:
    r"""Inner leaves an update of which, in the outer step taken from `state`, amplifies a change of `outer` enormously.

    Where a gradient entry is exactly 0 but its derivative by `outer` is not, Adam's update $g / (|g| + \epsilon)$
    has the slope $1 / \epsilon$: the derivative of the training that was run, and no direction to follow. Others
    (ADOPT) divide by what came before, and are steep at their second step. The first step with such a leaf is told.
    """
    hypergradient = getattr(solver, "hypergradient", None)
    if isinstance(hypergradient, Unrolled | OneStep) and (asked := asked_for(solver, state, data)):
        return _steep(hypergradient, *asked)
    return []


def _steep(hypergradient, problem, inner_state, outer, inner_batches, outer_batch, key) -> list[str]:
    keys = split_keys(key, hypergradient.steps)
    state = hypergradient.resume(Query(problem, hypergradient.steps, inner_state, outer, inner_batches, None, keys))
    (params, rest), (moving, fixed) = split_inner(problem, state.params), partition(outer)
    xs, bind = slots(inner_batches, hypergradient.steps)
    transform = optimizers.transformation(hypergradient.optimizer, outer)
    leaves, structure = jax.tree.flatten(moving)
    draws = zip(jax.random.split(jax.random.key(0), len(leaves)), leaves, strict=True)
    direction = structure.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in draws])

    @jax.jit
    def step(moving, params, rest, opt_state, tangents, t, slot, key):
        """The next `(params, rest, opt_state)`, tangents of what moves, and which leaves are amplified."""
        opt_moving, opt_fixed = partition(opt_state)

        def gradient(moving, params):
            seen = at_step(combine(moving, fixed), t)
            loss = lambda params: inner_outcome(problem, combine(params, rest), seen, bind(slot), key)[:2]  # noqa: E731
            (value, updates), grad = jax.value_and_grad(loss, has_aux=True)(params)
            return grad, (value, updates)

        grad, slope, (value, updates) = jax.jvp(gradient, (moving, params), (direction, tangents[0]), has_aux=True)
        update = lambda grad: optimizers.update(transform, grad, opt_state, params, value)[0]  # noqa: E731
        at_zero = jax.tree.map(lambda g, s: jnp.where(g == 0, s, jnp.zeros_like(s)), grad, slope)
        moved = jax.jvp(update, (grad,), (at_zero,))[1]
        found = jax.tree.map(lambda s, m: _most(m) > AMPLIFIED * _most(s), at_zero, moved)

        def advance(grad, params, opt_moving):
            change, new = optimizers.update(transform, grad, combine(opt_moving, opt_fixed), params, value)
            new_moving, new_fixed = partition(jax.tree.map(jnp.asarray, new))
            return (optimizers.apply(params, change), new_moving), new_fixed

        (params, opt_moving), tangents, opt_fixed = jax.jvp(
            advance, (grad, params, opt_moving), (slope, *tangents), has_aux=True
        )
        return params, rest | updates if updates else rest, combine(opt_moving, opt_fixed), tangents, found

    opt_state = jax.tree.map(jnp.asarray, state.opt_state)
    tangents = jax.tree.map(jnp.zeros_like, (params, partition(opt_state)[0]))
    truncate = 1 if isinstance(hypergradient, OneStep) else hypergradient.truncate or hypergradient.steps
    for t in range(hypergradient.steps):
        slot = jax.tree.map(lambda x: x[t], xs)  # noqa: B023
        params, rest, opt_state, tangents, found = step(
            moving, params, rest, opt_state, tangents, jnp.int32(t), slot, keys.inner[t]
        )
        if t < hypergradient.steps - truncate:  # not differentiated
            tangents = jax.tree.map(jnp.zeros_like, tangents)
        elif any(jax.tree.leaves(found)):
            names = zip(leaf_names(params, "inner"), jax.tree.leaves(found), strict=True)
            return [name for name, steep in names if steep]
    return []


def _most(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), initial=0.0).astype(jnp.float32)
