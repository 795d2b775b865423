"""SABA in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Constant steps."""

    name = "SABA"

    def make(self, problem):
        return bilevel.SABA(
            problem,
            *self.steps(),
            inner_blocks=self.batches(self.inner_arrays),
            outer_blocks=self.batches(self.outer_arrays),
        )
