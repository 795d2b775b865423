"""FSLA in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Steps and momentum decay as `step ** -1/2`."""

    name = "FSLA"
    parameters = {**BilevelSolver.parameters, "eta": [0.5]}

    def make(self, problem):
        return bilevel.FSLA(problem, *self.steps(1 / 2, 1 / 2), eta=bilevel.Power(self.eta, 1 / 2))
