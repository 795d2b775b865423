"""Which derivatives are zero by construction, decided from the trace and never from values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.differentiation.flat import Mark, marks
from bilevel.differentiation.flat import reason as flatness
from bilevel.differentiation.tracing import jaxprs, operation, used
from bilevel.settings.fields import shown
from bilevel.trees import PyTree, leaf_names, named


class StructuralZeroWarning(UserWarning):
    """A derivative is exactly 0 by construction: the estimator cannot see how an outer leaf acts, or a loss does not
    depend on what it is to be differentiated by.

    Attributes:
      leaves: the names of these leaves; none where a loss is meant.

    Examples:
      >>> import warnings, bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.FirstOrder(optax.sgd(0.5), steps=20)  # the decay acts inside training only
      >>> arguments = problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     grad = hypergradient.estimate(*arguments).grad
      >>> float(grad), [warning.category.__name__ for warning in caught]
      (0.0, ['StructuralZeroWarning'])
    """

    leaves: tuple[str, ...] = ()


def report(
    reached: list[bool],
    moving: PyTree,
    estimator: str,
    remedies: Sequence[str | None],
    acts: list[bool],
    lost: Callable[[], list[str | None]] | None = None,
    flat: Sequence[Mark] = (),
) -> None:
    """Tells of outer leaves that a hypergradient does not reach, so that it is 0 there whatever their values are.

    Args:
      reached: for each leaf of `moving`, whether it is reached.
      estimator: its name, for the message.
      remedies: for each leaf, what the estimator does not see, and what to use instead.
      acts: for each leaf, whether it has an influence that the estimator does not see.
      lost: for each leaf, where its influence is lost; asked only where one is.
      flat: for each leaf the operation without a slope that its influence ends in, as flat.py marks it.

    Warns:
      StructuralZeroWarning: names the leaves.

    Raises:
      ValueError: if no leaf has an influence.
    """
    # Nothing can be missed of a leaf without entries.
    reached = [r or not np.size(x) for r, x in zip(reached, jax.tree.leaves(moving), strict=True)]
    if all(reached):
        return
    reasons = lost() if lost else [None] * len(reached)
    reasons = [why or (f and flatness(f)) for why, f in zip(reasons, flat or [None] * len(reached), strict=True)]
    rows = list(zip(leaf_names(moving), reached, acts, remedies, reasons, strict=True))
    dead = [(name, reason) for name, is_reached, does_act, _, reason in rows if not is_reached and not does_act]
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
    for name, is_reached, does_act, remedy, reason in rows:
        if not is_reached:
            why = (remedy if does_act else reason) or "nothing that is trained or evaluated depends on it"
            groups.setdefault(why, []).append(name)
    for why, names in groups.items():
        warning = StructuralZeroWarning(
            f"{estimator}: the hypergradient of {named('outer', *names)} is exactly 0 by construction: {why}."
        )
        warning.leaves = tuple(names)
        warnings.warn(warning, stacklevel=6)


def replayed_marks(function: Callable[[PyTree], PyTree], moving: PyTree) -> list[Mark]:
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


class ZeroHypergradientWarning(UserWarning):
    """The hypergradient was exactly 0 in every step of a run, for the values that there were and not by construction.

    Of leaves that are 0 by construction a `StructuralZeroWarning` tells, and this one of the others. Of a stochastic
    solver it is the direction that `outer` moves along, where neither loss has a slope that would ever change it.

    Examples:
      >>> import warnings, bilevel, jax, optax
      >>> problem = bilevel.Problem(  # training sees outer by a clip, and it starts below what is let through
      ...     lambda w, outer, batch, key: (w - jax.numpy.clip(outer, 0.2, 0.9)) ** 2,
      ...     lambda w, outer, batch, key: (w - 0.5) ** 2,
      ...     lambda key, outer: jax.numpy.zeros(()), lambda key: jax.numpy.asarray(0.1),
      ... )
      >>> solver = bilevel.Nested(problem, bilevel.Unrolled(optax.sgd(0.1), steps=5), optax.sgd(0.1))
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     result = bilevel.run(solver, steps=3, progress=False)
      >>> [warning.category.__name__ for warning in caught]
      ['ZeroHypergradientWarning']
    """


class InexactHypergradientWarning(UserWarning):
    """A hypergradient rests on a point that is not trained, or on a linear system that is not solved.

    Examples:
      >>> import warnings, bilevel
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("error", bilevel.InexactHypergradientWarning)
      ...     try:
      ...         bilevel.warn_if_inexact({"linear_residual": 0.5})  # of `Estimate.aux.info`
      ...     except bilevel.InexactHypergradientWarning:
      ...         print("not to be trusted")
      not to be trusted
    """


class SteepUpdateWarning(UserWarning):
    """An inner update is so steep at a gradient of exactly 0 that the hypergradient through it is enormous.

    Examples:
      >>> import warnings, bilevel, jax, optax
      >>> problem = bilevel.Problem(  # training starts where its gradient is exactly 0, and Adam divides by that
      ...     lambda w, outer, batch, key: (w - outer) ** 2, lambda w, outer, batch, key: (w - 1) ** 2,
      ...     lambda key, outer: jax.numpy.zeros(()), lambda key: jax.numpy.zeros(()),
      ... )
      >>> solver = bilevel.Nested(problem, bilevel.Unrolled(optax.adam(0.1), steps=1), optax.sgd(1e-9))
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     result = bilevel.run(solver, steps=1, progress=False)
      >>> [warning.category.__name__ for warning in caught]
      ['SteepUpdateWarning']
    """


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

    Raises:
      ValueError: if `info` is not numbers by name.

    Examples:
      >>> import warnings, bilevel
      >>> bilevel.warn_if_inexact({"stationarity_relative": 1e-3, "linear_residual": 1e-6})  # good, says nothing
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     bilevel.warn_if_inexact({"linear_residual": 0.5})
      >>> [warning.category.__name__ for warning in caught]
      ['InexactHypergradientWarning']
    """
    if not isinstance(info, Mapping):
        raise ValueError(f"warn_if_inexact(info={shown(info)}): must be Estimate.aux.info, numbers by name.")
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
        if operation(eqn) == "custom_lin":
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
