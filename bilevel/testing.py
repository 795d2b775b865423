"""Checking hypergradients: a family with closed forms, central differences of the whole training, a verdict."""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.arguments import check_outer
from bilevel.differentiation.influence import StructuralZeroWarning
from bilevel.hypergradients.arguments import refuse_complex
from bilevel.hypergradients.base import Hypergradient, is_hypergradient
from bilevel.hypergradients.per_task import PerTask
from bilevel.hypergradients.query import outer_value, split_keys
from bilevel.hypergradients.training import InnerState
from bilevel.measuring.point import Point
from bilevel.problem import Problem, is_problem
from bilevel.settings import check_arguments, integer, real
from bilevel.trees import Batch, Outer, PyTree, combine, is_inexact, leaf_names, partition

__all__ = [
    "Agreement",
    "HypergradientCheck",
    "Quadratic",
    "central_differences",
    "check_hypergradient",
    "quadratic",
    "ridge",
]

STEP = 3e-4
"""Of central differences, relative to the size of a leaf."""

UNDECIDED = 1e-2
"""Relative uncertainty from which central differences confirm nothing."""


@dataclasses.dataclass(frozen=True)
class Quadratic:
    r"""A bilevel problem whose training by gradient descent, and every hypergradient of it, has a closed form.

    .. math:: f(w, \lambda) = \tfrac12 w^\top H w - (b + C \lambda)^\top w, \qquad
              F(w, \lambda) = \tfrac12 (w - c)^\top A (w - c) + \tfrac12 |\lambda|^2 .

    `outer` is a dict: `tilt` is :math:`\lambda`; `rate`, if there, the learning rate :math:`\eta`; `start`, if
    there, the initial point :math:`w_0`. With :math:`M = I - \eta H`, :math:`\bar w = H^{-1}(b + C\lambda)` and
    :math:`v = A(w_K - c)`,

    .. math:: w_K = \bar w + M^K (w_0 - \bar w).

    The methods return what an estimator should: dicts of NumPy arrays with the keys of `outer`, computed in float64
    from these formulas and not by differentiation. `rate` and `start` are used where `outer` does not have them.

    Attributes:
      H, b, C, A, c: the coefficients, NumPy arrays; H and A symmetric and positive definite.
      start: :math:`w_0` where `outer` has no `start`.

    Examples:
      >>> import numpy as np
      >>> from bilevel.testing import Quadratic
      >>> one = np.ones((1, 1))
      >>> q = Quadratic(H=2 * one, b=one[0], C=one, A=one, c=0 * one[0], start=0 * one[0])
      >>> outer = {"tilt": np.ones(1)}
      >>> q.trained(outer, 50, rate=0.5).tolist()  # (b + C tilt) / H
      [1.0]
      >>> q.implicit(outer, 50, rate=0.5)["tilt"].tolist()  # tilt + C A w / H
      [1.5]
    """

    H: np.ndarray
    b: np.ndarray
    C: np.ndarray
    A: np.ndarray
    c: np.ndarray
    start: np.ndarray

    @property
    def problem(self) -> Problem:
        """The problem; its `init_outer` gives `{"tilt": 0}`."""
        bind = jax.tree_util.Partial
        return Problem(
            bind(_quadratic_inner, *map(jnp.asarray, (self.H, self.b, self.C))),
            bind(_quadratic_outer, *map(jnp.asarray, (self.A, self.c))),
            bind(_quadratic_start, jnp.asarray(self.start)),
            bind(_quadratic_tilt, jnp.zeros(self.C.shape[1])),
        )

    def trained(self, outer: Outer, steps: int, *, rate: Any = None, start: Any = None) -> np.ndarray:
        """:math:`w_K` for K = `steps`."""
        rest, decay, begin = self._training(outer, rate, start)
        return rest + np.linalg.matrix_power(decay, steps) @ (begin - rest)

    def value(self, outer: Outer, steps: int, *, rate: Any = None, start: Any = None) -> float:
        """:math:`F(w_K, \\lambda)`."""
        away = self.trained(outer, steps, rate=rate, start=start) - self.c
        return 0.5 * away @ self.A @ away + 0.5 * np.sum(np.square(outer["tilt"]))

    def unrolled(
        self, outer: Outer, steps: int, *, rate: Any = None, start: Any = None, truncate: int | None = None
    ) -> dict[str, np.ndarray]:
        r"""The derivative of T = `truncate` last steps; of all K by default. With :math:`w_{K-T}` held constant,

        .. math:: \lambda + C^\top H^{-1} (I - M^T) v, \qquad
                  -T\, v^\top H M^{T-1} (w_{K-T} - \bar w), \qquad M^K v \text{ if } T = K, \text{ else } 0

        are those with respect to `tilt`, `rate` and `start`. A warm `start=` is a constant.
        """
        last = steps if truncate is None else truncate
        rest, decay, _ = self._training(outer, rate, start)
        power = partial(np.linalg.matrix_power, decay)
        v = self._pull(outer, steps, rate, start)
        before = self.trained(outer, steps - last, rate=rate, start=start)
        solved = np.linalg.solve(self.H, v - power(last) @ v)
        return _only(
            outer,
            tilt=np.asarray(outer["tilt"]) + self.C.T @ solved,
            rate=-last * v @ self.H @ power(last - 1) @ (before - rest),
            start=power(steps) @ v if last == steps and start is None else np.zeros_like(v),
        )

    def implicit(self, outer: Outer, steps: int, *, rate: Any = None, start: Any = None) -> dict[str, np.ndarray]:
        r""":math:`\lambda + C^\top H^{-1} v` at :math:`w_K`; 0 for `rate` and `start`."""
        v = self._pull(outer, steps, rate, start)
        tilt = np.asarray(outer["tilt"]) + self.C.T @ np.linalg.solve(self.H, v)
        return _only(outer, tilt=tilt, rate=np.zeros(()), start=np.zeros_like(v))

    def first_order(self, outer: Outer, steps: int, *, rate: Any = None, start: Any = None) -> dict[str, np.ndarray]:
        r"""The direct term :math:`\lambda`; 0 for `rate` and `start`."""
        del steps, rate, start
        return _only(outer, tilt=np.asarray(outer["tilt"]), rate=np.zeros(()), start=np.zeros_like(self.start))

    def _training(self, outer, rate, start):
        rate = outer["rate"] if rate is None else rate
        begin = outer.get("start", self.start) if start is None else start
        rest = np.linalg.solve(self.H, self.b + self.C @ np.asarray(outer["tilt"]))
        return rest, np.eye(len(self.b)) - float(rate) * self.H, np.asarray(begin)

    def _pull(self, outer, steps, rate, start):
        return self.A @ (self.trained(outer, steps, rate=rate, start=start) - self.c)


def quadratic(size: int = 4, outer_size: int = 3, *, condition: float = 10.0, seed: int = 0) -> Quadratic:
    """A random `Quadratic`: the eigenvalues of H and A lie in `[1 / condition, 1]`, so that any rate < 2 is stable.

    Examples:
      >>> import numpy as np
      >>> from bilevel.testing import quadratic
      >>> q = quadratic(size=4, outer_size=3)
      >>> q.unrolled({"tilt": np.ones(3)}, 10, rate=0.5)["tilt"].shape
      (3,)
    """
    rng = np.random.default_rng(seed)

    def definite():
        basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
        return (basis * np.geomspace(1 / condition, 1.0, size)) @ basis.T

    return Quadratic(
        H=definite(),
        b=rng.normal(size=size),
        C=rng.normal(size=(size, outer_size)),
        A=definite(),
        c=rng.normal(size=size),
        start=rng.normal(size=size),
    )


def _quadratic_inner(H, b, C, inner, outer, batch, key):
    return 0.5 * inner @ H @ inner - (b + C @ outer["tilt"]) @ inner


def _quadratic_outer(A, c, inner, outer, batch, key):
    return 0.5 * (inner - c) @ A @ (inner - c) + 0.5 * jnp.sum(outer["tilt"] ** 2)


def _quadratic_start(start, key, outer):
    return outer.get("start", start)


def _quadratic_tilt(tilt, key):
    return {"tilt": tilt}


def _only(outer, **values):
    return {name: values[name] for name in outer}


def ridge() -> tuple[Problem, tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    r"""The problem of the examples in this reference: the decay of a ridge regression on four rows, from its logarithm.

    With the training rows :math:`(X, y)` and the validation rows :math:`(Z, t)`,

    .. math:: f(w, \lambda) = \tfrac18 |X w - y|^2 + \tfrac12 e^\lambda |w|^2, \qquad
              F(w, \lambda) = \tfrac14 |Z w - t|^2 .

    The rows are such that :math:`X^\top X / 4 = \mathrm{diag}(1, 1/4)`, :math:`X^\top y / 4 = (3/2, 3/4)`, Z is the
    identity and :math:`t = (1, 1)`. So everything has a closed form. With :math:`s = e^\lambda`,

    .. math:: w^*(\lambda) = \Big(\frac{3/2}{1 + s}, \frac{3/4}{1/4 + s}\Big), \qquad
              \frac{dF}{d\lambda} = \frac{s}{2} \Big(\frac{(1 - w_1^*)\, w_1^*}{1 + s}
              + \frac{(1 - w_2^*)\, w_2^*}{1/4 + s}\Big) .

    The search starts at :math:`\lambda = 0`, where :math:`w^* = (0.75, 0.6)` and :math:`dF/d\lambda = 0.142875`. It
    ends at the decay :math:`s = 1/2`, where :math:`w^* = (1, 1)` and F is 0. Training starts at 0, and gradient descent
    with a rate of 0.5 comes to rest within 20 steps.

    Returns:
      `(problem, train, val)`: the data are pairs of rows and targets.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Implicit(optax.sgd(0.5), steps=20)
      >>> function = bilevel.value_and_hypergrad(problem, hypergradient)
      >>> value, grad = function(jax.numpy.zeros(()), None, bilevel.FullBatch(train), val, jax.random.key(0))
      >>> round(float(grad), 3)
      0.143
    """
    train = jnp.array([[1.0, 0.5], [1.0, -0.5], [-1.0, 0.5], [-1.0, -0.5]]), jnp.array([3.0, 0.0, 0.0, -3.0])
    val = jnp.eye(2), jnp.ones(2)
    return Problem(_ridge_inner, _ridge_outer, _ridge_start, _ridge_log_decay), train, val


def _mean_squares(w, batch):
    rows, targets = batch
    return 0.5 * jnp.mean((rows @ w - targets) ** 2)


def _ridge_inner(w, log_decay, batch, key):
    return _mean_squares(w, batch) + 0.5 * jnp.exp(log_decay) * jnp.sum(w**2)


def _ridge_outer(w, log_decay, batch, key):
    return _mean_squares(w, batch)


def _ridge_start(key, log_decay):
    return jnp.zeros(2)


def _ridge_log_decay(key):
    return jnp.zeros(())


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
      ...     slope = central_differences(
      ...         problem, hypergradient, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
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
    size = step * (np.sqrt(np.mean(x**2)) or 1.0)
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
        params = hypergradient.solve(problem, inner_state, at, inner_batches, key).params
        keys = split_keys(key, hypergradient.steps)
        return outer_value(problem, hypergradient.steps, params, at, outer_batch, keys)[0]

    return jax.lax.map(value, moves)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How a hypergradient (or a leaf of it) compares with central differences.

    Attributes:
      name: of the estimator, or of the outer leaf.
      verdict: `"exact"`; `"biased"`; `"wrong"`: not finite, or no direction of descent; or `"undecided"`: the central
        differences are too uncertain, because a loss is not smooth or rounds to a low precision.
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
        if self.verdict == "exact":
            return f"{self.name}: exact, relative error {self.error:.0e} ({known})"
        if self.verdict == "biased":
            return f"{self.name}: biased by {100 * self.error:.3g} %, cosine {self.cosine:.3f} ({known})"
        if self.verdict == "undecided":
            return f"{self.name}: undecided ({known} only: is a loss not smooth, or of low precision?)"
        if not np.isfinite(self.error):
            return f"{self.name}: wrong, not finite"
        return f"{self.name}: wrong, no direction of descent, cosine {self.cosine:.3f} ({known})"


@dataclasses.dataclass(frozen=True)
class HypergradientCheck(Agreement):
    """The verdict on a hypergradient; `print` it.

    Attributes:
      leaves: an `Agreement` for each inexact leaf of `outer`.

    Examples:
      >>> import bilevel, optax
      >>> from bilevel.testing import check_hypergradient, ridge
      >>> problem, train, val = ridge()
      >>> check = check_hypergradient(problem, bilevel.OneStep(optax.sgd(0.5), 20), inner_data=train, outer_data=val)
      >>> check.verdict, round(check.error, 3), [leaf.name for leaf in check.leaves]
      ('biased', 0.252, ['outer'])
    """

    leaves: tuple[Agreement, ...]

    def __str__(self) -> str:
        return "\n  ".join([super().__str__(), *map(str, self.leaves)])


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
    makes the central differences uncertain, which the verdict tells. Costs `6 * directions` trainings for each leaf.

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
            grad = jax.jit(lambda problem, hypergradient, *rest: hypergradient.estimate(problem, *rest).grad)(
                *arguments
            )
        rng = np.random.default_rng(0)
        rows = []
        for i, (g, x) in enumerate(zip(jax.tree.leaves(grad), jax.tree.leaves(moving), strict=True)):
            if not np.size(x):  # nothing to differ by
                rows.append([np.zeros(0)] * 3)
                continue
            basis, weight = _directions(rng, np.shape(x), directions)
            true, uncertainty = _derivatives(arguments, i, basis, STEP)
            projected = np.tensordot(basis, np.asarray(g), np.ndim(x)) if np.ndim(x) else basis * np.asarray(g)
            rows.append([np.sqrt(weight) * values for values in (projected, true, uncertainty)])
    whole = [np.concatenate(column) for column in zip(*rows, strict=True)]
    floor = tolerance * np.linalg.norm(whole[1])  # a leaf that hardly matters is not measured by its own size
    names = ["outer" if name == "." else name for name in leaf_names(moving)]
    leaves = tuple(
        Agreement(name, *_compare(row, tolerance, floor)) for name, row in zip(names, rows, strict=True)
    )
    return HypergradientCheck(type(hypergradient).__name__, *_compare(whole, tolerance, floor), leaves)


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
    error = float(np.linalg.norm(estimated - true) / scale)
    known = float(np.linalg.norm(uncertainty) / scale)
    cosine = float(estimated @ true / ((length * np.linalg.norm(estimated)) or 1.0))
    if error <= max(tolerance, known):
        return "exact" if known <= UNDECIDED else "undecided", error, cosine, known
    return "biased" if cosine > 0 else "wrong", error, cosine, known
