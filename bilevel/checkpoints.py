"""Saving and restoring the state of a run, typed random keys included. Atomic: a folder is whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel.trees import PyTree, is_key


def _without_keys(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


class Checkpoints:
    """Numbered checkpoints of a pytree in `folder`, the newest two kept.

    Saving is orbax's: it writes beside and renames, so that a run killed at any moment leaves whole checkpoints only.
    """

    def __init__(self, folder: str | Path):
        import orbax.checkpoint as ocp  # takes seconds to import

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, history: dict[str, np.ndarray], feeds: list[Any]) -> None:
        """Saves checkpoint `step`: `state`, the rows of metrics so far, and where iterators stand (JSON)."""
        args = self._ocp.args
        items = args.Composite(
            state=args.StandardSave(_without_keys(state)),
            history=args.StandardSave(history),
            feeds=args.JsonSave({"feeds": feeds}),
        )
        self._manager.save(step, args=items)

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, np.ndarray], list[Any]]:
        """`(state, history, feeds)` of checkpoint `step`; the state has the structure, shapes and key types of `like`.

        Raises:
          ValueError: if the checkpoint does not fit `like` or cannot be read.
        """
        args = self._ocp.args
        target = jax.tree.map(_abstract, _without_keys(like))
        items = args.Composite(
            state=args.StandardRestore(target), history=args.StandardRestore(), feeds=args.JsonRestore()
        )
        try:
            saved = self._manager.restore(step, args=items)
        except Exception as error:  # orbax raises many kinds, none of which names what to do
            raise ValueError(
                f"Checkpoint {step} does not fit this solver or is damaged ({str(error).splitlines()[0]}): "
                "continue with the solver it was written by, or start in an empty folder."
            ) from error
        history = {name: np.asarray(rows) for name, rows in saved["history"].items()}
        return jax.tree.map(_with_keys, like, saved["state"]), history, saved["feeds"]["feeds"]


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _with_keys(like: Any, x: Any) -> Any:
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like)) if is_key(like) else x
