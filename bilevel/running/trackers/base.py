"""The contract of a tracker: a callback of `run` that is told settings once, then each row of metrics once."""

# pyright: strict

from __future__ import annotations

import abc
import contextlib
import dataclasses
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.settings.fields import is_known_number
from bilevel.sharding.processes import is_first


class Tracker(abc.ABC):
    """A callback of `run` and `fit` that hands rows of metrics to a service. A tracker follows one run.

    A subclass has three methods, and may have a fourth:

    - `begin(settings, start)` opens the service and tells it the settings. The run has `start` steps behind it, 0 of
      one that begins anew. It returns the last step that is written there already, 0 for none.
    - `write(step, row)`: the numbers of one step, `{name: float}`. Steps come in order and none of them twice.
    - `flush()`, after the rows of each call: the run may be killed from here on. By default it does nothing.
    - `end(error)` closes the service, with what ended the run, or None where it came to its end.

    When a run is resumed it may come by rows again that were written before it was killed. They are the same bit for
    bit, so those up to what `begin` has returned are left out.

    A row tells numbers by their names. An array is told by its Euclidean norm, under its name and "_norm": a service
    shows curves, and the arrays themselves are in `Result.history`. What holds no real numbers is left out. Of a stack
    of runs (`run(key=keys)`) each number is the mean over the runs, and each norm too.

    The settings are the numbers, texts and classes of the solver's fields (`"hypergradient.steps": 20`), the number of
    steps, and what the attribute `settings` adds to them. Of several processes only the first one writes. A service
    that fails ends no training: a warning says so once, and what is left of the run is not told.

    Attributes:
      settings: what is told beside the solver's own settings.
      stops: exceptions of `write` that are meant to end the run.

    Warns:
      RuntimeWarning: if the service fails.

    Examples:
      >>> import bilevel
      >>> from bilevel.extend import Tracker
      >>> from bilevel.testing import ridge
      >>> class Kept(Tracker):
      ...     def begin(self, settings, start):
      ...         self.settings_told, self.rows = settings, []
      ...         return 0
      ...     def write(self, step, row):
      ...         self.rows.append((step, round(row["outer_loss"], 3)))
      ...     def end(self, error):
      ...         self.ended = error
      >>> problem, train, val = ridge()
      >>> solver, kept = bilevel.SOBA(problem, inner_step=0.5, outer_step=0.5), Kept()
      >>> data = {"inner_data": train, "outer_data": val, "progress": False}
      >>> result = bilevel.run(solver, steps=3, callbacks=[kept], **data)
      >>> told = kept.settings_told
      >>> [step for step, _ in kept.rows], told["solver"], told["inner_step"], kept.ended
      ([1, 2, 3], 'SOBA', 0.5, None)
    """

    settings: Mapping[str, Any] = {}
    stops: tuple[type[Exception], ...] = ()
    # On the class, so that a subclass need not call `__init__`.
    _told: Mapping[str, Any] = {}
    _is_open = _has_failed = False
    _last = 0

    @abc.abstractmethod
    def begin(self, settings: Mapping[str, Any], start: int) -> int:
        """Opens the service; returns the last step that is written there already."""
        raise NotImplementedError

    @abc.abstractmethod
    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Tells the numbers of one step."""
        raise NotImplementedError

    @abc.abstractmethod
    def end(self, error: BaseException | None) -> None:
        """Closes the service."""
        raise NotImplementedError

    def flush(self) -> None:  # noqa: B027  (most services need none)
        """Sees to it that what was written is there if the process is killed from here on."""

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """What `run` calls: `metrics` are the rows since the last call, of which the last is that of `step`."""
        count = len(next(iter(metrics.values()), ()))
        if self._has_failed or not count or not is_first():
            return
        with self._guarded("write"):
            if not self._is_open:
                self._is_open = True  # before: a service that is half open is closed too
                self._last = self.begin({**self._told, **self.settings}, step - count)
            axes = np.ndim(getattr(state, "step", 0))
            for i in range(max(0, self._last - (step - count)), count):
                self._last = step - count + i + 1
                self.write(self._last, numbers({name: rows[i] for name, rows in metrics.items()}, axes))
            self.flush()

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """A run begins, with these settings; the service is opened with the first row."""
        self._told, self._has_failed = settings, False

    def close(self, error: BaseException | None = None) -> None:
        """The run has ended, by `error` if it is not None. `run` calls it; after calls by hand, so do you."""
        if self._is_open:
            self._is_open = False
            with self._guarded("end"):
                self.end(error)

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Generator[None]:
        try:
            yield
        except self.stops:
            raise
        except Exception as error:
            said = not self._has_failed  # one warning is enough
            self._has_failed = True
            if said:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                lost = "its last rows may be missing" if what == "end" else "the run goes on without it"
                warnings.warn(f"{type(self).__name__} failed, and {lost} ({reason}).", RuntimeWarning, stacklevel=3)


@contextlib.contextmanager
def following(callbacks: Sequence[Any], solver: Any, steps: int) -> Generator[None]:
    """The trackers among `callbacks` are told the settings before the block, and closed after it."""
    trackers = [callback for callback in callbacks if isinstance(callback, Tracker)]
    for tracker in trackers:
        tracker.prepare(described("solver", solver) | {"steps": steps})
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        for tracker in trackers:
            tracker.close(error)


def numbers(row: Mapping[str, Any], axes: int = 0) -> dict[str, float]:
    """The numbers of a row by name, an array by its norm; the first `axes` axes are of runs side by side."""
    told: dict[str, float] = {}
    for name, value in row.items():
        x = np.asarray(value)
        if not (jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.kind in "biu"):
            continue
        x = x.astype(np.float64)
        if x.ndim <= axes:
            told[name] = float(x.mean())
        else:
            over = tuple(range(axes, x.ndim))
            told[f"{name}_norm"] = float(np.sqrt(np.sum(x**2, axis=over)).mean())
    return told


def described(name: str, value: Any) -> dict[str, Any]:
    """The settings of a dataclass in a flat dict: numbers and texts, functions by their names, fields by paths.

    The class itself is under `name`; the fields of a solver have no prefix.
    """
    told: dict[str, Any] = {}
    if isinstance(value, bool | int | float | str):
        told[name] = value
    elif not isinstance(value, type) and dataclasses.is_dataclass(value):
        told[name] = type(value).__name__
        prefix = "" if name == "solver" else f"{name}."
        for field in dataclasses.fields(value):
            told |= described(prefix + field.name, getattr(value, field.name))
    elif isinstance(value, jax.Array | np.ndarray | np.generic):
        if is_known_number(value):
            told[name] = value.item()
    elif hasattr(value, "__name__"):
        told[name] = value.__name__
    return told
