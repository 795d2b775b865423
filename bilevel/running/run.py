"""The host loop around any solver: data, progress, metrics, checkpoints, callbacks, early stop."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel.data import slots
from bilevel.differentiation.captures import forget_outdated
from bilevel.differentiation.loss_checks import TracedLoss, refuse_captured, traced_losses, warn_if_misplaced
from bilevel.hypergradients.arguments import check_run
from bilevel.hypergradients.progress import Progress
from bilevel.running import seeds
from bilevel.running.checkpoints import Checkpoints
from bilevel.running.chunks import batches, kinds, recorded, wanted_batches
from bilevel.running.feeds import Feed
from bilevel.running.fingerprint import fingerprint
from bilevel.running.interrupts import Terminated, terminable
from bilevel.running.loop import Callback, Loop, Store
from bilevel.running.programs import programs
from bilevel.running.trackers.base import following
from bilevel.running.unsteady import refuse_changing, warn_if_swapped
from bilevel.settings.numeric import check_schedules
from bilevel.sharding.inside import no_mesh
from bilevel.sharding.processes import agree, attempt, is_first, is_in_all, several, together
from bilevel.sharding.sharding import Sharding
from bilevel.solvers.base import Solver
from bilevel.trees import Key, Outer, is_key, replayed, shapes

LOGGER = logging.getLogger("bilevel")


class Result(NamedTuple):
    """What a run found.

    Attributes:
      outer: the outer variable.
      inner: the state of the inner problem (`InnerState`, or the solver's own).
      history: name -> array with one row a step; of a run over a stack of keys its second axis is that of the keys.
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
    sharding: Sharding | None = None,
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
      key: randomness of the run; None is `jax.random.key(0)`. A stack of keys, `jax.random.split(key, 5)`, is as many
        runs side by side in one program (`jax.vmap`): each is, to rounding, the run of its own key alone. All of
        `outer`, `inner` and `state` then have a leading axis, that of the keys, and `record` is given the state of one
        of them. Two branches of a `jax.lax.cond` that reads what differs between the runs are both computed; what
        cannot be mapped (an ordered callback, keys of another kind than threefry, `Replay`) is refused.
      progress: whether to show progress on stderr.
      callbacks: called as `callback(step, state, metrics)` after every `callback_every` steps and after the last, with
        copies of the rows of metrics since they were last called; a true return value stops the run. If a run was
        interrupted before they had all returned, or stopped by one, it resumes by calling them again. A tracker
        (`TensorBoard`, `WandB`, `MLflow`, one of your own) is a callback that is also told the settings and the end.
      callback_every: steps between two calls. A call makes the device wait: where a step takes microseconds, 100.
      checkpoint_dir: folder to save the state in, every minute or so and at the end, by Ctrl-C and SIGTERM too, and to
        resume from. It holds two checkpoints, and `fingerprint.json`: settings, losses, optimizers, data, key and
        versions, which a resumed run must share (callbacks, which look on, may be others). Without this file
        (delete it where a difference is meant, such as a newer JAX) a run is resumed unchecked, with a warning. What
        else lies there is left alone.
      checkpoint_every: least seconds between two checkpoints.
      record: `record(state) -> {name: array}`, computed after every step and added to the history.
      title: what the progress display calls the run.
      sharding: where arrays lie on a mesh of devices. The numbers are those of one device, to rounding; a run is
        resumed on another mesh, or on one device, as well. With the devices of several processes every one of them
        calls `run` with the same arguments, but for iterators, which give the rows of their own process.

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
      RuntimeError: in the other processes of a run of several, where one has failed; says which, and of what.
      FloatingPointError: if a metric, a number of `record` or the state is not finite; names the step, the inner step
        and leaf where it began, and the leaf of outer whose last move did it.
      KeyboardInterrupt: by Ctrl-C, after a warning of the logger "bilevel" (a line on stderr, if logging is not
        configured) on what is saved and how to go on; so does SIGTERM.

    Examples:
      >>> import math, bilevel, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> solver = bilevel.Nested(problem, bilevel.Unrolled(optax.sgd(0.5), steps=20), optax.sgd(1.0))
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=60, progress=False)
      >>> round(math.exp(result.outer), 3)  # the decay that fits the validation rows
      0.5
    """
    given = locals()
    mesh = sharding.mesh if isinstance(sharding, Sharding) else None
    with together(mesh), contextlib.nullcontext() if mesh is None else no_mesh():
        with attempt("checking its arguments"):
            check_run("run", **given)
        reads = forget_outdated(solver, record)
        key = jax.random.key(0) if key is None else key if is_key(key) else jax.random.wrap_key_data(key)
        key = _uncommitted(key) if sharding else key
        solver_key, inner_key, outer_key = seeds.split(key)
        with attempt("looking at its data"):
            feeds = (
                Feed.of("inner_data", inner_data, inner_key, steps, getattr(solver, "data_title", "")),
                Feed.of("outer_data", outer_data, outer_key, steps),
            )
        if several():
            agree("run", _alike(solver, feeds, steps, callbacks, callback_every, checkpoint_dir, sharding))
        if sharding:
            solver = sharding.solver(solver)
            for feed in feeds:
                feed.place(sharding)
        store = Store(Checkpoints(checkpoint_dir), checkpoint_every) if checkpoint_dir is not None else None
        with attempt("reading its checkpoints") as alike:
            note = store.checkpoints.note(steps) if store else None
            alike += [f"the checkpoint of step {note['step']}" if note else "no checkpoint"]
        state = seeds.start(solver, solver_key)
        data = _first(solver, feeds, note)
        # What is looked at before the first step is the same for all runs of a stack.
        first = seeds.numbers(state)[0]
        alone = seeds.of(first, state)
        losses = _refuse_unfit(solver, alone, seeds.data_of(first, data), record, reads)
        seeds.refuse_unsteady_losses(state, losses)
        every = callback_every if callbacks else steps
        loop = Loop(solver, record, steps, callbacks, every, feeds, store, state, data, fresh=not note)
        returned = kinds(jax.eval_shape(lambda state: recorded(record, state, {}), alone)) if record else "none"
        if store:
            store.record = returned
        if store or several():
            found = fingerprint(solver, key, alone, losses, feeds, record)
            agree("run", found | {"record": returned})
        if sharding:
            loop.pin(sharding)
        if store:
            with attempt("looking at its checkpoint_dir"):
                store.checkpoints.claim(found, returned, note)
            if note:
                loop.resume(store, note)
        check_schedules(solver, loop.done, steps)
        with terminable(), following(callbacks, solver, steps):
            error = None
            try:
                # Interrupted before they had returned, or stopped by one: they are asked again.
                loop.call_back()
                display = Progress(title, steps, start=loop.done, show=progress and is_first())
                if note and loop.done == steps:
                    display.already_finished()
                with display if loop.done < steps else contextlib.nullcontext():
                    while not loop.ended:
                        metrics = loop.advance()
                        display.advance(loop.done, metrics, loop.program)
                        loop.call_back()
                        loop.settle()
            except BaseException as raised:
                error = raised
                raise
            finally:
                # An interrupt keeps what is done.
                if is_in_all(error):
                    loop.save()
                if isinstance(error, KeyboardInterrupt | Terminated) and is_first():
                    # Without handlers of the program's own Python writes a warning's words to stderr.
                    LOGGER.warning("%s", _farewell(title, loop.done, steps, loop.written, checkpoint_dir))
        loop.look_back()
        return Result(loop.state.outer, loop.state.inner, loop.history.rows(), loop.state)


def _alike(solver, feeds, steps, callbacks, callback_every, checkpoint_dir, sharding) -> dict[str, str]:
    """What several processes must share for the same programs to run in each, as text by name."""
    mesh = sharding.mesh
    sources = [type(feed.source).__name__ if feed.is_iterator else shapes(feed.source) for feed in feeds]
    return {
        "steps": str(steps),
        "callbacks": f"every {callback_every} steps" if callbacks else "none",
        "solver": f"{type(solver).__name__} {shapes(solver)}",
        "inner_data": sources[0],
        "outer_data": sources[1],
        "checkpoint_dir": "none" if checkpoint_dir is None else str(Path(checkpoint_dir).absolute()),
        "sharding": f"{mesh.shape} {sharding.batch} {sharding.keys} {list(map(str, mesh.devices.flat))}",
    }


def _refuse_unfit(solver: Solver, state: Any, data: Any, record: Any, reads: Any) -> list[TracedLoss]:
    """Traces the losses, refuses or warns of what they tell of the problem, and returns them."""
    losses = _losses(solver, state, data)
    refuse_captured(losses, state.outer)
    anew = lambda: _losses(solver, state, data, anew=True)  # noqa: E731
    refuse_changing(reads, losses, anew, lambda: list(programs(solver, state, record)))
    warn_if_misplaced(losses, learned=getattr(solver, "learns_outer", True))
    warn_if_swapped(solver, losses, state.outer, replayed(state.key))
    return losses


def _uncommitted(key: Key) -> Key:
    """`key`, bound to no device, so that it may meet arrays that lie on several."""
    return jax.random.wrap_key_data(
        jax.numpy.asarray(np.asarray(jax.random.key_data(key))), impl=jax.random.key_impl(key)
    )


def _farewell(title: str, done: int, steps: int, written: int, folder: Any) -> str:
    """What an interrupted run says last: what there is of it, how much of it is `written`, and how to go on."""
    if not done:
        return f"{title}: interrupted before the first of {steps} was done: the same call begins anew."
    stopped = f"{title}: interrupted after {done} of {steps}, which "
    if folder is None:
        return stopped + "are not saved: give checkpoint_dir=, and the same call goes on where it was interrupted."
    kept = f"are saved in {folder}" if written == done else f"are lost after step {written}"
    return stopped + kept + ": the same call goes on from there."


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
