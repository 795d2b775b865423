"""Hypergradients from values of the outer loss alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import bijectors
from bilevel.differentiation.gradients import reverse_gradient
from bilevel.differentiation.influence import dependence
from bilevel.hypergradients.base import Trained
from bilevel.hypergradients.query import Answer, Query
from bilevel.problem.problem import Problem
from bilevel.settings.fields import Unfit, register, setting
from bilevel.settings.numeric import integer, real
from bilevel.trees import PyTree, combine, partition, replayed, widened


def even(value: Any) -> int:
    """An even integer of at least 2."""
    try:
        value = integer(2)(value)
    except Unfit:
        value = 1
    if value % 2:
        raise Unfit("must be an even integer >= 2, since members come in pairs")
    return value


@register
@dataclasses.dataclass(frozen=True)
class EvolutionStrategies(Trained):
    r"""Antithetic evolution strategies: with $L(\lambda) = F(w_K(\lambda), \lambda)$, all of training included,

    $$
    \widehat{\frac{dF}{d\lambda}} = \frac{1}{n \sigma^2} \sum_{i \le n/2}
      \big(L(\lambda + \sigma\epsilon_i) - L(\lambda - \sigma\epsilon_i)\big)\,\sigma \epsilon_i,
      \quad \epsilon_i \sim N(0, I).
    $$

    Unbiased for the gradient of $E\, L(\lambda + \sigma\epsilon)$, which is that of L where L is quadratic, and
    else differs by $O(\sigma^2)$ times a third derivative. Nothing is differentiated: losses may have jumps, and
    memory does not grow with K. The price is variance: relative to the squared norm of the gradient it is about
    2 dim / n. All members train on the same batches with the same random keys. Where `Problem.domain` bounds
    $\lambda$ it is the free variable that is perturbed, so that no training leaves the domain.

    Args:
      optimizer, steps: as for `Unrolled`.
      population: n, trainings an estimate beside the one at $\lambda$; even. All run at once.
      sigma: standard deviation of the perturbation of every entry of `outer`, in the units of the free variable where
        there is a domain; choose it small against their scale.

    Raises:
      ValueError: for steps < 1, a population that is not even and positive, or a sigma that is not positive.

    References:
      Nesterov and Spokoiny 2017; Salimans et al. 2017, arXiv 1703.03864; Metz et al. 2019, arXiv 1810.10180.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.EvolutionStrategies(optax.sgd(0.5), steps=20, population=2000)
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> bool(abs(estimate.grad - 0.143) < 0.02)  # a mean over random perturbations
      True
    """

    population: int = dataclasses.field(default=32, kw_only=True, metadata=setting(even))
    sigma: float = dataclasses.field(default=0.01, kw_only=True, metadata=setting(real(above=0.0)))

    def _value(self, query: Query, free: PyTree, natural: Callable[..., PyTree]) -> jax.Array:
        """The outer loss after training, at another free variable, with the same noise for every member."""
        again = replayed(query.keys)
        moved = dataclasses.replace(query, outer=natural(free), keys=again)
        # A gradient with a rule of its own would hide from the trace what it reads.
        state, _ = self.trajectory(moved, gradient=reverse_gradient)
        return moved.outer_loss(state.params, moved.outer)[0]

    def reached(self, query: Query) -> list[bool]:
        """What the values of the outer loss depend on: nothing is differentiated."""
        free, natural, _ = coordinates(query.problem, query.outer)
        return dependence(lambda free: self._value(query, free, natural), free)[0]

    def differentiate(self, query: Query) -> Answer:
        """Costs (`population` + 1) `steps` inner gradients. `info["variance"]`: see `weighted`."""
        free, natural, pull = coordinates(query.problem, query.outer)
        state, trace = self.trajectory(query)
        centre, aux = query.outer_loss(state.params, query.outer)
        noise = perturbations(self, free, query.keys.own)
        values = jax.vmap(lambda free: self._value(query, free, natural))(mirrored(free, noise))
        grad, variance = weighted(values, jax.vmap(pull)(noise), self.sigma)
        return Answer(centre, grad, state, trace, aux, {"variance": variance})


def coordinates(problem: Problem, outer: PyTree) -> tuple[PyTree, Callable[..., PyTree], Callable[..., PyTree]]:
    """`(free, natural, pull)`: the free variable of what moves in `outer`, the way back to an `outer`, and the gradient
    for `outer` of one for `free`."""
    moving, fixed = partition(outer)
    free, pull = jax.vjp(lambda moving: partition(bijectors.free(problem.domain, combine(moving, fixed)))[0], moving)
    return free, lambda free: bijectors.natural(problem.domain, combine(free, fixed)), lambda grad: pull(grad)[0]


def perturbations(estimator: Any, free: PyTree, key: jax.Array) -> PyTree:
    """One N(0, sigma^2) perturbation of `free` a pair: a tree like it with a leading axis of population / 2."""
    leaves, structure = jax.tree.flatten(free)
    keys = jax.random.split(key, len(leaves))
    count = estimator.population // 2
    drawn = [
        jax.random.normal(k, (count, *jnp.shape(x)), jnp.result_type(x)) * estimator.sigma
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def mirrored(free: PyTree, noise: PyTree) -> PyTree:
    """The whole population: `free + noise`, then `free - noise`, along the leading axis."""
    return jax.tree.map(lambda x, e: x[None] + jnp.concatenate([e, -e]), free, noise)


def weighted(values: jax.Array, weights: PyTree, sigma: float) -> tuple[PyTree, jax.Array]:
    """`(gradient, variance)` from the losses of a `mirrored` population.

    `gradient` is the mean over pairs of (ahead - behind) / (2 sigma^2) times the pair's `weights`; `variance` the
    estimated sum of the variances of its entries, 0 for a single pair.
    """
    ahead, behind = jnp.split(values, 2)
    count = ahead.shape[0]

    def terms(w):
        slope = ((ahead - behind) / (2 * sigma**2)).astype(w.dtype)
        return w * slope.reshape(count, *[1] * (w.ndim - 1))

    each = jax.tree.map(terms, weights)
    spread = [jnp.sum(jnp.var(x, axis=0)) / max(count - 1, 1) for x in jax.tree.leaves(widened(each))]
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), each), sum(spread[1:], spread[0])
