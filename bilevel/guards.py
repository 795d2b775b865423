"""Derivatives that say when they are zero by construction, decided from the trace and never from values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import partial_eval

from bilevel.trees import PyTree, leaf_names


class StructuralZeroWarning(UserWarning):
    """An outer leaf has hypergradient exactly 0 because the estimator cannot see how it acts."""


def value_and_grad(
    function: Callable[[PyTree], tuple[jax.Array, PyTree]], moving: PyTree, *, estimator: str, sees_training: bool
) -> tuple[tuple[jax.Array, PyTree], PyTree]:
    """`jax.value_and_grad(function, has_aux=True)(moving)`, with a warning for every leaf without an influence.

    Args:
      function: `moving -> (scalar, aux)`.
      estimator: its name, for the message.
      sees_training: whether the derivative includes that of the training; then no influence at all is an error.

    Warns:
      StructuralZeroWarning: names leaves whose derivative is 0 whatever their value.

    Raises:
      ValueError: if `sees_training` and no leaf has an influence.
    """
    value, pullback, aux = jax.vjp(function, moving, has_aux=True)
    # The cotangent reaches exactly those leaves that have an influence; it is looked for in the trace of the pullback,
    # which is then evaluated, so that nothing is traced twice.
    closed = jax.make_jaxpr(pullback)(jnp.ones_like(value))
    reached = _reached(closed.jaxpr)
    names = [name for name, used in zip(leaf_names(moving), reached, strict=True) if not used]
    if names and sees_training and len(names) == len(reached):
        raise ValueError(
            f"Neither loss depends on outer ({', '.join(names)}), so its hypergradient would be 0: "
            "use the `outer` argument inside inner_loss or outer_loss, not a value captured from outside."
        )
    if names:
        remedy = (
            "nothing that is trained or evaluated depends on it."
            if sees_training
            else "it acts only inside training, where this estimator does not look; use Unrolled or Implicit."
        )
        warnings.warn(
            f"{estimator}: the hypergradient of outer leaf {', '.join(names)} is exactly 0 by construction: {remedy}",
            StructuralZeroWarning,
            stacklevel=3,
        )
    leaves = jex.jaxpr_as_fun(closed)(jnp.ones_like(value))
    return (value, aux), jax.tree.unflatten(jax.tree.structure(moving), leaves)


def _reached(jaxpr: Any) -> list[bool]:
    count = len(jaxpr.outvars)
    return [partial_eval.dce_jaxpr(jaxpr, [j == i for j in range(count)])[1][0] for i in range(count)]
