"""What MRBO and SUSTAIN share: recursive momentum on both variables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from bilevel.settings.fields import child, setting
from bilevel.settings.numeric import integer, step_size
from bilevel.settings.rules import optional
from bilevel.solvers.iterations import Point, momentum
from bilevel.solvers.stochastic import Calls, Iterate, Iteration, StepSize, Stochastic, descend, minus, size, zeros
from bilevel.trees import PyTree


@dataclasses.dataclass(frozen=True)
class DoubleMomentum(Stochastic):
    """Recursive momentum on both variables; a subclass says how v is found.

    `State.memory` is `((w, lam) before the last update, d_w, d_lam)`. Inner gradients and mixed products are taken on
    inner draw 0.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      terms: Q, of the Neumann series.
      eta: the momentum's weight on the new gradient, in (0, 1], a number or a schedule.
      linear_step: step size of the Neumann series, at most 1 over the largest eigenvalue of H; None is `inner_step`.
    """

    terms: int = dataclasses.field(default=10, kw_only=True, metadata=setting(integer(1)))
    eta: StepSize = dataclasses.field(default=0.5, kw_only=True, metadata=child(step_size(above=0.0, high=1.0)))
    linear_step: StepSize | None = dataclasses.field(default=None, kw_only=True, metadata=child(optional(step_size())))

    def invert(self, at: Iteration, points: Sequence[Point], rhs: Sequence[PyTree]) -> tuple[list[PyTree], Any]:
        """v at each point, for one right-hand side each, and the products taken at a point; from inner draw 1 on."""
        raise NotImplementedError

    @property
    def inner_batches_per_step(self) -> int:
        return 1 + self.terms

    def start(self, w: PyTree, lam: PyTree) -> PyTree:
        return (w, lam), zeros(w), zeros(lam)

    def iterate(self, at: Iteration) -> Iterate:
        now, (before, d_inner, d_outer) = (at.w, at.lam), at.memory
        points, eta = [now, before], size(self.eta, at.step)
        outside = [at.outer_gradient(w, lam, at.outer_draws[0]) for w, lam in points]
        adjoints, hvps = self.invert(at, points, [o.inner for o in outside])
        inside = [at.products(w, lam, v, at.draws[0]) for (w, lam), v in zip(points, adjoints, strict=True)]
        new, old = (minus(o.outer, i.mixed) for o, i in zip(outside, inside, strict=True))
        d_inner = momentum(inside[0].grad, inside[1].grad, d_inner, eta, at.step)
        d_outer = momentum(new, old, d_outer, eta, at.step)
        return Iterate(
            descend(at.w, at.inner_step, d_inner),
            at.move_outer(d_outer),
            (now, d_inner, d_outer),
            d_outer,
            inside[0].value,
            outside[0].value,
            Calls(2, 2, 2 * hvps, 2),
        )
