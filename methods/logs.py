"""What the logger "bilevel" says, as a command shows it: news on stdout, warnings on stderr, the words alone."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Generator

LOGGER = logging.getLogger("bilevel")


class _Shown(logging.Handler):
    """Writes to what stdout and stderr are at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        if stream is not None:
            print(self.format(record), file=stream, flush=True)


_SHOWN = _Shown()


_AS_PYTHON = warnings.formatwarning


def _sentence(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None):
    """A warning as a user reads it: those that are meant for users without the line of the program they are from."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return _AS_PYTHON(message, category, filename, lineno, line)


@contextlib.contextmanager
def listening() -> Generator[None]:
    """Shows what is logged meanwhile, and to nobody else: some libraries put a handler of their own at the root."""
    before, shown = (LOGGER.level, LOGGER.propagate), warnings.formatwarning
    warnings.formatwarning = _sentence
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    LOGGER.addHandler(_SHOWN)
    try:
        yield
    finally:
        warnings.formatwarning = shown
        LOGGER.removeHandler(_SHOWN)
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]
