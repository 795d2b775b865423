"""One step on w, one on v, recursive momentum on the outer direction."""

from __future__ import annotations

import dataclasses

from bilevel.settings.fields import child, register
from bilevel.settings.numeric import step_size
from bilevel.settings.rules import optional
from bilevel.solvers.iterations import momentum
from bilevel.solvers.stochastic import Calls, Iterate, Iteration, StepSize, Stochastic, descend, minus, size, zeros
from bilevel.trees import PyTree


@register
@dataclasses.dataclass(frozen=True)
class FSLA(Stochastic):
    r"""FSLA: one inner step, one step on the linear system at the new point, and recursive momentum on
    $D(w, \lambda, v) = \partial_\lambda F - C v$:

    $$
    \begin{aligned}
    w_{k+1} &= w_k - \rho\, \partial_w f(w_k, \lambda_k), \\
    v_{k+1} &= v_k - \rho_v\, (H v_k - \partial_w F)(w_{k+1}, \lambda_k), \\
    d_k &= D(w_{k+1}, \lambda_k, v_{k+1}) + (1 - \eta) (d_{k-1} - D(w_k, \lambda_{k-1}, v_k)), \\
    \lambda_{k+1} &= \lambda_k - \gamma\, d_k .
    \end{aligned}
    $$

    The paper's steps are `Power(., 1/2)` for all four. At the first iteration $\eta = 1$.
    Cost per iteration: 1 inner gradient, 3 outer gradients, 1 Hessian-vector product, 2 mixed products; 3 inner and 2
    outer batches. `State.memory` is `(v, lam before the last update, d)`.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      linear_step: step size of v, a number or a schedule; None is `inner_step`.
      eta: the momentum's weight on the new gradient, in (0, 1], a number or a schedule.

    References:
      Li, Gu & Huang 2022, arXiv 2112.04660, Algorithm 1.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.FSLA(problem, inner_step=0.5, outer_step=1.0)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=60, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    linear_step: StepSize | None = dataclasses.field(default=None, kw_only=True, metadata=child(optional(step_size())))
    eta: StepSize = dataclasses.field(default=0.5, kw_only=True, metadata=child(step_size(above=0.0, high=1.0)))

    @property
    def inner_batches_per_step(self) -> int:
        return 3

    @property
    def outer_batches_per_step(self) -> int:
        return 2

    def start(self, w: PyTree, lam: PyTree) -> PyTree:
        return zeros(w), lam, zeros(lam)

    def iterate(self, at: Iteration) -> Iterate:
        v_old, lam_old, d = at.memory
        inside = at.inner_gradient(at.w, at.lam, at.draws[0])
        w = descend(at.w, at.inner_step, inside.inner)
        outside = at.outer_gradient(w, at.lam, at.outer_draws[0])
        hv = at.hvp(w, at.lam, v_old, at.draws[1])
        v = descend(v_old, at.linear_step, minus(hv, outside.inner))

        def direction(w, lam, v):
            mixed = at.products(w, lam, v, at.draws[2]).mixed
            return minus(at.outer_gradient(w, lam, at.outer_draws[1]).outer, mixed)

        new, old = direction(w, at.lam, v), direction(at.w, lam_old, v_old)
        d = momentum(new, old, d, size(self.eta, at.step), at.step)
        memory = (v, at.lam, d)
        return Iterate(w, at.move_outer(d), memory, d, inside.value, outside.value, Calls(1, 3, 1, 2))
