"""How many bytes of an array one device holds, told from shapes: of what training carries, and of what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.sharding.sharding import Sharding
from bilevel.trees import PyTree, leaf_names, nbytes


def on_one_device(sharding: Sharding, inner: PyTree, batch: PyTree) -> Callable[[Any], int]:
    """`size(array)`: the bytes of an array, or of its shape, on one device, in a training of `inner` on `batch`.

    What is shaped like a leaf of the inner variable lies as that leaf does. What has an axis as long as the batch has
    rows, or its first axes together (rows times tokens), is computed row by row, and lies as the batch does. Anything
    else counts whole; the compiler may split more of it.
    """
    leaves = jax.tree.leaves(inner)
    specs = sharding.of_inner(inner, leaf_names(inner), leaves)
    shares: dict[tuple[int, ...], int] = {}  # of leaves of one shape the share of the one that is split least
    for x, spec in zip(leaves, specs, strict=True):
        share = math.prod(sharding.mesh.shape[axis] for axes in spec for axis in _names(axes))
        shares[jnp.shape(x)] = min(share, shares.get(jnp.shape(x), share))
    rows = {math.prod(x.shape[:n]) for x in jax.tree.leaves(batch) for n in (1, 2) if jnp.ndim(x) >= n}

    def size(array: Any) -> int:
        if array.shape in shares:
            return nbytes(array) // shares[array.shape]
        by_rows = any(axis in rows and axis % sharding.parts == 0 for axis in array.shape)
        return nbytes(array) // (sharding.parts if by_rows else 1)

    return size


def _names(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
