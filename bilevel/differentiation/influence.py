"""Derivatives that say when they are zero by construction, decided from the trace and never from values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from bilevel.differentiation.flat import PASSES, Mark, marks
from bilevel.differentiation.flat import reason as flatness
from bilevel.differentiation.tracing import jaxprs, used
from bilevel.trees import PyTree, leaf_names, named


class StructuralZeroWarning(UserWarning):
    """A derivative is exactly 0 by construction: the estimator cannot see how an outer leaf acts, or a loss does not
    depend on what it is to be differentiated by."""


def value_and_grad(
    function: Callable[[PyTree], tuple[jax.Array, PyTree]],
    moving: PyTree,
    *,
    estimator: str,
    training: Callable[[PyTree], PyTree] | None = None,
    lost: Lost | None = None,
) -> tuple[tuple[jax.Array, PyTree], PyTree]:
    """`jax.value_and_grad(function, has_aux=True)(moving)`, with a warning for every leaf without an influence.

    Args:
      function: `moving -> (scalar, aux)`.
      estimator: its name, for the message.
      training: the training that `function` leaves out, as a function of `moving`; None if it leaves out nothing.
      lost: why the influence of a leaf may be lost; asked only where one is.

    Warns:
      StructuralZeroWarning: names leaves whose derivative is 0 whatever their value.

    Raises:
      ValueError: if no leaf has an influence, on the training neither.
    """
    value, pullback, aux = jax.vjp(function, moving, has_aux=True)
    remedy = None if training is None else INSIDE_TRAINING
    whole = lambda ct: (pullback(ct)[0], None)  # noqa: E731
    direct = lambda moving: function(moving)[0]  # noqa: E731
    options = {"remedy": remedy, "training": training, "lost": lost, "direct": direct}
    grad, _ = pull(whole, value, moving, estimator=estimator, **options)
    return (value, aux), grad


Lost = Callable[[], list["str | None"]]
"""For each leaf of what is differentiated, where its influence is lost if it has one that no derivative shows."""

INSIDE_TRAINING = "it acts only inside training, where this estimator does not look; use Unrolled or Implicit"
"""Remedy for a leaf without a direct influence on the outer loss."""


def pull(
    pullback: Callable[[jax.Array], tuple[PyTree, PyTree]],
    value: jax.Array,
    moving: PyTree,
    *,
    estimator: str,
    remedy: str | None,
    training: Callable[[PyTree], PyTree] | None = None,
    lost: Lost | None = None,
    direct: Callable[[PyTree], PyTree] | None = None,
) -> tuple[PyTree, PyTree]:
    """`pullback(1)`, with a warning for every leaf of the gradient that the 1 does not reach.

    Args:
      pullback: cotangent of `value` -> `(grad, extra)`, `grad` a tree like `moving`.
      value, moving: the function's value and argument.
      estimator: its name, for the message.
      remedy: what the estimator does not see, and what to use instead; None if it sees all there is, so that no
        influence at all is an error.
      training, lost: as for `value_and_grad`; traced only if a leaf is not reached.
      direct: what is differentiated, as a function of `moving`; traced likewise, to find operations without a slope.

    Warns, Raises:
      As `value_and_grad`.
    """
    # The cotangent reaches exactly those leaves that have an influence; it is looked for in the trace of the pullback,
    # which is then evaluated, so that nothing is traced twice.
    closed, shape = jax.make_jaxpr(pullback, return_shape=True)(jnp.ones_like(value))
    refuse_reverse_rules(closed.jaxpr)
    count = len(jax.tree.leaves(moving))
    reached = [row[0] for row in _rows(closed.jaxpr, count)]
    inside, flat = [None if remedy is None else PASSES] * count, [None] * count
    if not all(reached):
        inside = inside if training is None else _replayed_marks(training, moving)
        flat = flat if direct is None else _replayed_marks(direct, moving)
    acts = [mark == PASSES for mark in inside]
    report(reached, moving, estimator, remedy, acts, lost, [a or b for a, b in zip(inside, flat, strict=True)])
    leaves = jex.jaxpr_as_fun(closed)(jnp.ones_like(value))
    return jax.tree.unflatten(jax.tree.structure(shape), leaves)


def traced(
    function: Callable[[PyTree], jax.Array], moving: PyTree, *, estimator: str, lost: Lost | None = None
) -> Callable[[PyTree], jax.Array]:
    """`function`, a scalar function of trees like `moving`, traced once; for estimators that only evaluate it.

    Warns, Raises:
      As `value_and_grad`, for an estimator that sees all there is.
    """
    closed = jax.make_jaxpr(function)(moving)
    reached = _rows(closed.jaxpr, 1)[0]
    report(reached, moving, estimator, None, [False] * len(reached), lost)
    return lambda tree: jex.jaxpr_as_fun(closed)(*jax.tree.leaves(tree))[0]


def report(
    reached: list[bool],
    moving: PyTree,
    estimator: str,
    remedy: str | None,
    acts: list[bool],
    lost: Lost | None = None,
    flat: Sequence[Mark] = (),
) -> None:
    """Tells of leaves that are not `reached`: `remedy` for those that have an influence all the same (`acts`).

    `flat`: for each leaf the operation without a slope that its influence ends in, as flat.py marks it.

    Warns, Raises:
      As `value_and_grad`.
    """
    if all(reached):
        return
    reasons = lost() if lost else [None] * len(reached)
    reasons = [why or (f and flatness(f)) for why, f in zip(reasons, flat or [None] * len(reached), strict=True)]
    rows = list(zip(leaf_names(moving), reached, acts, reasons, strict=True))
    dead = [(name, reason) for name, is_reached, does_act, reason in rows if not is_reached and not does_act]
    if dead and len(dead) == len(rows):
        if known := [f"{'outer' if name == '.' else name} ({reason})" for name, reason in dead if reason]:
            raise ValueError(
                f"{estimator}: the hypergradient of every outer leaf is exactly 0 by construction: {'; '.join(known)}."
            )
        raise ValueError(
            f"Neither loss depends on outer{_listed(name for name, _ in dead)} by a way that has a derivative, so "
            "its hypergradient would be 0: use the `outer` argument inside inner_loss or outer_loss, not a value "
            "captured from outside, and no operation without a derivative in between (sign, round, stop_gradient)."
        )
    groups: dict[str, list[str]] = {}
    for name, is_reached, does_act, reason in rows:
        if not is_reached:
            why = (remedy if does_act else reason) or "nothing that is trained or evaluated depends on it"
            groups.setdefault(why, []).append(name)
    for why, names in groups.items():
        warnings.warn(
            f"{estimator}: the hypergradient of {named('outer', *names)} is exactly 0 by construction: {why}.",
            StructuralZeroWarning,
            stacklevel=6,
        )


def _replayed_marks(function: Callable[[PyTree], PyTree], moving: PyTree) -> list[Mark]:
    """`marks`, without what the function warns of: it has been called before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return marks(function, moving)


def _listed(names: Iterable[str]) -> str:
    """Names of leaves in brackets; nothing where the tree is an array itself."""
    names = [name for name in names if name != "."]
    return f" ({', '.join(names)})" if names else ""


def arrives(function: Callable[[PyTree], PyTree], moving: PyTree) -> list[bool]:
    """For each leaf of `moving`, whether the derivative of `function`, inexact in all it returns, by it is not 0 by
    construction."""
    shape = jax.eval_shape(function, moving)
    leaves = [jnp.zeros(x.shape, x.dtype) for x in jax.tree.leaves(shape)]

    def pulled(cotangent):
        return jax.vjp(function, moving)[1](jax.tree.unflatten(jax.tree.structure(shape), cotangent))[0]

    return [any(row) for row in dependence(pulled, leaves)]


class InexactHypergradientWarning(UserWarning):
    """A hypergradient rests on a point that is not trained, or on a linear system that is not solved."""


class SteepUpdateWarning(UserWarning):
    """An inner update is so steep at a gradient of exactly 0 that the hypergradient through it is enormous."""


EXACTNESS = ("stationarity_relative", "linear_residual")
"""Entries of `Estimate.aux.info` that are 0 where an implicit hypergradient is exact."""


def warn_if_inexact(
    info: dict[str, Any],
    *,
    stationarity: float = 0.1,
    linear: float = 0.01,
    undetermined: Callable[[], list[str]] | None = None,
) -> None:
    """Looks at the `info` of implicit estimators, on the host: call it where the numbers have arrived, not in a trace.

    Args:
      info: `Estimate.aux.info`; entries it does not have, and numbers of more than one estimate, are fine.
      stationarity, linear: largest `stationarity_relative` and `linear_residual` that go without a warning.
      undetermined: names of what the equations of a singular system do not determine, none if it is regular or nobody
        knows; asked only where `linear_residual` is too large.

    Warns:
      InexactHypergradientWarning: once for each, with the largest value and the remedy.
    """
    limits = {
        "stationarity_relative": (stationarity, "the inner problem is not solved", "train more steps, or use Unrolled"),
        "linear_residual": (linear, "the linear system is not solved", _UNSOLVED),
    }
    for name, (limit, problem, remedy) in limits.items():
        worst = float(np.max(np.asarray(info.get(name, 0.0))))
        if not worst <= limit:
            if name == "linear_residual" and undetermined is not None and (names := undetermined()):
                problem, remedy = f"the linear system is singular, {_singular(names)}", _REGULAR
            warnings.warn(f"{name} is {worst:.2g}: {problem}; {remedy}.", InexactHypergradientWarning, stacklevel=2)


_UNSOLVED = "allow more iterations; where they do not help, it is singular or nearly so: raise damping, or use Unrolled"
_REGULAR = (
    "more iterations do not help: take that direction out of inner (or penalise it in inner_loss), raise damping, or "
    "use Unrolled"
)


def _singular(names: list[str]) -> str:
    return (
        f"so no derivative of its solution is defined: along {', '.join(names)} there is a direction in which every "
        "point solves the inner problem as well"
    )


def refuse_reverse_rules(jaxpr: Any) -> None:
    """Raises TypeError if `jaxpr` pushes a tangent through a function with a reverse rule only (`jax.custom_vjp`).

    JAX itself would notice when the program is compiled, far from its cause.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "custom_lin":
            raise TypeError("Forward-mode differentiation was applied to a jax.custom_vjp function.")
        for inner in jaxprs(eqn.params):
            refuse_reverse_rules(inner)


def dependence(function: Callable[[PyTree], PyTree], argument: PyTree) -> list[list[bool]]:
    """For each output leaf of `function(argument)`, which leaves of `argument` it is computed from."""
    jaxpr = jax.make_jaxpr(function)(argument).jaxpr
    return _rows(jaxpr, len(jaxpr.outvars))


def _rows(jaxpr: Any, count: int) -> list[list[bool]]:
    outputs = range(len(jaxpr.outvars))
    return [used(jaxpr, [j == i for j in outputs]) for i in range(count)]
