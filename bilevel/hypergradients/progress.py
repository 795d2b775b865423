"""What a long run shows while it goes: a bar with the time left on a terminal, a line from time to time elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Hashable, Mapping
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult

LINE_EVERY = 30.0
"""Seconds between two lines where the output is not a terminal."""
_GAP = "  "
_open: list[Progress] = []
"""Bars that are drawn now, the outermost first."""


class Progress:
    r"""A progress display over `total` steps; use as a context manager and call `advance`.

    On a terminal, and in a notebook that has ipywidgets, it is one line that is drawn anew. Bar, steps done and time
    left are always there. Where the line is too narrow for the rest, what stands on the right goes first: the time
    elapsed, then the newest numbers, the last one first. Elsewhere a line is printed every half minute, without control
    characters.

    Args:
      title: what is running.
      total: steps until it is done.
      start: steps that were done before this run, which took none of its time.
      show: False shows nothing.
      console: where to show it; stderr if None.

    Examples:
      >>> import io
      >>> from bilevel.extend import Progress
      >>> from rich.console import Console
      >>> file = io.StringIO()
      >>> with Progress("steps", 3, console=Console(file=file)) as bar:
      ...     for step in range(3):
      ...         bar.advance(step + 1, {"loss": 0.5**step})
      >>> file.getvalue()
      'steps 3/3  loss 0.25  0:00 left\n'
    """

    def __init__(self, title: str, total: int, *, start: int = 0, show: bool = True, console: Console | None = None):
        self._title, self._total, self._done, self._show = title, total, start, show
        self._numbers: Mapping[str, float] = {}
        self._begun = self._advanced = self._last_line = time.monotonic()
        # Steps whose time says how fast the rest will be, and the programs that are compiled by now.
        self._timed, self._seconds = 0, 0.0
        self._programs: set[Hashable] = set()
        # rich puts a bar below one that is drawn already if both are on the same console.
        self._console = console or (_open[0]._console if _open else _stderr())
        self._live: Any = None

    def __enter__(self) -> Progress:
        if self._show and (self._console.is_interactive or _is_notebook(self._console)):
            from rich.live import Live  # needed only here

            # What a callback prints is put above the bar, unless it goes to a file. A bar below another one is gone
            # when it is done: there would be one for each step of that other.
            apart = sys.stdout is None or not sys.stdout.isatty()
            self._live = Live(self, console=self._console, redirect_stdout=not apart, transient=bool(_open))
            self._live.start(refresh=True)
            _open.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            _open.remove(self)
            self._live.refresh()  # in a notebook rich leaves what was drawn last
            self._live.stop()

    def advance(self, done: int, numbers: Mapping[str, float], program: Hashable = None) -> None:
        """Shows that `done` steps are done, with the newest `numbers`.

        `program` is what computed the steps since the last call. The first ones of each program are left out of the
        speed, since it was compiled before them.
        """
        now = time.monotonic()
        if program in self._programs:
            self._seconds += now - self._advanced
            self._timed += done - self._done
        self._programs.add(program)
        self._done, self._advanced, self._numbers = done, now, numbers
        if self._show and self._live is None and (now - self._last_line >= LINE_EVERY or done == self._total):
            self._last_line = now
            self._print(*self._shown_numbers(), self._left())

    def already_finished(self) -> None:
        """Says that there is nothing to do: all steps were done before."""
        if self._show:
            self._print("already finished")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line with the bar, in the width that there is."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        # Numbers come and go with the room that there is, but the bar's width is that of the window alone: no jitter.
        bar = min(max(options.max_width // 5, 10), 40)
        count, left = self._count().rjust(2 * len(str(self._total)) + 1), self._left()
        room = options.max_width - bar - len(_GAP + count + _GAP + left)
        title = set_cell_size(self._title, min(cell_len(self._title), max(0, room - len(_GAP))))
        room -= cell_len(title + _GAP)
        rest = []
        for part in (*self._shown_numbers(), f"{_clock(time.monotonic() - self._begun)} elapsed"):
            room -= cell_len(_GAP + part)
            if room < 0:
                break
            rest.append(part)
        cells = [Text(title)] if title else []
        cells += [ProgressBar(self._total, self._done, width=bar)]
        cells += [Text(count, "progress.download"), Text(left, "progress.remaining"), *map(Text, rest)]
        line = Table.grid(padding=(0, len(_GAP)))
        for _ in cells:
            line.add_column(no_wrap=True)
        line.add_row(*cells)
        yield line

    def _print(self, *parts: str) -> None:
        print(f"{self._title} {self._count()}", *parts, sep=_GAP, file=self._console.file, flush=True)

    def _count(self) -> str:
        return f"{self._done}/{self._total}"

    def _shown_numbers(self) -> list[str]:
        return [f"{name} {value:.4g}" for name, value in self._numbers.items()]

    def _left(self) -> str:
        steps = self._total - self._done
        if steps and not self._timed:
            return "-:-- left"
        since = time.monotonic() - self._advanced
        return f"{_clock(max(0.0, steps * self._seconds / self._timed - since) if steps else 0.0)} left"


def _stderr() -> Console:
    """A console that is a terminal only where stderr is: rich takes a file for one where FORCE_COLOR is set."""
    return Console(stderr=True, force_terminal=sys.stderr is not None and sys.stderr.isatty())


def _is_notebook(console: Console) -> bool:
    """Whether rich can draw in a notebook: without ipywidgets it would warn, and show nothing."""
    return console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
