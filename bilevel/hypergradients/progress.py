"""What a long run shows while it goes: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

LINE_EVERY = 30.0
"""Seconds between two lines where the output is not a terminal."""


class Progress:
    """A progress display over `total` steps; use as a context manager and call `advance`.

    Args:
      title: what is running.
      total: steps until it is done.
      show: False shows nothing.
    """

    def __init__(self, title: str, total: int, *, start: int = 0, show: bool = True):
        self._title, self._total, self._done, self._first = title, total, start, start
        self._mode = "none" if not show else "bar" if sys.stderr.isatty() else "lines"
        self._begun = self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._mode == "bar":
            from rich import progress  # slow to import, and only needed here

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[numbers]}"),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._first, numbers="")
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, done: int, numbers: Mapping[str, float]) -> None:
        """Shows that `done` steps are done, with the newest `numbers`."""
        self._done = done
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._mode == "bar":
            self._bar.update(self._task, completed=done, numbers=text)
        elif self._mode == "lines":
            now = time.monotonic()
            if now - self._last_line >= LINE_EVERY or done == self._total:
                self._last_line = now
                print(f"{self._title} {done}/{self._total}  {text}  {self._left()}", file=sys.stderr, flush=True)

    def already_finished(self) -> None:
        """Says that there is nothing to do: all steps were done before."""
        if self._mode != "none":
            print(f"{self._title} {self._done}/{self._total}  already finished", file=sys.stderr, flush=True)

    def _left(self) -> str:
        gone, steps = time.monotonic() - self._begun, self._done - self._first
        seconds = round(gone / max(steps, 1) * (self._total - self._done))
        return f"{seconds // 60}:{seconds % 60:02d} left"
