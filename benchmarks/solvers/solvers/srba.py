"""SRBA in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Constant steps; `period_frac` of the mini-batches of both data sets from one full pass to the next."""

    name = "SRBA"
    parameters = {**BilevelSolver.parameters, "period_frac": [0.5]}

    def make(self, problem):
        return bilevel.SRBA(problem, *self.steps(), period=self.period(self.period_frac))
