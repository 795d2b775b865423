"""A `bilevel` solver as a benchopt solver."""

import time

import jax
import numpy as np
from benchopt import BaseSolver

import bilevel
from bilevel import Power
from bilevel.extend import Calls

ENDLESS = 2**31 - 1  # benchopt says when to stop
RETURN_SECONDS = 0.1
"""Between two returns to benchopt."""
UNIT = 64
"""Rows that an oracle call is counted in, so that solvers with other batches, or full ones, can be compared."""


class BilevelSolver(BaseSolver):
    """Runs `make(problem)` by `bilevel.run`; subclasses give `make` and, where the solver does not count, `count`.

    `run` waits for the device before each return to benchopt, so that the clock sees the work, and everything is
    compiled in `warm_up`, so that it sees nothing else. It returns about ten times a second.

    Parameters of every solver: `step_size` of the inner variable; `outer_ratio`, by which the outer one is smaller;
    `batch_size`, a number or "full"; `seed`.
    """

    sampling_strategy = "callback"
    requirements = ("pip::bilevel[bench]",)
    parameters = {"step_size": [0.1], "outer_ratio": [1.0], "batch_size": [64], "seed": [0]}

    def make(self, problem):
        raise NotImplementedError

    def count(self, metrics) -> np.ndarray:
        """Oracle calls, in batches, of the iterations that these rows of metrics come from, as `Calls` orders them."""
        return np.array([metrics[name].sum() for name in Calls._fields])

    def steps(self, inner_exponent: float = 0.0, outer_exponent: float = 0.0) -> tuple[Power, Power]:
        """`(inner_step, outer_step)` that decay with these exponents."""
        return Power(self.step_size, inner_exponent), Power(self.step_size / self.outer_ratio, outer_exponent)

    def batches(self, arrays) -> int:
        """Mini-batches in a data set."""
        return -(-_rows(arrays) // self._size(arrays))

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

    @property
    def weights(self) -> np.ndarray:
        """How many calls of `UNIT` rows a call on a batch is, as `Calls` orders them."""
        inner, outer = (self._size(arrays) / UNIT for arrays in (self.inner_arrays, self.outer_arrays))
        return np.array(Calls(inner, outer, inner, inner))

    def warm_up(self):
        # The third iteration is timed: the first compiles, the second may still wait for it.
        times = []

        def clock(*_):
            times.append(time.perf_counter())
            return len(times) == 3

        self._start([clock], 1)
        self.every = max(1, round(RETURN_SECONDS / (times[2] - times[1])))

    def run(self, callback):
        self.result = self.solver.init(start_key(self.seed))
        self.counts = np.zeros(len(Calls._fields))

        def between(step, state, metrics):
            jax.block_until_ready(state)
            self.result = state
            self.counts += self.count(metrics) * self.weights
            return not callback()

        if callback():
            self._start([between], self.every)

    def get_result(self):
        return result(self.result.inner.params, self.result.outer, self.counts, int(self.result.step))

    def _start(self, callbacks, every):
        key, data = jax.random.key(self.seed), self.data
        settings = {"steps": ENDLESS, "key": key, "progress": False, "callbacks": callbacks, "callback_every": every}
        bilevel.run(self.solver, **data, **settings)

    def _batches(self, arrays):
        if self.batch_size == "full":
            return bilevel.FullBatch(arrays)
        return bilevel.Batches(arrays, self.batch_size, order="blocks")  # as benchmark_bilevel samples

    def _size(self, arrays) -> int:
        return _rows(arrays) if self.batch_size == "full" else self.batch_size


def start_key(seed: int) -> jax.Array:
    """The key that `bilevel.run` initialises a solver with."""
    return jax.random.split(jax.random.key(seed), 3)[0]


def result(inner, outer, counts, steps):
    """What the objective measures: both variables, `steps`, the oracle calls of `UNIT` rows each, and their sums."""
    counts = dict(zip(Calls._fields, (float(n) for n in counts), strict=True))
    gradients = counts["inner_gradients"] + counts["outer_gradients"]
    sums = {"gradient_calls": gradients, "oracle_calls": sum(counts.values()), "steps": steps}
    return {"inner": inner, "outer": outer, "counts": counts | sums}


def sizes(problem) -> tuple[int, int]:
    """Numbers in the inner and in the outer variable."""

    def start(key):
        outer = problem.start_outer(key)
        return problem.start_inner(key, outer), outer

    shapes = jax.eval_shape(start, jax.random.key(0))
    inner, outer = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in shapes)
    return inner, outer


def _rows(arrays) -> int:
    return len(jax.tree.leaves(arrays)[0])
