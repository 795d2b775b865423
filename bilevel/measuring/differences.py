"""Central differences of a whole training map along directions of one outer leaf, and how far they may be off.

A difference is off by three things: by what the map bends within the stencil, by what it rounds, and by a kink. The
first is the difference between a stencil and one of twice its width. The second is assumed to be a unit in the last
place of the coarsest precision that the influence of the leaf passes through, which the traced program tells, and is
measured besides: nine values lie on a polynomial of degree four, but for rounding. Of a kink right at the point two
sides of such a polynomial differ in slope.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import bijectors
from bilevel.differentiation.tracing import is_literal, jaxprs, kept_for, operation, scan_counts, while_counts
from bilevel.hypergradients.contract import traceable
from bilevel.hypergradients.per_task import PerTask
from bilevel.hypergradients.query import outer_value, split_keys
from bilevel.trees import PyTree, combine, partition

STEP = 3e-4
"""Of central differences, relative to the size of a leaf."""
COARSE = 1e-2
"""The same, of a step of the size that an outer optimizer takes."""
SHORTER, SHORTEST, PROBED = 1e-3, 3, 2
"""Shorter steps, each by so much relative to the one before, so many of them, along so many directions."""
NOTED, UNEVEN = 1e-3, 1e6
"""The relative change of a slope over shorter steps, and the multiple of rounding, by which a training is rough."""
GRAIN = 1e-2
"""Largest share of a step that an entry which it moves may round by."""
DOUBTED = 1e-3
"""Relative uncertainty from which steps of the size of single entries are tried."""

OFFSETS = np.array([-4.0, -2.0, -1.0, 1.0, 2.0, 4.0, -2.7, 3.3])
"""Of the stencil, in steps; the last two, at no regular distance, show rounding that falls on the same grid."""
_TIMES = np.append(OFFSETS, 0.0) / 4
_POLYNOMIAL = np.vander(_TIMES, 5)
_HINGED = np.column_stack([_POLYNOMIAL, np.abs(_TIMES)])


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
    long as they agree. Waves that are narrow beside a step are hidden from it: shorter steps have to confirm the
    slope, and are taken in its place where they agree with each other.
    """
    path = _Path.of(arguments[0].domain, partition(arguments[3])[0], leaf)
    scale, small = path.scales(directions)
    traced = _values_moved.trace(*arguments, leaf, path.moves(directions, STEP * scale))
    precision = lowered(traced.jaxpr.jaxpr, len(traced.jaxpr.jaxpr.invars) - 1)
    eps = float(jnp.finfo(precision or "float64").eps)

    def at(directions, sizes):
        moves = path.moves(directions, sizes)
        values = np.asarray(_values_moved(*arguments, leaf, moves), np.float64)
        return differences(values[:-1].reshape(len(OFFSETS), -1), values[-1], sizes, eps)

    fine = at(directions, STEP * scale)
    if not _is_known(fine) and (small < scale / 2).any():
        near = at(directions, STEP * small)
        better = np.isfinite(near.slope) & ~(near.doubt >= fine.doubt)
        fine, scale = _chosen(better, near, fine), np.where(better, small, scale)
    far = at(directions, COARSE * scale)
    # Waves and chaos look even from afar: coarse steps stand in for fine ones only where these are said to round.
    with np.errstate(invalid="ignore"):
        agree = np.abs(far.slope - fine.slope) <= far.doubt + fine.doubt
        coarse = agree & (fine.doubt <= 4 * fine.rounding) & (far.doubt < fine.doubt / 3)
        # Values that stand still and move a little further off are on a step of a staircase, or beside an edge.
        stairs = fine.still & ~far.still & np.isfinite(far.slope) & ~coarse
    best = _chosen(coarse, far, fine)
    doubt = np.where(stairs, np.maximum(best.doubt, np.abs(far.slope) + far.doubt), best.doubt)
    best = best._replace(doubt=doubt)
    is_known = np.linalg.norm(doubt) <= np.linalg.norm(best.slope)
    roughness = _over_shorter(at, path, directions, scale, best, expected) if is_known else 0.0
    hidden = float(np.linalg.norm(best.rounding)) if precision else 0.0
    rough = doubt < roughness
    best = best._replace(doubt=np.maximum(doubt, roughness))
    if not _is_known(best):
        best, settled = _settled(at, path, directions, scale, best)
        rough &= ~settled
    return Found(best.slope, best.doubt, best.kink, rough, far.slope - best.slope, precision, hidden)


def _settled(
    at: Callable[[np.ndarray, np.ndarray], Differences],
    path: _Path,
    directions: np.ndarray,
    scale: np.ndarray,
    best: Differences,
) -> tuple[Differences, np.ndarray]:
    """`best`, with slopes over much shorter steps where two such steps agree on one, and where that is.

    A network of relus has a kink at every few of its steps and is smooth between two of them. Values that stand still
    settle nothing: over short steps a staircase has no slope.
    """
    settled = np.zeros(best.slope.shape, bool)
    nears = []
    for n in range(1, SHORTEST + 1):
        sizes = STEP * scale * SHORTER**n
        near, grain = at(directions, sizes), path.grain(directions, sizes)
        lost = np.where(grain < GRAIN, grain * np.abs(near.slope), np.nan)
        nears.append(near._replace(doubt=near.doubt + lost))
    for near, nearer in itertools.pairwise(nears):
        with np.errstate(invalid="ignore"):
            apart, size = np.abs(near.slope - nearer.slope), np.abs(near.slope)
            agree = (apart <= 3 * (near.doubt + nearer.doubt)) & (nearer.doubt <= size / 10) & ~near.still & ~near.kink
            better = ~settled & agree & (near.doubt <= DOUBTED * size) & ~(best.doubt <= near.doubt)
        best, settled = _chosen(better, near, best), settled | better
    return best, settled


def _over_shorter(
    at: Callable[[np.ndarray, np.ndarray], Differences],
    path: _Path,
    directions: np.ndarray,
    scale: np.ndarray,
    best: Differences,
    expected: np.ndarray,
) -> float:
    """By how much slopes over shorter steps differ from those that are known best; 0 where they confirm them.

    Shorter steps round more. They have a say where they are known well enough to tell the slope that was found from
    another. Where values jump about over them by much more than rounding does, waves may be narrower than the shortest
    of them: then the expected slope may be theirs, if jumps of that size have it on so short a way. Other jumps tell
    nothing: Adam makes whole steps of a gradient that is 0 but for rounding.

    Args:
      at: `at(directions, sizes)`, differences along as many directions as there are.
      path, directions, scale: of the leaf.
      best: what is known.
      expected: the slopes by the estimate; where they differ most from those that are known, is looked first.
    """
    apart = np.abs(expected - best.slope)
    probed = np.argsort(-apart, kind="stable")[:PROBED]
    # As many at a time as there are directions, which is what the program is compiled for.
    pairs = [(i, SHORTER**n) for n in range(1, SHORTEST + 1) for i in probed]
    size, most = float(np.linalg.norm(best.slope)), 0.0
    for first in range(0, len(pairs), len(directions)):
        filled = itertools.cycle(pairs[first : first + len(directions)])
        which, shares = map(np.array, zip(*itertools.islice(filled, len(directions)), strict=True))
        sizes = STEP * scale[which] * shares
        near, grain = at(directions[which], sizes), path.grain(directions[which], sizes)
        change, jumps = np.abs(near.slope - best.slope[which]), near.doubt - near.rounding
        noted = np.maximum(apart[which] / 3, NOTED * size)
        doubt = near.doubt + best.doubt[which] + grain * (np.abs(near.slope) + np.abs(best.slope[which]))
        rough = (grain < GRAIN) & (change > noted) & (change > 3 * doubt)
        narrowest = STEP * scale[which] * SHORTER**SHORTEST
        uneven = (grain < GRAIN) & (jumps > UNEVEN * near.rounding) & (jumps * sizes < 10 * narrowest * apart[which])
        most = max([most, *change[rough], *apart[which][uneven]])
    return most


def differences(values: np.ndarray, centre: float, sizes: np.ndarray, eps: float) -> Differences:
    """From `values` at `OFFSETS` times `sizes` (offsets, directions), and the one at the point itself."""
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = _fourth_order(values[[0, 1, 4, 5]], 2 * sizes), _fourth_order(values[1:5], sizes)
        whole = np.vstack([values, np.full((1, values.shape[1]), centre)])
        rounding = eps * np.abs(whole).max(axis=0) / sizes
        # Less the centre, so that a large constant is not what the fit rounds.
        apart = whole - centre
        _, without = _fit(_POLYNOMIAL, apart)
        factors, hinged = _fit(_HINGED, apart)
        half = np.abs(factors[-1]) / 4 / sizes  # half of what the slopes to both sides differ by
        kink = (without > 10 * hinged) & (half > 10 * rounding)
        doubt = np.abs(high - low) + rounding + np.where(kink, hinged / sizes + half, without / sizes)
    finite = np.isfinite(whole).all(axis=0) & np.isfinite(doubt)
    slope, doubt = np.where(finite, high, np.nan), np.where(finite, doubt, np.nan)
    return Differences(slope, doubt, rounding, kink & finite, finite & (whole == centre).all(axis=0))


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

    def moves(self, directions: np.ndarray, sizes: np.ndarray) -> jax.Array:
        """What the leaf is moved by, in natural units: at each of `OFFSETS` along all directions, and 0 at last."""
        sizes = sizes.reshape(-1, *[1] * (directions.ndim - 1))
        rows = (OFFSETS.reshape(-1, *[1] * directions.ndim) * sizes * directions).reshape(-1, *directions.shape[1:])
        rows = jnp.asarray(np.concatenate([rows, np.zeros_like(rows[:1])]))
        if not self.bounded:
            return rows
        start = self.natural(jnp.zeros_like(rows[0]))
        moved = jax.vmap(lambda row: self.natural(row) - start)(rows)
        return jnp.where(jnp.isfinite(moved), moved, 0.0)  # an entry at an infinity stays there

    def grain(self, directions: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """What an entry rounds by where it is moved, as a share of the move: the largest along each direction."""
        count, axes = len(directions), tuple(range(1, directions.ndim))
        rows = np.abs(np.asarray(self.moves(directions, sizes)))[3 * count : 4 * count]  # at the offset 1
        sized = np.abs(np.where(np.isfinite(self.at), self.at, 0.0))
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where(directions == 0, 0.0, np.finfo(float).eps * sized / rows)
        return np.max(np.nan_to_num(shares, nan=np.inf), axis=axes, initial=0.0)

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


def lowered(jaxpr: Any, given: int) -> str | None:
    """The coarsest dtype that what is computed from the input number `given` of a program is cast down to, or None."""
    kept = kept_for(jaxpr, [True] * len(jaxpr.outvars))
    casts: set[Any] = set()
    _through(kept, [i == given for i in range(len(kept.invars))], casts)
    return str(max(casts, key=lambda dtype: jnp.finfo(dtype).eps)) if casts else None


def _through(jaxpr: Any, inputs: list[bool], casts: set[Any]) -> list[bool]:
    """Which outputs of a program are computed from the `inputs`; adds the dtypes that those are cast down to."""
    reached = {var for var, is_reached in zip(jaxpr.invars, inputs, strict=True) if is_reached}

    def is_reached(atom):
        return not is_literal(atom) and atom in reached

    for eqn in jaxpr.eqns:
        before = [is_reached(atom) for atom in eqn.invars]
        if any(before):
            after = _outputs(eqn, before, casts)
            reached.update(var for var, does in zip(eqn.outvars, after, strict=True) if does)
    return [is_reached(atom) for atom in jaxpr.outvars]


def _outputs(eqn: Any, before: list[bool], casts: set[Any]) -> list[bool]:
    name, inner = operation(eqn), list(jaxprs(eqn.params))
    if name == "scan":
        consts, carry = scan_counts(eqn)
        return _loop(inner[0], before, consts, carry, casts)
    if name == "while":
        of_cond, of_body = while_counts(eqn)
        return _loop(eqn.params["body_jaxpr"].jaxpr, before[of_cond:], of_body, len(eqn.outvars), casts)
    if name == "cond":
        ways = [_through(branch, before[1:], casts) for branch in inner]
        return [before[0] or any(column) for column in zip(*ways, strict=True)]
    if inner and len(inner[0].invars) == len(before) and len(inner[0].outvars) == len(eqn.outvars):
        return _through(inner[0], before, casts)
    for jaxpr in inner:  # of a kind that is not known: whatever it holds is reached
        _through(jaxpr, [True] * len(jaxpr.invars), casts)
    if not inner:
        widest = [_eps(atom.aval) for atom, does in zip(eqn.invars, before, strict=True) if does]
        finest = min((eps for eps in widest if eps), default=np.inf)
        casts.update(out.aval.dtype for out in eqn.outvars if _eps(out.aval) > finest)
        if name == "reduce_precision":
            casts.update(_reduced(eqn.params["mantissa_bits"], finest))
    return [True] * len(eqn.outvars)


def _loop(body: Any, before: list[bool], consts: int, carry: int, casts: set[Any]) -> list[bool]:
    while True:
        after = _through(body, before, casts)
        now = before[consts : consts + carry]
        carried = [a or b for a, b in zip(now, after, strict=False)]
        if carried == now:
            return [*carried, *after[carry:]]
        before = [*before[:consts], *carried, *before[consts + carry :]]


def _eps(aval: Any) -> float:
    dtype = getattr(aval, "dtype", None)
    return float(jnp.finfo(dtype).eps) if dtype is not None and jnp.issubdtype(dtype, jnp.inexact) else 0.0


def _reduced(bits: int, finest: float) -> list[Any]:
    """The dtype that holds no more than so many bits of a mantissa."""
    kept = [dtype for dtype in (jnp.bfloat16, jnp.float16, jnp.float32) if jnp.finfo(dtype).nmant >= bits]
    return [jnp.dtype(kept[0])] if kept and 2.0**-bits > finest else []
