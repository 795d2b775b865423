"""What users hand to the engine beside settings: trees, modules, states, keys. Each is refused in one sentence."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel.trees import PyTree, is_inexact, leaf_names, shapes


class Contents(NamedTuple):
    """What a tree holds, to see afterwards whether it was changed in place: its structure and its very leaves.

    Attributes:
      structure: of the tree.
      leaves: in flattening order; None where the tree makes a leaf anew each time it is flattened.
    """

    structure: Any
    leaves: list[Any]

    @classmethod
    def of(cls, tree: PyTree) -> Contents:
        """The contents now."""
        leaves, structure = jax.tree.flatten(tree)
        again = jax.tree.leaves(tree)
        return cls(structure, [x if x is y else None for x, y in zip(leaves, again, strict=True)])

    def changed(self, tree: PyTree) -> str | None:
        """The name of a leaf of `tree` that is no longer what it was; None if all are."""
        if jax.tree.structure(tree) != self.structure:
            return "its entries are others"
        leaves = zip(leaf_names(tree), jax.tree.leaves(tree), self.leaves, strict=True)
        return next((f"leaf {name}" for name, new, old in leaves if old is not None and new is not old), None)


def check_outer(what: str, outer: PyTree) -> None:
    """Raises ValueError, in a sentence that `what` begins, if `outer` holds no number that can be learned."""
    if any(is_inexact(x) and np.size(x) for x in jax.tree.leaves(outer)):
        return
    found = ", ".join(
        f"{name} {getattr(x, 'dtype', type(x).__name__)}{list(np.shape(x))}"
        for name, x in zip(leaf_names(outer), jax.tree.leaves(outer), strict=True)
    )
    raise ValueError(
        f"{what} nothing that can be learned ({found or 'no leaf'}): outer needs a floating-point leaf with at least "
        "one number, since integers, booleans and keys are constants (write 3.0 for 3, and gates as 0.0 and 1.0)."
    )


_LEAVES = 12
"""Most leaves of an argument that a note lists."""


@contextlib.contextmanager
def telling(when: str, **given: PyTree) -> Iterator[None]:
    """Adds to whatever a function of the user's raises inside a note: `when` it did, and the shapes it was `given`.

    Raises:
      ValueError: for a flax nnx object that was captured from outside and changes: instead of flax's own error.
    """
    try:
        yield
    except StopIteration:
        raise
    except Exception as error:
        if type(error).__name__ == "TraceContextError" and type(error).__module__.startswith("flax"):
            said = str(error).partition("\n")[0].rstrip(".")
            raise ValueError(
                f"While {when}, a flax nnx object captured from outside was to be changed (dropout counters, batch "
                f"statistics), which would be lost: {_SPLIT}; or switch it off, model.eval(). ({said})"
            ) from error
        trees = "; ".join(f"{what}: {shapes(tree, _LEAVES)}" for what, tree in given.items())
        error.add_note(f"This happened while {when}{', with ' * bool(trees)}{trees}.")
        raise


_SPLIT = (
    "give the module to bilevel.nnx.problem, and use what its losses are given; or split it, graphdef, params, rest = "
    "nnx.split(model, nnx.Param, ...), train params, merge inside the loss, and carry the rest as Problem(mutable=...) "
    "says"
)


def refuse_modules(what: str, tree: PyTree, mutable: tuple[str, ...] = ()) -> None:
    """Refuses objects of flax's nnx that a loss would change in place, which is lost: a tree is copied at every step.

    Modules, and variables that are no parameters (batch statistics, counters of random keys) outside the entries
    `mutable`; parameters of a split module are fine.

    Raises:
      ValueError: in a sentence that `what` begins.
    """
    nnx = sys.modules.get("flax.nnx")  # where it was never imported there is nothing of it
    if nnx is None:
        return
    modules = tuple(getattr(nnx, name) for name in ("Module", "Rngs", "Optimizer") if hasattr(nnx, name))
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, (*modules, nnx.Variable)))
    for path, x in found:
        name = jax.tree_util.keystr(path) or "."
        if isinstance(x, modules):
            raise ValueError(
                f"{what} a flax nnx object ({type(x).__name__}) in leaf {name}, and what it changes inside a loss "
                f"(dropout counters, batch statistics) would be lost: {_SPLIT}."
            )
        carried = path and str(getattr(path[0], "key", "")) in mutable
        if isinstance(x, nnx.Variable) and not isinstance(x, nnx.Param) and not carried:
            raise ValueError(
                f"{what} a flax nnx {type(x).__name__} in leaf {name}, which is no parameter: what training updates "
                "without a gradient belongs into an entry named in Problem(mutable=...)."
            )
