"""equinox (pip install equinox): the checkpointed loop that optimistix and diffrax stand on, around the plain step."""

from __future__ import annotations

import math

import equinox.internal as eqxi
import jax
import optax

from benchmarks.hypergradients.peers.base import Ready, Task, compiled


def unrolled(task: Task) -> Ready:
    def hypergradient(task, problem, outer, start):
        def objective(outer):
            def step(carry, _):
                params, state = carry
                grad = jax.grad(lambda params: task.inner_loss(problem, params, outer))(params)
                updates, state = task.optax.update(grad, state, params)
                return (optax.apply_updates(params, updates), state), None

            carry = start, task.optax.init(start)
            checkpoints = math.isqrt(task.steps)
            (params, _), _ = eqxi.scan(
                step, carry, None, length=task.steps, kind="checkpointed", checkpoints=checkpoints
            )
            return task.outer_loss(problem, params, outer)

        return jax.grad(objective)(outer)

    return compiled(hypergradient, task)
