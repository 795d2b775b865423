"""A `bilevel` solver as a benchopt solver."""

import jax
import numpy as np
from benchopt import BaseSolver

import bilevel
from bilevel import Power
from bilevel.solvers.stochastic import Calls

ENDLESS = 2**31 - 1  # benchopt says when to stop


class BilevelSolver(BaseSolver):
    """Runs `make(problem)` by `bilevel.run`; subclasses give `make` and, where the solver does not count, `calls`.

    `run` waits for the device before each return to benchopt, so that the clock sees the work, and everything is
    compiled in `warm_up`, so that it sees nothing else. It returns after 1, 3, 7, ... iterations, and later about once
    a second.

    Parameters of every solver: `step_size` of the inner variable; `outer_ratio`, by which the outer one is smaller;
    `batch_size`, a number or "full"; `seed`.
    """

    sampling_strategy = "callback"
    requirements = ("pip::bilevel[bench]",)
    parameters = {"step_size": [0.1], "outer_ratio": [1.0], "batch_size": [64], "seed": [0]}

    def make(self, problem):
        raise NotImplementedError

    def calls(self) -> Calls | None:
        """Oracle calls of one iteration; None where the solver's metrics say."""
        return None

    def steps(self, inner_exponent: float = 0.0, outer_exponent: float = 0.0) -> tuple[Power, Power]:
        """`(inner_step, outer_step)` that decay with these exponents."""
        return Power(self.step_size, inner_exponent), Power(self.step_size / self.outer_ratio, outer_exponent)

    def batches(self, arrays) -> int:
        """Mini-batches in a data set."""
        return -(-self._rows(arrays) // self._size(arrays))

    def period(self, fraction: float) -> int:
        """Iterations that see `fraction` of the mini-batches of both data sets."""
        return max(1, int(fraction * (self.batches(self.inner_arrays) + self.batches(self.outer_arrays))))

    def set_objective(self, problem, inner, outer):
        self.inner_arrays, self.outer_arrays = inner, outer
        self.data = {
            "inner_data": self._batches(inner),
            "outer_data": self._batches(outer),
        }
        self.solver = self.make(problem)

    def warm_up(self):
        # Two returns: the second chunk of a run is the first that is not a single step.
        returns = iter([False, True])
        self._start([lambda *_: next(returns)])

    def run(self, callback):
        state = self.solver.init(jax.random.split(jax.random.key(self.seed), 3)[0])  # as `bilevel.run` starts
        self.result, self.counts = state, np.zeros(len(Calls._fields), np.int64)

        def between(step, state, metrics):
            jax.block_until_ready(state)
            self.result = state
            self.counts += self._count(metrics)
            return not callback()

        if callback():
            self._start([between])

    def get_result(self):
        counts = dict(zip(Calls._fields, self.counts.tolist(), strict=True))
        inner = self.result.inner.params
        return {
            "inner": inner,
            "outer": self.result.outer,
            "counts": counts | {"oracle_calls": sum(counts.values()), "steps": int(self.result.step)},
        }

    def _start(self, callbacks):
        key = jax.random.key(self.seed)
        bilevel.run(self.solver, **self.data, steps=ENDLESS, key=key, progress=False, callbacks=callbacks)

    def _count(self, metrics):
        fixed = self.calls()
        if fixed is not None:
            return np.array(fixed) * len(metrics["outer_loss"])
        return np.array([metrics[name].sum() for name in Calls._fields])

    def _batches(self, arrays):
        if self.batch_size == "full":
            return bilevel.FullBatch(arrays)
        return bilevel.Batches(arrays, self.batch_size, order="blocks")  # as benchmark_bilevel samples

    def _rows(self, arrays) -> int:
        return len(jax.tree.leaves(arrays)[0])

    def _size(self, arrays) -> int:
        return self._rows(arrays) if self.batch_size == "full" else self.batch_size
