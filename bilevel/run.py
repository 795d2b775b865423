"""The host loop around any solver: data, progress, metrics, checkpoints, callbacks, early stop."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from bilevel.calls import check_run
from bilevel.checkpoints import Checkpoints
from bilevel.data import Batches, FullBatch, Indexed, Shuffled, columns, rows, slots
from bilevel.diagnosis import STEEP, describe_failure, steep_leaves
from bilevel.guards import EXACTNESS, SteepUpdateWarning, warn_if_inexact
from bilevel.progress import Callback, Progress
from bilevel.refusals import refuse_captured, traced_losses
from bilevel.solvers.base import Solver, outer_batches
from bilevel.trees import PyTree

CHUNK_SECONDS = 1.0
"""Device time between two returns to the host."""
CAPACITY = 512
"""Most steps between two returns to the host."""


class Result(NamedTuple):
    """What a run found.

    Attributes:
      outer: the outer variable.
      inner: the state of the inner problem (`InnerState`, or the solver's own).
      history: name -> array with one row a step.
      state: the solver's whole state, to continue from.
    """

    outer: PyTree
    inner: Any
    history: dict[str, np.ndarray]
    state: Any


def run(
    solver: Solver,
    *,
    inner_data: Any = None,
    outer_data: Any = None,
    steps: int,
    key: jax.Array | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: float = 60.0,
    record: Callable[[Any], dict[str, Any]] | None = None,
    title: str = "outer steps",
) -> Result:
    """`steps` outer iterations of `solver`.

    Steps run on the device in chunks of about a second; the compiled step is traced once. Batches are a function of the
    step number, so that a run that was killed and resumed equals one that was not, bit for bit.

    Args:
      solver: any `Solver`.
      inner_data, outer_data: `Batches(arrays, size)` for mini-batches; arrays, or a `datasets.Dataset` (whose columns
        are then a dict), for the full batch at every step; an iterator of batches (`solver.inner_batches` or
        `outer_batches` of them an outer step), which a run can only be resumed from if it has `get_state() -> JSON` and
        `set_state`; None where the loss reads no batch.
      steps: outer iterations in all, resumed ones included.
      key: randomness of the run; None is `jax.random.key(0)`.
      progress: whether to show progress on stderr.
      callbacks: called as `callback(step, state, metrics)` between chunks; a true return value stops the run.
      checkpoint_dir: folder to save the state in, now and then and at the end, and to resume from.
      checkpoint_every: least seconds between two checkpoints.
      record: `record(state) -> {name: array}`, computed after every step and added to the history.
      title: what the progress display calls the run.

    Warns:
      InexactHypergradientWarning: if an implicit estimator's last point was not trained or its system not solved.
      SteepUpdateWarning: if a hypergradient is enormous because an inner gradient that is exactly 0 depends on `outer`
        and the optimizer (Adam) divides it by its own size; names the leaf.

    Raises:
      ValueError: for steps < 1, a negative `checkpoint_every`, unusable data, or a loss that captured the outer
        variable instead of reading it.
      FloatingPointError: if a metric is not finite; names the step, and the inner step and leaf where it began.
    """
    check_run("run", **locals())
    key = jax.random.key(0) if key is None else key
    solver_key, inner_key, outer_key = jax.random.split(key, 3)
    feeds = _Feed.of("inner_data", inner_data, inner_key), _Feed.of("outer_data", outer_data, outer_key)
    state = solver.init(solver_key)
    history: list[dict[str, np.ndarray]] = []
    store = Checkpoints(checkpoint_dir) if checkpoint_dir is not None else None
    if store and (latest := store.latest()) is not None:
        state, history = _restore(store, latest, state, feeds)
    saved = time.monotonic()
    done, count, capacity = int(state.step), 1, min(CAPACITY, steps)
    if any(feed.is_iterator for feed in feeds):
        capacity = 1
    positions, looked = [feed.position() for feed in feeds], False
    try:
        with Progress(title, steps, start=done, show=progress) as display:
            while done < steps:
                begun = time.monotonic()
                count = min(count, steps - done, capacity)
                data = [feed.next(n, done) for feed, n in zip(feeds, _wanted(solver), strict=True)]
                if not history:
                    _refuse_captured(solver, state, data)
                new, buffer = _chunk(solver, record, capacity, state, data, count)
                rows_ = {name: np.asarray(value)[:count] for name, value in buffer.items()}
                _check_finite(solver, record, state, data, rows_, done)
                looked = looked or _warn_if_steep(solver, record, capacity, state, data, rows_)
                # All at once, after the device is done: an interrupt or a failure before leaves what was done before.
                history.append(rows_)
                state, done, positions = new, done + count, [feed.position() for feed in feeds]
                elapsed = time.monotonic() - begun
                count = max(1, min(2 * count, round(count * CHUNK_SECONDS / max(elapsed, 1e-9))))
                shown = {n: float(v[-1]) for n, v in rows_.items() if v.ndim == 1 and not _is_count(v)}
                display.advance(done, shown)
                stop = [bool(callback(done, state, rows_)) for callback in callbacks]
                if store and time.monotonic() - saved >= checkpoint_every:
                    _save(store, done, state, history, positions)
                    saved = time.monotonic()
                if any(stop):
                    break
    finally:
        # An interrupt keeps what is done.
        if store and history and store.latest() != done:
            _save(store, done, state, history, positions)
    if history:
        warn_if_inexact({name: history[-1][name][-1] for name in EXACTNESS if name in history[-1]})
    return Result(state.outer, state.inner, _concatenate(history), state)


class _Feed:
    """Where the batches of one loss come from."""

    def __init__(self, source: Any, key: jax.Array, is_iterator: bool):
        self.source, self.key, self.is_iterator = source, key, is_iterator

    @classmethod
    def of(cls, name: str, data: Any, key: jax.Array) -> _Feed:
        if data is None or isinstance(data, (Batches, FullBatch)):
            return cls(jax.tree.map(jnp.asarray, data), key, False)  # on the device once, not at each chunk
        if isinstance(data, Iterator):
            return cls(data, key, True)
        try:
            arrays = jax.tree.map(jnp.asarray, columns(data))
            rows(arrays)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} is a {type(data).__name__} that is neither Batches, arrays, an iterator nor None: {error}"
            ) from None
        return cls(FullBatch(arrays), key, False)

    def position(self) -> Any:
        """Where an iterator stands, if it can tell."""
        return self.source.get_state() if self.is_iterator and hasattr(self.source, "get_state") else None

    def move(self, position: Any) -> None:
        """Puts an iterator where `position` says."""
        if self.is_iterator:
            self.source.set_state(position)

    def next(self, count: int, step: int) -> tuple[Any, jax.Array]:
        """`(source, key)` for a chunk that starts at outer step `step`; an iterator is read `count` times."""
        if not self.is_iterator:
            return self.source, self.key
        batches = []
        for _ in range(count):
            try:
                batches.append(next(self.source))
            except StopIteration:
                raise ValueError(
                    f"The data iterator ended at outer step {step}: give one that repeats, or run fewer steps."
                ) from None
        return jax.tree.map(lambda *xs: jnp.stack(xs), *batches), self.key


@partial(jax.jit, static_argnums=(1, 2))
def _chunk(solver, record, capacity, state, data, count):
    """`count` steps on the device; rows of metrics in buffers of `capacity` rows."""
    # Once a chunk: a call of the generator at every step would cost more than the gradient of a small problem.
    data = [
        (source.shuffle(key, state.step * wanted, capacity * wanted), key) if isinstance(source, Batches) else feed
        for feed, (source, key), wanted in zip(data, data, _wanted(solver), strict=True)
    ]

    def one(state):
        state, metrics = _step(solver, state, data)
        return state, metrics | (record(state) if record else {})

    # The step is traced once, here: its shapes size the buffers, its jaxpr is the body of the loop.
    step, shapes = jax.make_jaxpr(one, return_shape=True)(state)
    rows = jax.eval_shape(_packed, shapes[1])
    buffer = jax.tree.map(lambda row: jnp.zeros((capacity, *row.shape), row.dtype), rows)

    def body(i, carry):
        state, buffer = carry
        leaves = jaxpr_as_fun(step)(*jax.tree.leaves(state))
        state, metrics = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
        write = partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        return state, jax.tree.map(write, buffer, _packed(metrics))

    state, buffer = jax.lax.fori_loop(0, count, body, (state, buffer))
    return state, jax.vmap(partial(_unpacked, shapes[1]))(buffer)


def _packed(metrics):
    """One vector a dtype: to write each metric by itself takes as long as a gradient of a small problem."""
    vectors: dict[str, list[jax.Array]] = {}
    for leaf in jax.tree.leaves(metrics):
        vectors.setdefault(str(leaf.dtype), []).append(leaf.ravel())
    return {dtype: jnp.concatenate(parts) for dtype, parts in vectors.items()}


def _unpacked(like, vectors):
    """The inverse of `_packed`, for metrics like `like`."""
    ends = dict.fromkeys(vectors, 0)

    def take(leaf):
        start, ends[str(leaf.dtype)] = ends[str(leaf.dtype)], ends[str(leaf.dtype)] + leaf.size
        return vectors[str(leaf.dtype)][start : start + leaf.size].reshape(leaf.shape)

    return jax.tree.map(take, like)


def _step(solver, state, data):
    return solver.step(state, *_batches(solver, state, data))


def _refuse_captured(solver, state, data):
    def seen(state, data):
        inner, outer = _batches(solver, state, data)
        if (wanted := outer_batches(solver)) > 1:
            xs, bind = slots(outer, wanted, "outer calls")
            outer = bind(jax.tree.map(lambda x: x[0], xs))
        return inner, outer

    inner, outer = jax.eval_shape(seen, state, data)
    params = getattr(state.inner, "params", None)
    losses = traced_losses(solver.problem, params, state.outer, inner, outer, state.key, solver.inner_batches)
    refuse_captured(losses, state.outer)


def _wanted(solver):
    """Batches an outer step, from the inner and from the outer data."""
    return solver.inner_batches, outer_batches(solver)


def _batches(solver, state, data):
    found = []
    for (source, key), wanted in zip(data, _wanted(solver), strict=True):
        if isinstance(source, Batches):
            source = source.shuffle(key, state.step * wanted, wanted)
        found.append(source.take(state.step * wanted, wanted) if isinstance(source, Shuffled) else source)
    inner, outer = found
    single = outer_batches(solver) == 1
    if single and isinstance(outer, Indexed):
        outer = outer.batch(0)
    elif single and outer is not None and not isinstance(outer, FullBatch):
        outer = jax.tree.map(lambda x: x[0], outer)
    return inner, outer


def _is_count(values):
    return np.issubdtype(values.dtype, np.integer)


def _check_finite(solver, record, before, data, rows_, done):
    numbers = {n: v for n, v in rows_.items() if np.issubdtype(v.dtype, np.inexact)}
    bad = [
        int(np.argmin(np.isfinite(v.reshape(len(v), -1)).all(1))) for v in numbers.values() if not np.isfinite(v).all()
    ]
    if not bad:
        return
    state, norms = before, ""
    if min(bad):
        state, _ = _chunk(solver, record, len(next(iter(rows_.values()))), before, data, min(bad))
        norms = ", ".join(f"{n} was {v[min(bad) - 1]:.3g}" for n, v in numbers.items() if v.ndim == 1)
    raise FloatingPointError(describe_failure(solver, state, partial(_step, data=data), done + min(bad), norms))


def _warn_if_steep(solver, record, capacity, before, data, rows_) -> bool:
    """Whether a hypergradient was so large that it was looked into; with a warning if it was for a steep update."""
    norms = rows_.get("hypergradient_norm", np.zeros(1))
    if not np.max(norms) > STEEP:
        return False
    at, state = int(np.argmax(norms > STEEP)), before
    if at:
        state, _ = _chunk(solver, record, capacity, before, data, at)
    if names := steep_leaves(solver, state, partial(_step, data=data)):
        warnings.warn(
            f"The hypergradient has norm {norms[at]:.2g}: the inner gradient of {', '.join(names)} is exactly 0 at the "
            "start but depends on outer, and there the optimizer's update has a slope of about 1 / eps; start training "
            "elsewhere, or give the optimizer a larger eps (as in optax.adam(rate, eps=1e-3)).",
            SteepUpdateWarning,
            stacklevel=3,
        )
    return True


def _concatenate(history):
    return {name: np.concatenate([rows_[name] for rows_ in history]) for name in history[0]} if history else {}


def _save(store, step, state, history, positions):
    store.save(step, state, _concatenate(history), positions)


def _restore(store, step, state, feeds):
    state, history, positions = store.restore(step, state)
    for feed, position in zip(feeds, positions, strict=True):
        if feed.is_iterator and (position is None or not hasattr(feed.source, "set_state")):
            raise ValueError(
                "The run cannot be resumed exactly from a plain iterator: pass Batches(arrays, size), arrays, or an "
                "iterator with get_state and set_state."
            )
        feed.move(position)
    return state, [history]
