"""StocBiO in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Constant steps."""

    name = "StocBiO"
    parameters = {**BilevelSolver.parameters, "inner_steps": [10], "terms": [10]}

    def make(self, problem):
        return bilevel.StocBiO(problem, *self.steps(), inner_steps=self.inner_steps, terms=self.terms)
