"""SOBA with a moving average of the outer direction."""

from __future__ import annotations

import dataclasses

from bilevel.settings.fields import child, register
from bilevel.settings.numeric import step_size
from bilevel.settings.rules import optional
from bilevel.solvers.iterations import directions, follow
from bilevel.solvers.stochastic import Calls, Iterate, Iteration, StepSize, Stochastic, descend, minus, size, zeros
from bilevel.trees import PyTree


@register
@dataclasses.dataclass(frozen=True)
class MASOBA(Stochastic):
    r"""MA-SOBA: the updates of $w$ and $v$ of `SOBA`, and

    $$
    \begin{aligned}
    \lambda &\leftarrow \lambda - \gamma\, h, \\
    h &\leftarrow (1 - \theta)\, h + \theta\, (\partial_\lambda F - C v),
    \end{aligned}
    $$

    $\lambda$ moving along the old average, which starts at 0.

    The paper's steps are all of order `Power(., 1/2)`, or constants of order one over the root of the number of
    iterations; the average takes away SOBA's need for smooth second derivatives of F.
    Cost per iteration: 1 inner gradient, 1 outer gradient, 1 Hessian-vector product, 1 mixed product.
    `State.memory` is `(v, h)`.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      linear_step: step size of v, a number or a schedule; None is `inner_step`.
      average: theta in (0, 1], a number or a schedule.

    References:
      Chen, Xiao & Balasubramanian 2023, arXiv 2306.12067, Algorithm 1.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.MASOBA(problem, inner_step=0.5, outer_step=0.3, average=0.5)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=300, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    linear_step: StepSize | None = dataclasses.field(default=None, kw_only=True, metadata=child(optional(step_size())))
    average: StepSize = dataclasses.field(default=0.1, kw_only=True, metadata=child(step_size(above=0.0, high=1.0)))

    def start(self, w: PyTree, lam: PyTree) -> PyTree:
        return zeros(w), zeros(lam)

    def iterate(self, at: Iteration) -> Iterate:
        v, h = at.memory
        d = directions(at, (at.w, at.lam, v), at.draws[0], at.outer_draws[0])
        average = descend(h, size(self.average, at.step), minus(h, d.outer))
        return follow(at, v, d._replace(outer=h), Calls(1, 1, 1, 1), lambda v: (v, average))
