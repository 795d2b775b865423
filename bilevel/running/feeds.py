"""Where the batches of a run come from, and how they go on after an interruption."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.data import Batches, FullBatch, check_batch, columns, rows
from bilevel.differentiation.described import described
from bilevel.problem.arguments import telling
from bilevel.sharding.processes import attempt, digest, everyone, several
from bilevel.sharding.sharding import Sharding
from bilevel.sharding.specs import on
from bilevel.trees import PyTree, leaf_names, shapes


class Feed:
    """The batches of one loss: `source` as the compiled step takes it, or an iterator to read from."""

    def __init__(self, name: str, source: Any, key: jax.Array, is_iterator: bool, steps: int = 0, title: str = ""):
        self.source: Any = source
        self.name, self.key, self.is_iterator, self.steps = name, key, is_iterator, steps
        self.title, self.word = title or name, "step" if title else "outer step"
        self._last: tuple[Any, int, PyTree] | None = None
        self._sharding: Sharding | None = None
        self._compared = False
        # Batches of an iterator may differ in shape: a loss is known by what it computes on the first.
        self._shapes: list[Any] | None = None

    @classmethod
    def of(cls, name: str, data: Any, key: jax.Array, steps: int = 0, title: str = "") -> Feed:
        """A feed from the argument `name` of `run`, for so many outer steps; `title` is what messages call it."""
        if data is None or isinstance(data, (Batches, FullBatch)):
            return cls(name, jax.tree.map(jnp.asarray, data), key, False)  # on the device once, not at each chunk
        if isinstance(data, Iterator):
            return cls(name, data, key, True, steps, title)
        try:
            arrays = jax.tree.map(jnp.asarray, columns(data))
            rows(arrays)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{title or name} is a {type(data).__name__} that cannot be read as a data set: {error}"
            ) from None
        return cls(name, FullBatch(arrays), key, False)

    @property
    def _can_move(self) -> bool:
        return hasattr(self.source, "get_state") and hasattr(self.source, "set_state")

    def next(self, count: int, step: int) -> tuple[Any, jax.Array]:
        """`(source, key)` for a chunk that starts at outer step `step`; an iterator is read `count` times."""
        if not self.is_iterator:
            return self.source, self.key
        with attempt(f"reading {self.title}") as alike:
            before = self.source.get_state() if self._can_move else None
            read = self._read(count, step)
            self._last = before, count, read
            if several():  # a look at each batch is work that one process need not do
                alike.append(shapes(jax.eval_shape(lambda read: jax.tree.map(lambda x: x[0], read), read)))
        placed = self._placed(read)
        self._shapes = self._shapes or [jnp.shape(leaf) for leaf in jax.tree.leaves(placed)]
        return placed, self.key

    def _read(self, count: int, step: int) -> PyTree:
        batches = []
        for _ in range(count):
            number = step * count + len(batches)
            try:
                with telling(f"reading batch {number} of {self.title}"):
                    batch = next(self.source)
            except StopIteration:
                raise ValueError(
                    f"{self.title}: the iterator ended at {self.word} {step}, after {_counted(number)}, but "
                    f"{self.steps} steps need {self.steps * count}, {count} each: give an iterator that repeats, or "
                    "run fewer steps."
                ) from None
            check_batch(f"{self.title}: batch {number} of the iterator", batch)
            batches.append(batch)
            new, old = _likes(batch, batches[0])
            if new != old:
                raise ValueError(
                    f"{self.title}: batch {number} of the iterator is {new}, but the first of the same step is {old}: "
                    "the batches of one step are stacked, so they must be of one structure, shape and dtype."
                )
        return jax.tree.map(lambda *xs: jnp.stack(xs), *batches)

    def place(self, sharding: Sharding) -> None:
        """Puts the data on a mesh.

        The rows of full batches, and of those that are read, are split over the mesh. The arrays of `Batches` stay
        where they are, if that is on all devices of the mesh, and else are copied to each, so that it gathers its own
        rows.

        Raises:
          ValueError: for rows that the devices do not divide; names the data.
        """
        self._sharding, self.key = sharding, sharding.replicated(self.key, what="The key")
        if isinstance(self.source, FullBatch):
            self.source = FullBatch(sharding.rows(self.title, self.source.arrays))
        elif isinstance(self.source, Batches):
            if self.source.size % sharding.parts:
                raise ValueError(
                    f"{self.title}: Batches(size={self.source.size}) on {sharding.parts} devices "
                    f"({on(sharding.mesh, sharding.batch)}), which do not divide it: take a multiple of "
                    f"{sharding.parts} rows, or another mesh."
                )
            self.source = sharding.replicated(self.source, what=self.title)

    def _placed(self, read: PyTree) -> PyTree:
        if self._sharding is None:
            return read
        if several():
            self._compare(read, self._sharding)
        return self._sharding.own_rows(self.title, read, axis=1)

    def _compare(self, read: PyTree, sharding: Sharding) -> None:
        """Compares the rows of processes that hold the same ones, and once those of others.

        Raises:
          ValueError: if the same rows are others, or the first of others the same.
        """
        holders = sharding.row_holders()
        first, self._compared = not self._compared, True
        pairs = [(i, j) for i, j in itertools.combinations(range(len(holders)), 2) if first or holders[i] == holders[j]]
        digests = everyone(digest(read)) if pairs else []
        for i, j in pairs:
            if digests[i] == digests[j] and holders[i] != holders[j]:
                raise ValueError(
                    f"{self.title}: the iterator gave the same first batch in process {i} and {j}, but each has to "
                    "give rows of its own, those of its devices: let it read another part of the data by "
                    "jax.process_index(), and give jax.process_count() times fewer rows."
                )
            if digests[i] != digests[j] and holders[i] == holders[j]:
                raise ValueError(
                    f"{self.title}: the devices of process {i} and {j} hold the same rows of a batch, but the iterator "
                    "gave others in each: give both the same, or split rows over a mesh axis that parts the processes."
                )

    def position(self) -> Any:
        """Where an iterator stands, and what it read last; to be given to `noted`."""
        if not (self.is_iterator and self._can_move and self._last):
            return None
        return self.source.get_state(), *self._last, self._shapes

    def resume(self, note: Any, count: int, step: int) -> tuple[Any, jax.Array]:
        """Puts an iterator where `note`, made by `noted`, says; its last batches before that are compared.

        Returns:
          As `next`, for the first batches of the run; of an iterator, only their shapes and dtypes.

        Raises:
          ValueError: if it cannot be put there, or gives other batches than it gave.
        """
        if not self.is_iterator:
            return self.source, self.key
        if note is None or not self._can_move:
            raise ValueError(
                f"{self.name}: the run cannot be resumed exactly from a plain iterator: pass Batches(arrays, size), "
                "arrays, or an iterator with get_state and set_state."
            )
        with attempt(f"reading {self.title}"):
            self.source.set_state(note["before"])
            read = self._read(count, step)
            if count == note["count"] and digest(read) != note["digest"]:
                raise ValueError(
                    f"{self.name}: the iterator gives other batches for the step before outer step {step} than it gave "
                    "when the checkpoint was written: resume with the same data, or use another checkpoint_dir."
                )
            self.source.set_state(note["after"])
            self._last = note["before"], count, read
        if count == note["count"]:
            self._shapes = note["shapes"]
        placed = jax.tree.leaves(self._placed(read))  # in several processes the rows of all of them
        leaves = zip(self._shapes or map(jnp.shape, placed), placed, strict=True)
        first = [jax.ShapeDtypeStruct(tuple(shape), leaf.dtype) for shape, leaf in leaves]
        return jax.tree.unflatten(jax.tree.structure(read), first), self.key

    def fingerprint(self) -> dict[str, str]:
        """What the data are, by name; of an iterator `resume` looks at the batches themselves."""
        if self.is_iterator:
            return {f"{self.name} is": "an iterator"}
        kind = "None" if self.source is None else type(self.source).__name__
        if isinstance(self.source, Batches):
            kind += f"(size={self.source.size}, order={self.source.order!r})"
        arrays = getattr(self.source, "arrays", None)
        names, leaves = leaf_names(arrays, self.name), jax.tree.leaves(arrays)
        return {f"{self.name} is": kind} | {n: described(x) for n, x in zip(names, leaves, strict=True)}


def _counted(batches: int) -> str:
    return f"{batches} batch{'es' * (batches != 1)}"


def _likes(*batches: PyTree) -> list[str]:
    """What each of `batches` is, in words that differ where they cannot be stacked."""
    found = [shapes(batch) for batch in batches]
    return found if len(set(found)) > 1 else [str(jax.tree.structure(batch)) for batch in batches]


def noted(position: Any) -> Any:
    """A `Feed.position` as JSON, with a hash of the batches that were read last."""
    if position is None:
        return None
    after, before, count, read, shapes = position
    return {"after": after, "before": before, "count": count, "digest": digest(read), "shapes": shapes}
