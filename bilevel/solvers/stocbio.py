"""Inner SGD, then a truncated Neumann series."""

from __future__ import annotations

import dataclasses

from bilevel.settings.fields import child, register, setting
from bilevel.settings.numeric import integer, step_size
from bilevel.settings.rules import optional
from bilevel.solvers.iterations import double_loop, neumann
from bilevel.solvers.stochastic import Iterate, Iteration, StepSize, Stochastic


@register
@dataclasses.dataclass(frozen=True)
class StocBiO(Stochastic):
    r"""stocBiO: T warm-started inner SGD steps, then

    $$
    \begin{aligned}
    v &= \eta \sum_{q=0}^{Q} \prod_{j=1}^{q} (I - \eta H_j)\, \partial_w F \approx H^{-1} \partial_w F, \\
    \lambda &\leftarrow \lambda - \gamma\, (\partial_\lambda F - C v),
    \end{aligned}
    $$

    every inner call on a batch of its own.

    Constant steps. Biased by the remainder of the series, $(I - \eta H)^{Q+1} H^{-1} \partial_w F$.
    Cost per iteration: T inner gradients, 1 outer gradient, Q Hessian-vector products, 1 mixed product; T + Q + 1 inner
    batches. No memory.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      inner_steps: T.
      terms: Q.
      linear_step: eta of the Neumann series, at most 1 over the largest eigenvalue of H; None is `inner_step`.

    References:
      Ji, Yang & Liang 2021, arXiv 2010.07962, Algorithms 1 and 2.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.StocBiO(problem, inner_step=0.5, outer_step=1.0, inner_steps=5, terms=5)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=60, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    inner_steps: int = dataclasses.field(default=10, kw_only=True, metadata=setting(integer(1)))
    terms: int = dataclasses.field(default=10, kw_only=True, metadata=setting(integer(1)))
    linear_step: StepSize | None = dataclasses.field(default=None, kw_only=True, metadata=child(optional(step_size())))

    @property
    def inner_batches_per_step(self) -> int:
        return self.inner_steps + self.terms + 1

    def iterate(self, at: Iteration) -> Iterate:
        def solve(w, rhs):
            [v] = neumann(at, [(w, at.lam)], [rhs], self.terms, lambda t: at.draws[self.inner_steps + t])
            return v, self.terms

        return double_loop(at, self.inner_steps, solve)._replace(memory=())
