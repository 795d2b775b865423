"""Batches: what an inner step and an outer step are given, without copying the data.

An estimator takes `inner_batches` in one of four forms. A pytree of arrays leads with an axis of length `steps`, one
slice an inner step. `Indexed(arrays, index)` holds the data once and an `index[steps, size]`; the step gathers its
rows itself. `FullBatch(arrays)` is the same whole data at every step. `None` is for losses that need no batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.settings.fields import check_fields, register, setting, shown, signature
from bilevel.settings.numeric import integer
from bilevel.settings.rules import boolean, one_of
from bilevel.trees import PyTree, in_leaf, is_steady, leaf_names, unlike_array

Order = Literal["rows", "blocks"]


@register
@dataclasses.dataclass(frozen=True)
class Indexed:
    """Rows `index` of `arrays`: a batch (`index[size]`) or `steps` batches (`index[steps, size]`), not yet gathered.

    Attributes:
      arrays: pytree of arrays with a common leading axis of length N.
      index: integers in `[0, N)`.
      contiguous: whether the rows of each batch follow each other, so that a slice does instead of a gather.

    Examples:
      >>> import bilevel, jax
      >>> from bilevel.extend import resolve
      >>> rows = jax.numpy.array([10.0, 20.0, 30.0])
      >>> batch = bilevel.Indexed(rows, jax.numpy.array([2, 0]))
      >>> resolve(batch).tolist()
      [30.0, 10.0]
    """

    arrays: PyTree
    index: jax.Array
    contiguous: bool = dataclasses.field(default=False, metadata=setting(boolean))

    def __post_init__(self):
        check_fields(self)
        kind = getattr(self.index, "dtype", None)
        if kind is None or not jnp.issubdtype(kind, jnp.integer):
            raise ValueError(f"Indexed(index={shown(self.index)}): must be an array of integers, the rows.")
        if isinstance(self.index, Tracer) or not np.size(self.index):
            return
        as_data("Indexed", self.arrays)
        low, high, count = int(np.min(self.index)), int(np.max(self.index)), rows(self.arrays)
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise ValueError(f"Indexed(index=...) holds the row {wrong}, but the arrays have {count} rows.")

    def batch(self, which: Any) -> Indexed:
        """The batches `index[which]`."""
        return dataclasses.replace(self, index=self.index[which])


@register
@dataclasses.dataclass(frozen=True)
class FullBatch:
    """The whole of `arrays`, or the columns of a `datasets.Dataset`, as the batch of every step.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20)  # each of the 20 steps sees all rows
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> round(float(estimate.grad), 3)
      0.143
    """

    arrays: PyTree

    _hint = ", where arrays that belong together are one tree, FullBatch((x, y))"

    def __post_init__(self):
        object.__setattr__(self, "arrays", as_data("FullBatch", self.arrays))


def resolve(batch: PyTree) -> PyTree:
    """The arrays a loss sees: an `Indexed` is gathered, a `FullBatch` opened, anything else left as it is.

    Examples:
      >>> import bilevel, jax
      >>> from bilevel.extend import resolve
      >>> rows = jax.numpy.array([10.0, 20.0, 30.0])
      >>> resolve(bilevel.Indexed(rows, jax.numpy.array([2, 0]))).tolist()
      [30.0, 10.0]
      >>> resolve(bilevel.FullBatch(rows)).tolist()
      [10.0, 20.0, 30.0]
    """
    if isinstance(batch, Indexed) and batch.contiguous:
        start, size = batch.index[0], len(batch.index)
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), batch.arrays)
    if isinstance(batch, Indexed):
        return jax.tree.map(lambda a: jnp.take(a, batch.index, axis=0), batch.arrays)
    if isinstance(batch, FullBatch):
        return batch.arrays
    return batch


def slots(batches: PyTree, steps: int, what: str = "inner steps") -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """`(xs, bind)`: what a scan over `steps` slices, and the batch that a slice stands for.

    Raises:
      ValueError: if a leading axis is not `steps` long.
    """
    if isinstance(batches, FullBatch):
        return None, lambda x: batches
    refuse_sources(f"The {what.split()[0]} batches", batches)
    xs = batches.index if isinstance(batches, Indexed) else batches
    for name, leaf in zip(leaf_names(xs), jax.tree.leaves(xs), strict=True):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != steps:
            raise ValueError(
                f"{what.split()[0]}_batches leaf {name} has shape {jnp.shape(leaf)}, but {steps} {what} need a leading "
                f"axis of {steps}: stack one batch a step, or pass FullBatch(arrays) for the same data at every step."
            )
    if isinstance(batches, Indexed):
        return xs, lambda x: dataclasses.replace(batches, index=x)
    return xs, lambda x: x


def narrow(batches: PyTree, start: int, stop: int) -> PyTree:
    """Cuts the batches of inner steps `start` to `stop - 1` out of those of all steps."""
    if isinstance(batches, FullBatch):
        return batches
    if isinstance(batches, Indexed):
        return batches.batch(slice(start, stop))
    return jax.tree.map(lambda x: x[start:stop], batches)


def columns(data: Any) -> PyTree:
    """The columns of a `datasets.Dataset`, a dict of NumPy arrays of the types it has; anything else as it is.

    Raises:
      ValueError: for a column that is no array (text, lists of different lengths, missing values), by name.
    """
    # Known by what it can do: the engine does not import datasets.
    whole: Any = data
    if isinstance(whole, dict) and (sets := [name for name, x in whole.items() if hasattr(x, "with_format")]):
        raise ValueError(
            f"A {type(data).__name__} of {', '.join(map(repr, sets))} is several data sets: give one of them, as in "
            f"data[{sets[0]!r}]."
        )
    if not (hasattr(data, "with_format") and hasattr(data, "features")):
        return data
    if not hasattr(data, "num_rows"):
        raise ValueError(
            "A streamed data set has no rows to sample from: pass an iterator of batches, or load it without streaming."
        )
    names = data.format["columns"]
    # The NumPy format would round to float32.
    table = data.with_format("arrow", columns=names)[:]
    return {name: _column(name, table.column(name).combine_chunks()) for name in names}


def _column(name: str, values: Any) -> np.ndarray:
    shape, values = [len(values)], getattr(values, "storage", values)
    while hasattr(values, "flatten") and hasattr(values.type, "value_type"):  # lists
        if hasattr(values, "offsets"):
            lengths = set(np.diff(np.asarray(values.offsets)).tolist())
        else:
            lengths = {values.type.list_size}
        if len(lengths) > 1:
            raise ValueError(
                f"Column {name!r} holds lists of different lengths: pad them, or drop it (select_columns)."
            )
        shape.append(lengths.pop() if lengths else 0)
        values = values.flatten()
    array = values.to_numpy(zero_copy_only=False)
    if values.null_count or array.dtype.kind not in "biuf":
        what = "missing values" if values.null_count else f"values of type {values.type}"
        raise ValueError(f"Column {name!r} holds {what}, which are no numbers: encode it, or drop it (select_columns).")
    return array.reshape(shape)


def as_data(what: str, data: Any) -> PyTree:
    """`data` as a tree of arrays that a loss may be given: `columns` of it.

    Raises:
      ValueError: in a sentence that `what` begins, for a list of batches, a leaf that is no array of numbers, or
        numbers that the enabled types do not hold; as `columns`.
    """
    sources = (Batches, FullBatch, Indexed, Shuffled)
    for x in jax.tree.leaves(data, is_leaf=lambda node: isinstance(node, sources)):
        if isinstance(x, sources):
            raise ValueError(f"{what} was given {type(x).__name__}, which is made of data: give the arrays themselves.")
    data = columns(data)
    for name, x in zip(leaf_names(data), jax.tree.leaves(data), strict=True):
        if isinstance(x, (bool, int, float, complex)):
            reason = f"the single number {x!r}, which is no row of data (make arrays: np.asarray(...))"
        else:
            reason = unlike_array(x)
        if reason is not None:
            raise ValueError(f"{what} was given {reason}{in_leaf(name)}.")
    refuse_list(what, data)
    return data


def check_batch(what: str, batch: PyTree) -> None:
    """Checks one batch that did not come from checked arrays: of an iterator, or of the caller of an estimator.

    Raises:
      ValueError: in a sentence that `what` begins, for a leaf that is no array and no number, numbers that the enabled
        types do not hold, or a list of numbers, each of which would be a leaf.
    """
    for name, x in zip(leaf_names(batch), jax.tree.leaves(batch), strict=True):
        if (reason := unlike_array(x)) is not None:
            raise ValueError(f"{what} holds {reason}{in_leaf(name)}.")

    def look(node):
        if isinstance(node, list) and node and all(isinstance(x, (bool, int, float, complex)) for x in node):
            raise ValueError(f"{what} holds a list of {len(node)} numbers, which is no array: make it np.asarray(...).")
        return False

    jax.tree.leaves(batch, is_leaf=look)


def refuse_list(what: str, data: Any) -> None:
    """Raises ValueError, in a sentence that `what` begins, for a list of batches where one tree of arrays is meant."""
    if not isinstance(data, list) or not data or jax.tree_util.all_leaves(data):
        return
    if len({jax.tree.structure(item) for item in data}) == 1:
        raise ValueError(
            f"{what} was given a list of {len(data)} batches, where one tree of arrays is meant: stack them, "
            "jax.tree.map(lambda *x: jnp.stack(x), *batches), or give run an iterator over them (where one tree is "
            "meant, make it a tuple)."
        )


def refuse_sources(what: str, batches: Any) -> None:
    """Raises ValueError for a source of batches, or a list of them, where the batches themselves are meant."""
    if isinstance(batches, (Batches, Shuffled)):
        raise ValueError(
            f"{what} are Batches, from which run draws: draw them here, batches.take(key, 0, steps), or one, "
            "batches.take(key, 0, 1).batch(0)."
        )
    if hasattr(batches, "__next__"):
        raise ValueError(f"{what} are an iterator, which only run reads: take from it what is needed, and stack it.")
    refuse_list(what, batches)


def draw(data: Any, key: jax.Array, first: Any, count: int) -> PyTree:
    """Batches number `first` to `first + count - 1` of `Batches`; anything else is the same data at every step."""
    if isinstance(data, Batches):
        return data.take(key, first, count)
    if data is None or isinstance(data, FullBatch):
        return data
    if hasattr(data, "__next__"):
        raise ValueError("Data are an iterator, which only run reads: give Batches(arrays, size), or arrays.")
    return FullBatch(jax.tree.map(jnp.asarray, as_data("The data", data)))


def draw_one(data: Any, key: jax.Array, number: Any) -> PyTree:
    """Batch `number` of `Batches`, without a leading axis; anything else as `draw`."""
    batches = draw(data, key, number, 1)
    return batches.batch(0) if isinstance(batches, Indexed) else batches


def rows(arrays: PyTree) -> int:
    """The common length of the leading axes of `arrays`.

    Raises:
      ValueError: if there is no array, an array is empty, or lengths differ.
    """
    leaves = jax.tree.leaves(arrays)
    lengths = {leaf.shape[0] if jnp.ndim(leaf) else 0 for leaf in leaves}
    if not leaves or 0 in lengths:
        raise ValueError("The data set is empty: every array needs a leading axis with at least one row.")
    if len(lengths) > 1:
        named = ", ".join(f"{n}: {jnp.shape(x)}" for n, x in zip(leaf_names(arrays), leaves, strict=True))
        raise ValueError(f"The arrays of a data set must have one row count, but have shapes {named}.")
    return lengths.pop()


@register
@dataclasses.dataclass(frozen=True)
class Batches:
    """Shuffled mini-batches of `size` rows, without replacement, drawn inside the compiled step.

    With `order="rows"` each epoch is a fresh pseudo-random permutation of the rows, cut into `N // size` batches (the
    remainder waits for another epoch). With `order="blocks"` the batches are fixed, `size` consecutive rows each, and
    only their order is shuffled: nothing is gathered, which is several times faster where a step takes microseconds.
    The rows must then be in no particular order, and where `size` does not divide N the last block overlaps the one
    before. Batch number `b` is a function of `key` and `b` alone, so a run resumes exactly from its step number.

    Args:
      arrays: pytree of arrays with a common leading axis of length N, or a `datasets.Dataset`, which is read once: a
        batch is then a dict of its columns.
      size: rows a batch, `1 <= size <= N`.
      order: `"rows"` or `"blocks"`.

    Raises:
      ValueError: for an empty data set, unequal lengths, a column that is no array, a size that is not in `[1, N]`, or
        an unknown order.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> result = bilevel.fit(
      ...     problem, jax.numpy.zeros(()), optimizer=optax.sgd(0.0), data=bilevel.Batches(train, 1), steps=4,
      ...     progress=False,
      ... )
      >>> sorted(result.history["inner_loss"].tolist())  # an epoch sees each of the four rows once
      [0.0, 0.0, 4.5, 4.5]
    """

    arrays: PyTree
    size: int = dataclasses.field(metadata=setting(integer(1)))
    order: Order = dataclasses.field(default="rows", kw_only=True, metadata=setting(one_of(*get_args(Order))))

    _hint = ", where arrays that belong together are one tree, Batches((x, y), size)"

    def __post_init__(self):
        if isinstance(self.arrays, int) and not hasattr(self.arrays, "shape"):
            raise ValueError(
                f"Batches({self.arrays}, ...): the number of rows comes second; it is {signature(Batches)}{self._hint}."
            )
        if getattr(self.size, "shape", ()) or isinstance(self.size, tuple | list | dict):
            raise ValueError(
                f"Batches(size={shown(self.size)}): must be an integer >= 1, the rows of a batch; it is "
                f"{signature(Batches)}{self._hint}."
            )
        object.__setattr__(self, "arrays", as_data("Batches", self.arrays))
        count = rows(self.arrays)
        check_fields(self)
        if self.size > count:
            raise ValueError(
                f"Batches(size={self.size}) on {count} rows: the batch size must be between 1 and the number of rows."
            )

    def take(self, key: jax.Array, first: Any, count: int) -> Indexed:
        """Batches number `first` to `first + count - 1` of the stream that `key` names: `index[count, size]`."""
        return self.shuffle(key, first, count).take(first, count)

    def shuffle(self, key: jax.Array, first: Any, count: int) -> Shuffled:
        """Draws what `take` needs for batches number `first` to `first + count - 1`, once for many calls of it."""
        per_epoch, epochs = self.per_epoch, min(count, (count - 1) // self.per_epoch + 2)
        start = jnp.asarray(first, jnp.uint32) // jnp.uint32(per_epoch)
        key, numbers = _as_threefry(key), start + jnp.arange(epochs, dtype=jnp.uint32)
        return Shuffled(self, start, jax.vmap(lambda e: _words(jax.random.fold_in(key, e)))(numbers))

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        n = rows(self.arrays)
        return -(-n // self.size) if self.order == "blocks" else n // self.size


@register
@dataclasses.dataclass(frozen=True)
class Shuffled:
    """`source` with the permutations of some epochs: `words[epochs, 2]`, from epoch number `start` on."""

    source: Batches
    start: jax.Array
    words: jax.Array

    def take(self, first: Any, count: int) -> Indexed:
        """Batches number `first` to `first + count - 1`, which must be among those that were asked for."""
        n, size, per_epoch = rows(self.source.arrays), self.source.size, self.source.per_epoch
        by_block = self.source.order == "blocks"
        number = jnp.asarray(first, jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
        epoch, offset = jnp.divmod(number, jnp.uint32(per_epoch))
        within = jnp.arange(size, dtype=jnp.uint32)[None]
        position = offset[:, None] if by_block else offset[:, None] * jnp.uint32(size) + within
        index = _permute(self.words[epoch - self.start], position, per_epoch if by_block else n)
        if by_block:
            index = jnp.minimum(index * jnp.uint32(size), jnp.uint32(n - size)) + within
        return Indexed(self.source.arrays, index.astype(jnp.int32), by_block)


ROUNDS = 24
"""Rounds of the pseudo-random permutation that shuffles rows. In each place of a batch, every row (and in each pair of
places every pair of rows) comes up equally often, up to about 2**-ROUNDS, however many rows there are."""


def _as_threefry(key: jax.Array) -> jax.Array:
    """`key`, or one of threefry made of its words: others draw other numbers in company than alone (`jax.vmap`).

    The epochs that are drawn together are those of a chunk of steps, which is as long as the machine is fast.
    """
    if is_steady(key):
        return key
    words = jnp.ravel(jax.random.key_data(key))
    start = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
    return functools.reduce(jax.random.fold_in, words[2:], start)


def _words(key: jax.Array) -> jax.Array:
    """The two random words that a permutation is computed from."""
    return jax.random.bits(key, (2,), jnp.uint32)


def _permute(words: jax.Array, index: jax.Array, n: int) -> jax.Array:
    """Images of `index[count, k]` under pseudo-random permutations of `0..n-1`, one a row of `words[count, 2]`.

    The swap-or-not shuffle (Hoang, Morris & Rogaway 2012): in round r, x and K_r - x mod n change places if a hash of
    the larger says so. A sort of all n rows a step, which `jax.random.permutation` needs, would cost more than the
    gradient of a small problem.
    """
    # All rounds' words at once, from two: a generator's call for each would cost more than the rounds.
    count = jnp.arange(1, ROUNDS + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    turns, salts = _hash(words[:, :1] + count[None]) % jnp.uint32(n), _hash(words[:, 1:] + count[None])

    def swap(index, drawn):
        turn, salt = drawn[0][:, None], drawn[1][:, None]
        other = jnp.where(index <= turn, turn - index, turn + (jnp.uint32(n) - index))
        return jnp.where(_hash(jnp.maximum(index, other) ^ salt) >> 31 == 1, other, index), None

    # A loop, not 24 rounds written out: XLA would fuse those into every reader of a batch and compute them again for
    # each entry it gathers, and LLVM's vectoriser takes exponential time over such a fusion.
    return jax.lax.scan(swap, index, (turns.T, salts.T))[0]


def _hash(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words without a visible pattern (the finaliser of MurmurHash3)."""
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(multiplier)
    return x ^ (x >> 16)
