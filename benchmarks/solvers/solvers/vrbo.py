"""VRBO in the benchmark."""

from benchmark_utils.adapter import BilevelSolver

import bilevel


class Solver(BilevelSolver):
    """Constant steps; `period_frac` of the mini-batches of both data sets from one full pass to the next."""

    name = "VRBO"
    parameters = {**BilevelSolver.parameters, "period_frac": [0.5], "inner_steps": [10], "terms": [10]}

    def make(self, problem):
        return bilevel.VRBO(
            problem,
            *self.steps(),
            period=self.period(self.period_frac),
            inner_steps=self.inner_steps,
            terms=self.terms,
        )
