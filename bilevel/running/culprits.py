"""Functions beside the losses that make what is not finite: they are called apart from the rest of a failed step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.differentiation import optimizers
from bilevel.problem.problem import split_inner
from bilevel.running.chunks import step
from bilevel.running.holes import newly, not_finite
from bilevel.running.replay import asked_for
from bilevel.trees import combine, partition, replayed


def projection(solver: Any, state: Any, data: Any, leaves: list[str]) -> str | None:
    """That `project` made leaves not finite, which the step without it leaves finite; None if it did not."""
    if getattr(solver.problem, "project", None) is None or not any(name.startswith("outer") for name in leaves):
        return None
    alone = dataclasses.replace(solver, problem=dataclasses.replace(solver.problem, project=None))
    new, _ = step(alone, *replayed((state, data)))
    if newly("outer", state.outer, new.outer):
        return None
    return (
        f"project made {', '.join(leaves)} not finite, while the step before it is finite: look for a root, "
        "logarithm or division by 0 in project."
    )


def steep_function(solver: Any, state: Any, data: Any) -> str:
    """The function of `outer` whose derivative is not finite: of those beside the losses, if it is one of them."""
    asked = asked_for(solver, state, data)
    if not asked:
        return "a loss"
    problem, inner_state, outer, _, _, key = asked
    moving, fixed = partition(outer)

    def start(moving):
        return split_inner(problem, problem.start_inner(key, combine(moving, fixed)))[0]

    def update(moving):
        transform = optimizers.transformation(solver.hypergradient.optimizer, combine(moving, fixed))
        params = jax.tree.map(jnp.ones_like, start(jax.lax.stop_gradient(moving)))
        return transform.update(params, transform.init(params), params, value=jnp.ones(()), grad=params)[0]

    tried = {"init_inner": start} if inner_state is None else {}
    if callable(getattr(solver.hypergradient, "optimizer", None)):
        tried["the optimizer, which is a function of outer"] = update
    for name, function in tried.items():
        value, pull = jax.vjp(function, moving)
        inexact = jax.tree.map(jnp.ones_like, value)
        if not_finite("", pull(inexact)) and not not_finite("", value):
            return name
    return "a loss"
