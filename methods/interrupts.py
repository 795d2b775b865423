"""What is said of a Ctrl-C that has to wait: Python hears of one when the compiled step that runs is done.

And what becomes of one that Python drops: the handler of the signal raises KeyboardInterrupt in whatever runs, and what
is raised in a callback of the garbage collector, in one of a weak reference or in a `__del__` goes no further.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

PATIENCE = 1.0
"""Seconds after which a Ctrl-C that nothing has come of is told to be waited for."""
WAITS = "Ctrl-C: what runs is finished first, and then saved; a second one ends at once, with what was saved before."
AGAIN = 0.02
"""Seconds after which one that was dropped is sent again; what it was dropped in is over then, as a rule."""
_DROPPED = 0
"""What stands in the pipe for one that was dropped; no signal has this number."""


@contextlib.contextmanager
def acknowledged() -> Iterator[None]:
    """Inside, a Ctrl-C that is not obeyed within a second is answered on stderr, and a second one ends the process.

    The operating system's handler writes the signal's number into a pipe, whatever the main thread does, and a thread
    reads it there. One that Python drops is sent again, until it is raised where something hears of it. Only in the
    main thread, where Python's own handler of Ctrl-C is in force, and nobody else reads the signals
    (`signal.set_wakeup_fd`); elsewhere nothing is changed.
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
    hook, ended = sys.unraisablehook, threading.Event()

    def dropped(told: Any) -> None:
        try:
            if not interrupted(told.exc_value):
                return hook(told)
        except KeyboardInterrupt:  # one that came here
            pass
        os.write(writing, bytes([_DROPPED]))

    thread = threading.Thread(target=_answer, args=(reading, ended), daemon=True)
    thread.start()
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        ended.set()
        sys.unraisablehook = hook
        signal.set_wakeup_fd(-1)
        os.close(writing)  # the thread reads the end, and ends
        thread.join()
        os.close(reading)


def interrupted(error: BaseException | None, *, meanwhile: bool = False) -> bool:
    """Whether an error is a Ctrl-C, or was made of one, as Python does where it wraps whatever is raised.

    Args:
      error: what was raised.
      meanwhile: whether one counts too that was being handled when the error came.
    """
    told, seen = [error], set()
    while told:
        if isinstance(each := told.pop(), KeyboardInterrupt):
            return True
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            told += [each.__cause__, each.__context__ if meanwhile else None]
    return False


def _answer(reading: int, ended: threading.Event) -> None:
    """Reads signals until the pipe is closed; answers a Ctrl-C that takes its time, and sends a dropped one again."""
    waits, ours = False, 0
    while numbers := os.read(reading, 1):
        if numbers[0] == _DROPPED and not ended.wait(AGAIN):
            ours += 1
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if numbers[0] != signal.SIGINT:
            continue
        if waits and not ours:
            os._exit(128 + signal.SIGINT)
        ours = max(ours - 1, 0)
        if not waits and not select.select([reading], [], [], PATIENCE)[0]:
            print(f"\n{WAITS}", file=sys.stderr, flush=True)
            waits = True
