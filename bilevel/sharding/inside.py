"""What a model calls inside a loss, so that its activations and weights lie where they should on a mesh."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from bilevel.sharding.specs import FSDP, pin, rows
from bilevel.trees import PyTree


class Active(NamedTuple):
    """What a loss that is traced now may know of the mesh.

    Attributes:
      mesh: the mesh, with `Auto` axes.
      batch: the mesh axes that the rows of a batch are split over.
    """

    mesh: Mesh
    batch: tuple[str, ...]


_ACTIVE: contextvars.ContextVar[Active | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def entered(active: Active) -> Iterator[None]:
    """For the trace of a loss: `split_rows`, `gathered` and `across` find the mesh."""
    token = _ACTIVE.set(active)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def split_rows(x: jax.Array) -> jax.Array:
    """`x`, an activation whose leading axis is that of a batch, with its rows where the batch's are.

    The compiler is free to move activations to where the weights are. In a model whose weights are split, pin what a
    block is given. Outside a run with a `Sharding` it does nothing.

    Examples:
      >>> import jax
      >>> from bilevel.extend import split_rows
      >>> split_rows(jax.numpy.ones((8, 16))).shape
      (8, 16)
    """
    active = _ACTIVE.get()
    return x if active is None else pin(active.mesh, x, rows(active.batch, jnp.ndim(x)))


def gathered(function: Callable[[Any, Any], Any], x: PyTree, weights: PyTree) -> PyTree:
    """`function(x, weights)`, for which the weights are gathered on every device, for as long as it takes.

    Without it the compiler may gather the activations of all devices instead, where these are smaller. A derivative
    gathers them anew: kept for it, the weights of all layers would lie on each device. Outside a run with a `Sharding`
    it is `function(x, weights)`.

    Examples:
      >>> import jax
      >>> from bilevel.extend import gathered
      >>> gathered(jax.numpy.matmul, jax.numpy.ones((8, 16)), jax.numpy.ones((16, 4))).shape
      (8, 4)
    """
    if (active := _ACTIVE.get()) is None:
        return function(x, weights)

    def product(x: PyTree, weights: PyTree) -> PyTree:
        return function(x, jax.tree.map(lambda w: pin(active.mesh, w, PartitionSpec()), weights))

    return jax.checkpoint(product, prevent_cse=False)(x, weights)


def across(table: jax.Array) -> jax.Array:
    """A table that is split over its rows, split over its columns instead: each device then finds its part of any row.

    Outside a run with a `Sharding`, and where the columns do not divide, it does nothing.

    Examples:
      >>> import jax
      >>> from bilevel.extend import across
      >>> across(jax.numpy.ones((100, 16))).shape
      (100, 16)
    """
    active = _ACTIVE.get()
    if active is None or FSDP not in active.mesh.axis_names or table.shape[-1] % active.mesh.shape[FSDP]:
        return table
    return pin(active.mesh, table, PartitionSpec(None, FSDP))


def on_a_mesh() -> bool:
    """Whether the loss that is traced now is that of a run, or of a problem, with a `Sharding`.

    Examples:
      >>> from bilevel.extend import on_a_mesh
      >>> on_a_mesh()
      False
    """
    return _ACTIVE.get() is not None


def no_mesh() -> Any:
    """A context without a mesh, whatever surrounds it: what a program does is said by its arguments and its pins."""
    return jax.set_mesh(Mesh(np.empty((), dtype=object), ()))
