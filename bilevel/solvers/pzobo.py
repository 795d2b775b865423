"""The Jacobian of inner training by finite differences along random directions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from bilevel import bijectors
from bilevel.settings.fields import child, register, setting
from bilevel.settings.numeric import integer, scalar
from bilevel.solvers.iterations import sgd
from bilevel.solvers.stochastic import Calls, Iterate, Iteration, Stochastic, descend, minus, plus


@register
@dataclasses.dataclass(frozen=True)
class PZOBO(Stochastic):
    r"""PZOBO: with $w^T(\lambda)$ the result of T inner steps from $w$ and Gaussian $u_1, \dots,
    u_J$,

    $$
    \lambda \leftarrow \lambda - \gamma \Big(\partial_\lambda F + \frac1J \sum_j
        \Big\langle \frac{w^T(\lambda + \mu u_j) - w^T(\lambda)}{\mu},\, \partial_w F \Big\rangle\, u_j \Big),
    \qquad w \leftarrow w^T(\lambda),
    $$

    $F$ taken at $(w^T(\lambda), \lambda)$ and all trainings on the same batches. Where `Problem.domain`
    bounds $\lambda$, it is the free variable that is perturbed, so that no training leaves the domain.

    Constant steps. Biased in two ways: it estimates the hypergradient of T unrolled steps from a constant start, and
    finite differences add $O(\mu)$ times the curvature of the training map (0 where that is linear). Its variance
    grows with the dimension of $\lambda$ over J, and vanishes with the hypergradient's indirect part.
    Cost per iteration: T(1 + J) inner gradients, 1 outer gradient; T inner batches. No memory.

    Args:
      problem, inner_step, outer_step: as for `Stochastic`.
      inner_steps: T.
      directions: J.
      smoothing: mu.

    References:
      Sow, Ji & Liang 2022, arXiv 2110.07004, Algorithm 1.

    Examples:
      >>> import math, bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.PZOBO(problem, inner_step=0.5, outer_step=1.0, directions=5)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=60, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """

    inner_steps: int = dataclasses.field(default=10, kw_only=True, metadata=setting(integer(1)))
    directions: int = dataclasses.field(default=10, kw_only=True, metadata=setting(integer(1)))
    smoothing: float | jax.Array = dataclasses.field(default=0.1, kw_only=True, metadata=child(scalar(above=0.0)))

    @property
    def inner_batches_per_step(self) -> int:
        return self.inner_steps

    def iterate(self, at: Iteration) -> Iterate:
        w = sgd(at, at.w, at.lam, self.inner_steps)
        inside = at.inner_gradient(w, at.lam, at.draws[-1])  # for its value
        outside = at.outer_gradient(w, at.lam, at.outer_draws[0])

        free, to_natural = jax.vjp(lambda lam: bijectors.free(at.problem.domain, lam), at.lam)

        def along(key):
            u = optax.tree.random_like(key, free)
            lam = bijectors.natural(at.problem.domain, descend(free, -jnp.asarray(self.smoothing), u))
            moved = sgd(at, at.w, lam, self.inner_steps)
            slope = optax.tree.vdot(minus(moved, w), outside.inner) / self.smoothing
            return jax.tree.map(lambda x: jnp.asarray(slope, x.dtype) * x, u)

        samples = jax.vmap(along)(jax.random.split(at.key, self.directions))
        indirect = jax.tree.map(lambda x: jnp.mean(x, axis=0), samples)
        direction = plus(outside.outer, to_natural(indirect)[0])
        calls = Calls(inner_gradients=self.inner_steps * (1 + self.directions), outer_gradients=1)
        return Iterate(w, at.move_outer(direction), (), direction, inside.value, outside.value, calls)
