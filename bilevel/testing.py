"""Checking hypergradients.

- `check_hypergradient`: an estimate on your problem against central differences of the whole training, with a verdict.
- `check_estimator`: what `Hypergradient` asks of an estimator of your own, tried duty by duty on small problems.
- `quadratic`: a family of problems with closed forms.
"""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.differentiation.captures import forget_outdated
from bilevel.differentiation.influence import StructuralZeroWarning
from bilevel.hypergradients.arguments import refuse_complex
from bilevel.hypergradients.base import Hypergradient, is_hypergradient
from bilevel.hypergradients.contract import driven_from_host, traceable
from bilevel.hypergradients.per_task import PerTask
from bilevel.hypergradients.query import outer_value, split_keys
from bilevel.hypergradients.training import InnerState
from bilevel.measuring.conformance import EstimatorCheck as EstimatorCheck
from bilevel.measuring.conformance import check_estimator as check_estimator
from bilevel.measuring.duties import DUTIES as DUTIES
from bilevel.measuring.point import Point
from bilevel.measuring.quadratic import Quadratic as Quadratic
from bilevel.measuring.quadratic import quadratic as quadratic
from bilevel.measuring.ridge import ridge as ridge
from bilevel.problem.arguments import check_outer
from bilevel.problem.problem import Problem, is_problem
from bilevel.settings.fields import check_arguments
from bilevel.settings.numeric import integer, real
from bilevel.trees import Batch, Outer, PyTree, combine, is_inexact, leaf_names, partition

__all__ = [
    "DUTIES",
    "Agreement",
    "EstimatorCheck",
    "HypergradientCheck",
    "Quadratic",
    "central_differences",
    "check_estimator",
    "check_hypergradient",
    "quadratic",
    "ridge",
]

STEP = 3e-4
"""Of central differences, relative to the size of a leaf."""

COARSE = 1e-2
"""The same, of a step of the size that an outer optimizer takes."""
UNDECIDED = 1e-2
"""Relative uncertainty from which central differences confirm nothing."""
UNKNOWN = 0.5
"""Uncertainty of central differences from which they contradict no estimate."""
MARGIN = 3.0
"""How many times their uncertainty central differences must be off before they contradict an estimate."""


def central_differences(
    problem: Problem,
    hypergradient: Hypergradient,
    inner_state: InnerState | None,
    outer: Outer,
    inner_batches: Batch,
    outer_batch: Batch,
    key: jax.Array,
    *,
    step: float = STEP,
) -> PyTree:
    """What `hypergradient.estimate(...).grad` should be, without differentiating anything.

    The whole training map is run at `outer` moved by `step` times the leaf's root mean square (or by `step`, at a leaf
    of zeros) to both sides, twice as far as well, for each entry of each inexact leaf: fourth order, in the dtype of
    `outer`, so float64 is wanted. Batches and random keys are those of the estimate.

    Returns:
      A tree like `outer`, NumPy arrays, None at leaves that are not inexact.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import central_differences, ridge
      >>> with jax.enable_x64(True):
      ...     problem, train, val = ridge()
      ...     hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20)
      ...     outer = jax.numpy.zeros(())
      ...     slope = central_differences(
      ...         problem, hypergradient, None, outer, bilevel.FullBatch(train), val, jax.random.key(0)
      ...     )
      >>> round(float(slope), 6)
      0.142875
    """
    arguments = problem, hypergradient, inner_state, outer, inner_batches, outer_batch, key
    leaves, structure = jax.tree.flatten(partition(outer)[0])
    result = []
    for i, leaf in enumerate(leaves):
        if not leaf.size:
            result.append(np.zeros(leaf.shape))
            continue
        basis = np.eye(leaf.size).reshape(leaf.size, *leaf.shape)
        result.append(_derivatives(arguments, i, basis, step)[0].reshape(leaf.shape))
    return jax.tree.unflatten(structure, result)


def _derivatives(arguments: tuple, leaf: int, directions: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of the training map along `directions` of one leaf, and how far they may be off."""
    x = np.asarray(jax.tree.leaves(partition(arguments[3])[0])[leaf])
    finite = x[np.isfinite(x)]  # an infinity is a mask, which no step moves
    size = step * (np.sqrt(np.mean(finite**2)) if finite.any() else 1.0)
    offsets = size * np.array([-4, -2, -1, 1, 2, 4])
    moves = jnp.asarray((offsets[:, None, *[None] * x.ndim] * directions).reshape(-1, *x.shape), x.dtype)
    values = np.asarray(_values_moved(*arguments, leaf, moves)).reshape(6, len(directions))
    low, high = (_fourth_order(values[i], size * h) for i, h in (([0, 1, 4, 5], 2), ([1, 2, 3, 4], 1)))
    rounding = np.finfo(values.dtype).eps * np.abs(values).max() / size
    return high, np.abs(high - low) + rounding


def _fourth_order(values, size):
    return (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * size)


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


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How a hypergradient (or a leaf of it) compares with central differences.

    Attributes:
      name: of the estimator, or of the outer leaf.
      verdict: `"exact"`; `"biased"`; `"wrong"`: not finite, or no direction of descent; `"zero"`: exact, but both are
        0; or `"undecided"`: the central differences are too uncertain, because a loss is not smooth or rounds to a low
        precision, or an optimizer amplifies rounding.
      error: relative error, Euclidean.
      cosine: of the angle between the two.
      uncertainty: how far, relatively, the central differences themselves may be off.

    Examples:
      >>> from bilevel.testing import Agreement
      >>> print(Agreement("decay", "biased", error=0.25, cosine=1.0, uncertainty=1e-8))
      decay: biased by 25 %, cosine 1.000 (central differences are known to 1e-08)
    """

    name: str
    verdict: str
    error: float
    cosine: float
    uncertainty: float

    def __str__(self) -> str:
        known = f"central differences are known to {self.uncertainty:.0e}"
        if self.verdict == "zero":
            return (
                f"{self.name}: exactly 0, and the central differences are 0 as well: nothing on its way to the outer "
                "loss has a slope here (a clip or a relu beyond its edge, a product with 0?), or it acts on nothing"
            )
        if self.verdict == "exact":
            return f"{self.name}: exact, relative error {self.error:.0e} ({known})"
        if self.verdict == "biased":
            return f"{self.name}: biased by {100 * self.error:.3g} %, cosine {self.cosine:.3f} ({known})"
        if self.verdict == "undecided":
            why = (
                "is a loss not smooth, of low precision, or the training rough, as bilevel.smoothness tells? Or is an "
                "inner gradient 0 but for rounding, as of a bias before a normalisation, which Adam makes a whole step?"
            )
            return f"{self.name}: undecided ({known} only: {why})"
        if not np.isfinite(self.error):
            return f"{self.name}: wrong, not finite"
        return f"{self.name}: wrong, no direction of descent, cosine {self.cosine:.3f} ({known})"


@dataclasses.dataclass(frozen=True)
class HypergradientCheck(Agreement):
    """The verdict on a hypergradient; `print` it.

    Attributes:
      leaves: an `Agreement` for each inexact leaf of `outer`.
      coarse: how far, relatively, differences over steps of 1 % of a leaf's size are from the derivative: above 0.5 it
        does not foretell such steps, however exact it is. NaN where a training at such a step is not finite.

    Examples:
      >>> import bilevel, optax
      >>> from bilevel.testing import check_hypergradient, ridge
      >>> problem, train, val = ridge()
      >>> one_step = bilevel.OneStep(optax.sgd(0.5), steps=20)
      >>> check = check_hypergradient(problem, one_step, inner_data=train, outer_data=val)
      >>> check.verdict, round(check.error, 3), [leaf.name for leaf in check.leaves]
      ('biased', 0.252, ['outer'])
    """

    leaves: tuple[Agreement, ...]
    coarse: float = float("nan")

    def __str__(self) -> str:
        lines = [super().__str__(), *map(str, self.leaves)]
        if self.coarse > UNKNOWN:
            lines.append(
                f"It does not foretell steps of 1 % of outer, by {100 * self.coarse:.3g} %: the training is rough, or "
                "bends within such a step; see bilevel.smoothness."
            )
        return "\n  ".join(lines)


def check_hypergradient(
    problem: Problem,
    hypergradient: Hypergradient,
    *,
    outer: Outer = None,
    inner_state: InnerState | None = None,
    inner_data: Any = None,
    outer_data: Any = None,
    key: jax.Array | None = None,
    directions: int = 8,
    tolerance: float = 1e-6,
) -> HypergradientCheck:
    """Compares an estimate with central differences of the whole training map, in float64, and says what it found.

    Everything inexact is cast to float64, whatever the configuration; a loss that rounds to a lower precision by itself
    makes the central differences uncertain, which the verdict tells. Costs `12 * directions` trainings for each leaf.

    Args:
      problem, hypergradient: what to check.
      outer: where; None is `problem.start_outer(key)`.
      inner_state: a warm start, or None to start inside the map that is differentiated.
      inner_data, outer_data: as for `run`, without iterators.
      key: randomness of the estimate, replayed in the comparison; None is `jax.random.key(0)`.
      directions: random directions for each leaf; a leaf with no more entries is compared entry by entry.
      tolerance: relative error up to which a hypergradient counts as exact.

    Returns:
      A `HypergradientCheck`.

    Raises:
      ValueError: for directions < 1, or an `outer` without an inexact leaf.

    Examples:
      >>> import bilevel, optax
      >>> from bilevel.testing import check_hypergradient, ridge
      >>> problem, train, val = ridge()
      >>> data = {"inner_data": train, "outer_data": val}
      >>> check_hypergradient(problem, bilevel.Unrolled(optax.sgd(0.5), steps=20), **data).verdict
      'exact'
      >>> check_hypergradient(problem, bilevel.OneStep(optax.sgd(0.5), steps=20), **data).verdict
      'biased'
    """
    rules = {
        "problem": is_problem,
        "hypergradient": is_hypergradient,
        "directions": integer(1),
        "tolerance": real(above=0.0),
    }
    given = {"problem": problem, "hypergradient": hypergradient, "directions": directions, "tolerance": tolerance}
    check_arguments("check_hypergradient", rules, **given)
    with jax.enable_x64(True):
        forget_outdated(problem, hypergradient)
        point = Point.of("check_hypergradient", problem, outer, inner_state, inner_data, outer_data, key)
        _, state, outer, inner_batches, outer_batch, start_key = point.arguments(hypergradient.steps)
        init = jax.tree_util.Partial(_start_wide, problem.init_inner)
        problem = dataclasses.replace(problem, init_inner=init)
        arguments = (*_wide((problem, hypergradient, state, outer, inner_batches, outer_batch)), start_key)
        check_outer("check_hypergradient was given", arguments[3])
        moving = partition(arguments[3])[0]
        refuse_complex("check_hypergradient", "outer", moving, "write them in real and imaginary parts")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StructuralZeroWarning)  # the verdict says it
            estimate = lambda problem, hypergradient, *rest: hypergradient.estimate(problem, *rest).grad  # noqa: E731
            grad = (estimate if driven_from_host(hypergradient) else jax.jit(estimate))(*arguments)
        rng = np.random.default_rng(0)
        rows = []
        for i, (g, x) in enumerate(zip(jax.tree.leaves(grad), jax.tree.leaves(moving), strict=True)):
            if not np.size(x):  # nothing to differ by
                rows.append([np.zeros(0)] * 4)
                continue
            basis, weight = _directions(rng, np.shape(x), directions)
            true, uncertainty = _derivatives(arguments, i, basis, STEP)
            projected = np.tensordot(basis, np.asarray(g), np.ndim(x)) if np.ndim(x) else basis * np.asarray(g)
            far, _ = _derivatives(arguments, i, basis, COARSE)  # no program more: only its numbers are others
            rows.append([np.sqrt(weight) * values for values in (projected, true, uncertainty, far - true)])
    *whole, miss = (np.concatenate(column) for column in zip(*rows, strict=True))
    floor = tolerance * np.linalg.norm(whole[1])  # a leaf that hardly matters is not measured by its own size
    names = ["outer" if name == "." else name for name in leaf_names(moving)]
    leaves = tuple(
        Agreement(name, *_compare(row[:3], tolerance, floor)) for name, row in zip(names, rows, strict=True)
    )
    length = float(np.linalg.norm(whole[1]))
    coarse = float(np.linalg.norm(miss)) / length if length else 0.0
    return HypergradientCheck(type(hypergradient).__name__, *_compare(whole, tolerance, floor), leaves, coarse)


def _start_wide(init, key, outer):
    return _wide(init(key, outer))


def _wide(tree):
    def cast(leaf):
        wide = jnp.complex128 if jnp.iscomplexobj(leaf) else jnp.float64
        return jnp.asarray(leaf, wide) if is_inexact(leaf) else leaf

    return jax.tree.map(lambda leaf: cast(leaf) if hasattr(leaf, "dtype") else cast(jnp.asarray(leaf)), tree)


def _directions(rng, shape, count):
    """Unit vectors, and the weight that makes a sum of squares over them one over all entries."""
    size = int(np.prod(shape))
    if size <= count:
        return np.eye(size).reshape(size, *shape), 1.0
    vectors = rng.normal(size=(count, size))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.reshape(count, *shape), size / count


def _compare(columns, tolerance, floor):
    estimated, true, uncertainty = columns
    if not (np.isfinite(estimated).all() and np.isfinite(true).all()):
        return "wrong", float("nan"), float("nan"), float("nan")
    length = np.linalg.norm(true)
    scale = max(length, floor) or 1.0
    if estimated.size and not (estimated.any() or true.any()):
        return "zero", 0.0, float("nan"), 0.0
    error = float(np.linalg.norm(estimated - true) / scale)
    known = float(np.linalg.norm(uncertainty) / scale)
    cosine = float(estimated @ true / ((length * np.linalg.norm(estimated)) or 1.0))
    if known > UNKNOWN:  # of a rough training no step is small enough: the differences say nothing of the estimate
        return "undecided", error, cosine, known
    if error <= max(tolerance, MARGIN * known):
        return "exact" if known <= UNDECIDED else "undecided", error, cosine, known
    return "biased" if cosine > 0 else "wrong", error, cosine, known
