"""First-order gradients only: descent that keeps lowering the inner value gap."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from bilevel.settings.fields import child, register, setting
from bilevel.settings.numeric import integer, scalar, step_size
from bilevel.settings.rules import optional
from bilevel.solvers.iterations import sgd
from bilevel.solvers.stochastic import Calls, Iterate, Iteration, StepSize, Stochastic, descend, minus, size
from bilevel.trees import global_norm, power_of_two, times


@register
@dataclasses.dataclass(frozen=True)
class BOME(Stochastic):
    r"""BOME: with $w^T$ the result of T inner steps from $w$, held constant, and the gap
    $q(w, \lambda) = f(w, \lambda) - f(w^T, \lambda)$,

    $$
    (w, \lambda) \leftarrow (w, \lambda) - (\rho, \gamma) \odot (\nabla F + \sigma \nabla q), \qquad
    \sigma = \max\Big(\eta - \frac{\langle \nabla F, \nabla q \rangle}{\|\nabla q\|^2},\; 0\Big) .
    $$

    $\sigma$ is 0 where $\nabla q = 0$. Deterministic in the paper, with constant steps. Biased by
    $(I - \alpha H)^T$, what the T steps of size $\alpha$ leave of the gap; and as the direction of
    $\nabla q$ turns abruptly near the solution, constant steps end in a neighbourhood that shrinks with them.
    Cost per iteration: T + 2 inner gradients, 1 outer gradient; T + 2 inner batches. No memory.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      inner_steps: T.
      gap_step: alpha, a number or a schedule; None is `inner_step`.
      eta: how much of the gap's decrease is asked for.

    References:
      Liu, Ye, Wright, Stone & Liu 2022, arXiv 2209.08709, Algorithm 1.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.BOME(problem, inner_step=0.3, outer_step=0.3)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=300, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    inner_steps: int = dataclasses.field(default=10, kw_only=True, metadata=setting(integer(1)))
    gap_step: StepSize | None = dataclasses.field(default=None, kw_only=True, metadata=child(optional(step_size())))
    eta: float | jax.Array = dataclasses.field(default=0.5, kw_only=True, metadata=child(scalar(low=0.0)))

    commuting: ClassVar[bool] = True

    @property
    def inner_batches_per_step(self) -> int:
        return self.inner_steps + 2

    def iterate(self, at: Iteration) -> Iterate:
        gap_step = self.inner_step if self.gap_step is None else self.gap_step
        trainer = dataclasses.replace(at, inner_step=size(gap_step, at.step))
        trained = sgd(trainer, at.w, at.lam, self.inner_steps)
        outside = at.outer_gradient(at.w, at.lam, at.outer_draws[0])
        inside = at.inner_gradient(at.w, at.lam, at.draws[-2])
        beyond = at.inner_gradient(trained, at.lam, at.draws[-1])
        gap = inside.inner, minus(inside.outer, beyond.outer)
        objective = outside.inner, outside.outer
        # The gap in a unit in which its square is a number however near the inner problem is to its solution.
        unit = power_of_two(gap)
        gap = times(gap, 1 / unit)
        square = global_norm(gap) ** 2
        overlap = optax.tree.vdot(objective, gap) / jnp.where(square > 0, square, 1)
        weight = jnp.where(square > 0, jnp.maximum(self.eta * unit - overlap, 0), 0)
        d_inner, d_outer = descend(objective, -weight, gap)
        w = descend(at.w, at.inner_step, d_inner)
        calls = Calls(inner_gradients=self.inner_steps + 2, outer_gradients=1)
        return Iterate(w, at.move_outer(d_outer), (), d_outer, inside.value, outside.value, calls)
