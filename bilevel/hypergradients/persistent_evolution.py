"""Evolution strategies whose perturbations outlive the estimate."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel.differentiation.gradients import reverse_gradient
from bilevel.differentiation.influence import traced
from bilevel.differentiation.loss_checks import guarded
from bilevel.hypergradients.base import Aux, Estimate, Trained, schedule
from bilevel.hypergradients.evolution import coordinates, even, mirrored, perturbations, weighted
from bilevel.hypergradients.training import InnerState
from bilevel.settings import integer, optional, real, register, setting
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

    A warm start makes every other estimator forget how earlier pieces depend on :math:`\lambda`. Here each pair of
    particles goes on with its own inner problem, perturbed afresh by :math:`\pm\epsilon_i^{(t)}` in piece t, and its
    loss is weighted with all perturbations it has seen:

    .. math:: \widehat{\frac{dF_t}{d\lambda}} = \frac{1}{n \sigma^2} \sum_{i \le n/2}
              \big(F(w^{i+}_{tK}) - F(w^{i-}_{tK})\big) \sum_{s \le t} \epsilon_i^{(s)},
              \quad \epsilon \sim N(0, \sigma^2 I).

    With :math:`\lambda` at rest this is unbiased for the (Gaussian-smoothed) derivative through all tK steps so far, at
    the cost of K; in a run, each piece is taken at the :math:`\lambda` of its time. The variance grows with the number
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
    """

    population: int = dataclasses.field(default=32, kw_only=True, metadata=setting(even))
    sigma: float = dataclasses.field(default=0.01, kw_only=True, metadata=setting(real(above=0.0)))
    memory: int | None = dataclasses.field(default=None, kw_only=True, metadata=setting(optional(integer(1))))

    def init(self, problem, outer, key) -> InnerState:
        """As `Trained.init`, with all `Particles` at that start."""
        state = super().init(problem, outer, key)
        return state._replace(extra=self._particles(state, outer))

    @guarded
    def estimate(self, problem, inner_state, outer, inner_batches, outer_batch, key) -> Estimate:
        """See `Hypergradient`. Costs (`population` + 1) `steps` inner gradients."""
        free, natural, pull = coordinates(problem, outer)
        keys = schedule(key, self.steps)
        state, trace = self.trajectory(problem, inner_state, outer, inner_batches, keys)
        value, aux = self.outer_loss(problem, state.params, outer, outer_batch, keys)
        noise = perturbations(self, free, keys.own)
        again = replayed(keys)  # the same noise for every member

        def member(free, particle=None):
            outer = natural(free)
            # A gradient with a rule of its own would hide from the trace what it reads.
            after, _ = self.trajectory(problem, particle, outer, inner_batches, again, gradient=reverse_gradient)
            after = after._replace(extra=None)
            return self.outer_loss(problem, after.params, outer, outer_batch, again)[0], after

        lost = self.lost(problem, inner_state, outer, inner_batches, again)
        # Evaluated below for the whole population; here for the warnings.
        traced(lambda free: member(free, inner_state)[0], free, estimator="PersistentES", lost=lost)
        if inner_state is None:
            particles = self._particles(state, outer)
            values, states = jax.vmap(member)(mirrored(free, noise))
        else:
            particles = self._remembered(inner_state, outer)
            values, states = jax.vmap(member)(mirrored(free, noise), particles.states)
        accumulated = jax.tree.map(jnp.add, particles.accumulated, noise)
        grad, variance = weighted(values, jax.vmap(pull)(accumulated), self.sigma)
        state = state._replace(extra=Particles(states, accumulated, particles.age + 1))
        return Estimate(value, grad, state, Aux(trace.aux, aux, {"inner_loss": trace.value, "variance": variance}))

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
