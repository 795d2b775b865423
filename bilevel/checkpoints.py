"""Saving and restoring the state of a run, typed random keys included. Atomic: a folder is whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

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

    def save(self, step: int, tree: PyTree) -> None:
        """Saves `tree` as checkpoint `step`."""
        self._manager.save(step, args=self._ocp.args.StandardSave(_without_keys(tree)))

    def restore(self, step: int, like: PyTree) -> PyTree:
        """Checkpoint `step` as a tree with the structure, shapes and key types of `like`.

        Raises:
          ValueError: if the checkpoint does not fit `like` or cannot be read.
        """
        target = jax.tree.map(_abstract, _without_keys(like))
        try:
            tree = self._manager.restore(step, args=self._ocp.args.StandardRestore(target))
        except Exception as error:  # orbax raises many kinds, none of which names what to do
            raise ValueError(
                f"Checkpoint {step} does not fit this solver or is damaged ({str(error).splitlines()[0]}): "
                "continue with the solver it was written by, or start in an empty folder."
            ) from error
        return jax.tree.map(_with_keys, like, tree)


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _with_keys(like: Any, x: Any) -> Any:
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like)) if is_key(like) else x
