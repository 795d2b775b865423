"""A bilevel problem: two losses, how to start, and what is feasible."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import resolve
from bilevel.trees import PyTree, as_arrays, leaf_names


def as_pytree(function: Any) -> Any:
    """`function` as something that can be an argument of a compiled function.

    Pytrees that are callable (`jax.tree_util.Partial`, registered dataclasses) stay as they are: their arrays
    are arguments. A plain function becomes a `Partial` without leaves, compared by identity.
    """
    if callable(function) and jax.tree_util.all_leaves([function]):
        return jax.tree_util.Partial(function)
    return function


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    r"""The bilevel problem

    .. math:: \min_{\lambda} F(w^*(\lambda), \lambda) \quad\text{with}\quad
              w^*(\lambda) \approx \arg\min_w f(w, \lambda),

    where :math:`w` is `inner`, :math:`\lambda` is `outer`, :math:`f` is `inner_loss`, :math:`F` is `outer_loss`.

    Args:
      inner_loss: `f(inner, outer, batch, key) -> scalar`, or `(scalar, aux)` with `has_aux`.
      outer_loss: `F(inner, outer, batch, key)`, likewise.
      init_inner: `init_inner(key, outer) -> inner`, any pytree. What it takes from `outer` is part of the
        hypergradient whenever an estimator is given `inner_state=None`.
      init_outer: `init_outer(key) -> outer`, any pytree. Inexact leaves get a hypergradient; typed random keys
        are constant within an outer iteration and advanced after it; all other leaves are constants.
      has_aux: whether both losses return `(scalar, aux)`.
      project: `project(outer) -> outer`, applied after each outer update.

    Large constants (frozen weights) belong into `jax.tree_util.Partial(loss, weights)`: they are then arguments of
    the compiled step, and their cotangent is never formed.
    """

    inner_loss: Callable[..., Any]
    outer_loss: Callable[..., Any]
    init_inner: Callable[[jax.Array, PyTree], PyTree]
    init_outer: Callable[[jax.Array], PyTree]
    has_aux: bool = dataclasses.field(default=False, kw_only=True, metadata={"static": True})
    project: Callable[[PyTree], PyTree] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        for name in ("inner_loss", "outer_loss", "init_inner", "init_outer", "project"):
            object.__setattr__(self, name, as_pytree(getattr(self, name)))

    def start_outer(self, key: jax.Array) -> PyTree:
        """`init_outer(key)`, its numbers made arrays."""
        return as_arrays(self.init_outer(key))

    def start_inner(self, key: jax.Array, outer: PyTree) -> PyTree:
        """`init_inner(key, outer)`, its numbers made arrays."""
        return as_arrays(self.init_inner(key, outer))

    def inner_value(self, inner: PyTree, outer: PyTree, batch: PyTree, key: Any) -> tuple[jax.Array, PyTree]:
        """`(inner_loss, aux)`, `aux` being None without `has_aux`.

        Raises:
          ValueError: if the loss is not a real scalar, or is not a pair where `has_aux` says so.
        """
        return self._value("inner_loss", inner, outer, batch, key)

    def outer_value(self, inner: PyTree, outer: PyTree, batch: PyTree, key: Any) -> tuple[jax.Array, PyTree]:
        """`(outer_loss, aux)`; as `inner_value`."""
        return self._value("outer_loss", inner, outer, batch, key)

    def _value(self, name, inner, outer, batch, key):
        batch = resolve(batch)
        try:
            result = getattr(self, name)(inner, outer, batch, key)
        except (TypeError, ValueError) as error:
            read = (("inner", inner), ("outer", outer), ("batch", batch))
            shapes = "; ".join(f"{what}: {_shapes(tree)}" for what, tree in read)
            error.add_note(f"This happened in {name}, which was called with {shapes}. Do they fit together?")
            raise
        if isinstance(result, tuple) != self.has_aux or (self.has_aux and len(result) != 2):
            wanted = "a pair (scalar, aux), as has_aux=True says" if self.has_aux else "a scalar"
            raise ValueError(
                f"{name} returned {_describe(result)}, but must return {wanted}; set Problem(has_aux=...) to match."
            )
        value, aux = result if self.has_aux else (result, None)
        if not _is_loss(value):
            raise ValueError(
                f"{name} returned {_describe(value)}, but a loss is a real floating-point scalar: "
                "reduce it with a mean or a sum."
            )
        return value, aux


def _is_loss(value: Any) -> bool:
    array = isinstance(value, (jax.Array, np.ndarray, np.generic, float))
    return array and jnp.shape(value) == () and jnp.issubdtype(jnp.result_type(value), jnp.floating)


def _shapes(tree: PyTree) -> str:
    named = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    return ", ".join(f"{name} {jnp.result_type(x)}{list(jnp.shape(x))}" for name, x in named) or "None"


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return f"an array of shape {jnp.shape(value)} and dtype {jnp.result_type(value)}"
    return f"a {type(value).__name__}"
