"""The resident memory of this process, as the kernel tells it (Linux); no library is imported for it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Resident(NamedTuple):
    """Bytes of resident memory of this process.

    Attributes:
      earlier: the peak from its start to the call: imports, compilation, warming up.
      before: what it holds when the call begins.
      peak: the peak during the call.
    """

    earlier: int
    before: int
    peak: int

    @property
    def beyond(self) -> int:
        """What the call took on top of what was there."""
        return self.peak - self.before


def resident(call: Callable[[], Any]) -> Resident | None:
    """The resident memory around `call()`; None where the kernel does not tell, and then it may not have been called.

    The same for every library: it asks the kernel, not an allocator. Memory that the allocator holds free is given back
    first, or the call would find room in it unseen.
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        earlier = _status("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return None
    call()
    return Resident(earlier, before, _status("VmHWM"))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))
