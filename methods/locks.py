"""A run folder belongs to one process at a time: two that write into it would spoil each other's files.

The locks are the system's: on the folder itself, and on a file of it for file systems that lock no folders. They go
when their process ends, however that ends; the file stays. In one process a folder may be opened more than once. Where
the system, or the file system, has no such locks, nothing is locked.

A lock is on what was opened, and not on the name that it had: who removes the file, or moves the folder away, lets
others in. So a process that writes asks first whether the names are still of what it has locked, `Lock.check`.
"""

from __future__ import annotations

import os
import stat
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
      ValueError: if another process has it, or something else is where its file would be.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._taken = folder, _taken(folder, make=True)
        for key in self._taken.values():
            weakref.finalize(self, _release, key)

    def check(self) -> None:
        """Raises ValueError if another process may write where this one has begun to."""
        # Who has the folder keeps out others whatever happens to the file.
        decisive = next(iter(self._taken), None)
        if decisive is not None and _key(decisive) != self._taken[decisive]:
            raise ValueError(
                f"{decisive} was moved or removed while a run was written to {self._folder}, where another process may "
                "write now: this one ends; start it again with the same command, or with another --out."
            )


def check(folder: Path) -> None:
    """Raises ValueError if another process has the lock of `folder`; leaves nothing behind."""
    for key in _taken(folder, make=False).values():
        _release(key)


def _taken(folder: Path, *, make: bool) -> dict[Path, tuple[int, int]]:
    """The locks of a folder and of its file that there are, taken, by what they are on; all or none."""
    found = {}
    try:
        for place in (folder, folder / FILE):
            if (key := _take(folder, place, make=make and place != folder)) is not None:
                found[place] = key
    except BaseException:
        for key in found.values():
            _release(key)
        raise
    return found


def _take(folder: Path, place: Path, *, make: bool) -> tuple[int, int] | None:
    if fcntl is None:
        return None
    while True:
        if (key := _key(place)) in _held:  # by this process, which another handle of the file would wait for
            _held[key] = _held[key][0], _held[key][1] + 1
            return key
        try:
            handle = _opened(place, make)
        except FileNotFoundError:
            if make:
                raise ValueError(f"{place} {_ODD} (a link to nothing): remove it, or {_OTHER}.") from None
            return None
        if place != folder and stat.S_ISDIR(os.fstat(handle).st_mode):
            os.close(handle)
            raise ValueError(f"{place} {_ODD} (a folder): remove it, or {_OTHER}.")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(
                f"{folder} is in use by another process, which writes a run there: wait until that has ended, or "
                f"{_OTHER}."
            ) from None
        except OSError:  # a file system without locks
            os.close(handle)
            return None
        status = os.fstat(handle)
        key = status.st_dev, status.st_ino
        if _key(place) == key:
            _held[key] = handle, 1
            return key
        os.close(handle)  # it was removed before it was locked: others lock what has its name now


_ODD, _OTHER = "is no file where a run has its lock", "name another folder with --out"


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
    except (IsADirectoryError, PermissionError):  # a folder, or somebody else's file in a folder of both
        return os.open(file, os.O_RDONLY)


def _release(key: tuple[int, int]) -> None:
    handle, count = _held.pop(key)
    if count > 1:
        _held[key] = handle, count - 1
    else:
        os.close(handle)
