"""`bilevel` itself."""

from __future__ import annotations

import math

import bilevel
from benchmarks.hypergradients.peers.base import KEY, Ready, Task, compiled


def unrolled(task: Task, mode: str, checkpoint: str) -> Ready:
    def hypergradient(task, problem, outer, start):
        # As many checkpoints as the other libraries are given.
        schedule = bilevel.Binomial(math.isqrt(task.steps)) if checkpoint == "binomial" else checkpoint
        estimator = bilevel.Unrolled(task.optax, task.steps, mode=mode, checkpoint=schedule)
        begin = estimator.init(problem, outer, KEY)._replace(params=start)
        return estimator.estimate(problem, begin, outer, bilevel.FullBatch(task.batch), task.outer_batch, KEY).grad

    return compiled(hypergradient, task)
