"""TTSA in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Steps decay as `step ** -2/5` inside and `step ** -3/5` outside, that of the Neumann series is constant."""

    name = "TTSA"
    parameters = {**BilevelSolver.parameters, "terms": [10]}

    def make(self, problem):
        return bilevel.TTSA(problem, *self.steps(2 / 5, 3 / 5), terms=self.terms, linear_step=self.step_size)
