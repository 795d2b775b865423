"""Evolution strategies whose perturbations outlive the estimate."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.differentiation.gradients import reverse_gradient
from bilevel.differentiation.influence import dependence
from bilevel.hypergradients.base import Trained
from bilevel.hypergradients.evolution import coordinates, even, mirrored, perturbations, weighted
from bilevel.hypergradients.query import Answer, Query
from bilevel.hypergradients.training import InnerState
from bilevel.settings.fields import register, setting
from bilevel.settings.numeric import integer, real
from bilevel.settings.rules import optional
from bilevel.trees import PyTree, partition, replayed


class Particles(NamedTuple):
    """What `PersistentES` carries in `inner_state.extra`.

    Attributes:
      states: the inner problems of the population, an `InnerState` with a leading axis; the two members of pair i are
        i and population / 2 + i.
      accumulated: the sum of each pair's perturbations since its members were set, a tree like the inexact leaves of
        `outer` with a leading axis of population / 2.
      age: estimates since then, int32.
    """

    states: InnerState
    accumulated: PyTree
    age: jax.Array


@register
@dataclasses.dataclass(frozen=True)
class PersistentES(Trained):
    r"""Persistent evolution strategies: unbiased over a training that is cut into pieces of K steps.

    A warm start makes every other estimator forget how earlier pieces depend on $\lambda$. Here each pair of
    particles goes on with its own inner problem, perturbed afresh by $\pm\epsilon_i^{(t)}$ in piece t, and its
    loss is weighted with all perturbations it has seen:

    $$
    \widehat{\frac{dF_t}{d\lambda}} = \frac{1}{n \sigma^2} \sum_{i \le n/2}
      \big(F(w^{i+}_{tK}) - F(w^{i-}_{tK})\big) \sum_{s \le t} \epsilon_i^{(s)},
      \quad \epsilon \sim N(0, \sigma^2 I).
    $$

    With $\lambda$ at rest this is unbiased for the (Gaussian-smoothed) derivative through all tK steps so far, at
    the cost of K; in a run, each piece is taken at the $\lambda$ of its time. The variance grows with the number
    of pieces that are remembered: `memory` bounds it.

    Only warm starts profit: with `inner_state=None` every estimate begins with new particles, and is
    `EvolutionStrategies`.

    Args:
      optimizer, steps: as for `Unrolled`.
      population, sigma: as for `EvolutionStrategies`, domains too. The particles' inner problems are kept: `population`
        copies of the inner variable and its optimizer state.
      memory: pieces after which the particles are set back to the unperturbed inner problem, which truncates the
        derivative there; None for never.

    Raises:
      ValueError: as `EvolutionStrategies`, and for memory < 1 or an inner state without particles.

    References:
      Vicol et al. 2021, arXiv 2112.13835.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.PersistentES(optax.sgd(0.5), steps=20, population=2000)
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> bool(abs(estimate.grad - 0.143) < 0.02)  # a mean over random perturbations
      True
    """

    population: int = dataclasses.field(default=32, kw_only=True, metadata=setting(even))
    sigma: float = dataclasses.field(default=0.01, kw_only=True, metadata=setting(real(above=0.0)))
    memory: int | None = dataclasses.field(default=None, kw_only=True, metadata=setting(optional(integer(1))))

    def init(self, problem, outer, key) -> InnerState:
        """As `Trained.init`, with all `Particles` at that start."""
        state = super().init(problem, outer, key)
        return state._replace(extra=self._particles(state, outer))

    def _member(self, query: Query, free: PyTree, natural: Any, particle: InnerState | None) -> tuple[jax.Array, Any]:
        """The outer loss and the state of a member, trained on from `particle` with the same noise for every member."""
        again = replayed(query.keys)
        moved = dataclasses.replace(query, outer=natural(free), keys=again, inner_state=particle)
        # A gradient with a rule of its own would hide from the trace what it reads.
        after, _ = self.trajectory(moved, gradient=reverse_gradient)
        return moved.outer_loss(after.params, moved.outer)[0], after._replace(extra=None)

    def reached(self, query: Query) -> list[bool]:
        """What the values of the outer loss depend on: nothing is differentiated."""
        free, natural, _ = coordinates(query.problem, query.outer)
        return dependence(lambda free: self._member(query, free, natural, query.inner_state)[0], free)[0]

    def differentiate(self, query: Query) -> Answer:
        """Costs (`population` + 1) `steps` inner gradients."""
        free, natural, pull = coordinates(query.problem, query.outer)
        state, trace = self.trajectory(query)
        value, aux = query.outer_loss(state.params, query.outer)
        noise = perturbations(self, free, query.keys.own)
        member = lambda free, particle=None: self._member(query, free, natural, particle)  # noqa: E731
        if query.inner_state is None:
            particles = self._particles(state, query.outer)
            values, states = jax.vmap(member)(mirrored(free, noise))
        else:
            particles = self._remembered(query.inner_state, query.outer)
            values, states = jax.vmap(member)(mirrored(free, noise), particles.states)
        accumulated = jax.tree.map(jnp.add, particles.accumulated, noise)
        grad, variance = weighted(values, jax.vmap(pull)(accumulated), self.sigma)
        state = state._replace(extra=Particles(states, accumulated, particles.age + 1))
        return Answer(value, grad, state, trace, aux, {"variance": variance})

    def _particles(self, state: InnerState, outer: PyTree) -> Particles:
        """The whole population at `state`, nothing accumulated."""
        n, (moving, _) = self.population, partition(outer)
        states = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), state._replace(extra=None))
        nothing = jax.tree.map(lambda x: jnp.zeros((n // 2, *x.shape), x.dtype), moving)
        return Particles(states, nothing, jnp.zeros((), jnp.int32))

    def _remembered(self, state: InnerState, outer: PyTree) -> Particles:
        if not isinstance(state.extra, Particles):
            raise ValueError("PersistentES needs its particles: start from its own init(problem, outer, key), or None.")
        if self.memory is None:
            return state.extra
        forget = state.extra.age >= self.memory
        return jax.lax.cond(forget, lambda: self._particles(state, outer), lambda: state.extra)
