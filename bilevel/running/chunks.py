"""Many outer steps on the device at once, and the metrics that come back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import Batches, FullBatch, Indexed, Shuffled
from bilevel.differentiation.tracing import evaluate_closed
from bilevel.problem.arguments import telling
from bilevel.solvers.base import Solver
from bilevel.solvers.states import checked_step
from bilevel.trees import as_arrays, is_inexact, is_key

CAPACITY = 512
"""Most steps between two returns to the host."""
BUFFER_BYTES = 2**24
"""Most device memory for the rows of metrics of these steps, unless one row alone is larger."""
DRAWN = 8192
"""Most batches of these steps, unless one step alone wants more: their shuffles are drawn at the start of a chunk."""


def chunk(
    solver: Any, record: Any, capacity: int, state: Any, data: Any, count: Any
) -> tuple[Any, dict[str, jax.Array], jax.Array]:
    """`(state, rows, holes)` after `count` steps from `state`.

    Args:
      solver: the solver.
      record: as for `run`.
      capacity: most steps of a chunk; there are fewer, `len(rows[name])`, where rows are large.
      state: of the solver; or a stack of states, those of several runs, with one key each in `data`.
      data: `(source, key)` for the inner and the outer loss.
      count: how many steps, traced.

    Returns:
      The state; name -> rows of metrics, of which the first `count` are meant; and for each inexact leaf of the state
      how many of its entries are not finite, and how many are NaN, `[leaves, 2]`. Of a stack of runs, rows have the
      axis of runs behind that of steps, and the counts have it first.

    Examples:
      >>> import bilevel, jax
      >>> from bilevel.extend import chunk
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.SOBA(problem, inner_step=0.5, outer_step=1.0)
      >>> inner_key, outer_key, key = jax.random.split(jax.random.key(0), 3)
      >>> data = (bilevel.FullBatch(train), inner_key), (bilevel.FullBatch(val), outer_key)
      >>> state, rows, holes = chunk(solver, None, 8, solver.init(key), data, 3)
      >>> int(state.step), rows["outer_loss"].shape, int(holes.sum())  # 3 of at most 8 steps, every number finite
      (3, (8,), 0)
    """
    if getattr(solver, "driven_from_host", False):
        return _by_hand(solver, record, state, data, int(count))
    return compiled(solver, record, capacity, state, data, count)


def _by_hand(solver, record, state, data, count):
    """As `chunk`, of a solver whose steps cannot be part of a compiled program."""
    rows = []
    for _ in range(count):
        state, metrics = step(solver, state, data)
        rows.append(metrics | (recorded(record, state, metrics) if record else {}))
    return state, {name: jnp.stack([row[name] for row in rows]) for name in (rows[0] if rows else {})}, _holes(state)


@partial(jax.jit, static_argnums=(1, 2))
def compiled(solver, record, capacity, state, data, count):
    """`chunk` as one program."""
    sharding = getattr(solver.problem, "sharding", None)
    one = partial(_program, solver, record, capacity)
    if jnp.ndim(state.step) == 0:
        state, *results = one(state, data, count)
    else:
        # Runs of a stack share settings and data. What is pinned inside is pinned of each run; the axis of the runs
        # goes over the mesh axes `keys`.
        axes = (0, [(None, 0)] * len(data), None)
        over = sharding.keys if sharding else None
        state, rows, holes = jax.vmap(one, in_axes=axes, spmd_axis_name=over)(state, data, count)
        results = {name: jnp.moveaxis(row, 0, 1) for name, row in rows.items()}, holes
    return state, *(results if sharding is None else sharding.pin_results(results))


def _program(solver, record, capacity, state, data, count):
    """`compiled`, of one run."""
    # Once a chunk: a call of the generator at every step would cost more than the gradient of a small problem.
    data = [
        (source.shuffle(key, state.step * wanted, capacity * wanted), key) if isinstance(source, Batches) else feed
        for feed, (source, key), wanted in zip(data, data, wanted_batches(solver), strict=True)
    ]

    sharding = getattr(solver.problem, "sharding", None)

    def one(state):
        state, metrics = step(solver, state, data)
        # Each step ends where the next begins, and the last where the next chunk does.
        state = state if sharding is None else sharding.pin_state(state)
        return state, metrics | (recorded(record, state, metrics) if record else {})

    # The step is traced once, here: its shapes size the buffers, its jaxpr is the body of the loop.
    body_jaxpr, shapes = jax.make_jaxpr(one, return_shape=True)(state)
    rows = jax.eval_shape(_packed, shapes[1])
    row_bytes = sum(row.size * row.dtype.itemsize for row in rows.values())
    capacity = max(1, min(capacity, BUFFER_BYTES // max(row_bytes, 1)))
    buffer = jax.tree.map(lambda row: jnp.zeros((capacity, *row.shape), row.dtype), rows)

    def body(i, carry):
        state, buffer = carry
        leaves = evaluate_closed(body_jaxpr, *jax.tree.leaves(state))
        state, metrics = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
        write = partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        return state, jax.tree.map(write, buffer, _packed(metrics))

    state, buffer = jax.lax.fori_loop(0, count, body, (state, buffer))
    state = state if sharding is None else sharding.pin_state(state)
    return state, jax.vmap(partial(_unpacked, shapes[1]))(buffer), _holes(state)


def chunk_capacity(solver: Solver) -> int:
    """`capacity` of a solver's chunks.

    Nothing but the solver decides: programs that differ in it may differ in a last bit, and a run must not depend on
    how far it goes at once, or on who looks.
    """
    return max(1, min(CAPACITY, DRAWN // max(1, *wanted_batches(solver))))


def _holes(state):
    leaves = [leaf for leaf in jax.tree.leaves(state) if is_inexact(leaf)]
    # An infinity from the start may be meant (a mask); a NaN that comes of it is none.
    holes = [[jnp.sum(hole, dtype=jnp.int32) for hole in (~jnp.isfinite(x), jnp.isnan(x))] for x in leaves]
    return jnp.asarray(holes or [[0, 0]], jnp.int32)


def _packed(metrics):
    """One vector a dtype: to write each metric by itself takes as long as a gradient of a small problem."""
    vectors: dict[str, list[jax.Array]] = {}
    for leaf in jax.tree.leaves(metrics):
        vectors.setdefault(str(leaf.dtype), []).append(leaf.ravel())
    return {dtype: jnp.concatenate(parts) for dtype, parts in vectors.items()}


def _unpacked(like, vectors):
    """Undoes `_packed`, for metrics of the shapes of `like`."""
    ends = dict.fromkeys(vectors, 0)

    def take(leaf):
        start, ends[str(leaf.dtype)] = ends[str(leaf.dtype)], ends[str(leaf.dtype)] + leaf.size
        return vectors[str(leaf.dtype)][start : start + leaf.size].reshape(leaf.shape)

    return jax.tree.map(take, like)


def step(solver, state, data):
    """Takes one step of `solver`, on the batches that belong to the number of that step."""
    return checked_step(solver, state, solver.step(state, *batches(solver, state, data)))


def wanted_batches(solver):
    """Batches an outer step, from the inner and from the outer data."""
    return solver.inner_batches_per_step, solver.outer_batches_per_step


def batches(solver, state, data):
    """`(inner_batches, outer_batch)` of the step that `state` is before, as `Solver.step` takes them."""
    found = []
    for (source, key), wanted in zip(data, wanted_batches(solver), strict=True):
        if isinstance(source, Batches):
            source = source.shuffle(key, state.step * wanted, wanted)
        found.append(source.take(state.step * wanted, wanted) if isinstance(source, Shuffled) else source)
    inner, outer = found
    single = solver.outer_batches_per_step == 1
    if single and isinstance(outer, Indexed):
        outer = outer.batch(0)
    elif single and outer is not None and not isinstance(outer, FullBatch):
        outer = jax.tree.map(lambda x: x[0], outer)
    return inner, outer


class History:
    """Rows of metrics on the host, in memory that grows with the rows there are."""

    def __init__(self, rows: Mapping[str, np.ndarray] | None = None):
        self._arrays: dict[str, np.ndarray] = dict(rows or {})
        self._count = len(next(iter(self._arrays.values()))) if self._arrays else 0

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Mapping[str, Any], count: int) -> None:
        """Adds a copy of the first `count` of `rows`.

        Raises:
          ValueError: if they are not of the names, shapes and dtypes of those before.
        """
        new = {name: np.asarray(value)[:count] for name, value in rows.items()}
        if not self._arrays:
            self._arrays = {name: np.empty((0, *value.shape[1:]), value.dtype) for name, value in new.items()}
        if (now := _rows_of(new)) != (before := _rows_of(self._arrays)):
            raise ValueError(
                f"The rows of metrics are {now}, but those of the checkpoint are {before}: use the solver and `record` "
                "that it was written with, or another checkpoint_dir."
            )
        end = self._count + count
        for name, value in new.items():
            array = self._arrays[name]
            if len(array) < end:
                array = np.empty((max(end, len(array) * 3 // 2), *value.shape[1:]), value.dtype)
                array[: self._count] = self._arrays[name][: self._count]
                self._arrays[name] = array
            array[self._count : end] = value
        self._count = end

    def rows(self, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
        """The rows from number `start` to `stop - 1`, or to the last."""
        stop = self._count if stop is None else stop
        return {name: array[start:stop] for name, array in self._arrays.items()}


def kinds(metrics: Mapping[str, Any]) -> str:
    """Names, dtypes and shapes of the metrics of a step."""
    return ", ".join(f"{n} {metrics[n].dtype}{list(metrics[n].shape)}" for n in sorted(metrics)) or "none"


def _rows_of(rows: Mapping[str, np.ndarray]) -> str:
    return kinds({name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in rows.items()})


def recorded(record: Any, state: Any, metrics: dict[str, Any]) -> dict[str, jax.Array]:
    """What `record` says of `state`, as arrays.

    Raises:
      ValueError: if it is no dict of arrays and numbers by name, or a name is that of a metric.
    """
    with telling("tracing record(state)"):
        rows = record(state)
    wanted = "but must return {name: array}"
    if not isinstance(rows, dict) or not all(isinstance(name, str) for name in rows):
        raise ValueError(f"run(record=...): record returned a {type(rows).__name__}, {wanted}.")
    for name, value in rows.items():
        if not isinstance(value, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
            raise ValueError(
                f"run(record=...): record returned {'None' if value is None else f'a {type(value).__name__}'} as "
                f"{name!r}, {wanted}, one array or number for each name."
            )
        if is_key(value):
            raise ValueError(
                f"run(record=...): record returned random keys as {name!r}, {wanted}: record jax.random.key_data(keys)."
            )
    if taken := sorted(set(rows) & set(metrics)):
        raise ValueError(f"run(record=...): {', '.join(taken)} is a metric of the solver: record it by another name.")
    return as_arrays(rows, "run(record=...): record returned")
