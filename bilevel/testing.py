"""Checking hypergradients.

- `check_hypergradient`: an estimate on your problem against central differences of the whole training, with a verdict.
- `check_estimator`: what `Hypergradient` asks of an estimator of your own, tried duty by duty on small problems.
- `quadratic`: a family of problems with closed forms.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import bijectors
from bilevel.differentiation.captures import forget_outdated
from bilevel.differentiation.influence import StructuralZeroWarning
from bilevel.hypergradients.arguments import refuse_complex
from bilevel.hypergradients.base import Hypergradient, is_hypergradient
from bilevel.hypergradients.contract import driven_from_host
from bilevel.hypergradients.training import InnerState
from bilevel.measuring.conformance import EstimatorCheck as EstimatorCheck
from bilevel.measuring.conformance import check_estimator as check_estimator
from bilevel.measuring.differences import STEP, Found, central, found
from bilevel.measuring.duties import DUTIES as DUTIES
from bilevel.measuring.point import Point
from bilevel.measuring.quadratic import Quadratic as Quadratic
from bilevel.measuring.quadratic import quadratic as quadratic
from bilevel.measuring.ridge import ridge as ridge
from bilevel.problem.arguments import check_outer
from bilevel.problem.problem import Problem, is_problem
from bilevel.settings.fields import check_arguments
from bilevel.settings.numeric import integer, real
from bilevel.trees import Batch, Outer, PyTree, is_inexact, leaf_names, partition

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

UNDECIDED = 1e-3
"""Relative uncertainty from which central differences confirm nothing."""
UNCERTAIN = (
    "is a loss not smooth, of low precision, or the training rough, as bilevel.smoothness tells? Or is an "
    "inner gradient 0 but for rounding, as of a bias before a normalisation, which Adam makes a whole step?"
)
"""Asked where it is not known what makes central differences uncertain."""
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
        result.append(central(arguments, i, basis, step).reshape(leaf.shape))
    return jax.tree.unflatten(structure, result)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How a hypergradient (or a leaf of it) compares with central differences.

    Attributes:
      name: of the estimator, or of the outer leaf.
      verdict: `"exact"`; `"biased"`; `"wrong"`: not finite, or no direction of descent; `"zero"`: exact, but both are
        0; or `"undecided"`: the central differences are too uncertain, because a loss is not smooth or rounds to a low
        precision, or an optimizer amplifies rounding, or because they are not finite.
      error: relative error, Euclidean; relative to the hypergradient where the differences are 0.
      cosine: of the angle between the two; NaN where the differences are 0 and the hypergradient is not.
      uncertainty: how far, relatively, the central differences themselves may be off.
      why: what makes the differences uncertain, or which leaves have the verdict; empty where that is not known.

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
    why: str = dataclasses.field(default="", kw_only=True)

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
            if np.isnan(self.uncertainty):
                return f"{self.name}: undecided ({self.why})"
            return f"{self.name}: undecided ({known} only: {self.why or UNCERTAIN})"
        if not np.isfinite(self.error):
            return f"{self.name}: wrong, not finite"
        if np.isnan(self.cosine):
            return (
                f"{self.name}: wrong, not 0 where the differences are exactly 0: a derivative's own rule, such as "
                "a straight-through one, may be why, or all that outer moves is rounded away"
            )
        if self.error == 1.0 and self.cosine == 0.0:
            return (
                f"{self.name}: wrong, exactly 0 where the differences are not: outer acts by a way that is not "
                f"differentiated here, such as the training of a first-order estimate, or a stop_gradient ({known})"
            )
        return f"{self.name}: wrong, no direction of descent, cosine {self.cosine:.3f} ({known})"


@dataclasses.dataclass(frozen=True)
class HypergradientCheck(Agreement):
    """The verdict on a hypergradient; `print` it.

    Attributes:
      leaves: an `Agreement` for each inexact leaf of `outer`, measured by its own size. Where one of them is biased or
        wrong, so is the whole, however small that leaf is beside the others.
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
        first = super().__str__()
        if self.why and self.verdict in ("biased", "wrong"):
            whole = "undecided as a whole"
            if self.uncertainty <= UNDECIDED:
                known = f"central differences are known to {self.uncertainty:.0e}"
                whole = f"with a relative error of {self.error:.0e} as a whole ({known})"
            first = f"{self.name}: {self.verdict} in {self.why}, {whole}"
        lines = [first, *map(str, self.leaves)]
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
    makes the central differences uncertain, as a kink does, which the verdict tells. Both are looked for: casts in the
    traced program, and values that do not lie on a polynomial. Multiplying the outer loss by a positive number changes
    no verdict.

    Steps are taken in the free coordinates of `Problem(domain=...)`, and hypergradients compared there. They are
    relative to the size of a leaf; where the differences are not finite or do not agree, relative to the size of its
    single entries. Much shorter steps, down to 1e-13 of a leaf's size, confirm what was found; where the training is
    rough within a step, or has kinks there, they settle it if they agree. A staircase settles nothing: its slope as a
    whole is not that on a stair. Costs `45 * directions` trainings for each leaf; `9 * directions` more where the sizes
    of single entries are tried, and `81 * directions` more where it is looked beside the point for a staircase.

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
        slope = bijectors.free_gradient(problem.domain, moving, grad)[1]
        rng = np.random.default_rng(0)
        rows, founds = [], []
        for i, (g, x) in enumerate(zip(jax.tree.leaves(slope), jax.tree.leaves(moving), strict=True)):
            if not np.size(x):  # nothing to differ by
                rows.append([np.zeros(0)] * 4)
                founds.append(None)
                continue
            basis, weight = _directions(rng, np.shape(x), directions)
            projected = np.tensordot(basis, np.asarray(g), np.ndim(x)) if np.ndim(x) else basis * np.asarray(g)
            founds.append(found(arguments, i, basis, projected))
            columns = projected, founds[-1].slope, founds[-1].doubt, founds[-1].miss
            rows.append([np.sqrt(weight) * values for values in columns])
    return _verdict(type(hypergradient).__name__, leaf_names(moving), rows, founds, tolerance)


def _verdict(
    name: str, leaves: list[str], rows: list[list[np.ndarray]], founds: list[Found | None], tolerance: float
) -> HypergradientCheck:
    names = ["outer" if leaf == "." else leaf for leaf in leaves]
    hidden = [0.0 if each is None else each.hidden for each in founds]
    compared = [_compare(row[:3], tolerance, least) for row, least in zip(rows, hidden, strict=True)]
    agreements = tuple(
        Agreement(leaf, verdict, *numbers, why=_reason(verdict, row, each))
        for leaf, (verdict, *numbers), row, each in zip(names, compared, rows, founds, strict=True)
    )
    *whole, miss = (np.concatenate(column) for column in zip(*rows, strict=True))
    verdict, *numbers = _compare(whole, tolerance, max(hidden))
    why = ""
    if verdict == "undecided":
        of_most = max(range(len(rows)), key=lambda i: np.nan_to_num(np.linalg.norm(rows[i][2]), nan=np.inf))
        why = _reason(verdict, rows[of_most], founds[of_most])
        if len(names) > 1 and why:
            why = f"leaf {names[of_most]}: {why}"
    milder = {"exact": ("wrong", "biased"), "undecided": ("wrong", "biased"), "biased": ("wrong",)}
    for worse in milder.get(verdict, ()):
        if culprits := [leaf.name for leaf in agreements if leaf.verdict == worse]:
            verdict, why = worse, ", ".join(culprits)
            break
    length = float(np.linalg.norm(whole[1]))
    coarse = float(np.linalg.norm(miss)) / length if length else 0.0
    return HypergradientCheck(name, verdict, *numbers, leaves=agreements, coarse=coarse, why=why)


def _reason(verdict: str, row: list[np.ndarray], each: Found | None) -> str:
    """Why differences are uncertain, where that is known."""
    if verdict != "undecided" or each is None:
        return ""
    if not np.isfinite(row[1]).all():
        return (
            "the central differences are not finite: a training a small step away is not; is a loss there outside of "
            "what it is defined for? Problem(domain=...) keeps steps inside"
        )
    if not np.isfinite(row[2]).all():
        return (
            "its entries are of such sizes that a step of the small ones is lost in the rounding of the large ones: is "
            "one unit right for all of them?"
        )
    if np.linalg.norm(row[2][each.kink]) > 0.5 * np.linalg.norm(row[2]):
        return "there is a kink here, as of a relu at 0: the differences to both sides disagree"
    if np.linalg.norm(row[2][each.rough]) > 0.5 * np.linalg.norm(row[2]):
        return "over shorter steps the differences are others: the training is rough, as bilevel.smoothness tells"
    if each.precision:
        return f"what outer acts on is rounded to {each.precision} on its way to the outer loss"
    return ""


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


def _compare(columns, tolerance, hidden):
    """The verdict, error, cosine and uncertainty; `hidden` is the size of a slope that a cast may round away."""
    estimated, true, uncertainty = columns
    if not np.isfinite(estimated).all():
        return "wrong", float("nan"), float("nan"), float("nan")
    if not (np.isfinite(true).all() and np.isfinite(uncertainty).all()):
        return "undecided", float("nan"), float("nan"), float("nan")
    # Squares of what is tiny are 0.
    top = max((float(np.abs(column).max(initial=0.0)) for column in columns[:2]), default=0.0) or 1.0
    estimated, true, uncertainty = estimated / top, true / top, uncertainty / top
    length, size = np.linalg.norm(true), np.linalg.norm(estimated)
    if estimated.size and not (estimated.any() or true.any()):
        return ("undecided", 0.0, float("nan"), float("inf")) if hidden else ("zero", 0.0, float("nan"), 0.0)
    # Relative to something of the same unit always: where the truth is 0, to what is held to be it.
    scale = length or size or 1.0
    error = float(np.linalg.norm(estimated - true) / scale)
    known = float(np.linalg.norm(uncertainty) / scale)
    cosine = float(estimated @ true / ((length * size) or 1.0)) if length or not size else float("nan")
    if known > UNKNOWN:  # of a rough training no step is small enough: the differences say nothing of the estimate
        return "undecided", error, cosine, known
    if error <= max(tolerance, MARGIN * known):
        return "exact" if known <= UNDECIDED else "undecided", error, cosine, known
    return "biased" if cosine > 0 else "wrong", error, cosine, known
