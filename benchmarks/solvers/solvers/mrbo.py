"""MRBO in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Steps decay as `step ** -1/3`, the momentum as `step ** -2/3`; that of the Neumann series is constant."""

    name = "MRBO"
    parameters = {**BilevelSolver.parameters, "eta": [0.5], "terms": [10]}

    def make(self, problem):
        return bilevel.MRBO(
            problem,
            *self.steps(1 / 3, 1 / 3),
            eta=bilevel.Power(self.eta, 2 / 3),
            terms=self.terms,
            linear_step=self.step_size,
        )
