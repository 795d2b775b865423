"""What a run does between its start and its end: chunks of steps, calls of callbacks, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bilevel.differentiation.captures import look_again
from bilevel.differentiation.influence import EXACTNESS, warn_if_inexact
from bilevel.running import seeds
from bilevel.running.checkpoints import Checkpoints
from bilevel.running.chunks import History, chunk, chunk_capacity, wanted_batches
from bilevel.running.diagnosis import has_failed, refuse_failed, refuse_start
from bilevel.running.feeds import Feed
from bilevel.running.interrupts import end_by, noted, uninterrupted
from bilevel.running.singular import undetermined
from bilevel.running.standstill import stood_still, warn_of_zeros
from bilevel.running.steep import may_be_steep, warn_if_steep
from bilevel.running.unsteady import are_steady
from bilevel.settings.fields import shown
from bilevel.sharding.processes import attempt, everyone
from bilevel.sharding.sharding import Sharding, with_problem
from bilevel.solvers.base import Solver
from bilevel.solvers.states import check_counts
from bilevel.trees import PyTree, replayed

Callback = Callable[[int, Any, Mapping[str, Any]], Any]
"""`callback(step, state, metrics)` between chunks: `metrics` are the new rows; a true return value stops the run."""

CHUNK_SECONDS = 1.0
"""Device time between two returns to the host."""
_SHOWN_FIRST = ("outer_loss", "inner_loss")
"""What a narrow display shows of the metrics before the others."""


@dataclasses.dataclass
class Store:
    """Where a run is saved, and how often.

    Attributes:
      checkpoints: the folder.
      every: least seconds between two checkpoints.
      record: what `record` of the run returns, as `kinds` says it: a checkpoint notes it.
      written: the last step that is saved.
      saved: when a checkpoint was last due.
    """

    checkpoints: Checkpoints
    every: float
    record: str = "none"
    written: int = 0
    saved: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass
class Loop:
    """A run that is going on.

    Attributes:
      solver, record, steps, callbacks: as for `run`.
      every: steps between two calls of the callbacks; `steps` without any.
      feeds: of the inner and the outer batches.
      store: None where nothing is saved.
      state: the solver's, after `done` steps.
      data: the batches of the chunk that is computed now, or was computed last.
      fresh: whether these are of the next chunk, and not used yet.
      done: steps done.
      history: rows of metrics of these.
      called: how many of the rows the callbacks have seen.
      due: whether the callbacks must be called before another step.
      stop: whether a callback has asked for an end.
      earlier: outer before the last chunk; None before the second.
      count: steps of the next chunk, if nothing else cuts it short.
      room: most steps of a chunk, as their rows of metrics have it.
      holes: entries of `state` that are not finite, as `chunk` counts them; None until a chunk was compiled.
      looked: whether a warning about steep updates was given.
      capacity: most steps of a chunk.
      positions: where the feeds stood after step `done`.
    """

    solver: Solver
    record: Any
    steps: int
    callbacks: Sequence[Callback]
    every: int
    feeds: Sequence[Feed]
    store: Store | None
    state: Any
    data: Any
    fresh: bool
    _: dataclasses.KW_ONLY
    done: int = 0
    history: History = dataclasses.field(default_factory=History)
    called: int = 0
    due: bool = False
    stop: bool = False
    earlier: PyTree = None
    count: int = 1
    room: int = 1
    holes: np.ndarray | None = None
    looked: bool = False
    capacity: int = dataclasses.field(init=False)
    positions: list[Any] = dataclasses.field(init=False)

    def __post_init__(self):
        by_hand = getattr(self.solver, "driven_from_host", False) or any(feed.is_iterator for feed in self.feeds)
        self.capacity = 1 if by_hand else chunk_capacity(self.solver)
        self.positions = self._positions()

    @property
    def ended(self) -> bool:
        return self.stop or self.done >= self.steps

    @property
    def program(self) -> Any:
        """By which the compiled programs of chunks differ: data of another shape compile another one."""
        leaves, structure = jax.tree.flatten(self.data)
        return structure, tuple(np.shape(leaf) for leaf in leaves)

    @property
    def written(self) -> int:
        """The last step that is saved."""
        return self.store.written if self.store else 0

    def resume(self, store: Store, note: Any) -> None:
        """Goes back to what `note` of the store says: the state, the history, and what the callbacks have seen."""
        self.state, rows = store.checkpoints.restore(note["step"], self.state)
        self.done, self.history, self.due, self.called = note["step"], History(rows), note["due"], note["called"]
        store.written = self.done

    def pin(self, sharding: Sharding) -> None:
        """Puts the state where it belongs on a mesh, and keeps it there."""
        self.solver = with_problem(self.solver, dataclasses.replace(self.solver.problem, sharding=sharding))
        self.state = sharding.place_state(self.state)

    def advance(self) -> dict[str, float]:
        """Computes one chunk, and returns the metrics of its last step, those first that a display should keep longest.

        Raises:
          FloatingPointError, ValueError: as `run` says; nothing of the chunk is then kept.
        """
        begun = time.monotonic()
        # Chunks are as long as the machine is fast; callbacks see none of that.
        count = min(self.count, self.steps - self.done, self.room, self.every - self.done % self.every)
        if not self.fresh:
            wanted = wanted_batches(self.solver)
            self.data = [feed.next(n, self.done) for feed, n in zip(self.feeds, wanted, strict=True)]
        self.fresh = False
        if self.holes is None:
            self.holes = self._compiled()
        fixed = self.solver, self.record, self.capacity
        new, buffer, holes = chunk(*fixed, self.state, self.data, count)
        rows = {name: np.asarray(value)[:count] for name, value in buffer.items()}
        self._look(fixed, rows, np.asarray(holes))
        check_counts(self.solver, int(np.max(self.state.step)), int(np.max(new.step)), count)
        # All at once, after the device is done: an interrupt or a failure before leaves what was done.
        self.history.append(rows, count)
        self.earlier = self.state.outer
        self.state, self.done, self.positions = new, self.done + count, self._positions()
        self.due = bool(self.callbacks) and (self.done % self.every == 0 or self.done == self.steps)
        elapsed = time.monotonic() - begun
        self.room = max((len(value) for value in buffer.values()), default=self.capacity)
        self.count = max(1, min(2 * count, round(count * CHUNK_SECONDS / max(elapsed, 1e-9))))
        axes = 1 + np.ndim(new.step)  # of a stack of runs the display shows means
        shown = [name for name, row in rows.items() if row.ndim == axes and _is_real(row)]
        shown.sort(key=lambda name: _SHOWN_FIRST.index(name) if name in _SHOWN_FIRST else len(_SHOWN_FIRST))
        return {name: float(np.mean(rows[name][-1])) for name in shown}

    def _look(self, fixed: tuple[Solver, Any, int], rows: dict[str, np.ndarray], holes: np.ndarray) -> None:
        """Looks at what a chunk from `state` has made, of every run of a stack: what is not finite, what is steep."""
        for number in seeds.numbers(self.state):
            own = seeds.rows_of(number, rows)
            before, after = seeds.of(number, (self.holes, holes))
            failed, steep = has_failed(own, before, after), not self.looked and may_be_steep(own)
            if not failed and not steep:
                continue
            state, data = seeds.of(number, self.state), seeds.data_of(number, self.data)
            with seeds.told_of(number):
                if failed:
                    earlier = seeds.of(number, self.earlier)
                    refuse_failed(*fixed, state, data, self.done, own, before, after, earlier)
                warn_if_steep(*fixed, state, data, own)
                self.looked = True

    def _compiled(self) -> np.ndarray:
        """Compiles the chunk by computing no step of it: what is not finite in the state that it begins with."""
        state, data = replayed((self.state, self.data))
        with seeds.mapped(state):
            holes = np.asarray(chunk(self.solver, self.record, self.capacity, state, data, 0)[2])
        are_steady(look_again(self.solver, self.record))
        for number in seeds.numbers(self.state) if holes.any() else ():
            own = holes if number is None else holes[number]
            with seeds.told_of(number):
                refuse_start(self.solver, seeds.of(number, self.state), own, self.done)
        return holes

    def call_back(self) -> None:
        """Calls the callbacks, if it is time, with the rows that they have not seen."""
        if not (self.due and self.callbacks):
            return
        # Copies: what a callback writes into them is its own.
        rows = {name: rows.copy() for name, rows in self.history.rows(self.called, self.done).items()}
        with attempt("calling its callbacks"), _telling_names(self.solver, rows):
            stop = any([_truth(callback(self.done, self.state, rows)) for callback in self.callbacks])
        if any(everyone(stop)):
            self.due = self.stop = True
        else:
            self.called, self.due = self.done, False

    def settle(self) -> None:
        """Saves, if the last checkpoint is old enough; several processes go by the clock of the first.

        Raises:
          KeyboardInterrupt, Terminated: if a signal came to any of several processes, in all of them.
        """
        old = bool(self.store) and time.monotonic() - self.store.saved >= self.store.every
        told = everyone([self.count, old, noted()])
        self.count, old, _ = told[0]
        if self.store and old:
            self.save()
            self.store.saved = time.monotonic()
        end_by(max(number for _, _, number in told))

    def save(self) -> None:
        """Saves what is not saved yet."""
        store = self.store
        if not store or self.done == store.written:
            return
        # An interrupt may have come between the rows of a step and its state; one that comes now waits until both the
        # checkpoint is whole and it is known here.
        with uninterrupted():
            rows = self.history.rows(0, self.done)
            note = {"due": self.due, "called": self.called, "record": store.record}
            if store.checkpoints.save(self.done, self.state, rows, self.positions, **note):
                store.written = self.done

    def look_back(self) -> None:
        """Warns if no hypergradient of the run was other than 0, or if the last one is not to be trusted.

        That of an implicit estimator is not, where its point was not trained, or its system not solved.
        """
        if len(self.history):
            whole = self.history.rows()
            for number in seeds.numbers(self.state):
                if stood_still(seeds.rows_of(number, whole)):
                    state, data = replayed((seeds.of(number, self.state), seeds.data_of(number, self.data)))
                    with seeds.told_of(number):
                        warn_of_zeros(self.solver, state, data, len(self.history))
            last = self.history.rows(len(self.history) - 1)
            for number in seeds.numbers(self.state):
                own = seeds.rows_of(number, last)
                exactness = {name: own[name][-1] for name in EXACTNESS if name in own}

                def leaves(number=number):
                    arguments = seeds.of(number, self.state), seeds.data_of(number, self.data)
                    return undetermined(self.solver, *replayed(arguments))

                with seeds.told_of(number):
                    warn_if_inexact(exactness, undetermined=leaves)

    def _positions(self) -> list[Any]:
        return [feed.position() for feed in self.feeds]


@contextlib.contextmanager
def _telling_names(solver: Solver, rows: Mapping[str, Any]) -> Iterator[None]:
    """Adds to a KeyError, of a metric that a solver does not have, those that it has."""
    try:
        yield
    except KeyError as error:
        if error.args and isinstance(error.args[0], str) and error.args[0] not in rows:
            error.add_note(f"The metrics of a step of {type(solver).__name__} here are {', '.join(rows)}.")
        raise


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


def _is_real(values: np.ndarray) -> bool:
    return np.issubdtype(values.dtype, np.floating)
