"""Why a step failed or is out of proportion, found by replaying it: nothing of this runs unless something is odd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import optimizers
from bilevel.data import slots
from bilevel.hypergradients.base import schedule
from bilevel.hypergradients.one_step import OneStep
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.trees import PyTree, at_step, combine, is_inexact, leaf_names, partition

STEEP = 1e3
"""Norm from which a hypergradient is looked into; growth of a perturbation from which an update counts as steep."""

_START = "check the start values."


def not_finite(tree: PyTree) -> list[str]:
    """Names of the leaves of `tree` that hold a NaN or an infinity."""
    named = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    return [name for name, leaf in named if is_inexact(leaf) and not np.isfinite(np.asarray(leaf)).all()]


class _Instead:
    """A hypergradient with another `estimate`."""

    def __init__(self, hypergradient: Any, estimate: Callable[..., Any]):
        self._hypergradient, self.estimate = hypergradient, estimate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hypergradient, name)


class _Asked(Exception):
    """Thrown by an `estimate` that only takes note of what it is asked."""


def steep_leaves(solver: Any, state: Any, step: Callable[..., Any]) -> list[str]:
    r"""Inner leaves whose first update, in the outer step taken from `state`, amplifies a change of `outer` enormously.

    Where a gradient entry is exactly 0 but its derivative by `outer` is not, Adam's update :math:`g / (|g| + \epsilon)`
    has the slope :math:`1 / \epsilon`: the derivative of the training that was run, and no direction to follow.
    """
    hypergradient = getattr(solver, "hypergradient", None)
    if not isinstance(hypergradient, Unrolled | OneStep):
        return []

    def listen(*args):
        raise _Asked(*args)

    try:
        step(dataclasses.replace(solver, hypergradient=_Instead(hypergradient, listen)), state)
    except _Asked as asked:
        return _steep(hypergradient, *asked.args)
    return []


def _steep(hypergradient, problem, inner_state, outer, inner_batches, outer_batch, key) -> list[str]:
    keys = schedule(key, hypergradient.steps)
    state = hypergradient.resume(problem, inner_state, outer, keys)
    (params, rest), (moving, fixed) = problem.split(state.params), partition(outer)
    xs, bind = slots(inner_batches, hypergradient.steps)
    batch, inner_key = bind(jax.tree.map(lambda x: x[0], xs)), keys.inner[0]
    transform = optimizers.transformation(hypergradient.optimizer, outer)

    @jax.jit
    def amplified(moving, params, batch):
        def gradient(moving):
            seen = at_step(combine(moving, fixed), 0)
            loss = lambda params: problem.inner_value(combine(params, rest), seen, batch, inner_key)[0]  # noqa: E731
            value, grad = jax.value_and_grad(loss)(params)
            return grad, value

        leaves, structure = jax.tree.flatten(moving)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        direction = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        grad, slope, value = jax.jvp(gradient, (moving,), (structure.unflatten(direction),), has_aux=True)
        at_zero = jax.tree.map(lambda g, s: jnp.where(g == 0, s, jnp.zeros_like(s)), grad, slope)
        update = lambda grad: optimizers.update(transform, grad, state.opt_state, params, value)[0]  # noqa: E731
        moved = jax.jvp(update, (grad,), (at_zero,))[1]
        most = lambda x: jnp.max(jnp.abs(x), initial=0.0).astype(jnp.float32)  # noqa: E731
        return jax.tree.map(lambda s, m: most(m) > STEEP * most(s), at_zero, moved)

    found = amplified(moving, params, batch)
    return [name for name, steep in zip(leaf_names(params), jax.tree.leaves(found), strict=True) if steep]


def describe_failure(solver: Any, state: Any, step: Callable[..., Any], number: int, norms: str = "") -> str:
    """One sentence on why outer step `number`, taken from `state` by `step(solver, state)`, is not finite.

    `norms` says how large the last finite metrics were.
    """
    where = f"Outer step {number}: "
    if names := not_finite((state.outer, state.inner)):
        where += f"the state it starts from is already not finite, in {', '.join(names)}; "
        return where + (f"the step before it diverged ({norms}): lower the step sizes." if norms else _START)
    kept: list[Any] = []
    if hasattr(solver, "hypergradient"):
        hypergradient = solver.hypergradient

        def recorded(*args):
            kept.append(hypergradient.estimate(*args))
            return kept[-1]

        solver = dataclasses.replace(solver, hypergradient=_Instead(hypergradient, recorded))
    new, metrics = step(solver, state)
    remedy = "lower the inner learning rate, or check the data for values that are not finite."
    for estimate in kept:
        losses = np.asarray(estimate.aux.info.get("inner_loss", ()))
        if not np.isfinite(losses).all():
            t = int(np.argmin(np.isfinite(losses)))
            leaves = ", ".join(not_finite(estimate.inner_state.params)) or "no leaf of the trained parameters"
            return where + f"inner_loss is {losses[t]} at inner step {t} (then not finite: {leaves}); " + remedy
        if names := not_finite(estimate.inner_state.params):
            return where + f"the inner update made {', '.join(names)} not finite; " + remedy
        if not np.isfinite(estimate.value):
            return where + f"outer_loss is {estimate.value} at a finite point; check outer_loss and its data."
        if names := not_finite(estimate.grad):
            return where + (
                f"the hypergradient is not finite at outer leaf {', '.join(names)} while both losses are finite; "
                "look for a root, logarithm, norm or division at 0 in a loss."
            )
    names = [name for name, value in metrics.items() if not np.isfinite(np.asarray(value)).all()]
    leaves = ", ".join(not_finite((new.outer, new.inner))) or "no leaf of the state"
    before = f"; before it {norms}" if norms else ""
    return where + (
        f"{', '.join(names)} is not finite (not finite after the step: {leaves}{before}); lower the step sizes."
    )
