"""What a loss must not be, found by tracing it and said in a sentence.

A loss that captured `outer` from outside has a hypergradient of 0 where it should not; a loss that holds an operation
without a derivative fails deep inside JAX. Nothing here looks at values of a trace, or runs a loss.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.data import slots
from bilevel.differentiation.custom_rules import custom_rule
from bilevel.differentiation.gradients import INNER_GRADIENT
from bilevel.differentiation.influence import StructuralZeroWarning, refuse_reverse_rules
from bilevel.differentiation.tracing import bind, constants, evaluate_closed, is_literal, jaxprs, operation, used
from bilevel.problem.problem import Problem, inner_outcome
from bilevel.trees import PyTree, at_step, is_inexact, leaf_names, named

_FAILURES = (TypeError, ValueError, NotImplementedError)
"""What JAX raises where it cannot differentiate; a loss may raise them for reasons of its own."""


@contextlib.contextmanager
def explained(losses: list[TracedLoss], orders: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """What is differentiated inside, as `orders` says for each of `losses`, with JAX's failure put in a sentence.

    Raises:
      ValueError: instead of JAX's error where an operation of a loss cannot be differentiated so: names it.
    """
    try:
        yield
    except _FAILURES as error:
        reason = _undifferentiable(losses, orders, str(error))
        if reason is None and "custom_vjp" in str(error) and "forward-mode" in str(error).lower():
            reason = f"Training that forward mode is pushed through {_MIXED}."
        if reason is None:
            raise
        said = str(error).partition("\n")[0]
        raise ValueError(f"{reason} ({said})") from error


class TracedLoss(NamedTuple):
    """A loss as a jaxpr of the leaves of `(inner, outer, ...)`; what it captured are the jaxpr's constants.

    Attributes:
      name: its name in `Problem`.
      closed: the jaxpr; its first output is the value.
      inner, outer: how many leaves of its arguments belong to the two.
    """

    name: str
    closed: Any
    inner: int
    outer: int

    def custom_rule(self) -> str | None:
        """The name of a function in it whose rule is not its derivative, of something computed from inner or outer."""
        variables = self.inner + self.outer
        return custom_rule(self.closed.jaxpr, [i < variables for i in range(len(self.closed.in_avals))])

    def value_reads(self) -> list[bool]:
        """For each leaf of the arguments, whether the loss itself, its first output, is computed from it."""
        return used(self.closed.jaxpr, [i == 0 for i in range(len(self.closed.jaxpr.outvars))])

    def reads(self) -> list[bool]:
        """For each leaf of `outer`, whether an output is computed from it."""
        read = used(self.closed.jaxpr, [True] * len(self.closed.jaxpr.outvars))
        return read[self.inner : self.inner + self.outer]


def traced_losses(
    problem: Problem,
    params: PyTree,
    outer: PyTree,
    inner_batches: PyTree,
    outer_batch: PyTree,
    key: jax.Array,
    steps: int,
    *,
    anew: bool = False,
) -> list[TracedLoss]:
    """Both losses, on their first batch; without one that cannot be traced, which will say so itself.

    Args:
      params: the inner variable; None for what `init_inner` returns.
      steps: inner batches, as `Hypergradient.steps`.
      anew: whether they are traced again, though JAX may remember their traces.
    """

    found = []
    losses: Any = ("inner_loss", _inner_loss, inner_batches), ("outer_loss", _outer_loss, outer_batch)
    for name, loss, batch in losses:
        try:
            inner = jax.eval_shape(problem.start_inner, key, outer) if params is None else params
            arguments = inner, outer, batch, problem, key
            loss = _forgotten(loss) if anew else loss
            closed = loss.trace(*arguments, steps).jaxpr
            if len(closed.in_avals) != len(jax.tree.leaves(arguments)):
                # A captured value of a trace became an argument.
                closed = jax.make_jaxpr(loss.__wrapped__, static_argnums=5)(*arguments, steps)
        except Exception:  # whatever a loss may raise
            continue
        found.append(TracedLoss(name, closed, len(jax.tree.leaves(inner)), len(jax.tree.leaves(outer))))
    return found


def _forgotten(loss: Any) -> Any:
    """`loss` as a compiled function of which JAX remembers no trace."""
    return jax.jit(functools.wraps(loss.__wrapped__)(lambda *args: loss.__wrapped__(*args)), **_STATIC)


_STATIC: dict[str, Any] = {"static_argnums": 5, "keep_unused": True}

# Compiled functions of the module, though they are never compiled: JAX then remembers their traces.


@functools.partial(jax.jit, **_STATIC)
def _inner_loss(inner, outer, batches, problem, key, steps):
    xs, bind = slots(batches, steps)
    batch = bind(jax.tree.map(lambda x: x[0], xs))
    value, updates, _ = inner_outcome(problem, inner, at_step(outer, 0), batch, key)
    return value, updates


@functools.partial(jax.jit, **_STATIC)
def _outer_loss(inner, outer, batch, problem, key, steps):
    return problem.outer_value(inner, at_step(outer, steps), batch, key)[0]


def warn_if_misplaced(losses: list[TracedLoss], *, learned: bool = True) -> None:
    """Looks at what the values of the losses are computed from.

    Args:
      losses: those that could be traced.
      learned: whether the outer variable is learned, so that the outer loss matters.

    Warns:
      StructuralZeroWarning: for an inner or an outer loss that does not depend on inner.
    """
    why = {
        "inner_loss": "training moves nothing by its gradient, which is exactly 0",
        "outer_loss": "nothing that training does can change it",
    }
    for loss in losses:
        if (learned or loss.name == "inner_loss") and loss.inner and not any(loss.value_reads()[: loss.inner]):
            warnings.warn(
                f"{loss.name} does not depend on inner: {why[loss.name]}; are its arguments (inner, outer, batch, key) "
                "in this order?",
                StructuralZeroWarning,
                stacklevel=3,
            )


def refuse_captured(losses: list[TracedLoss], outer: PyTree) -> None:
    """Refuses losses that hold a leaf of `outer` as a constant instead of reading it from their argument.

    The very same array is recognised anywhere; a copy of it only where no loss reads the leaf.

    Raises:
      ValueError: names the loss and the leaf.
    """
    read = [loss.reads() for loss in losses]
    for i, (name, leaf) in enumerate(zip(leaf_names(outer), jax.tree.leaves(outer), strict=True)):
        if not is_inexact(leaf):
            continue
        unread = len(losses) == 2 and not any(row[i] for row in read)
        for loss, row in zip(losses, read, strict=True):
            held = any(c is leaf or (unread and _is_copy(c, leaf)) for c in constants(loss.closed))
            if held and not row[i]:
                raise ValueError(
                    f"{loss.name} holds {named('outer', name)} as a constant captured from outside, which its "
                    "hypergradient would miss: use the `outer` argument (or capture a copy of the leaf, if a "
                    "constant is meant)."
                )


def _is_copy(constant: Any, leaf: Any) -> bool:
    if any(isinstance(x, Tracer) for x in (constant, leaf)) or np.size(leaf) < 2:
        return False
    same_kind = np.shape(constant) == np.shape(leaf) and getattr(constant, "dtype", None) == leaf.dtype
    return same_kind and bool(np.array_equal(np.asarray(constant), np.asarray(leaf)))


FORWARD = " in forward mode"

_DERIVATIVES: dict[str, Callable[..., Any]] = {
    "": jax.grad,
    " twice, forward over reverse": lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (x,))[1],
    FORWARD: lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
}
"""Derivatives that estimators take of a loss, by the words for them."""

TRAINING = {"inner_loss": ("",)}
"""What training alone takes."""

ORDERS: dict[str, tuple[str, ...]] = {
    "inner_loss": ("", " twice, forward over reverse", FORWARD),
    "outer_loss": ("", FORWARD),
}
"""What the estimators take."""

_REMEDIES = {
    "while": "jax.lax.while_loop, and fori_loop with bounds not known beforehand, have no reverse derivative: use "
    "jax.lax.scan or fixed bounds, stop_gradient its inputs if it is a constant, or ImplicitSolve if it is an inner "
    "solver",
    "pure_callback": "what runs on the host has no derivative of its own: give it one with jax.custom_jvp, or use "
    "EvolutionStrategies if it is in outer_loss",
    "custom_vjp_call": "its backward rule must itself be differentiable by jax: write it with such operations, use "
    "jax.custom_jvp instead or mode='reverse', or an estimator that takes no second derivative (FirstOrder, or "
    "EvolutionStrategies)",
}
_REMEDIES["io_callback"] = _REMEDIES["pure_callback"]
_REMEDY = (
    "it has no derivative rule: replace it, give it one with jax.custom_jvp, or use an estimator that takes no second "
    "derivative (FiniteDifference, SAMA, FirstOrder)"
)


def _undifferentiable(losses: list[TracedLoss], orders: Mapping[str, tuple[str, ...]], said: str) -> str | None:
    """Which operation of which loss cannot be differentiated, and what to do; None if all can. `said`: by JAX."""
    for loss in losses:
        whole, variables = functools.partial(evaluate_closed, loss.closed), range(loss.inner + loss.outer)
        for words in orders.get(loss.name, ()):
            if words == FORWARD and not ("custom_vjp" in said and "forward-mode" in said.lower()):
                continue
            if not _fails(whole, loss.closed.in_avals, variables, words):
                continue
            if name := _culprit(loss.closed.jaxpr, variables, words):
                remedy = _REMEDIES.get(name, _REMEDY)
                if name == "custom_vjp_call" and _trains(loss.closed.jaxpr):
                    return f"{loss.name} cannot be differentiated{words}: the training inside it {_MIXED}."
                return f"{loss.name} cannot be differentiated{words}, because of `{name}`: {remedy}."
    return None


_MIXED = (
    "has a gradient with a rule for reverse mode alone (mixed mode): give the estimator that trains there "
    "mode='reverse', as in Unrolled(optimizer, steps, mode='reverse')"
)


def _trains(jaxpr: Any) -> bool:
    """Whether an estimator trains inside `jaxpr`."""
    named = (eqn.params["name"] == INNER_GRADIENT for eqn in jaxpr.eqns if operation(eqn) == "name")
    return any(named) or any(_trains(inner) for eqn in jaxpr.eqns for inner in jaxprs(eqn.params))


def _culprit(jaxpr: Any, variables: range, words: str) -> str | None:
    """An operation on `variables` that has no such derivative by itself, as deep in `jaxpr` as possible; its name."""
    moving = {jaxpr.invars[i] for i in variables}
    for eqn in jaxpr.eqns:
        inputs = [v for v in eqn.invars if not is_literal(v)]
        if not moving.intersection(inputs):
            continue
        moving.update(eqn.outvars)

        def alone(*values, eqn=eqn):
            given = iter(values)
            return bind(eqn, *(v.val if is_literal(v) else next(given) for v in eqn.invars))

        if _fails(alone, [v.aval for v in inputs], range(len(inputs)), words):
            inside = (_culprit(inner, range(len(inner.invars)), words) for inner in jaxprs(eqn.params))
            return next((name for name in inside if name), operation(eqn))
    return None


def _fails(function: Callable[..., list[Any]], avals: list[Any], variables: range, words: str) -> bool:
    """Whether the outputs of `function` cannot be differentiated by those of its arguments that are `variables`."""
    rest = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    moving = [i for i in variables if jnp.issubdtype(rest[i].dtype, jnp.inexact)]

    def derivative(leaves, rest):
        def total(leaves):
            arguments = list(rest)
            for i, leaf in zip(moving, leaves, strict=True):
                arguments[i] = leaf
            with jax.numpy_dtype_promotion("standard"):
                return sum((jnp.sum(jnp.real(x)) for x in function(*arguments) if is_inexact(x)), start=0.0)

        return _DERIVATIVES[words](total)(leaves)

    if not moving:
        return False
    try:
        refuse_reverse_rules(jax.make_jaxpr(derivative)([rest[i] for i in moving], rest).jaxpr)
    except _FAILURES:
        return True
    return False
