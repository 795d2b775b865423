"""Central differences of a whole training map along directions of one outer leaf, and how far they may be off.

A difference is off by three things: by what the map bends within the stencil, by what it rounds, and by a kink. The
first is the difference between a stencil and one of twice its width. The second is assumed to be a unit in the last
place of the coarsest precision that the influence of the leaf passes through, which the traced program tells, and is
measured besides: nine values lie on a polynomial of degree four, but for rounding. Of a kink right at the point two
sides of such a polynomial differ in slope.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import bijectors
from bilevel.hypergradients.contract import traceable
from bilevel.hypergradients.per_task import PerTask
from bilevel.hypergradients.query import outer_value, split_keys
from bilevel.measuring.casts import lowered
from bilevel.measuring.rungs import Rung, held_against
from bilevel.trees import PyTree, combine, partition

STEP = 3e-4
"""Of central differences, relative to the size of a leaf."""
COARSE = 1e-2
"""The same, of a step of the size that an outer optimizer takes."""
SHORTER = (1e-3, 1e-6, 1e-9)
"""Shorter steps, relative to that one."""
BESIDE = (-np.sqrt(5.37), np.sqrt(0.47), np.sqrt(9.88))
"""Where shorter steps are taken beside the point, in steps of the first size: not at round numbers, as edges are."""
GRAIN = 1e-2
"""Largest share of a step that the entries which it moves may round by."""
DOUBTED = 1e-3
"""Relative uncertainty from which steps of the size of single entries are tried."""

OFFSETS = np.array([-4.0, -2.0, -1.0, 1.0, 2.0, 4.0, -2.7, 3.3, 0.0])
"""Of the stencil, in steps: two before the last, at no regular distance, show rounding that falls on the same grid."""
_POLYNOMIAL = np.vander(OFFSETS / 4, 5)
_HINGED = np.column_stack([_POLYNOMIAL, np.abs(OFFSETS / 4)])


class Differences(NamedTuple):
    """Derivatives along directions; an array each, with an entry for each direction.

    Attributes:
      slope: the central difference of fourth order; NaN where the map is not finite.
      doubt: how far it may be off.
      rounding: the part of that which is assumed for the precision of the map.
      kink: whether the slopes to both sides differ.
      still: whether all values are the same.
    """

    slope: np.ndarray
    doubt: np.ndarray
    rounding: np.ndarray
    kink: np.ndarray
    still: np.ndarray


class Found(NamedTuple):
    """What differences say of a leaf.

    Attributes:
      slope, doubt, kink: as of `Differences`, of the steps at which they are known best.
      rough: whether the doubt is of shorter steps, over which the slope is another.
      miss: what differences over coarse steps differ by.
      precision: the coarsest that the influence of the leaf passes through by a cast, or None.
      hidden: how large a slope may be that this precision rounds away; 0 without such a cast.
    """

    slope: np.ndarray
    doubt: np.ndarray
    kink: np.ndarray
    rough: np.ndarray
    miss: np.ndarray
    precision: str | None
    hidden: float


def central(arguments: tuple, leaf: int, directions: np.ndarray, step: float) -> np.ndarray:
    """Derivatives of the training map along `directions` of one leaf, to fourth order."""
    x = np.asarray(jax.tree.leaves(partition(arguments[3])[0])[leaf])
    size, offsets = step * _size(x), np.array([-2, -1, 1, 2])
    moves = jnp.asarray((size * offsets[:, None, *[None] * x.ndim] * directions).reshape(-1, *x.shape), x.dtype)
    values = np.asarray(_values_moved(*arguments, leaf, moves)).reshape(4, len(directions))
    return _fourth_order(values, size)


def found(arguments: tuple, leaf: int, directions: np.ndarray, expected: np.ndarray) -> Found:
    """As `central`, with what it may be off by, along `directions` of the free coordinates of `Problem(domain=...)`.

    Args:
      arguments: of an estimate.
      leaf: the number of an outer leaf.
      directions: `[D, ...]`.
      expected: the slope by the estimate along each of them, `[D]`.

    Steps are relative to the root mean square of the leaf, and no longer than one in free coordinates. Where the
    differences are not finite, or do not agree, steps relative to the single entries, and no longer than one, are
    tried: a leaf may hold entries of several sizes. Where rounding is all that is in doubt, coarse steps are taken as
    long as they agree. Then shorter steps have to confirm the slope: what is narrow beside a step is hidden from it.
    """
    path = _Path.of(arguments[0].domain, partition(arguments[3])[0], leaf)
    scale, small = path.scales(directions)
    traced = _values_moved.trace(*arguments, leaf, path.moves(directions, STEP * scale))
    precision = lowered(traced.jaxpr.jaxpr, len(traced.jaxpr.jaxpr.invars) - 1)
    eps = float(jnp.finfo(precision or "float64").eps)

    def at(sizes: np.ndarray, shifts: np.ndarray | float = 0.0) -> Differences:
        moves = path.moves(directions, sizes, shifts)
        values = np.asarray(_values_moved(*arguments, leaf, moves), np.float64).reshape(len(OFFSETS), -1)
        seen = differences(values, sizes, eps)
        # An entry that is large beside its move rounds what it is moved by, in the worst case to nothing.
        grain, most = path.grain(directions, sizes), np.abs(seen.slope).max()
        return seen._replace(doubt=np.where(grain < GRAIN, seen.doubt + grain * most, np.inf))

    fine = at(STEP * scale)
    if not _is_known(fine) and (small < scale / 2).any():
        near = at(STEP * small)
        better = np.isfinite(near.slope) & ~(near.doubt >= fine.doubt)
        fine, scale = _chosen(better, near, fine), np.where(better, small, scale)
    far = at(COARSE * scale)
    # Waves and chaos look even from afar: coarse steps stand in for fine ones only where these are said to round.
    with np.errstate(invalid="ignore"):
        agree = np.abs(far.slope - fine.slope) <= far.doubt + fine.doubt
        coarse = agree & (fine.doubt <= 4 * fine.rounding) & (far.doubt < fine.doubt / 3)
        # Values that stand still and move a little further off are on a step of a staircase, or beside an edge.
        stairs = fine.still & ~far.still & np.isfinite(far.slope) & ~coarse
    best = _chosen(coarse, far, fine)
    best = best._replace(doubt=np.where(stairs, np.maximum(best.doubt, np.abs(far.slope) + far.doubt), best.doubt))
    hidden = float(np.linalg.norm(best.rounding)) if precision else 0.0

    sizes = [STEP * scale * share for share in SHORTER]
    rungs = [at(each) for each in sizes]
    size = float(np.linalg.norm(best.slope))
    # Steps beside the point are taken only where they are needed, and then for all directions.
    beside: list[list[Differences]] = []

    def looked_at_beside(i: int) -> list[list[Rung]]:
        if not beside:
            beside.extend([at(each, shift * STEP * scale) for shift in BESIDE] for each in sizes)
        return [[_rung(seen, each, i) for seen in row] for row, each in zip(beside, sizes, strict=True)]

    weighed = [
        held_against(
            _rung(best, STEP * scale, i),
            [_rung(seen, each, i) for seen, each in zip(rungs, sizes, strict=True)],
            lambda i=i: looked_at_beside(i),
            float(expected[i]),
            size,
        )
        for i in range(len(directions))
    ]
    slope, doubt, rough = (np.array(column) for column in zip(*weighed, strict=True))
    if precision and best.still.any():
        # Whatever is rounded where numbers are larger than the loss may be all that moves: the slope may be any.
        doubt, hidden = np.where(best.still, np.maximum(doubt, np.abs(expected)), doubt), np.inf
    return Found(slope, doubt, best.kink & (doubt == best.doubt), rough, far.slope - slope, precision, hidden)


def _rung(seen: Differences, sizes: np.ndarray, i: int) -> Rung:
    numbers = (float(column[i]) for column in (seen.slope, seen.doubt, seen.rounding, sizes))
    return Rung(*numbers, still=bool(seen.still[i]), kink=bool(seen.kink[i]))


def differences(values: np.ndarray, sizes: np.ndarray, eps: float) -> Differences:
    """From `values` at `OFFSETS` times `sizes` (offsets, directions); the last are those at the centre."""
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = _fourth_order(values[[0, 1, 4, 5]], 2 * sizes), _fourth_order(values[1:5], sizes)
        rounding = eps * np.abs(values).max(axis=0) / sizes
        # Less the centre, so that a large constant is not what the fit rounds.
        apart = values - values[-1]
        _, without = _fit(_POLYNOMIAL, apart)
        factors, hinged = _fit(_HINGED, apart)
        half = np.abs(factors[-1]) / 4 / sizes  # half of what the slopes to both sides differ by
        kink = (without > 10 * hinged) & (half > 10 * rounding)
        doubt = np.abs(high - low) + rounding + np.where(kink, hinged / sizes + half, without / sizes)
    finite = np.isfinite(values).all(axis=0) & np.isfinite(doubt)
    slope, doubt = np.where(finite, high, np.nan), np.where(finite, doubt, np.nan)
    return Differences(slope, doubt, rounding, kink & finite, finite & (apart == 0).all(axis=0))


def _fit(columns: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of least squares, and the length of what is left; NaN where a value is not finite."""
    factors = np.linalg.pinv(columns) @ values
    return factors, np.linalg.norm(values - columns @ factors, axis=0)


def _fourth_order(values, size):
    return (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * size)


def _is_known(fine: Differences) -> bool:
    return bool(np.linalg.norm(fine.doubt) <= DOUBTED * np.linalg.norm(fine.slope))


def _chosen(which: np.ndarray, these: Differences, others: Differences) -> Differences:
    return Differences(*(np.where(which, a, b) for a, b in zip(these, others, strict=True)))


def _size(x: np.ndarray) -> float:
    """The root mean square of a leaf, without its infinities, which are masks and not moved by any step."""
    finite = x[np.isfinite(x)]
    return float(np.sqrt(np.mean(finite**2))) if finite.any() else 1.0


class _Path(NamedTuple):
    """How a leaf, in free coordinates where it has a domain, is moved."""

    domain: PyTree
    free: PyTree
    leaf: int
    at: Any
    bounded: bool

    @classmethod
    def of(cls, domain: PyTree, moving: PyTree, leaf: int) -> _Path:
        free = moving if domain is None else bijectors.free(domain, moving)
        x, u = jax.tree.leaves(moving)[leaf], jax.tree.leaves(free)[leaf]
        bounded = domain is not None and not np.array_equal(np.asarray(x), np.asarray(u), equal_nan=True)
        return cls(domain, free, leaf, x, bounded)

    def natural(self, move: jax.Array) -> jax.Array:
        leaves, structure = jax.tree.flatten(self.free)
        leaves[self.leaf] = leaves[self.leaf] + move
        return jax.tree.leaves(bijectors.natural(self.domain, structure.unflatten(leaves)))[self.leaf]

    def moves(self, directions: np.ndarray, sizes: np.ndarray, shifts: np.ndarray | float = 0.0) -> jax.Array:
        """What the leaf is moved by, in natural units: by `shifts`, and at each of `OFFSETS`, along all directions."""
        column = (-1, *[1] * (directions.ndim - 1))
        steps = OFFSETS[:, None] * sizes + np.broadcast_to(shifts, sizes.shape)
        rows = jnp.asarray(steps.reshape(column) * np.tile(directions, (len(OFFSETS), *column[1:])))
        if not self.bounded:
            return rows
        start = self.natural(jnp.zeros_like(rows[0]))
        moved = jax.vmap(lambda row: self.natural(row) - start)(rows)
        return jnp.where(jnp.isfinite(moved), moved, 0.0)  # an entry at an infinity stays there

    def grain(self, directions: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """What the entries round by where they are moved, as a share of the move along each direction."""
        count, axes = len(directions), tuple(range(1, directions.ndim))
        rows = np.asarray(self.moves(directions, sizes))[3 * count : 4 * count]  # at the offset 1
        rounded = np.finfo(float).eps * np.where(np.isfinite(self.at) & (directions != 0), self.at, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.sqrt(np.sum(rounded**2, axis=axes) / np.sum(rows**2, axis=axes))
        return np.nan_to_num(shares, nan=np.inf)

    def scales(self, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each direction, the size of a step by that of the leaf, and by those of the entries that it moves."""
        x, axes = np.asarray(self.at), tuple(range(1, directions.ndim))
        speeds = directions
        if self.bounded:
            still = jnp.zeros_like(self.at)
            push = jax.vmap(lambda d: jax.jvp(self.natural, (still,), (d,))[1])
            speeds = np.nan_to_num(np.asarray(push(jnp.asarray(directions))))
        rms, most = _size(x), 1.0 if self.bounded else np.inf
        entries = np.where(np.isfinite(x) & (x != 0), np.abs(x), rms)
        limits = np.minimum(entries, 1.0)
        with np.errstate(divide="ignore"):
            scale = np.minimum(rms / np.sqrt(np.sum(speeds**2, axis=axes)), most)
            small = np.min(np.where(speeds == 0, np.inf, limits / np.abs(speeds)), axis=axes, initial=np.inf)
        scale = np.where(np.isfinite(scale), scale, 1.0)
        return scale, np.minimum(small, scale)


@partial(jax.jit, static_argnums=(7,))
def _values_moved(problem, hypergradient, inner_state, outer, inner_batches, outer_batch, key, leaf, moves):
    moving, fixed = partition(outer)
    leaves, structure = jax.tree.flatten(moving)

    def value(move):
        moved = [x + move if i == leaf else x for i, x in enumerate(leaves)]
        at = combine(jax.tree.unflatten(structure, moved), fixed)
        if isinstance(hypergradient, PerTask):  # one training for each task, and the mean of their outer losses
            return hypergradient.estimate(problem, inner_state, at, inner_batches, outer_batch, key).value
        params = traceable(hypergradient).solve(problem, inner_state, at, inner_batches, key).params
        keys = split_keys(key, hypergradient.steps)
        return outer_value(problem, hypergradient.steps, params, at, outer_batch, keys)[0]

    return jax.lax.map(value, moves)
