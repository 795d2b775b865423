"""MASOBA in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Steps decay as `step ** -1/2`."""

    name = "MA-SOBA"
    parameters = {**BilevelSolver.parameters, "average": [0.5]}

    def make(self, problem):
        return bilevel.MASOBA(problem, *self.steps(1 / 2, 1 / 2), average=self.average)
