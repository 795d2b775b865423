"""Which leaves of a tree hold what is not finite, and which of them hold more of it than before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from bilevel.sharding.processes import on_host
from bilevel.trees import PyTree, is_inexact, leaf_names


def not_finite(root: str, tree: PyTree) -> list[str]:
    """Names of the leaves of `tree`, which is called `root`, that hold a NaN or an infinity."""
    return [name for name, leaf in named_leaves(root, tree) if not np.isfinite(on_host(leaf)).all()]


def holding_nan(root: str, tree: PyTree) -> list[str]:
    """Names of the leaves that hold a NaN."""
    return [name for name, leaf in named_leaves(root, tree) if np.isnan(on_host(leaf)).any()]


def named_leaves(root: str, tree: PyTree) -> Iterator[tuple[str, Any]]:
    """The inexact leaves of `tree`, by name."""
    for name, leaf in zip(leaf_names(tree, root), jax.tree.leaves(tree), strict=True):
        if is_inexact(leaf):
            yield name, leaf


def newly(root: str, before: PyTree, after: PyTree) -> list[str]:
    """Names of leaves that hold more infinities or NaN than before: an infinity from the start may be meant."""
    was = {name: holes(x) for name, x in named_leaves(root, before)}
    return [name for name, x in named_leaves(root, after) if np.any(holes(x) > was.get(name, 0))]


def holes(x: Any) -> np.ndarray:
    """How many entries are not finite, and how many are NaN."""
    whole = on_host(x)
    return np.asarray([np.sum(~np.isfinite(whole)), np.sum(np.isnan(whole))])
