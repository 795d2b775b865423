"""SUSTAIN in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Steps decay as `step ** -1/3`, the momentum as `step ** -2/3`; that of the Neumann series is constant."""

    name = "SUSTAIN"
    parameters = {**BilevelSolver.parameters, "eta": [0.5], "terms": [10]}

    def make(self, problem):
        return bilevel.SUSTAIN(
            problem,
            *self.steps(1 / 3, 1 / 3),
            eta=bilevel.Power(self.eta, 2 / 3),
            terms=self.terms,
            linear_step=self.step_size,
        )
