"""What the logger "bilevel" says, as a command shows it: news on stdout, warnings on stderr, the words alone."""

from __future__ import annotations

import logging
import sys

LOGGER = logging.getLogger("bilevel")


class _Shown(logging.Handler):
    """Writes to what stdout and stderr are at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        if stream is not None:
            print(self.format(record), file=stream, flush=True)


_SHOWN = _Shown()


def listen() -> None:
    """Shows what is logged from now on; once, however often it is called."""
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(_SHOWN)
