"""AmIGO in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Constant steps."""

    name = "AmIGO"
    parameters = {**BilevelSolver.parameters, "inner_steps": [10]}

    def make(self, problem):
        return bilevel.AmIGO(problem, *self.steps(), inner_steps=self.inner_steps, linear_steps=self.inner_steps)
