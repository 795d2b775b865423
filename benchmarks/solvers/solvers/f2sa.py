"""F2SA in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Steps decay as `step ** -4/7`, the multiplier grows as `step ** 1/7` from `penalty`."""

    name = "F2SA"
    parameters = {**BilevelSolver.parameters, "penalty": [10.0], "inner_steps": [10]}

    def make(self, problem):
        return bilevel.F2SA(
            problem,
            *self.steps(4 / 7, 4 / 7),
            penalty=bilevel.Power(self.penalty, -1 / 7),
            inner_steps=self.inner_steps,
        )
