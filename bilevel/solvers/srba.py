"""Recursive variance reduction of all three directions of SOBA."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from bilevel.settings.fields import child, register, setting
from bilevel.settings.numeric import integer, step_size
from bilevel.settings.rules import optional
from bilevel.solvers.iterations import Directions, directions, follow
from bilevel.solvers.oracles import passes
from bilevel.solvers.stochastic import (
    Calls,
    Iterate,
    Iteration,
    StepSize,
    Stochastic,
    minus,
    plus,
    zeros,
)
from bilevel.trees import PyTree


@register
@dataclasses.dataclass(frozen=True)
class SRBA(Stochastic):
    r"""SRBA: `SOBA` along $d = (d_w, d_v, d_\lambda)$, where D stacks SOBA's three directions at
    $u = (w, v, \lambda)$ and

    $$
    d_k = \begin{cases} D(u_k) \text{ on all data} & k \equiv 0 \mod q, \\
          d_{k-1} + D_{b}(u_k) - D_{b}(u_{k-1}) \text{ on one batch } b & \text{otherwise.} \end{cases}
    $$

    Constant steps; linear convergence on strongly convex finite sums. The paper's period is of the order of the number
    of batches in the data.
    Cost per iteration: 2 of each oracle, and at every q-th a pass over both data sets instead, in one call: the whole
    data must fit beside the model. `State.memory` is `(v, (w, lam, v) before the last update, (d_w, d_v, d_lam))`.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      linear_step: step size of v, a number or a schedule; None is `inner_step`.
      period: q, iterations from one full pass to the next.

    Raises:
      ValueError: for batches that are not `Indexed`, since the full pass needs the data set.

    References:
      Dagréou, Moreau, Vaiter & Ablin 2024, arXiv 2302.08766, Algorithm 1.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> train, val = bilevel.Batches(train, 2), bilevel.Batches(val, 2)
      >>> solver = bilevel.SRBA(problem, inner_step=0.2, outer_step=0.3, period=4)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=400, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    period: int = dataclasses.field(kw_only=True, metadata=setting(integer(1)))
    linear_step: StepSize | None = dataclasses.field(default=None, kw_only=True, metadata=child(optional(step_size())))

    def start(self, w: PyTree, lam: PyTree) -> PyTree:
        v = zeros(w)
        return v, (w, lam, v), (v, v, zeros(lam))

    def iterate(self, at: Iteration) -> Iterate:
        inner_passes, outer_passes = passes(self, at.draws), passes(self, at.outer_draws)
        v, before, kept = at.memory
        now = (at.w, at.lam, v)

        def restart():
            return directions(at, now, at.draws.full, at.outer_draws.full)

        def recurse():
            new, old = (directions(at, point, at.draws[0], at.outer_draws[0]) for point in (now, before))
            inner, linear, outer = plus(kept, minus(new[:3], old[:3]))
            return Directions(inner, linear, outer, new.inner_loss, new.outer_loss)

        full = at.step % self.period == 0
        d = jax.lax.cond(full, restart, recurse)
        inner, outer = (jnp.where(full, n, 2) for n in (inner_passes, outer_passes))
        return follow(at, v, d, Calls(inner, outer, inner, inner), lambda v: (v, now, d[:3]))
