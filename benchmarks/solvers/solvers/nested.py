"""Unrolled differentiation in the benchmark."""

import numpy as np
import optax
from benchmark_utils.adapter import BilevelSolver

import bilevel
from bilevel.extend import Calls


class Solver(BilevelSolver):
    """`Nested` with `Unrolled`: K steps of SGD, differentiated; gradient descent on the outer variable. Constant
    steps."""

    name = "UD"
    parameters = {**BilevelSolver.parameters, "inner_steps": [1, 10, 100], "start": ["warm", "cold"]}

    def make(self, problem):
        estimator = bilevel.Unrolled(optax.sgd(self.step_size), steps=self.inner_steps)
        outer = optax.sgd(self.step_size / self.outer_ratio)
        return bilevel.Nested(problem, estimator, outer, inner_start=self.start)

    def count(self, metrics):
        # The backward pass takes one product with H and one with C a step.
        steps = len(metrics["outer_loss"])
        return np.array(Calls(self.inner_steps, 1, self.inner_steps, self.inner_steps)) * steps
