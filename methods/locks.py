"""A run folder belongs to one process at a time: two that write into it would spoil each other's files.

The lock is the system's, on a file of the folder. It goes when its process ends, however that ends; the file stays. In
one process a folder may be opened more than once. Where the system, or the file system, has no such locks, nothing is
locked.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FILE = ".lock"
"""Its name in a run folder."""
_held: dict[tuple[int, int], tuple[int, int]] = {}
"""By device and inode of a locked file, its handle and how many hold it in this process."""


class Lock:
    """The lock of a folder, which is made if it is not there; held as long as the object is there.

    Raises:
      ValueError: if another process has it.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._key = _take(folder / FILE, make=True)
        if self._key is not None:
            weakref.finalize(self, _release, self._key)


def check(folder: Path) -> None:
    """Raises ValueError if another process has the lock of `folder`; leaves nothing behind."""
    key = _take(folder / FILE, make=False)
    if key is not None:
        _release(key)


def _take(file: Path, *, make: bool) -> tuple[int, int] | None:
    if fcntl is None:
        return None
    if (key := _key(file)) in _held:  # by this process, which another handle of the file would wait for
        _held[key] = _held[key][0], _held[key][1] + 1
        return key
    try:
        handle = _opened(file, make)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(
            f"{file.parent} is in use by another process, which writes a run there: wait until that has ended, or name "
            "another folder with --out."
        ) from None
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    key = _key(file)
    _held[key] = handle, 1
    return key


def _key(file: Path) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return 0, 0
    return status.st_dev, status.st_ino


def _opened(file: Path, make: bool) -> int:
    created = os.O_CREAT if make else 0
    try:
        return os.open(file, os.O_RDWR | created, 0o666)
    except PermissionError:  # somebody else's, in a folder of both
        return os.open(file, os.O_RDONLY)


def _release(key: tuple[int, int]) -> None:
    handle, count = _held.pop(key)
    if count > 1:
        _held[key] = handle, count - 1
    else:
        os.close(handle)
