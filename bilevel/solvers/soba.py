"""One gradient step on the inner problem, on its linear system and on the outer problem, at once."""

from __future__ import annotations

import dataclasses

from bilevel.settings.fields import child, register
from bilevel.settings.numeric import step_size
from bilevel.settings.rules import optional
from bilevel.solvers.iterations import directions, follow
from bilevel.solvers.stochastic import Calls, Iterate, Iteration, StepSize, Stochastic, zeros
from bilevel.trees import PyTree


@register
@dataclasses.dataclass(frozen=True)
class SOBA(Stochastic):
    r"""SOBA: with $v$ kept from one iteration to the next,

    $$
    \begin{aligned}
    w &\leftarrow w - \rho\, \partial_w f, \\
    v &\leftarrow v - \rho_v\, (H v - \partial_w F), \\
    \lambda &\leftarrow \lambda - \gamma\, (\partial_\lambda F - C v),
    \end{aligned}
    $$

    all taken at the old $(w, v, \lambda)$, on one inner and one outer batch.

    The paper's steps are `Power(rho, 1/2)` and `Power(gamma, 1/2)`; constant ones leave a plateau in proportion to
    them.
    Cost per iteration: 1 inner gradient, 1 outer gradient, 1 Hessian-vector product, 1 mixed product.
    `State.memory` is v.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      linear_step: step size of v, a number or a schedule; None is `inner_step`.

    References:
      Dagréou, Ablin, Vaiter & Moreau 2022, arXiv 2201.13409, Algorithm 1.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.SOBA(problem, inner_step=0.5, outer_step=0.5)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=200, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    linear_step: StepSize | None = dataclasses.field(default=None, kw_only=True, metadata=child(optional(step_size())))

    def start(self, w: PyTree, lam: PyTree) -> PyTree:
        return zeros(w)

    def iterate(self, at: Iteration) -> Iterate:
        d = directions(at, (at.w, at.lam, at.memory), at.draws[0], at.outer_draws[0])
        return follow(at, at.memory, d, Calls(1, 1, 1, 1), lambda v: v)
