"""PZOBO in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Constant steps, full batches."""

    name = "PZOBO"
    parameters = {
        **BilevelSolver.parameters,
        "inner_steps": [10],
        "directions": [10],
        "smoothing": [0.1],
        "batch_size": ["full"],
    }

    def make(self, problem):
        return bilevel.PZOBO(
            problem,
            *self.steps(),
            inner_steps=self.inner_steps,
            directions=self.directions,
            smoothing=self.smoothing,
        )
