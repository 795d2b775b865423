"""Losses with a derivative of their own: where second derivatives need not commute.

A function under `jax.custom_vjp` or `jax.custom_jvp` has the derivative that its author gave it: a straight-through
estimator passes gradients through a rounding, gradient reversal changes their sign, others clip them. What `jax.grad`
returns for a loss that holds such a function is a vector field g(w, lambda) which need not be the gradient of anything,
so that

    (dg/dw)^T v  =  d/de g(w + e v, lambda)        and        (dg/dlambda)^T v  =  d/de grad_lambda f(w + e v, lambda)

need not hold. Forward-over-reverse second derivatives rest on both; whoever uses them asks `custom_rule` first.

Most rules are what they seem to be: the derivative, in a form that is faster or more stable. They are told apart by
trying: at random points of the right shapes, the rule is compared with the derivative of the function itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from bilevel.tracing import bind, detached, evaluate, is_literal, jaxprs
from bilevel.trees import is_inexact, is_key

RULES = ("custom_vjp_call", "custom_jvp_call")
"""Operations that carry a derivative of their own."""


class CustomDerivativeWarning(UserWarning):
    """A loss has a derivative of its own, so its second derivatives are taken in a way that costs more."""


def custom_rule(jaxpr: Any, moving: Sequence[bool]) -> str | None:
    """The name of a function in `jaxpr` whose rule is not its derivative, applied to what depends on a moving argument.

    Args:
      jaxpr: of a loss.
      moving: for each of its arguments, whether it is differentiated.
    """
    reached = {var for var, moves in zip(jaxpr.invars, moving, strict=True) if moves}
    for eqn in jaxpr.eqns:
        if reached.isdisjoint(atom for atom in eqn.invars if not is_literal(atom)):
            continue
        reached.update(eqn.outvars)
        if eqn.primitive.name in RULES:
            if not has_true_rule(eqn):
                return _source(eqn)[0]
            continue
        for inner in jaxprs(eqn.params):
            # Which of its arguments move is not followed any further: too many is safe.
            if name := custom_rule(inner, [True] * len(inner.invars)):
                return name
    return None


_PACKAGES = tuple(os.path.join(os.path.dirname(str(module.__file__)), "") for module in (jax, optax))
"""Their rules by `jax.custom_jvp` (relu, softmax, projections) are derivatives; not all by `jax.custom_vjp` are."""

_OURS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")
"""The rules of this package are exact, or say in their estimator's docstring what they leave out (a third level)."""


def has_true_rule(eqn: Any) -> bool:
    """Whether the rule that the operation `eqn`, one of `RULES`, carries is the derivative of its function."""
    return _is_trusted(eqn) or _is_derivative(eqn)


def _is_trusted(eqn: Any) -> bool:
    _, file = _source(eqn)
    return file.startswith(_OURS) or (eqn.primitive.name == "custom_jvp_call" and file.startswith(_PACKAGES))


def _source(eqn: Any) -> tuple[str, str]:
    """Name and file of the function that an operation with its own derivative was made from."""
    info = getattr(eqn.params["call_jaxpr"].jaxpr, "debug_info", None)
    return getattr(info, "func_name", None) or "a function", getattr(info, "func_filename", None) or ""


_SCALES = (0.1, 1.0, 3.0, 30.0)
"""Of random points: a rule may differ from the derivative only beyond some bound (clipping) or within it."""

_EFFECTS = ("io_callback", "debug_callback")
"""Operations that are not done with made-up numbers."""


def _is_derivative(eqn: Any) -> bool:
    """Whether the rule of `eqn` gives the derivative of its function; False too where that cannot be found out."""
    closed = eqn.params["call_jaxpr"]
    if any(isinstance(const, Tracer) for const in closed.consts):
        return False
    plain = lambda *args: evaluate(detached(closed), *closed.consts, *args)  # noqa: E731
    ruled = lambda *args: bind(eqn, *args)  # noqa: E731
    agreed = False
    # Arrays of the trace around do not take part, so all of this is computed at once.
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"), np.errstate(all="ignore"):
        for seed, scale in enumerate(_SCALES):
            rng = np.random.default_rng(seed)
            point = [_random(rng, atom.aval, scale) for atom in eqn.invars]
            try:
                verdict = _agree(plain, ruled, point, rng)
            except Exception:  # whatever a function raises that is not made for such numbers
                return False
            if verdict is False:
                return False
            agreed = agreed or verdict is True
    return agreed


def _agree(function: Callable[..., Any], ruled: Callable[..., Any], point: list[Any], rng: Any) -> bool | None:
    """Whether the rule's derivatives at `point` are those of `function`; None where they are not finite."""
    moving = [i for i, x in enumerate(point) if is_inexact(x)]

    def of(function):
        def moved(leaves):
            full = list(point)
            for i, leaf in zip(moving, leaves, strict=True):
                full[i] = leaf
            return [x for x in function(*full) if is_inexact(x)]

        return moved

    at = [point[i] for i in moving]
    images = of(function)(at)
    if _has_effects(jax.make_jaxpr(lambda at, ct: jax.vjp(of(ruled), at)[1](ct))(at, images).jaxpr):
        return False
    pull_ruled = jax.vjp(of(ruled), at)[1]
    try:
        pull = jax.vjp(of(function), at)[1]
        pull(images)
    except Exception:  # a loop or a callback, which is why it has a rule: differences along one direction, then
        direction = [_random(rng, x, 1.0) for x in at]
        slope = _differences(of(function), at, direction)
        pull = None
    verdict = None
    for scale in (1e-6, 1.0, 1e6):  # a rule that clips is not linear
        cotangent = [_random(rng, x, scale) for x in images]
        found, tolerance = pull_ruled(cotangent)[0], 30 * np.sqrt(_eps(at))
        if pull is not None:
            wanted = pull(cotangent)[0]
        else:
            found, wanted, tolerance = [_inner(found, direction)], [_inner(cotangent, slope)], 0.05
        found, wanted = [np.asarray(x, complex) for x in found], [np.asarray(x, complex) for x in wanted]
        if not all(np.isfinite(x).all() for x in wanted):
            continue
        size = max((np.abs(x).max(initial=0.0) for x in (*wanted, *found)), default=0.0)
        if not all(np.abs(a - b).max(initial=0.0) <= tolerance * size for a, b in zip(wanted, found, strict=True)):
            return False
        verdict = True
    return verdict


def _differences(function: Callable[..., Any], at: list[Any], direction: list[Any]) -> list[Any]:
    """The derivative of `function` along `direction`, by central differences."""
    step = _eps(at) ** (1 / 3)
    moved = lambda h: function([x + jnp.asarray(h, x.dtype) * d for x, d in zip(at, direction, strict=True)])  # noqa: E731
    return [(a - b) / (2 * step) for a, b in zip(moved(step), moved(-step), strict=True)]


def _inner(xs: list[Any], ys: list[Any]) -> Any:
    return sum(jnp.sum(x * y) for x, y in zip(xs, ys, strict=True))


def _eps(arrays: list[Any]) -> float:
    return max((float(jnp.finfo(x.dtype).eps) for x in arrays), default=0.0)


def _random(rng: Any, like: Any, scale: float) -> jax.Array:
    if is_key(like):
        return jnp.broadcast_to(jax.random.key(0, impl=jax.random.key_impl(like)), like.shape)
    if jnp.issubdtype(like.dtype, jnp.inexact):
        values = rng.normal(size=like.shape) + (1j * rng.normal(size=like.shape) if like.dtype.kind == "c" else 0)
        return jnp.asarray(scale * values, like.dtype)
    return jnp.asarray(rng.integers(0, 2, like.shape), like.dtype)


def _has_effects(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in _EFFECTS or any(_has_effects(inner) for inner in jaxprs(eqn.params)) for eqn in jaxpr.eqns
    )
