"""SOBA in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Steps decay as `step ** -1/2`."""

    name = "SOBA"

    def make(self, problem):
        return bilevel.SOBA(problem, *self.steps(1 / 2, 1 / 2))
