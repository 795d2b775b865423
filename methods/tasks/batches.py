"""Batches of rows of similar length, so that little of what a model computes is padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

POOL = 50
"""Batches whose rows are sorted by length together: enough to be alike, few enough to stay random."""


class Buckets:
    """Endless training batches for `bilevel.run`, each cut to the length its longest row needs.

    Epoch e is a permutation of the rows by (seed, e). Stretches of `pool * size` of them are sorted by length and cut
    into batches, whose order is shuffled; `N mod size` rows wait for another epoch. A batch's length is the next
    multiple of `multiple`: as many shapes, and so many compilations. Batch number b is a function of (seed, b) alone,
    so that a run resumes exactly from its number.

    Args:
      arrays: a batch of all rows (`TokenBatch`, `LabelledBatch`, `ChoiceBatch`): `mask` `[N, T]` or `[N, C, T]`, other
        arrays likewise or `[N]`.
      size: rows a batch, `1 <= size <= N`.
      seed: of the order.
      multiple: of a batch's length.
      pool: batches whose rows are sorted by length together; 1 sorts nothing into batches.

    Raises:
      ValueError: for a size that is not in `[1, N]`.
    """

    def __init__(self, arrays: Any, size: int, *, seed: int = 0, multiple: int = 32, pool: int = POOL):
        self.arrays = type(arrays)(*(np.asarray(a) for a in arrays))
        self.lengths = row_lengths(self.arrays.mask)
        if not 1 <= size <= len(self.lengths):
            raise ValueError(f"Buckets of {size} rows: a batch must have between 1 and the {len(self.lengths)} rows.")
        self.size, self.seed, self.multiple, self.pool, self.number = size, seed, multiple, pool, 0
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty((0, size), int))

    def __iter__(self) -> Buckets:
        return self

    def __next__(self) -> Any:
        rows, self.number = self.rows(self.number), self.number + 1
        longest = int(self.lengths[rows].max())
        return cut(self.arrays, rows, min(-(-longest // self.multiple) * self.multiple, self.arrays.mask.shape[-1]))

    def rows(self, number: int) -> np.ndarray:
        """The rows of batch `number`, `[size]`."""
        epoch, at = divmod(number, len(self.lengths) // self.size)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][at]

    def get_state(self) -> int:
        """The number of the next batch."""
        return self.number

    def set_state(self, number: int) -> None:
        """Goes on with batch `number`."""
        self.number = int(number)

    def _order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        count = len(self.lengths) // self.size
        order = rng.permutation(len(self.lengths))[: count * self.size]
        pools = np.split(order, range(self.pool * self.size, len(order), self.pool * self.size))
        alike = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        return alike.reshape(count, self.size)[rng.permutation(count)]


class Cycled:
    """Endless batches of `size` rows for `bilevel.run`, in the order of the rows and over again: no row is skipped.

    Batch b has the rows b size, ..., b size + size - 1, each modulo N, so that a run resumes exactly from its number.

    Args:
      arrays: a batch of all rows (`TokenBatch`, `LabelledBatch`, `ChoiceBatch`).
      size: rows a batch.

    Raises:
      ValueError: for a size that is not in `[1, N]`.
    """

    def __init__(self, arrays: Any, size: int):
        self.arrays = type(arrays)(*(np.asarray(a) for a in arrays))
        self.count = len(self.arrays[0])
        if not 1 <= size <= self.count:
            raise ValueError(f"Cycled batches of {size} rows: a batch must have between 1 and the {self.count} rows.")
        self.size, self.number = size, 0

    def __iter__(self) -> Cycled:
        return self

    def __next__(self) -> Any:
        rows = (self.number * self.size + np.arange(self.size)) % self.count
        self.number += 1
        return type(self.arrays)(*(a[rows] for a in self.arrays))

    def get_state(self) -> int:
        """The number of the next batch."""
        return self.number

    def set_state(self, number: int) -> None:
        """Goes on with batch `number`."""
        self.number = int(number)


Watch = Callable[[Sequence[tuple[np.ndarray, int]]], Iterable[tuple[np.ndarray, int]]]
"""What batches of `by_length` are drawn through, such as a progress bar."""


def by_length(lengths: Any, size: int, multiple: int, most: int) -> list[tuple[np.ndarray, int]]:
    """Every row once, in batches of one padded length: `(rows, length)`, the longest first.

    Args:
      lengths: tokens of each row `[N]`.
      size: most rows a batch.
      multiple: lengths are padded to one, but never beyond `most`.
      most: longest a batch may be.
    """
    padded = np.minimum(-(-np.asarray(lengths) // multiple) * multiple, most)
    batches = []
    for length in sorted(set(padded.tolist()), reverse=True):  # what runs out of memory does so at once
        members = np.flatnonzero(padded == length)
        batches += [(members[at : at + size], length) for at in range(0, len(members), size)]
    return batches


def cut(batch: Any, rows: np.ndarray, length: int) -> Any:
    """Those rows of a batch, its arrays `[N, T]` cut to `[rows, length]`, those `[N, C, T]` to `[rows, C, length]`."""
    return type(batch)(*(a[rows, ..., :length] if a.ndim > 1 else a[rows] for a in batch))


def row_lengths(mask: np.ndarray) -> np.ndarray:
    """Tokens of each row `[N]`; of a row with choices, `[N, C, T]`, those of its longest."""
    lengths = mask.sum(axis=-1)
    return lengths if lengths.ndim == 1 else lengths.max(axis=1)
