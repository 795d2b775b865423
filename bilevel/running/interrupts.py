"""Signals that end a process, and what must be whole before they do."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from bilevel.sharding.processes import in_all, several


class Terminated(BaseException):
    """Raised when the process is told to end (SIGTERM)."""


_NOTED: list[int] = []
"""Signals that came to one of several processes, and that the others do not know of yet."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM inside unwinds the stack, as Ctrl-C does, and then ends the process as it would have.

    Only in the main thread, and only where nobody else handles the signal: a handler of the user's stays in force. One
    of several processes takes note of both, and goes on until all of them know (`noted`, `end_by`): the others would
    wait for it for ever. A second Ctrl-C is not waited with.
    """
    ours = threading.current_thread() is threading.main_thread()
    free = {number for number, usual in _USUAL.items() if ours and signal.getsignal(number) is usual}
    handled = free if several() else free - {signal.SIGINT}

    def handler(number, frame):
        if not several():
            raise Terminated
        _NOTED.append(number)
        signal.signal(number, _USUAL[number])

    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    except Terminated:
        if signal.SIGTERM in handled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM) from None  # where the signal takes its time
    finally:
        _NOTED.clear()
        for number in handled:
            signal.signal(number, _USUAL[number])


_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""What Python does with a signal if nobody says otherwise."""


def noted() -> int:
    """The signal that came to this one of several processes; 0 if none did."""
    return max(_NOTED, default=0)


def end_by(number: int) -> None:
    """Raises what signal `number` means, once all processes know of it."""
    if number:
        raise in_all(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back until the block inside is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A handler that is None was not set from Python, and could not be put back.
    held = [number for number, handler in before.items() if handler is not None]
    for number in held:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number in held:
            signal.signal(number, before[number])
        for number in dict.fromkeys(came):
            # Not sent again, where a handler of Python's can be called: to who counts signals it would be a second one.
            handler = before[signal.Signals(number)]
            handler(number, None) if callable(handler) else signal.raise_signal(number)
