"""Which entries of the inner variable an optimizer never moves, decided from the trace of its update.

`optax.set_to_zero` in a `partition` or `multi_transform`, `optax.transforms.freeze`, a multiplication by a mask: what
is frozen so is no unknown of an implicit system. An entry counts as frozen if its update is 0 whatever the gradient and
the parameters are, and whatever the optimizer's state comes to be: what `init` sets to 0 and an update leaves at 0 (the
momentum of a gradient that was masked) is 0 for ever; a learning rate that is 0 only now (warm-up) freezes nothing.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.differentiation.trials import Trial
from bilevel.differentiation.zeros import lasting, zeros_of
from bilevel.trees import PyTree, leaf_names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Division:
    """Which entries of the trained leaves of an inner variable are unknowns of a system, and which stay where they are.

    Attributes:
      kinds: for each trained leaf `"moving"`, `"held"`, or `"mixed"` if some of its entries move.
      masks: for each leaf that is mixed, in their order, which entries move.
    """

    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    masks: list[jax.Array]

    def split(self, trained: PyTree) -> tuple[PyTree, PyTree]:
        """`(z, held)`: leaves with entries that move, and all others, with None in each other's places."""
        leaves, structure = jax.tree.flatten(trained)
        z = [None if kind == "held" else x for kind, x in zip(self.kinds, leaves, strict=True)]
        held = [x if kind == "held" else None for kind, x in zip(self.kinds, leaves, strict=True)]
        return jax.tree.unflatten(structure, z), jax.tree.unflatten(structure, held)

    def pinned(self, z: PyTree) -> PyTree:
        """z, with entries that do not move held constant: a derivative sees the others only."""
        return self._where(lambda moves, x: jnp.where(moves, x, jax.lax.stop_gradient(x)), z)

    def rows(self, residual: PyTree, z: PyTree) -> PyTree:
        """`residual`, a tree like z, with `z - constant` in the rows of entries that do not move.

        These rows are 0 and their block of the derivative is the identity: the system is over what moves, and as
        regular and symmetric as it is there.
        """
        still = lambda moves, r, x: jnp.where(moves, r, (x - jax.lax.stop_gradient(x)).astype(r.dtype))  # noqa: E731
        return self._where(still, residual, z)

    def _where(self, function: Callable[..., Any], first: PyTree, *rest: PyTree) -> PyTree:
        """`first`, with `function(mask, leaf, ...)` in the place of leaves that are mixed."""
        leaves, structure = jax.tree.flatten(first)
        columns, masks = zip(leaves, *map(jax.tree.leaves, rest), strict=True), iter(self.masks)
        kinds = [kind for kind in self.kinds if kind != "held"]
        result = [
            function(next(masks), *row) if kind == "mixed" else row[0] for kind, row in zip(kinds, columns, strict=True)
        ]
        return jax.tree.unflatten(structure, result)


def whole(params: PyTree) -> Division:
    """Returns the division that says of every leaf that it moves."""
    return Division(("moving",) * len(jax.tree.leaves(params)), [])


@dataclasses.dataclass(frozen=True)
class Update:
    """The trace of an optimizer's `init` and `update`.

    Attributes:
      params: what it updates.
      begun: the closed jaxpr of `params -> state`.
      closed: that of `(state, gradients, params, value of the loss) -> (updates, state)`.
      own: whether a state that it is given has the structure of its own.
      state: how many leaves a state has.
    """

    params: PyTree
    begun: Any
    closed: Any
    own: bool
    state: int

    @property
    def count(self) -> int:
        """How many leaves are updated."""
        return len(jax.tree.leaves(self.params))

    def zeros(self, lost: set[str] | None = None, *, at_rest: bool = False) -> list[Any]:
        """For each leaf that is updated, where its update is known to be 0, whatever the parameters are.

        Args:
          lost: names of operations behind which a 0 may be lost are added to it.
          at_rest: whether all gradients are 0, for ever.
        """
        start = zeros_of(self.begun, [None] * len(self.begun.in_avals)) if self.own else [None] * self.state
        others: list[Any] = [None] * (len(self.closed.in_avals) - self.state)
        if at_rest:
            others[: self.count] = [np.bool_(True)] * self.count
        return lasting(self.closed, [*start, *others], 0, self.count, self.state, lost)[1][: self.count]

    def rests(self) -> bool:
        """Whether no parameter is ever moved where the gradient is 0, as far as the trace tells."""
        return all(zero is not None and np.all(zero) for zero in self.zeros(at_rest=True))


def traced(transform: Any, params: PyTree, state: PyTree) -> Update:
    """The `Update` of an optax transformation with extra arguments, for these parameters and this state."""

    def update(state, grads, params, value):
        return transform.update(grads, state, params, value=value, grad=grads)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        closed = jax.make_jaxpr(update)(state, params, params, jnp.zeros(()))
        begun, start = jax.make_jaxpr(transform.init, return_shape=True)(params)
    own = jax.tree.structure(start) == jax.tree.structure(state)
    return Update(params, begun, closed, own, len(jax.tree.leaves(state)))


def divide(estimator: str, update: Update, trial: Callable[[], Trial | None] | None = None) -> Division:
    """What of the trained leaves an optimizer moves, whatever its state comes to be.

    Args:
      estimator: its name, for messages.
      update: the optimizer's.
      trial: what tries it out, to be asked for what the trace does not show; None to say nothing of that.

    Warns:
      UserWarning: names leaves that count as moving and do not, as far as a trial can tell.

    Raises:
      ValueError: if nothing is ever moved.
    """
    lost: set[str] = set()
    kinds, masks = [], []
    for leaf, zero in zip(jax.tree.leaves(update.params), update.zeros(lost), strict=True):
        if zero is None or not np.any(zero):
            kinds.append("moving")
        elif np.all(zero):
            kinds.append("held")
        else:
            kinds.append("mixed")
            masks.append(~np.broadcast_to(zero, np.shape(leaf)))
    if trial is not None and (tried := trial()) is not None:
        _warn_if_still(estimator, update.params, kinds, masks, tried, lost)
    if kinds and set(kinds) == {"held"}:
        raise ValueError(
            f"{estimator}: the optimizer never moves any leaf of the inner variable "
            f"({', '.join(leaf_names(update.params))}), so there is no trained point to differentiate: leave out "
            "set_to_zero, or the mask, for what is trained."
        )
    return Division(tuple(kinds), list(map(jnp.asarray, masks)))


def _warn_if_still(
    estimator: str, params: PyTree, kinds: list[str], masks: list[np.ndarray], trial: Trial, lost: set[str]
) -> None:
    """Warn of a leaf that counts as moving and does not, as far as a trial can tell."""
    moving, found = iter(masks), []
    for name, kind, entries in zip(leaf_names(params), kinds, trial.still, strict=True):
        entries = entries & next(moving) if kind == "mixed" else entries
        if kind != "held" and entries.any():
            found.append(name)
    if found:
        uses = f", which uses {', '.join(sorted(lost))}" if lost else ""
        warnings.warn(
            f"{estimator}: the optimizer seems to leave {', '.join(found)} of the inner variable where it is (at least "
            f"in part), but this cannot be read from its update{uses}. The system is solved as if all of it moved, and "
            "the hypergradient is wrong if that is not so: freeze it by optax.transforms.freeze, or by a product with "
            "a mask of zeros and ones.",
            stacklevel=2,
        )
