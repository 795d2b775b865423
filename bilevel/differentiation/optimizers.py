"""Inner and outer optimizers as the engine uses them: any optax transformation, or a function of `outer`."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.differentiation.influence import dependence
from bilevel.differentiation.smooth import smooth
from bilevel.problem.arguments import telling
from bilevel.settings.fields import Unfit, shown
from bilevel.settings.rules import misfit
from bilevel.trees import PyTree, combine, leaf_names, named, partition

Optimizer = Any
"""An `optax.GradientTransformation`, or `outer -> optax.GradientTransformation`."""


def is_optimizer(value: Any) -> Optimizer:
    """The rule of a setting that is an `Optimizer`.

    A function of `outer` takes `outer` alone. A maker of optimizers (`optax.adam` without parentheses) could be called
    with it too, and would take the outer variable for its learning rate.
    """
    if isinstance(value, optax.GradientTransformation):
        if not (callable(value.init) and callable(value.update)):
            raise Unfit("must be an optax.GradientTransformation whose init and update are functions")
        return value
    if isinstance(value, optax.MultiSteps):
        return value
    wanted = "must be an optax.GradientTransformation or a function outer -> optax.GradientTransformation"
    if isinstance(value, type) or not callable(value) or typing.get_origin(value) is not None:
        raise Unfit(wanted)
    if (said := _of_optax(value)) is not None:
        raise Unfit(said)
    if name := _maker(value):
        raise Unfit(
            f"must be an optimizer, and not what makes one: call it, {name}(...), or write lambda outer: {name}(...)"
        )
    if (taken := misfit(value, 1)) is not None:
        raise Unfit(f"{wanted}, but takes {taken}")
    return value


_SCHEDULED = "to an optimizer as its learning rate, as in optax.adam({})"


def _of_optax(function: Any) -> str | None:
    """What to do instead, for a function of optax that makes no optimizers; None for all others."""
    whole = _whole(function)
    module, name = getattr(whole, "__module__", None) or "", getattr(whole, "__qualname__", "")
    if module.partition(".")[0] != "optax" or "GradientTransformation" in str(_returns(whole)):
        return None
    if not module.startswith("optax.schedules"):
        return f"must be an optimizer: call {name}(...) of optax if it makes one, or take another"
    if "<locals>" in name:  # what a maker of schedules has returned
        return f"must be an optimizer, and not a schedule step -> number: give it {_SCHEDULED.format('schedule')}"
    return "must be an optimizer, and not what makes a schedule: give what it makes " + _SCHEDULED.format(
        f"optax.{name}(...)"
    )


def _whole(function: Any) -> Any:
    """The function that others were made from by `functools.wraps` and `functools.partial`."""
    whole = inspect.unwrap(function)
    while isinstance(whole, functools.partial):
        whole = inspect.unwrap(whole.func)
    return whole


def _returns(function: Any) -> Any:
    try:
        return inspect.signature(function).return_annotation
    except (TypeError, ValueError):
        return None


def _maker(function: Any) -> str | None:
    """The name of a function that makes optimizers of settings; None for a function of `outer`."""
    whole = _whole(function)
    name, module = getattr(whole, "__name__", "optimizer"), getattr(whole, "__module__", None) or ""
    if module.partition(".")[0] == "optax":
        return f"optax.{name}"
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return name if len(names) > 1 and names[0] == "learning_rate" else None


_FUNCTION = (
    "what a function as an optimizer makes of the outer variable must be an optax.GradientTransformation (a schedule "
    "step -> number goes into an optimizer, as in optax.adam(schedule))."
)


def transformation(optimizer: Optimizer, outer: PyTree) -> optax.GradientTransformationExtraArgs:
    """The transformation that `optimizer` stands for at this `outer`; half-precision leaves are updated in float32.

    Raises:
      TypeError: if it is neither an optax transformation nor a function that returns one.
    """
    if not isinstance(optimizer, optax.GradientTransformation) and callable(optimizer):
        with telling("calling the optimizer, a function of outer", outer=outer):
            optimizer = optimizer(outer)
        if not isinstance(optimizer, optax.GradientTransformation | optax.MultiSteps):
            raise TypeError(f"The optimizer is a function that returned {shown(optimizer)}, but {_FUNCTION}")
    if isinstance(optimizer, optax.MultiSteps):  # not a transformation itself, though used like one
        optimizer = optimizer.gradient_transformation()
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"The optimizer is a {type(optimizer).__name__}, but must be an optax.GradientTransformation "
            "or a function outer -> optax.GradientTransformation."
        )
    return _at_least_single(optax.with_extra_args_support(optimizer))


def _at_least_single(transform: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`transform`, with float32 for every half-precision parameter, gradient and state; others as they are.

    The defaults of optimizers are not made for half precision: in float16 an eps of 1e-8, and the square of a small
    gradient, are 0, and Adam divides by both; in bfloat16 a decay of 0.999 is 1.
    """

    def update(updates, state, params=None, **extra):
        return transform.update(_widened(updates), state, _widened(params), **_widened(extra))

    return optax.GradientTransformationExtraArgs(lambda params: transform.init(_widened(params)), update)


def _widened(tree: PyTree) -> PyTree:
    half = (jnp.dtype("float16"), jnp.dtype("bfloat16"))
    return jax.tree.map(lambda x: x.astype(jnp.float32) if getattr(x, "dtype", None) in half else x, tree)


_OPTIMIZER_FAILURES = (TypeError, ValueError, LookupError, AttributeError)
"""What optimizers raise for what they cannot work with."""


def init(optimizer: Optimizer, outer: PyTree, params: PyTree) -> PyTree:
    """The state of `optimizer`, at this `outer`, before its first update of `params`.

    Raises:
      ValueError: where the optimizer cannot start; as `transformation`.
    """
    transform = transformation(optimizer, outer)
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return transform.init(params)
    except _OPTIMIZER_FAILURES as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"The optimizer cannot start from these parameters: {said}.") from error


def update(transform: optax.GradientTransformationExtraArgs, grads, state, params, value) -> tuple[PyTree, PyTree]:
    """`(updates, state)`; transformations with extra arguments are given `value` and `grad`.

    Raises:
      ValueError: for a transformation that needs to evaluate the loss itself (line searches), or whose parameters
        are not the ones to evaluate at (schedule-free, lookahead, sharpness-aware).
    """
    _refuse_evaluation_parameters(state)

    def call(grads, state, params, value):
        try:
            return transform.update(grads, state, params, value=value, grad=grads)
        except _OPTIMIZER_FAILURES as error:
            raise ValueError(_why_it_failed(error)) from error

    # optax descends along the conjugate of JAX's gradient of a complex variable.
    grads = jax.tree.map(jnp.conj, grads)
    # The step is traced once and evaluated smoothly; optax keeps its own promotion rules.
    return smooth(call)(grads, state, params, value)


def _why_it_failed(error: Exception) -> str:
    said = str(error).partition("\n")[0]
    if re.search(r"required keyword-only argument|must be provided|_fn\b", said):
        return (
            f"The optimizer asks for more than value and grad ({said}), which only evaluating the loss again can give "
            "(line searches, sophia): use one without, for example optax.adam(learning_rate), or "
            "optax.lbfgs(learning_rate, linesearch=None)."
        )
    return (
        f"The optimizer cannot update these parameters: {said.rstrip('.')} (a learning rate and the like are numbers, "
        "arrays or schedules)."
    )


def _refuse_evaluation_parameters(state: PyTree) -> None:
    def refused(node):
        return type(node).__name__ in ("ScheduleFreeState", "LookaheadState", "SAMState")

    for node in jax.tree.leaves(state, is_leaf=refused):
        if refused(node):
            raise ValueError(
                f"The optimizer keeps a {type(node).__name__}: its parameters are not the ones to evaluate the loss "
                "at, so the trained point is not what a hypergradient needs; use the plain optimizer instead."
            )


def apply(params: PyTree, updates: PyTree) -> PyTree:
    """`params + updates`, each leaf rounded once to its own dtype."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)


def refresh(optimizer: Optimizer, outer: PyTree, params: PyTree, state: PyTree) -> PyTree:
    """`state` with the leaves that `optimizer(outer).init` takes from `outer` computed anew from this `outer`.

    `optax.inject_hyperparams` keeps the learning rate in its state. Carried over from an earlier outer iteration it
    would be a constant, and the hypergradient with respect to the learning rate exactly 0.

    Raises:
      ValueError: if such a leaf also changes from step to step, so that it can neither be kept nor renewed.
    """
    if isinstance(optimizer, optax.GradientTransformation):
        return state
    moving, fixed = partition(outer)

    def fresh(moving):
        return transformation(optimizer, combine(moving, fixed)).init(params)

    derived = [any(used) for used in dependence(fresh, moving)]
    if not any(derived):
        return state
    handed_on = carried(transformation(optimizer, outer), params, state)
    new, old = jax.tree.leaves(fresh(moving)), jax.tree.leaves(state)
    for name, is_derived, is_carried in zip(leaf_names(state), derived, handed_on, strict=True):
        if is_derived and not is_carried:
            raise ValueError(
                f"{named('Optimizer state', name)} starts from outer and then changes at every step, so a warm start "
                "would lose its derivative: start it from a constant, or use inner_start='cold' (inner_state=None)."
            )
    leaves = [n if d else o for n, o, d in zip(new, old, derived, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def check_state(optimizer: Optimizer, outer: PyTree, params: PyTree, state: PyTree) -> None:
    """Refuses an optimizer state that is not one of `optimizer` for `params`.

    Raises:
      ValueError: if its structure, or the shape of a leaf, is another.
    """
    own = jax.eval_shape(lambda params, outer: init(optimizer, outer, params), params, outer)
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(tree)] for tree in (own, state)]
    if jax.tree.structure(own) != jax.tree.structure(state) or shapes[0] != shapes[1]:
        raise ValueError(
            "The optimizer state in inner_state is not one of this optimizer for these parameters: start from "
            "init(problem, outer, key) of this estimator, or give inner_state=None."
        )


def carried(transform: optax.GradientTransformationExtraArgs, params: PyTree, state: PyTree) -> list[bool]:
    """For each leaf of `state`, whether an update hands it on unchanged."""
    grads, value = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())

    def step(leaves):
        tree = jax.tree.unflatten(jax.tree.structure(state), leaves)
        return jax.tree.leaves(update(transform, grads, tree, params, value)[1])

    jaxpr = jax.make_jaxpr(step)(jax.tree.leaves(state)).jaxpr
    return [out is into for out, into in zip(jaxpr.outvars, jaxpr.invars, strict=True)]
