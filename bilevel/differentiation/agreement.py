"""Whether two ways to pull cotangents back through a function are the same, found out by numbers.

Both are tried at random points. Analytic functions that agree on an open set agree everywhere, but numbers only show
what is larger than rounding, so that one look is not enough: a cotangent that is clipped at 100 is the identity at 1,
and a wrong sign at a small argument is lost beside a large one. So cotangents and points have sizes of many decades,
outputs are pulled back one at a time as well, and each entry of a result is compared by itself, with a tolerance that
is what rounding makes of it: found by moving points and cotangents by one unit in their last place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.differentiation.tracing import Unlike, evaluate_closed, identity, silent

_DRAWS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda x: 0.5 * x,
    lambda x: 1.5 * x,
    lambda x: 2.5 * x,
    np.abs,  # for functions of positive numbers, and of probabilities
    np.exp,
    lambda x: 0.1 * np.exp(2 * x),
    lambda x: 1 / (1 + np.exp(-x)),
)
"""Ordinary points, made of standard normal numbers."""

_PLACES = (1e-3, 0.05, 30.0, 1e3, 1e6)
"""Sizes of points that are not."""

_COTANGENTS = (1e-12, 1e-6, 1e-3, 30.0, 1e3, 1e6, 1e12)
"""Sizes of cotangents beside 1, at an ordinary point: what pulls them back is linear."""

_SPREAD = 8.0
"""Decades, up and down from 1, over which the entries of one cotangent are spread."""

_ROUNDING = 300
"""Units in the last place, of what an entry comes to at ordinary points, that are not seen."""

_VISIBLE = 1e-3
"""Where rounding is larger than this, a point shows nothing. In half precision that is everywhere."""


class _Trial(NamedTuple):
    at: list[np.ndarray]
    toward: list[np.ndarray]
    """The cotangents."""
    scale: float
    """Their size."""


class _Seen(NamedTuple):
    wanted: list[np.ndarray]
    found: list[np.ndarray]
    noise: list[np.ndarray]
    """How far both move with the last digit of what they are computed from."""
    scale: float


def pull_back(function: Callable[..., list[Any]], kinds: Sequence[jax.ShapeDtypeStruct]) -> Any:
    """The closed jaxpr `(at, cotangents) -> cotangents` of the derivative of `function`, without what only prints.

    Args:
      function: of arrays, to a list of inexact arrays.
      kinds: of its arguments, all inexact.
    """
    images = jax.eval_shape(function, *kinds)
    return silent(jax.make_jaxpr(lambda at, cotangent: jax.vjp(function, *at)[1](cotangent))(list(kinds), images))


_known: dict[Any, bool] = {}
"""Of pairs that have been compared, by their `identity`: a loss is traced several times."""


def agree(function: Any, wanted: Any, found: Any) -> bool:
    """`compare`, which is remembered."""
    try:
        key = identity(function), identity(wanted), identity(found)
    except Unlike:
        return compare(function, wanted, found)
    if key not in _known:
        if len(_known) >= 256:
            _known.clear()
        _known[key] = compare(function, wanted, found)
    return _known[key]


def compare(function: Any, wanted: Any, found: Any) -> bool:
    """Whether `found` is the `pull_back` of `function`, as far as numbers show; False too where they show nothing.

    Args:
      function: a closed jaxpr with inexact arguments and results.
      wanted: its `pull_back`, a closed jaxpr, by JAX alone.
      found: the one that is questioned.
    """
    inputs = len(function.in_avals)
    kinds = wanted.in_avals
    eps = max(float(jnp.finfo(kind.dtype).eps) for kind in (*kinds, *wanted.out_avals))
    if _ROUNDING * eps > _VISIBLE:
        return False
    rng, shown = np.random.default_rng(0), True
    both = jax.jit(lambda *given: (evaluate_closed(wanted, *given), evaluate_closed(found, *given)))
    look = functools.partial(_look, both, kinds, rng, eps)
    for ordinary, others in _groups(rng, kinds[:inputs], kinds[inputs:]):
        seen = [look(trial) for trial in ordinary]
        usual = [x for x in seen if x is not None]
        if not usual:  # of an output that is pulled back alone, too
            return False
        sizes = [np.max([np.abs(a) for a in column], axis=0) for column in zip(*(x.wanted for x in usual), strict=True)]
        verdicts = [_same(x, sizes, eps) for x in usual]
        if False in verdicts:
            return False
        for trial in others:
            there = look(trial)
            if there is not None and _same(there, sizes, eps) is False and not _is_lost(function, trial, there, eps):
                return False
        shown = shown and True in verdicts
    return shown


def _look(both: Any, kinds: Sequence[Any], rng: np.random.Generator, eps: float, trial: _Trial) -> _Seen | None:
    """What both give at a trial; None where that is not finite."""

    def values(arguments):
        given = [jnp.asarray(x, kind.dtype) for x, kind in zip(arguments, kinds, strict=True)]
        return [[np.asarray(x, complex) for x in result] for result in both(*given)]

    arguments = [*trial.at, *trial.toward]
    wanted, found = values(arguments)
    if not all(np.isfinite(x).all() for x in wanted):
        return None
    noise = [np.zeros(x.shape) for x in wanted]
    # Among many entries there are some that happen not to move.
    for _ in range(2 if sum(x.size for x in arguments) < 2000 else 4):
        moved = values([x * (1 + eps * rng.integers(-1, 2, x.shape)) for x in arguments])
        for there, here in zip(moved, (wanted, found), strict=True):
            noise = [np.fmax(n, np.abs(x - y)) for n, x, y in zip(noise, there, here, strict=True)]
    return _Seen(wanted, found, noise, trial.scale)


def _same(seen: _Seen, usual: Sequence[np.ndarray], eps: float) -> bool | None:
    """Whether both are the same; None where rounding hides it. `usual`: sizes of results at ordinary points."""
    verdict: bool | None = True
    for a, b, noise, known in zip(seen.wanted, seen.found, seen.noise, usual, strict=True):
        sizes = np.maximum(np.abs(a), known * seen.scale)
        tolerance, largest = _ROUNDING * eps * sizes + 30 * noise, sizes.max(initial=0.0)
        if not (np.abs(a - b) <= tolerance).all():
            return False  # a NaN is another number too
        if largest > 0 and tolerance.max(initial=0.0) > _VISIBLE * largest:
            verdict = None
    return verdict


def _is_lost(function: Any, trial: _Trial, seen: _Seen, eps: float) -> bool:
    """Whether the derivative by JAX is not that of the values: the square of a large number has overflowed, say.

    Looked at where the two differ at a point that is far off: central differences tell which of them is right.
    """
    apart = [np.conj(b - a) for a, b in zip(*seen[:2], strict=True)]
    most = max(np.abs(x).max(initial=0.0) for x in apart)
    along = [x / most * np.abs(at).max(initial=0.0) for x, at in zip(apart, trial.at, strict=True)]

    def moved(step):
        rows = zip(trial.at, along, function.in_avals, strict=True)
        given = [jnp.asarray(x + (step * v if np.iscomplexobj(x) else step * v.real), k.dtype) for x, v, k in rows]
        return [np.asarray(x, complex) for x in evaluate_closed(function, *given)]

    step = eps ** (1 / 3) * 0.1
    images = zip(trial.toward, moved(step), moved(-step), strict=True)
    slope = sum(np.sum(c * (up - down)) for c, up, down in images) / (2 * step)
    by_jax, by_rule = (sum(np.sum(x * v) for x, v in zip(pulled, along, strict=True)) for pulled in seen[:2])
    return not np.isfinite(slope) or abs(slope - by_rule) < 0.1 * abs(slope - by_jax)


def _groups(
    rng: np.random.Generator, points: Sequence[Any], images: Sequence[Any]
) -> Iterator[tuple[list[_Trial], list[_Trial]]]:
    """Pairs of trials at ordinary points, which tell what is small, and of others, all with cotangents of one kind."""

    def drawn(kinds):
        return [_normal(rng, kind) for kind in kinds]

    def ordinary(weights):
        made = [([_each(draw, x) for x in drawn(points)], drawn(images)) for draw in _DRAWS]
        return [_Trial(at, [w * c for w, c in zip(weights, toward, strict=True)], 1.0) for at, toward in made]

    base, toward = [0.5 * x for x in drawn(points)], drawn(images)
    large = [_Trial(base, [scale * c for c in toward], scale) for scale in _COTANGENTS]
    far = [_Trial([2 * place * x for x in base], toward, 1.0) for place in _PLACES]
    yield ordinary([1.0] * len(images)), [*large, *far]
    for i in range(len(images) if len(images) > 1 else 0):
        yield ordinary([float(i == j) for j in range(len(images))]), []
    for _ in range(2):
        yield ordinary([10 ** rng.uniform(-_SPREAD, _SPREAD, kind.shape) for kind in images]), []


def _each(draw: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    return draw(np.real(x)) + 1j * draw(np.imag(x)) if np.iscomplexobj(x) else draw(x)


def _normal(rng: np.random.Generator, kind: Any) -> np.ndarray:
    real = rng.normal(size=kind.shape)
    return real + 1j * rng.normal(size=kind.shape) if jnp.issubdtype(kind.dtype, jnp.complexfloating) else real
