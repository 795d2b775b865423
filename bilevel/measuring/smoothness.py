"""Whether a hypergradient, exact as it is, foretells what a step of some size does: the smoothness of a training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import bijectors
from bilevel.differentiation.captures import forget_outdated
from bilevel.differentiation.tracing import used
from bilevel.hypergradients.base import Hypergradient, is_hypergradient
from bilevel.hypergradients.contract import traceable
from bilevel.hypergradients.training import InnerState
from bilevel.measuring.point import Point
from bilevel.problem.problem import Problem, split_inner
from bilevel.settings.fields import checked
from bilevel.settings.numeric import integer, real
from bilevel.sharding.processes import on_host
from bilevel.trees import Outer, PyTree, combine, is_inexact, partition

SMOOTH, ROUGH = 0.9, 0.5
"""Scores from which a training is called smooth, and below which it is called rough."""
NOISY = 0.05
"""Share of a movement that rounding may have before the movement says nothing."""
_NOT_FINITE = (
    "a training, or its hypergradient, is not finite near this point: lower the inner learning rate or `step`, or look "
    "for the NaN with run, which names where it begins"
)
AMPLIFIED = 1e3
"""How many times its own last digit training must move of a last digit of `outer` before that is no rounding."""


@dataclasses.dataclass(frozen=True)
class Smoothness:
    r"""How smooth a training is along random directions of `outer`, at steps of one size.

    Attributes:
      scores: for each direction, from -1 to 1: 1 where the trained variable answers a second step as it did the first.
      step: h, the size of a step.
      foretold: for each direction, the change of the outer loss that the hypergradient foretells for a step.
      found: for each direction, the change that there is.
      rounding: what a nudge of `outer` by a last digit moves of the trained variable, which is rounding and what
        training makes of it, as a share of what a step moves; above 0.05 the scores say nothing. It is infinite where
        nothing moves that depends on `outer`: what moves it may be rounded away.
      loss_rounding: the same of the outer loss; above 0.05 `error` says nothing.
      precision: the dtype of the trained variable, the coarsest of the leaves that move where there are several.
      amplified: whether `rounding` is what training makes of a last digit of float64, more than a thousand of its own:
        a training that does so is rough, and undecided is nothing.

    Examples:
      >>> import bilevel, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20)
      >>> found = bilevel.smoothness(problem, hypergradient, inner_data=train, outer_data=val)
      >>> print(str(found).partition(":")[0])
      Smoothness 1.00 at steps of 0.01 (1.00 to 1.00 along 4 directions)
    """

    scores: np.ndarray
    step: float
    foretold: np.ndarray
    found: np.ndarray
    rounding: float = 0.0
    loss_rounding: float = 0.0
    precision: str = "float64"
    amplified: bool = False

    @property
    def score(self) -> float:
        """The mean of `scores`."""
        return float(self.scores.mean())

    @property
    def error(self) -> float:
        r"""How far the hypergradient misses: $|\mathrm{found} - \mathrm{foretold}| / |\mathrm{found}|$."""
        size, off = float(np.linalg.norm(self.found)), float(np.linalg.norm(self.found - self.foretold))
        return off / size if size else (float("inf") if off else 0.0)

    @property
    def is_smooth(self) -> bool:
        """Whether training answers a second step as it did the first, as far as rounding lets that be seen."""
        return self.score >= SMOOTH and not self.is_undecided

    @property
    def is_undecided(self) -> bool:
        """Whether rounding moves so much of what a step moves that the scores say nothing."""
        return self.rounding > NOISY and not self.amplified

    def __str__(self) -> str:
        low, high, count = self.scores.min(), self.scores.max(), len(self.scores)
        where = f"{low:.2f} to {high:.2f} along {count} direction{'s' * (count > 1)}"
        if np.isnan(self.score):
            return f"Smoothness unknown at steps of {self.step:g}: {_NOT_FINITE}."
        double = "in double precision (with jax.enable_x64(True))" if self.precision != "float64" else ""
        if np.isinf(self.rounding):
            return (
                f"Smoothness undecided at steps of {self.step:g}: such a step moves nothing of what is trained, by not "
                f"even a last digit of {self.precision}. Either training has no slope here, as behind a clip, or its "
                f"movement is rounded away: measure {double and f'{double}, or '}at larger steps."
            )
        if self.is_undecided:
            double = double and f"{double}, where a rough training shows itself as rough, or "
            return (
                f"Smoothness undecided at steps of {self.step:g}: rounding in {self.precision} alone moves "
                f"{100 * self.rounding:.2g} % of what such a step moves. Measure {double}at larger steps."
            )
        drowned = self.loss_rounding > NOISY
        if self.score >= SMOOTH and self.error > 0.5 and not drowned:
            meaning = "training answers a step of this size evenly, but the outer loss bends: look at smaller steps"
        elif self.score >= SMOOTH:
            meaning = "training answers a step of this size evenly, and a hypergradient tells in which direction"
        elif self.score >= ROUGH:
            meaning = "a hypergradient foretells a step of this size in part; look at smaller steps"
        else:
            meaning = (
                "a hypergradient, exact as it may be, does not foretell a step of this size: lower the inner learning "
                "rate, raise eps or eps_root of Adam, train fewer steps, or take smaller outer steps"
            )
        if self.rounding > NOISY:
            meaning = (
                f"training makes {100 * self.rounding:.2g} % of such a step's movement of a last digit of "
                f"{self.precision}; {meaning}"
            )
        missed = f"it misses the change of the outer loss by {100 * self.error:.3g} %"
        if drowned:
            missed = "the change of the outer loss is too small beside its rounding to say more"
        return f"Smoothness {self.score:.2f} at steps of {self.step:g} ({where}): {meaning}; {missed}."


def smoothness(
    problem: Problem,
    hypergradient: Hypergradient,
    *,
    outer: Outer = None,
    inner_state: InnerState | None = None,
    inner_data: Any = None,
    outer_data: Any = None,
    key: jax.Array | None = None,
    step: float = 1e-2,
    directions: int = 4,
) -> Smoothness:
    r"""The metasmoothness of a training map, and how well a hypergradient foretells finite steps.

    A derivative is of use as far as it holds. With $\theta(\lambda)$ what training ends with at the outer
    variable $\lambda$, a random direction v and the differences of two steps one after the other,
    $\Delta_1 = \theta(\lambda + h v) - \theta(\lambda)$ and
    $\Delta_2 = \theta(\lambda + 2 h v) - \theta(\lambda + h v)$, the score is their agreement in sign, weighted
    by how much each entry moves:

    $$
    S = \sum_i \frac{|\Delta_1 + \Delta_2|_i}{\|\Delta_1 + \Delta_2\|_1}
      \operatorname{sign}(\Delta_1)_i \operatorname{sign}(\Delta_2)_i
    $$

    It is 1 for a training that depends on $\lambda$ linearly, and near 0 for one that is chaotic, as beyond the
    largest stable learning rate, where the derivative is exact and of no use. Costs 2 + 2 `directions` trainings and
    one estimate.

    In single precision a short training with a weak influence moves by little more than it rounds. So one more
    training starts from `outer` nudged by its last digit: what that moves is not `outer`'s influence, and where it is
    more than a twentieth of what a step moves, the verdict is that there is none. There is none either where nothing
    moves of a training that depends on `outer`.

    Args:
      problem, hypergradient: what to look at.
      outer: the point; by default `problem.start_outer(key)`.
      inner_state: a warm start; None for a cold one.
      inner_data, outer_data: as for `run`, without iterators.
      key: randomness of the training and of the directions; None is `jax.random.key(0)`.
      step: h, in units of `outer`; with `Problem(domain=...)` in those of its free coordinates. Directions are drawn
        from a normal distribution of unit variance in each entry.
      directions: how many.

    Returns:
      A `Smoothness`; printed, it says what it means.

    Raises:
      ValueError: for a step that is not above 0, and for directions < 1.
      FloatingPointError: if a training or its hypergradient is not finite.

    References:
      Engstrom et al. 2025, arXiv 2503.13751, definition 2.

    Examples:
      >>> import bilevel, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20)
      >>> found = bilevel.smoothness(problem, hypergradient, inner_data=train, outer_data=val)
      >>> round(found.score, 2), found.error < 0.05
      (1.0, True)
    """
    forget_outdated(problem, hypergradient)
    point = Point.of("smoothness", problem, outer, inner_state, inner_data, outer_data, key)
    checked("smoothness", "hypergradient", hypergradient, is_hypergradient)
    checked("smoothness", "step", step, real(above=0.0))
    checked("smoothness", "directions", directions, integer(1))
    arguments, estimator = point.arguments(hypergradient.steps), traceable(hypergradient)
    grad = jax.jit(estimator.estimate)(*arguments).grad
    return measured(estimator, arguments, grad, point.keys[0], step, directions)


def measured(
    estimator: Any, arguments: tuple[Any, ...], grad: PyTree, key: jax.Array, step: float, directions: int
) -> Smoothness:
    """As `smoothness`, for the very arguments of `estimate` and the gradient that it gave."""
    problem, state, outer, *batches, start = arguments

    @jax.jit
    def end(problem: Problem, state: Any, outer: Outer, *rest: Any) -> tuple[jax.Array, PyTree]:
        # What is not asked of an estimate, its gradient, is not computed. Weights and data are arguments: closed over,
        # they would be constants of the program.
        estimate = estimator.estimate(problem, state, outer, *rest)
        return estimate.value, split_inner(problem, estimate.inner_state.params)[0]

    def trained(outer: Outer) -> tuple[jax.Array, PyTree]:
        return end(problem, state, outer, *batches, start)

    moving, fixed = partition(outer)
    free, slope = bijectors.free_gradient(problem.domain, moving, grad)
    start_loss, start_params = trained(outer)
    value, params = _look((start_loss, start_params))
    nudged = combine(bijectors.natural(problem.domain, jax.tree.map(_nudge, free)), fixed)
    # Leaves may be of several precisions: each number rounds by that of its own.
    eps = _units(start_params)
    noise, loss_eps = _moved(value, params, *_look(trained(nudged))), _coarsest(start_loss)[1]
    scores, foretold, found, moves, moving_ones = [], [], [], [], np.zeros(params.shape, bool)
    for number in range(directions):
        direction = _normal(jax.random.fold_in(jax.random.clone(key), number), free)

        def at(times: float, direction: PyTree = direction) -> Outer:
            moved = jax.tree.map(lambda x, v: x + (times * step * v).astype(x.dtype), free, direction)
            return combine(bijectors.natural(problem.domain, moved), fixed)

        (first, near), (_, far) = (_look(trained(at(times))) for times in (1.0, 2.0))
        scores.append(_agreement(params, near, far))
        foretold.append(step * sum(map(_look, jax.tree.leaves(jax.tree.map(_product, slope, direction)))))
        found.append(first - value)
        # No rounding is smaller than a unit in the last place, of those numbers that move.
        moving_ones |= (near != params) | (far != params)
        last = np.array([loss_eps * abs(value), (eps * np.abs(params))[near != params].sum()])
        moves.append((_moved(value, params, first, near), np.maximum(noise, last), last))
    moved, noise, last = np.mean(moves, axis=0)
    # Where the outer loss does not move at all, it was foretold to move by less than a last digit.
    moved[0] = moved[0] or np.abs(foretold).mean()
    # Nothing that moves beside something that rounds is no smoothness: it may be rounded away.
    of_loss, of_params = np.divide(noise, moved, out=np.where(noise > 0, np.inf, 0.0), where=moved > 0)
    if params.size and not moving_ones.any():
        program = end.trace(*arguments).jaxpr.jaxpr
        of_params = np.inf if _depends(program, (problem, state), outer) else 0.0
    lists = np.asarray(scores), float(step), np.asarray(foretold), np.asarray(found)
    precision = _precision(start_params, moving_ones, free)
    amplified = precision == "float64" and noise[1] > AMPLIFIED * last[1] and np.isfinite(of_params)
    return Smoothness(*lists, float(of_params), float(of_loss), precision, bool(amplified))


def _depends(program: Any, before: PyTree, outer: Outer) -> bool:
    """Whether what is trained, all outputs of a program but the first, is computed from an inexact leaf of `outer`.

    The inputs are the leaves of `before`, those of `outer`, and others.
    """
    inputs = used(program, [i > 0 for i in range(len(program.outvars))])[len(jax.tree.leaves(before)) :]
    return any(is_used and is_inexact(x) for x, is_used in zip(jax.tree.leaves(outer), inputs, strict=False))


def _precision(start: PyTree, moving: np.ndarray, otherwise: PyTree) -> str:
    """The coarsest dtype of the leaves of which a number moves; of all where none does, of `otherwise` without any."""
    leaves = [x for x in jax.tree.leaves(start) if jnp.size(x)]
    counts = [jnp.size(x) * (2 if jnp.iscomplexobj(x) else 1) for x in leaves]
    parts = np.split(moving, np.cumsum(counts)[:-1]) if leaves else []
    return _coarsest([x for x, part in zip(leaves, parts, strict=True) if part.any()] or leaves or otherwise)[0]


def _units(tree: PyTree) -> np.ndarray:
    """For each number of a tree, flat as `_look` has it, the unit in the last place of 1 in its dtype."""
    units = [(x, float(jnp.finfo(x.dtype).eps)) for x in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0), *(np.full(x.size * (2 if jnp.iscomplexobj(x) else 1), u) for x, u in units)])


def _coarsest(tree: PyTree) -> tuple[str, float]:
    """The dtype of the leaves of a tree that rounds most, and its unit in the last place of 1."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)]
    coarsest = max(dtypes, key=lambda dtype: jnp.finfo(dtype).eps)
    return str(coarsest), float(jnp.finfo(coarsest).eps)


def _moved(value: float, params: np.ndarray, other: float, others: np.ndarray) -> np.ndarray:
    """How far an outer loss and a trained variable are from others."""
    return np.array([abs(other - value), np.abs(others - params).sum()])


def _nudge(x: jax.Array) -> jax.Array:
    """`x` moved by about a unit in its last place."""
    eps = jnp.finfo(x.dtype).eps
    return x + (eps * jnp.where(x == 0, 1.0, jnp.abs(x))).astype(x.dtype)


def _normal(key: jax.Array, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, max(len(leaves), 1))
    return structure.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=False)])


def _product(slope: jax.Array, direction: jax.Array) -> jax.Array:
    return jnp.real(jnp.sum(slope * direction))


def _agreement(start: np.ndarray, near: np.ndarray, far: np.ndarray) -> float:
    """The score of three trained variables, flat; 1 where nothing moves."""
    moved = np.abs(far - start)
    if not (total := moved.sum()):
        return 1.0
    return float(np.sum(moved / total * np.sign(near - start) * np.sign(far - near)))


def _look(result: Any) -> Any:
    """On the host, in double precision; a trained variable as one flat array.

    Raises:
      FloatingPointError: for what is not finite.
    """
    leaves = [np.ravel(on_host(x)) for x in jax.tree.leaves(result)]
    leaves = [part for x in leaves for part in ((x.real, x.imag) if np.iscomplexobj(x) else (x,))]
    if not all(np.isfinite(x.astype(np.float64)).all() for x in leaves):
        raise FloatingPointError(f"smoothness: {_NOT_FINITE}.")
    if not isinstance(result, tuple):
        return float(leaves[0][0])
    return float(leaves[0][0]), np.concatenate([np.zeros(0), *(x.astype(np.float64) for x in leaves[1:])])
