"""First-order gradients only: the inner problem as a penalty."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from bilevel.settings.fields import child, register, setting
from bilevel.settings.numeric import integer, step_size
from bilevel.solvers.stochastic import Calls, Iterate, Iteration, StepSize, Stochastic, descend, minus, size
from bilevel.trees import PyTree


@register
@dataclasses.dataclass(frozen=True)
class F2SA(Stochastic):
    r"""F2SA: beside $w$, which follows the inner problem, $y$ follows the penalised one, T steps each, and

    $$
    \begin{aligned}
    w &\leftarrow w - \rho\, \partial_w f(w, \lambda), \\
    y &\leftarrow y - \rho\, \big(\partial_w f(y, \lambda) + \tfrac{1}{\sigma} \partial_w F(y, \lambda)\big), \\
    \lambda &\leftarrow \lambda - \gamma\, \big(\partial_\lambda F(y, \lambda)
              + \sigma\, (\partial_\lambda f(y, \lambda) - \partial_\lambda f(w, \lambda))\big),
    \end{aligned}
    $$

    every call on a batch of its own.

    The paper's steps are, with `Power`, of exponent 4/7 inside, 5/7 for y and 4/7 outside, and its multiplier
    $\sigma_k$ grows as $k^{1/7}$: the step of y is $\rho / \sigma$, of exponent 4/7 + 1/7, along
    $\sigma\, \partial_w f + \partial_w F$, which is built in here. With a constant $\sigma$ the hypergradient is biased
    by $O(1 / \sigma)$; noise in $\lambda$ grows with $\sigma$.
    Cost per iteration: 2T + 2 inner gradients (the last two in $\lambda$), T + 1 outer gradients; 2T + 2 inner
    and T + 1 outer batches. `State.memory` is y.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      penalty: the multiplier sigma, a number or a schedule.
      inner_steps: T.

    References:
      Kwon, Kwon, Wright & Nowak 2023, arXiv 2301.10945, Algorithm 1.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.F2SA(problem, inner_step=0.3, outer_step=1.0, penalty=2.0)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=60, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    penalty: StepSize = dataclasses.field(kw_only=True, metadata=child(step_size(above=0.0)))
    inner_steps: int = dataclasses.field(default=10, kw_only=True, metadata=setting(integer(1)))

    commuting: ClassVar[bool] = True

    @property
    def inner_batches_per_step(self) -> int:
        return 2 * self.inner_steps + 2

    @property
    def outer_batches_per_step(self) -> int:
        return self.inner_steps + 1

    def start(self, w: PyTree, lam: PyTree) -> PyTree:
        return w

    def iterate(self, at: Iteration) -> Iterate:
        penalty = size(self.penalty, at.step)

        def body(t, carry):
            w, y = carry
            outside = at.outer_gradient(y, at.lam, at.outer_draws[t]).inner
            inside = at.inner_gradient(y, at.lam, at.draws[2 * t]).inner
            y = descend(y, at.inner_step, descend(inside, -1 / penalty, outside))
            return descend(w, at.inner_step, at.inner_gradient(w, at.lam, at.draws[2 * t + 1]).inner), y

        w, y = jax.lax.fori_loop(0, self.inner_steps, body, (at.w, at.memory))
        outside = at.outer_gradient(y, at.lam, at.outer_draws[-1])
        penalised = at.inner_gradient(y, at.lam, at.draws[-2])
        inside = at.inner_gradient(w, at.lam, at.draws[-1])
        direction = descend(outside.outer, -penalty, minus(penalised.outer, inside.outer))
        calls = Calls(inner_gradients=2 * self.inner_steps + 2, outer_gradients=self.inner_steps + 1)
        return Iterate(w, at.move_outer(direction), y, direction, inside.value, outside.value, calls)
