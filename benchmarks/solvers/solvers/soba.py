"""SOBA in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

from bilevel import solvers


class Solver(BilevelSolver):
    """Steps decay as `step ** -1/2`."""

    name = "SOBA"

    def make(self, problem):
        return solvers.SOBA(problem, *self.steps(1 / 2, 1 / 2))
