"""Inner SGD, then SGD on the linear system, both from where they ended."""

from __future__ import annotations

import dataclasses

import jax

from bilevel.settings.fields import child, register, setting
from bilevel.settings.numeric import integer, step_size
from bilevel.settings.rules import optional
from bilevel.solvers.iterations import double_loop
from bilevel.solvers.stochastic import Iterate, Iteration, StepSize, Stochastic, descend, minus, zeros
from bilevel.trees import PyTree


@register
@dataclasses.dataclass(frozen=True)
class AmIGO(Stochastic):
    r"""AmIGO: both loops are warm-started from the last iteration,

    $$
    \begin{aligned}
    w &\leftarrow w - \rho\, \partial_w f && T \text{ times}, \\
    v &\leftarrow v - \rho_v\, (H v - \partial_w F) && N \text{ times}, \\
    \lambda &\leftarrow \lambda - \gamma\, (\partial_\lambda F - C v),
    \end{aligned}
    $$

    every inner call on a batch of its own.

    Constant steps, and batches that grow where noise is to vanish. Unbiased in the limit for any T and N.
    Cost per iteration: T inner gradients, 1 outer gradient, N Hessian-vector products, 1 mixed product; T + N + 1 inner
    batches. `State.memory` is v.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      inner_steps: T.
      linear_steps: N.
      linear_step: step size of v, a number or a schedule; None is `inner_step`.

    References:
      Arbel & Mairal 2022, arXiv 2111.14580, Algorithm 1.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.AmIGO(problem, inner_step=0.5, outer_step=1.0, inner_steps=5, linear_steps=5)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=60, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    inner_steps: int = dataclasses.field(default=10, kw_only=True, metadata=setting(integer(1)))
    linear_steps: int = dataclasses.field(default=10, kw_only=True, metadata=setting(integer(1)))
    linear_step: StepSize | None = dataclasses.field(default=None, kw_only=True, metadata=child(optional(step_size())))

    @property
    def inner_batches_per_step(self) -> int:
        return self.inner_steps + self.linear_steps + 1

    def start(self, w: PyTree, lam: PyTree) -> PyTree:
        return zeros(w)

    def iterate(self, at: Iteration) -> Iterate:
        def solve(w, rhs):
            def body(t, v):
                hv = at.hvp(w, at.lam, v, at.draws[self.inner_steps + t])
                return descend(v, at.linear_step, minus(hv, rhs))

            return jax.lax.fori_loop(0, self.linear_steps, body, at.memory), self.linear_steps

        return double_loop(at, self.inner_steps, solve)
