"""What the logger "bilevel" says, as a command shows it: news on stdout, warnings on stderr, the words alone."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Generator

LOGGER = logging.getLogger("bilevel")


class _Shown(logging.Handler):
    """Writes to what stdout and stderr are at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        if stream is not None:
            print(self.format(record), file=stream, flush=True)


_SHOWN = _Shown()


@contextlib.contextmanager
def listening() -> Generator[None]:
    """Shows what is logged meanwhile, and to nobody else: some libraries put a handler of their own at the root."""
    before = LOGGER.level, LOGGER.propagate
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    LOGGER.addHandler(_SHOWN)
    try:
        yield
    finally:
        LOGGER.removeHandler(_SHOWN)
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]
