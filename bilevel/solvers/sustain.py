"""Recursive momentum on both variables, the hypergradient by a random Neumann term."""

from __future__ import annotations

import dataclasses

from bilevel.settings.fields import register
from bilevel.solvers.double_momentum import DoubleMomentum
from bilevel.solvers.iterations import random_neumann


@register
@dataclasses.dataclass(frozen=True)
class SUSTAIN(DoubleMomentum):
    r"""SUSTAIN: the updates of `MRBO`, recursive momentum on both variables, with one random term of the Neumann series

    $$ v = Q \eta_v \prod_{j=1}^{p} (I - \eta_v H_j)\, \partial_w F, \qquad p \sim U\{0, \dots, Q - 1\}, $$

    the same p and the same batches at the old and the new point.

    Steps and bias as for `MRBO`.
    Cost per iteration: 2 inner gradients, 2 outer gradients, 2p Hessian-vector products, 2 mixed products; 1 + Q inner
    batches. `State.memory` is `((w, lam) before the last update, d_w, d_lam)`.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      terms: Q.
      eta: the momentum's weight on the new gradient, in (0, 1], a number or a schedule.
      linear_step: step size of the Neumann series, at most 1 over the largest eigenvalue of H; None is `inner_step`.

    References:
      Khanduri, Zeng, Hong, Wai, Wang & Yang 2021, arXiv 2102.07367, Algorithm 1.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.SUSTAIN(problem, inner_step=0.5, outer_step=1.0, terms=5)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=60, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    def invert(self, at, points, rhs):
        return random_neumann(at, points, rhs, self.terms, lambda t: at.draws[1 + t])
