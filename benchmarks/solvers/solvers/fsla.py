"""FSLA in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

from bilevel import solvers


class Solver(BilevelSolver):
    """Steps and momentum decay as `step ** -1/2`."""

    name = "FSLA"
    parameters = {**BilevelSolver.parameters, "eta": [0.5]}

    def make(self, problem):
        return solvers.FSLA(problem, *self.steps(1 / 2, 1 / 2), eta=solvers.Power(self.eta, 1 / 2))
