"""What is said of a Ctrl-C that has to wait: Python hears of one when the compiled step that runs is done."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

PATIENCE = 1.0
"""Seconds after which a Ctrl-C that nothing has come of is told to be waited for."""
WAITS = "Ctrl-C: what runs is finished first, and then saved; a second one ends at once, with what was saved before."


@contextlib.contextmanager
def acknowledged() -> Iterator[None]:
    """Inside, a Ctrl-C that is not obeyed within a second is answered on stderr, and a second one ends the process.

    The operating system's handler writes the signal's number into a pipe, whatever the main thread does, and a thread
    reads it there. Only in the main thread, where Python's own handler of Ctrl-C is in force, and nobody else reads the
    signals (`signal.set_wakeup_fd`); elsewhere nothing is changed.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)
        yield
        return
    thread = threading.Thread(target=_answer, args=(reading,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writing)  # the thread reads the end, and ends
        thread.join()
        os.close(reading)


def _answer(reading: int) -> None:
    """Reads signals until the pipe is closed, and answers each Ctrl-C that takes its time."""
    waits = False
    while numbers := os.read(reading, 1):
        if numbers[0] != signal.SIGINT:
            continue
        if waits:
            os._exit(128 + signal.SIGINT)
        if not select.select([reading], [], [], PATIENCE)[0]:
            print(f"\n{WAITS}", file=sys.stderr, flush=True)
            waits = True
