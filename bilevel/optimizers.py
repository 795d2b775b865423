"""Inner and outer optimizers as the engine uses them: any optax transformation, or a function of `outer`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.guards import dependence
from bilevel.smooth import smooth
from bilevel.trees import PyTree, combine, leaf_names, partition

Optimizer = Any
"""An `optax.GradientTransformation`, or `outer -> optax.GradientTransformation`."""


def transformation(optimizer: Optimizer, outer: PyTree) -> optax.GradientTransformationExtraArgs:
    """The transformation that `optimizer` stands for at this `outer`.

    Raises:
      TypeError: if it is neither an optax transformation nor a function that returns one.
    """
    if not isinstance(optimizer, optax.GradientTransformation) and callable(optimizer):
        optimizer = optimizer(outer)
    if isinstance(optimizer, optax.MultiSteps):  # not a transformation itself, though used like one
        optimizer = optimizer.gradient_transformation()
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"The optimizer is a {type(optimizer).__name__}, but must be an optax.GradientTransformation "
            "or a function outer -> optax.GradientTransformation."
        )
    return optax.with_extra_args_support(optimizer)


def update(transform: optax.GradientTransformationExtraArgs, grads, state, params, value) -> tuple[PyTree, PyTree]:
    """`(updates, state)`; transformations with extra arguments are given `value` and `grad`.

    Raises:
      ValueError: for a transformation that needs to evaluate the loss itself (line searches), or whose parameters
        are not the ones to evaluate at (schedule-free, lookahead, sharpness-aware).
    """
    _refuse_evaluation_parameters(state)
    try:
        # optax descends along the conjugate of JAX's gradient of a complex variable.
        grads = jax.tree.map(jnp.conj, grads)
        # The step is traced once and evaluated smoothly; optax keeps its own promotion rules.
        step = smooth(lambda g, s, p, v: transform.update(g, s, p, value=v, grad=g))
        return step(grads, state, params, value)
    except TypeError as error:
        if "required keyword-only argument" not in str(error):
            raise
        raise ValueError(
            f"The optimizer asks for more than value and grad ({error}), which only a line search on the loss can "
            "give: use one without a line search, for example optax.lbfgs(learning_rate, linesearch=None)."
        ) from None


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
                f"Optimizer state leaf {name} starts from outer and then changes at every step, so a warm start would "
                "lose its derivative: start it from a constant, or use inner_start='cold' (inner_state=None)."
            )
    leaves = [n if d else o for n, o, d in zip(new, old, derived, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def carried(transform: optax.GradientTransformationExtraArgs, params: PyTree, state: PyTree) -> list[bool]:
    """For each leaf of `state`, whether an update hands it on unchanged."""
    grads, value = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())

    def step(leaves):
        tree = jax.tree.unflatten(jax.tree.structure(state), leaves)
        return jax.tree.leaves(update(transform, grads, tree, params, value)[1])

    jaxpr = jax.make_jaxpr(step)(jax.tree.leaves(state)).jaxpr
    return [out is into for out, into in zip(jaxpr.outvars, jaxpr.invars, strict=True)]
