"""Implicit differentiation in the benchmark."""

import numpy as np
import optax
from benchmark_utils.adapter import BilevelSolver, sizes

import bilevel
from bilevel.extend import Calls


class Solver(BilevelSolver):
    """`Nested` with `Implicit`: K steps of SGD, a linear system in the mean Hessian of their K batches, gradient
    descent on the outer variable. Constant steps.

    `linear_steps` is the most iterations of CG, NormalCG and BiCGStab, the Krylov vectors of GMRES (two cycles), the
    terms of Neumann (of scale `step_size`) and the rank of Nystrom (damped by 1e-2); Dense has no use for it.
    """

    name = "Implicit"
    parameters = {
        **BilevelSolver.parameters,
        "inner_steps": [10],
        "linear_solver": ["CG", "NormalCG", "GMRES", "BiCGStab", "Neumann", "Nystrom", "Dense"],
        "linear_steps": [10],
        "start": ["warm", "cold"],
    }

    def skip(self, problem, inner, outer):
        if self.linear_solver == "Dense" and sizes(problem)[0] > 2000:
            return True, "Dense holds a matrix of the inner dimension squared"
        return False, None

    def make(self, problem):
        steps = self.linear_steps
        solver = {
            "CG": lambda: bilevel.CG(max_steps=steps),
            "NormalCG": lambda: bilevel.NormalCG(max_steps=steps),
            "GMRES": lambda: bilevel.GMRES(restart=steps, max_steps=2 * steps),
            "BiCGStab": lambda: bilevel.BiCGStab(max_steps=steps),
            "Neumann": lambda: bilevel.Neumann(steps, self.step_size),
            "Nystrom": lambda: bilevel.Nystrom(steps, damping=1e-2),
            "Dense": bilevel.Dense,
        }[self.linear_solver]()
        estimator = bilevel.Implicit(optax.sgd(self.step_size), steps=self.inner_steps, linear_solver=solver)
        outer = optax.sgd(self.step_size / self.outer_ratio)
        return bilevel.Nested(problem, estimator, outer, inner_start=self.start)

    def count(self, metrics):
        # C is applied to the mean over the K batches, which are one and the same where they are full.
        steps, terms = len(metrics["outer_loss"]), 1 if self.batch_size == "full" else self.inner_steps
        return np.array(Calls(self.inner_steps * steps, steps, metrics["hvps"].sum(), terms * steps))
