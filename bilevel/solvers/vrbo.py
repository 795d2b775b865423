"""Recursive variance reduction inside a double loop, the hypergradient by a Neumann series."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from bilevel.settings.fields import child, register, setting
from bilevel.settings.numeric import integer, step_size
from bilevel.settings.rules import optional
from bilevel.solvers.iterations import neumann
from bilevel.solvers.oracles import passes
from bilevel.solvers.stochastic import Calls, Iterate, Iteration, StepSize, Stochastic, descend, minus, plus, zeros
from bilevel.trees import PyTree, moving


@register
@dataclasses.dataclass(frozen=True)
class VRBO(Stochastic):
    r"""VRBO: with $G = \partial_w f$, $D = \partial_\lambda F - C v$ and v by a Neumann series of Q
    products, at every q-th iteration $(d^w, d^\lambda) = (G, D)$ on all data. Then

    $$
    \begin{aligned}
    \lambda &\leftarrow \lambda - \gamma\, d^\lambda \quad\text{and, T times on fresh batches,} \\
    d^w &\leftarrow d^w + G(w, \lambda) - G(w^-, \lambda^-), \\
    d^\lambda &\leftarrow d^\lambda + D(w, \lambda) - D(w^-, \lambda^-), \\
    w &\leftarrow w - \rho\, d^w,
    \end{aligned}
    $$

    where $(w^-, \lambda^-)$ is the point before: at first that before the outer step.

    Constant steps. Biased by the remainder of the series.
    Cost per iteration: 2T inner gradients, 2T outer gradients, 2TQ Hessian-vector products, 2T mixed products; T(1 + Q)
    inner and T outer batches; at every q-th, in addition, a pass over both data sets (Q over the inner ones for the
    series), each in one call. `State.memory` is `(d_w, d_lam)`.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      period: q, iterations from one full pass to the next.
      inner_steps: T.
      terms: Q.
      linear_step: eta of the Neumann series, at most 1 over the largest eigenvalue of H; None is `inner_step`.

    Raises:
      ValueError: for batches that are not `Indexed`, since the full pass needs the data set.

    References:
      Yang, Ji & Liang 2021, arXiv 2106.04692, Algorithm 2.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> train, val = bilevel.Batches(train, 2), bilevel.Batches(val, 2)
      >>> solver = bilevel.VRBO(problem, inner_step=0.2, outer_step=0.3, period=4, inner_steps=5, terms=5)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=400, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    period: int = dataclasses.field(kw_only=True, metadata=setting(integer(1)))
    inner_steps: int = dataclasses.field(default=10, kw_only=True, metadata=setting(integer(1)))
    terms: int = dataclasses.field(default=10, kw_only=True, metadata=setting(integer(1)))
    linear_step: StepSize | None = dataclasses.field(default=None, kw_only=True, metadata=child(optional(step_size())))

    @property
    def inner_batches_per_step(self) -> int:
        return self.inner_steps * (1 + self.terms)

    @property
    def outer_batches_per_step(self) -> int:
        return self.inner_steps

    def start(self, w: PyTree, lam: PyTree) -> PyTree:
        return zeros(w), zeros(lam)

    def iterate(self, at: Iteration) -> Iterate:
        inner_passes, outer_passes = passes(self, at.draws), passes(self, at.outer_draws)
        full = at.step % self.period == 0
        now = (at.w, at.lam)

        def restart():
            return self._directions(at, [now], at.draws.full, at.outer_draws.full, lambda t: at.draws.full)[0][0]

        d_inner, d_outer = jax.lax.cond(full, restart, lambda: at.memory)
        outer = at.move_outer(d_outer)
        lam = moving(outer)

        def body(t, carry):
            w, before, kept, _ = carry
            here, first = (w, lam), t * (1 + self.terms)
            (new, old), losses = self._directions(
                at, [here, before], at.draws[first], at.outer_draws[t], lambda j: at.draws[first + 1 + j]
            )
            kept = plus(kept, minus(new, old))
            return descend(w, at.inner_step, kept[0]), here, kept, losses

        dtypes = jax.eval_shape(
            lambda: (at.inner_gradient(*now, at.draws[0]), at.outer_gradient(*now, at.outer_draws[0]))
        )
        losses = tuple(jnp.zeros((), d.value.dtype) for d in dtypes)
        start = (at.w, now, (d_inner, d_outer), losses)
        w, _, kept, (inner_loss, outer_loss) = jax.lax.fori_loop(0, self.inner_steps, body, start)
        inner, outer_calls = (2 * self.inner_steps + jnp.where(full, n, 0) for n in (inner_passes, outer_passes))
        calls = Calls(inner, outer_calls, self.terms * inner, inner)
        return Iterate(w, outer, kept, d_outer, inner_loss, outer_loss, calls)

    def _directions(self, at, points, draw, outer_draw, series):
        """`[(G, D)]` at the points, and both losses at the first."""
        outside = [at.outer_gradient(*point, outer_draw) for point in points]
        adjoints = neumann(at, points, [o.inner for o in outside], self.terms, series)
        inside = [at.products(*point, v, draw) for point, v in zip(points, adjoints, strict=True)]
        pairs = [(i.grad, minus(o.outer, i.mixed)) for i, o in zip(inside, outside, strict=True)]
        return pairs, (inside[0].value, outside[0].value)
