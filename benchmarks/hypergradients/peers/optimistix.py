"""optimistix (pip install optimistix): `OptaxMinimiser`, differentiated through recursive checkpoints."""

from __future__ import annotations

import math

import jax
import optimistix

from benchmarks.hypergradients.peers.base import Ready, Task, compiled


def unrolled(task: Task, checkpoints: str) -> Ready:
    def hypergradient(task, problem, outer, start):
        count = math.isqrt(task.steps) if checkpoints == "sqrt" else None  # None: its own default

        def objective(outer):
            found = optimistix.minimise(
                lambda params, outer: task.inner_loss(problem, params, outer),
                optimistix.OptaxMinimiser(task.optax, rtol=0.0, atol=0.0),
                start,
                args=outer,
                max_steps=task.steps,
                adjoint=optimistix.RecursiveCheckpointAdjoint(checkpoints=count),
                throw=False,
            )
            return task.outer_loss(problem, found.value, outer)

        return jax.grad(objective)(outer)

    return compiled(hypergradient, task)
