"""SABA in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

from bilevel import solvers


class Solver(BilevelSolver):
    """Constant steps."""

    name = "SABA"

    def make(self, problem):
        return solvers.SABA(
            problem,
            *self.steps(),
            inner_blocks=self.batches(self.inner_arrays),
            outer_blocks=self.batches(self.outer_arrays),
        )
