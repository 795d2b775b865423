"""Two time scales: one inner step, then one random term of the Neumann series."""

from __future__ import annotations

import dataclasses

from bilevel.settings.fields import child, register, setting
from bilevel.settings.numeric import integer, step_size
from bilevel.settings.rules import optional
from bilevel.solvers.iterations import double_loop, random_solve
from bilevel.solvers.stochastic import Iterate, Iteration, StepSize, Stochastic


@register
@dataclasses.dataclass(frozen=True)
class TTSA(Stochastic):
    r"""TTSA: the iteration of `BSA` with a single inner step, $w$ moving on a faster time scale than
    $\lambda$:

    $$
    \begin{aligned}
    w &\leftarrow w - \rho\, \partial_w f, \\
    \lambda &\leftarrow \Pi\big(\lambda - \gamma\, (\partial_\lambda F - C v)\big), \qquad
    v = Q \eta \prod_{j=1}^{p} (I - \eta H_j)\, \partial_w F, \quad p \sim U\{0, \dots, Q - 1\}.
    \end{aligned}
    $$

    The paper's steps are `Power(rho, 2/5)` inside and `Power(gamma, 3/5)` outside, $\eta$ constant. Bias as for
    `BSA`.
    Cost per iteration: 1 inner gradient, 1 outer gradient, p Hessian-vector products, 1 mixed product; 1 + Q inner
    batches. No memory.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      terms: Q.
      linear_step: eta of the Neumann series, at most 1 over the largest eigenvalue of H; None is `inner_step`.

    References:
      Hong, Wai, Wang & Yang 2023, arXiv 2007.05170, Algorithm 1.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.TTSA(problem, inner_step=0.5, outer_step=1.0, terms=5)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=60, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    terms: int = dataclasses.field(default=10, kw_only=True, metadata=setting(integer(1)))
    linear_step: StepSize | None = dataclasses.field(default=None, kw_only=True, metadata=child(optional(step_size())))

    @property
    def inner_batches_per_step(self) -> int:
        return 1 + self.terms

    def iterate(self, at: Iteration) -> Iterate:
        return double_loop(at, 1, random_solve(at, 1, self.terms))._replace(memory=())
