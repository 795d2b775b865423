"""The host loop around any solver: data, progress, metrics, checkpoints, callbacks, early stop."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel.data import slots
from bilevel.differentiation.captures import forget_outdated, look_again
from bilevel.differentiation.influence import EXACTNESS, warn_if_inexact
from bilevel.differentiation.loss_checks import TracedLoss, refuse_captured, traced_losses, warn_if_misplaced
from bilevel.hypergradients.arguments import check_run
from bilevel.running.checkpoints import Checkpoints
from bilevel.running.chunks import History, batches, chunk, chunk_capacity, kinds, recorded, wanted_batches
from bilevel.running.diagnosis import refuse_failed, refuse_start
from bilevel.running.feeds import Feed
from bilevel.running.fingerprint import fingerprint
from bilevel.running.interrupts import Terminated, terminable, uninterrupted
from bilevel.running.programs import programs
from bilevel.running.progress import Callback, Progress
from bilevel.running.singular import undetermined
from bilevel.running.steep import warn_if_steep
from bilevel.running.unsteady import are_steady, refuse_changing, warn_if_swapped
from bilevel.settings import check_schedules, shown
from bilevel.solvers.base import Solver
from bilevel.solvers.states import check_counts, check_state
from bilevel.trees import Outer, is_key, replayed

CHUNK_SECONDS = 1.0
"""Device time between two returns to the host."""


class Result(NamedTuple):
    """What a run found.

    Attributes:
      outer: the outer variable.
      inner: the state of the inner problem (`InnerState`, or the solver's own).
      history: name -> array with one row a step.
      state: the solver's whole state, to continue from.

    Examples:
      >>> import bilevel
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.SOBA(problem, inner_step=0.5, outer_step=0.5)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=200, progress=False)
      >>> result.history["outer_loss"].shape, [round(float(w), 3) for w in result.inner.params]
      ((200,), [1.0, 1.0])
    """

    outer: Outer
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
    callback_every: int = 1,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: float = 60.0,
    record: Callable[[Any], dict[str, Any]] | None = None,
    title: str = "outer steps",
) -> Result:
    """`steps` outer iterations of `solver`.

    Steps run on the device in chunks of about a second; the compiled step is traced once. Batches, and the steps at
    which callbacks are called, are functions of the step number, so that a run on a slow machine equals one on a fast
    one, and a run that was killed and resumed equals one that was not, bit for bit.

    Args:
      solver: any `Solver`.
      inner_data, outer_data: `Batches(arrays, size)` for mini-batches; arrays, or a `datasets.Dataset` (whose columns
        are then a dict), for the full batch at every step; an iterator of batches (`solver.inner_batches_per_step` or
        `outer_batches_per_step` of them an outer step), which a run can only be resumed from if it has
        `get_state() -> JSON` and `set_state`; None where the loss reads no batch.
      steps: outer iterations in all, resumed ones included.
      key: randomness of the run; None is `jax.random.key(0)`.
      progress: whether to show progress on stderr.
      callbacks: called as `callback(step, state, metrics)` after every `callback_every` steps and after the last, with
        copies of the rows of metrics since they were last called; a true return value stops the run. If a run was
        interrupted before they had all returned, or stopped by one, it resumes by calling them again.
      callback_every: steps between two calls. A call makes the device wait: where a step takes microseconds, 100.
      checkpoint_dir: folder to save the state in, now and then and at the end, by Ctrl-C and SIGTERM too, and to
        resume from. It holds two checkpoints, and `fingerprint.json`: settings, losses, optimizers, data, key and
        versions, which a resumed run must share (callbacks, which look on, may be others). Without this file
        (delete it where a difference is meant, such as a newer JAX) a run is resumed unchecked, with a warning. What
        else lies there is left alone.
      checkpoint_every: least seconds between two checkpoints.
      record: `record(state) -> {name: array}`, computed after every step and added to the history.
      title: what the progress display calls the run.

    Warns:
      InexactHypergradientWarning: if an implicit estimator's last point was not trained or its system not solved.
      SteepUpdateWarning: if a hypergradient is enormous because an inner gradient that is exactly 0 depends on `outer`
        and the optimizer (Adam) divides it by its own size; names the leaf.
      RuntimeWarning: if a checkpoint cannot be written, or is damaged and the one before it is taken.

    Raises:
      ValueError: for steps < 1, a negative `checkpoint_every`, a schedule of the solver that leaves its range within
        `steps` (names the step and the value), unusable data, a loss that captured the outer variable instead of
        reading it, a function that is another at each call, a folder that cannot be written, or checkpoints of another
        run: names what differs.
      FloatingPointError: if a metric, a number of `record` or the state is not finite; names the step, the inner step
        and leaf where it began, and the leaf of outer whose last move did it.
      KeyboardInterrupt: by Ctrl-C, after a line on stderr on what is saved and how to go on; so does SIGTERM.

    Examples:
      >>> import math, bilevel, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.Nested(problem, bilevel.Unrolled(optax.sgd(0.5), steps=20), optax.sgd(1.0))
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=60, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """
    check_run("run", **locals())
    reads = forget_outdated(solver, record)
    key = jax.random.key(0) if key is None else key if is_key(key) else jax.random.wrap_key_data(key)
    solver_key, inner_key, outer_key = jax.random.split(key, 3)
    inner_title = getattr(solver, "data_title", "")
    feeds = (
        Feed.of("inner_data", inner_data, inner_key, steps, inner_title),
        Feed.of("outer_data", outer_data, outer_key, steps),
    )
    store = Checkpoints(checkpoint_dir) if checkpoint_dir is not None else None
    note = store.note(steps) if store else None
    state, done, history, due, called = solver.init(solver_key), 0, History(), False, 0
    check_state(solver, state)
    data = _first(solver, feeds, note)
    losses = _losses(solver, state, data)
    refuse_captured(losses, state.outer)
    anew = lambda: _losses(solver, state, data, anew=True)  # noqa: E731
    refuse_changing(reads, losses, anew, lambda: list(programs(solver, state, record)))
    warn_if_misplaced(losses, learned=getattr(solver, "learns_outer", True))
    warn_if_swapped(solver, losses, state.outer, replayed(state.key))
    rows_of = kinds(jax.eval_shape(lambda state: recorded(record, state, {}), state)) if record else "none"
    if store:
        store.claim(fingerprint(solver, key, state, losses, feeds, record), rows_of, note)
        if note:
            state, rows = store.restore(note["step"], state)
            done, history, due, called = note["step"], History(rows), note["due"], note["called"]
    check_schedules(solver, done, steps)

    every = callback_every if callbacks else steps
    capacity = 1 if any(feed.is_iterator for feed in feeds) else chunk_capacity(solver)
    count, room, written, saved = 1, 1, done, time.monotonic()
    positions, holes, looked, stop, earlier = [feed.position() for feed in feeds], None, False, False, None

    def call_back() -> bool:
        nonlocal called
        # Copies: what a callback writes into them is its own.
        rows = {name: rows.copy() for name, rows in history.rows(called, done).items()}
        if any([_truth(callback(done, state, rows)) for callback in callbacks]):
            return True
        called = done
        return False

    def save() -> None:
        nonlocal written
        if not store or done == written:
            return
        # An interrupt may have come between the rows of a step and its state; one that comes now waits until both the
        # checkpoint is whole and it is known here.
        with uninterrupted():
            rows = history.rows(0, done)
            if store.save(done, state, rows, positions, due=due, called=called, record=rows_of):
                written = done

    with terminable():
        interrupted = False
        try:
            # Interrupted before they had returned, or stopped by one: they are asked again.
            if due and callbacks:
                due = stop = call_back()
            display = Progress(title, steps, start=done, show=progress)
            if note and done == steps:
                display.already_finished()
            with display if done < steps else contextlib.nullcontext():
                while done < steps and not stop:
                    begun = time.monotonic()
                    # Chunks are as long as the machine is fast; callbacks see none of that.
                    count = min(count, steps - done, room, every - done % every)
                    if done or note:
                        data = [feed.next(n, done) for feed, n in zip(feeds, wanted_batches(solver), strict=True)]
                    if holes is None:  # no step: compiled, and what is not finite from the start
                        holes = np.asarray(chunk(solver, record, capacity, *replayed((state, data)), 0)[2])
                        are_steady(look_again(solver, record))
                        refuse_start(solver, state, holes, done)
                    new, buffer, new_holes = chunk(solver, record, capacity, state, data, count)
                    rows = {name: np.asarray(value)[:count] for name, value in buffer.items()}
                    left = holes, np.asarray(new_holes)
                    refuse_failed(solver, record, capacity, state, data, done, rows, *left, earlier)
                    check_counts(solver, int(state.step), int(new.step), count)
                    looked = looked or warn_if_steep(solver, record, capacity, state, data, rows)
                    # All at once, after the device is done: an interrupt or a failure before leaves what was done.
                    history.append(rows, count)
                    earlier = state.outer
                    state, done, positions = new, done + count, [feed.position() for feed in feeds]
                    due = bool(callbacks) and (done % every == 0 or done == steps)
                    elapsed = time.monotonic() - begun
                    room = max((len(value) for value in buffer.values()), default=capacity)
                    count = max(1, min(2 * count, round(count * CHUNK_SECONDS / max(elapsed, 1e-9))))
                    display.advance(done, {n: float(v[-1]) for n, v in rows.items() if v.ndim == 1 and _is_real(v)})
                    if due:
                        due = stop = call_back()
                    if time.monotonic() - saved >= checkpoint_every:
                        save()
                        saved = time.monotonic()
        except (KeyboardInterrupt, Terminated):
            interrupted = True
            raise
        finally:
            # An interrupt keeps what is done.
            save()
            if interrupted:
                print(_farewell(title, done, steps, written, checkpoint_dir), file=sys.stderr, flush=True)
    if len(history):
        last = history.rows(len(history) - 1)
        exactness = {name: last[name][-1] for name in EXACTNESS if name in last}
        warn_if_inexact(exactness, undetermined=lambda: undetermined(solver, *replayed((state, data))))
    return Result(state.outer, state.inner, history.rows(), state)


def _farewell(title: str, done: int, steps: int, written: int, folder: Any) -> str:
    """What an interrupted run says last: what there is of it, how much of it is `written`, and how to go on."""
    if not done:
        return f"{title}: interrupted before the first of {steps} was done: the same call begins anew."
    stopped = f"{title}: interrupted after {done} of {steps}, which "
    if folder is None:
        return stopped + "are not saved: give checkpoint_dir=, and the same call goes on where it was interrupted."
    kept = f"are saved in {folder}" if written == done else f"are lost after step {written}"
    return stopped + kept + ": the same call goes on from there."


def _truth(answer: Any) -> bool:
    """Whether a callback asks for an end.

    Raises:
      ValueError: if it returned what is neither true nor false.
    """
    try:
        return bool(answer)
    except Exception:
        raise ValueError(
            f"run(callbacks=...): a callback returned {shown(answer)}, but must return True to stop the run, or None."
        ) from None


def _first(solver: Solver, feeds: Sequence[Feed], note: Any) -> list[Any]:
    """The batches to begin with; after an interruption, what they were like, with all feeds put where they stood."""
    wanted = wanted_batches(solver)
    if not note:
        return [feed.next(n, 0) for feed, n in zip(feeds, wanted, strict=True)]
    return [feed.resume(at, n, note["step"]) for feed, n, at in zip(feeds, wanted, note["feeds"], strict=True)]


def _losses(solver: Solver, state: Any, data: Any, *, anew: bool = False) -> list[TracedLoss]:
    """Traces both losses as a step on `data` calls them."""

    def seen(state, data):
        inner, outer = batches(solver, state, data)
        if (wanted := solver.outer_batches_per_step) > 1:
            xs, bind = slots(outer, wanted, "outer calls")
            outer = bind(jax.tree.map(lambda x: x[0], xs))
        return inner, outer

    inner, outer = jax.eval_shape(seen, state, data)
    params = getattr(state.inner, "params", None)
    arguments = params, state.outer, inner, outer, state.key, solver.inner_batches_per_step
    return traced_losses(solver.problem, *arguments, anew=anew)


def _is_real(values: np.ndarray) -> bool:
    return np.issubdtype(values.dtype, np.floating)
