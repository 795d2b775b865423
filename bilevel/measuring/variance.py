"""How much a hypergradient varies from batch to batch."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import Batches, columns, draw, draw_one
from bilevel.differentiation.captures import forget_outdated
from bilevel.hypergradients.base import Hypergradient, is_hypergradient
from bilevel.hypergradients.contract import driven_from_host
from bilevel.hypergradients.training import InnerState
from bilevel.measuring.point import Point
from bilevel.problem.problem import Problem
from bilevel.running.holes import not_finite
from bilevel.settings.fields import checked
from bilevel.settings.numeric import integer
from bilevel.sharding.processes import on_host
from bilevel.trees import Outer, PyTree


@dataclasses.dataclass(frozen=True)
class Variance:
    r"""The spread of a hypergradient g over batches, from n samples.

    Attributes:
      mean: $\bar g = \frac1n \sum_i g_i$, a tree like the gradient.
      variance: $\frac{1}{n - 1} \sum_i (g_i - \bar g)^2$ of each entry, likewise, in float64 whatever the gradient is
        in, of which squares may be too small or too large for it.
      total: the sum of `variance` over all entries, $E|g - E g|^2$.
      relative: `total` $/ |\bar g|^2$. A mean over m estimates has a relative error of about
        $\sqrt{\mathrm{relative} / m}$; above 1, a single estimate is mostly noise.

    Examples:
      >>> import bilevel, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.OneStep(optax.sgd(0.5), steps=20)
      >>> def spread(size):
      ...     return bilevel.variance(
      ...         problem, hypergradient, inner_data=bilevel.Batches(train, size), outer_data=val, samples=8
      ...     )
      >>> round(float(spread(4).mean), 3), round(spread(4).relative, 3)  # batches of all four rows
      (0.107, 0.0)
    """

    mean: PyTree
    variance: PyTree
    total: float
    relative: float


def variance(
    problem: Problem,
    hypergradient: Hypergradient,
    *,
    outer: Outer = None,
    inner_state: InnerState | None = None,
    inner_data: Any = None,
    outer_data: Any = None,
    key: jax.Array | None = None,
    samples: int = 16,
) -> Variance:
    """The variance of `hypergradient` over the batches of `inner_data` and `outer_data`, at one point.

    Samples are estimates from the same start with the same random keys, on the batches of successive outer
    iterations: the variance is that of the batches alone. One estimate is alive at a time.

    Args:
      problem, hypergradient: what to look at.
      outer: the point; by default `problem.start_outer(key)`.
      inner_state: a warm start; None for a cold one.
      inner_data, outer_data: as for `run`, without iterators; at least one of them `Batches`, since there is nothing to
        vary otherwise.
      key: randomness; None is `jax.random.key(0)`.
      samples: n >= 2.

    Raises:
      ValueError: for samples < 2, or if neither data is `Batches`.
      FloatingPointError: if a hypergradient is not finite; names the outer leaf.

    Examples:
      >>> import bilevel, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.OneStep(optax.sgd(0.5), steps=20)
      >>> def spread(size):
      ...     return bilevel.variance(
      ...         problem, hypergradient, inner_data=bilevel.Batches(train, size), outer_data=val, samples=8
      ...     )
      >>> spread(2).total > 1e-4, spread(4).total > 1e-4  # a batch of all four rows has no noise
      (True, False)
    """
    forget_outdated(problem, hypergradient)
    point = Point.of("variance", problem, outer, inner_state, inner_data, outer_data, key)
    checked("variance", "hypergradient", hypergradient, is_hypergradient)
    checked("variance", "samples", samples, integer(2))
    require_batches("variance", inner_data, outer_data)
    inner, held_out = (jax.tree.map(jnp.asarray, columns(data)) for data in (inner_data, outer_data))
    point.arguments(hypergradient.steps)  # looks at the losses
    sampled = _samples_by_hand if driven_from_host(hypergradient) else _samples
    grads = sampled(point._replace(inner_data=inner, outer_data=held_out), hypergradient, samples)
    if names := not_finite("outer", grads):
        raise FloatingPointError(
            f"The hypergradient is not finite at {', '.join(names)} on some of the {samples} batches: train at smaller "
            "step sizes, or look for the NaN with run, which names where it begins."
        )
    return _of(grads)


def require_batches(what: str, inner_data: Any, outer_data: Any) -> None:
    """Raises ValueError if neither of the data is `Batches`, so that all samples are the same."""
    if not any(isinstance(data, Batches) for data in (inner_data, outer_data)):
        raise ValueError(
            f"{what}: neither inner_data nor outer_data is Batches(arrays, size), so that every sample would see the "
            "same data and the variance over batches be 0: give one of them in mini-batches."
        )


@partial(jax.jit, static_argnums=(2,))
def _samples(point: Point, hypergradient: Hypergradient, samples: int):
    return jax.lax.map(partial(_sample, point, hypergradient), jnp.arange(samples, dtype=jnp.uint32))


def _samples_by_hand(point: Point, hypergradient: Hypergradient, samples: int):
    grads = [_sample(point, hypergradient, i) for i in jnp.arange(samples, dtype=jnp.uint32)]
    return jax.tree.map(lambda *each: jnp.stack(each), *grads)


def _sample(point: Point, hypergradient: Hypergradient, i: jax.Array):
    start, inner_key, outer_key = point.keys
    batches = draw(point.inner_data, inner_key, i * hypergradient.steps, hypergradient.steps)
    outer_batch = draw_one(point.outer_data, outer_key, i)
    return hypergradient.estimate(point.problem, point.inner_state, point.outer, batches, outer_batch, start).grad


def _of(grads: PyTree) -> Variance:
    """The moments of samples on a leading axis, in double precision on the host, in units of the largest entry."""
    wide = jax.tree.map(lambda g: on_host(g).astype(np.complex128 if jnp.iscomplexobj(g) else np.float64), grads)
    unit = max((float(np.abs(g).max(initial=0.0)) for g in jax.tree.leaves(wide)), default=0.0) or 1.0
    wide = jax.tree.map(lambda g: g / unit, wide)
    mean = jax.tree.map(lambda g: g.mean(axis=0), wide)
    spread = jax.tree.map(lambda g: g.var(axis=0, ddof=1), wide)
    total = float(sum(x.sum() for x in jax.tree.leaves(spread)))
    size = float(sum((np.abs(x) ** 2).sum() for x in jax.tree.leaves(mean)))
    return Variance(
        mean=jax.tree.map(lambda m, g: jnp.asarray(m * unit, g.dtype), mean, grads),
        variance=jax.tree.map(lambda x: x * unit**2, spread),
        total=total * unit**2,
        relative=total / size if size else float("inf") if total else 0.0,
    )
