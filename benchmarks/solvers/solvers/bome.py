"""BOME in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Constant steps, full batches."""

    name = "BOME"
    parameters = {**BilevelSolver.parameters, "inner_steps": [10], "eta": [0.5], "batch_size": ["full"]}

    def make(self, problem):
        return bilevel.BOME(problem, *self.steps(), inner_steps=self.inner_steps, eta=self.eta)
