"""Recursive momentum on both variables, the hypergradient by a Neumann series."""

from __future__ import annotations

import dataclasses

from bilevel.settings.fields import register
from bilevel.solvers.double_momentum import DoubleMomentum
from bilevel.solvers.iterations import neumann


@register
@dataclasses.dataclass(frozen=True)
class MRBO(DoubleMomentum):
    r"""MRBO: with $D(w, \lambda) = \partial_\lambda F - C v$ and $v \approx H^{-1} \partial_w F$ by a
    Neumann series of Q products, as in `StocBiO`,

    $$
    \begin{aligned}
    d^w_k &= \partial_w f(w_k, \lambda_k) + (1 - \eta) (d^w_{k-1} - \partial_w f(w_{k-1}, \lambda_{k-1})), \\
    d^\lambda_k &= D(w_k, \lambda_k) + (1 - \eta) (d^\lambda_{k-1} - D(w_{k-1}, \lambda_{k-1})), \\
    w_{k+1} &= w_k - \rho\, d^w_k, \qquad \lambda_{k+1} = \lambda_k - \gamma\, d^\lambda_k,
    \end{aligned}
    $$

    old and new taken on the same batches.

    The paper's steps are `Power(., 1/3)` for w and lambda and `Power(eta, 2/3)`, the series' step constant. At the
    first iteration $\eta = 1$. Biased by the remainder of the series.
    Cost per iteration: 2 inner gradients, 2 outer gradients, 2Q Hessian-vector products, 2 mixed products; 1 + Q inner
    batches. `State.memory` is `((w, lam) before the last update, d_w, d_lam)`.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      terms: Q.
      eta: the momentum's weight on the new gradient, in (0, 1], a number or a schedule.
      linear_step: step size of the Neumann series, at most 1 over the largest eigenvalue of H; None is `inner_step`.

    References:
      Yang, Ji & Liang 2021, arXiv 2106.04692, Algorithm 1.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.MRBO(problem, inner_step=0.5, outer_step=1.0, terms=5)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=60, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    def invert(self, at, points, rhs):
        return neumann(at, points, rhs, self.terms, lambda t: at.draws[1 + t]), self.terms
