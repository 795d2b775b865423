"""jaxopt (pip install jaxopt): `OptaxSolver`, its loop differentiated in reverse."""

from __future__ import annotations

import jax
import jaxopt

from benchmarks.hypergradients.peers.base import Ready, Task, compiled


def unrolled(task: Task) -> Ready:
    def hypergradient(task, problem, outer, start):
        def objective(outer):
            solver = jaxopt.OptaxSolver(
                fun=lambda params, outer: task.inner_loss(problem, params, outer),
                opt=task.optax,
                maxiter=task.steps,
                tol=0.0,
                implicit_diff=False,
                unroll=True,
            )
            params = solver.run(start, outer).params
            return task.outer_loss(problem, params, outer)

        return jax.grad(objective)(outer)

    return compiled(hypergradient, task)
