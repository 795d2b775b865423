"""BSA in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Steps decay as `step ** -1/2`, that of the Neumann series is constant."""

    name = "BSA"
    parameters = {**BilevelSolver.parameters, "inner_steps": [10], "terms": [10]}

    def make(self, problem):
        return bilevel.BSA(
            problem,
            *self.steps(1 / 2, 1 / 2),
            inner_steps=self.inner_steps,
            terms=self.terms,
            linear_step=self.step_size,
        )
