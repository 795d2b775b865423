"""Inner SGD, then one random term of the Neumann series."""

from __future__ import annotations

import dataclasses

from bilevel.settings.fields import child, register, setting
from bilevel.settings.numeric import integer, step_size
from bilevel.settings.rules import optional
from bilevel.solvers.iterations import double_loop, random_solve
from bilevel.solvers.stochastic import Iterate, Iteration, StepSize, Stochastic


@register
@dataclasses.dataclass(frozen=True)
class BSA(Stochastic):
    r"""BSA: T warm-started inner SGD steps, then with $p \sim U\{0, \dots, Q - 1\}$

    $$
    \begin{aligned}
    v &= Q \eta \prod_{j=1}^{p} (I - \eta H_j)\, \partial_w F, \\
    \lambda &\leftarrow \lambda - \gamma\, (\partial_\lambda F - C v),
    \end{aligned}
    $$

    every inner call on a batch of its own.

    The paper's steps are `Power(rho, 1/2)` inside and `Power(gamma, 1/2)` outside, $\eta$ constant. Biased by the
    remainder of the series, $(I - \eta H)^Q H^{-1} \partial_w F$; its variance grows with Q.
    Cost per iteration: T inner gradients, 1 outer gradient, p Hessian-vector products ((Q - 1)/2 on average), 1 mixed
    product; T + Q inner batches. No memory.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      inner_steps: T.
      terms: Q.
      linear_step: eta of the Neumann series, at most 1 over the largest eigenvalue of H; None is `inner_step`.

    References:
      Ghadimi & Wang 2018, arXiv 1802.02246, Algorithms 2 and 3.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.BSA(problem, inner_step=0.5, outer_step=1.0, inner_steps=5, terms=5)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=60, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    inner_steps: int = dataclasses.field(default=10, kw_only=True, metadata=setting(integer(1)))
    terms: int = dataclasses.field(default=10, kw_only=True, metadata=setting(integer(1)))
    linear_step: StepSize | None = dataclasses.field(default=None, kw_only=True, metadata=child(optional(step_size())))

    @property
    def inner_batches_per_step(self) -> int:
        return self.inner_steps + self.terms

    def iterate(self, at: Iteration) -> Iterate:
        return double_loop(at, self.inner_steps, random_solve(at, self.inner_steps, self.terms))._replace(memory=())
