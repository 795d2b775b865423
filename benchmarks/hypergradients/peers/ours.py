"""`bilevel` itself."""

from __future__ import annotations

import bilevel
from benchmarks.hypergradients.peers.base import KEY, Ready, Task, compiled


def unrolled(task: Task, mode: str, checkpoint: str) -> Ready:
    estimator = bilevel.Unrolled(task.optax, task.steps, mode=mode, checkpoint=checkpoint)
    state = estimator.init(task.case.problem, task.outer, KEY)

    def hypergradient(problem, outer, start):
        begin, batches = state._replace(params=start), bilevel.FullBatch(task.batch)
        return estimator.estimate(problem, begin, outer, batches, task.outer_batch, KEY).grad

    return compiled(hypergradient, task)
