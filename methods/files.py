"""Files that are whole or not there: written beside their place, synced to the disk, then renamed.

Without the sync a machine that loses power can leave an empty file under the new name: a rename may reach the disk
before the bytes that it names.

Of several processes of a command the first writes; in the others all of this leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from methods import processes

PART = ".part-"
"""How the names of unfinished files begin."""
PROBE = 1 << 16
"""Bytes of a trial file: more than a full disk still gives."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`; whole and on the disk, it takes the place of `path` when the block ends.

    If the block fails it is removed, and `path` stays as it was.

    Raises:
      IsADirectoryError: if `path` is a folder.
    """
    if not processes.is_first():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder where a file is to be written: move it away.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    try:
        yield part
        readable(part)
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """As `replacing`, for a folder of files: what was in `folder` before goes when the new one is there.

    Raises:
      FileExistsError: if `folder` holds something that the new one does not, which would be lost.
    """
    if not processes.is_first():
        with tempfile.TemporaryDirectory() as fresh:
            yield Path(fresh)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(folder)
    stale = fresh.with_name(fresh.name + "-old")
    try:
        fresh.mkdir()
        yield fresh
        written = {file.name for file in fresh.iterdir()} | {"README.md"}
        strangers = sorted({entry.name for entry in folder.iterdir()} - written) if folder.is_dir() else []
        if strangers or (folder.exists() and not folder.is_dir()):
            what = f"holds {strangers[0]}" if strangers else "is a file"
            raise FileExistsError(f"{folder} is not replaced, since it {what}.")
        for file in fresh.iterdir():
            readable(file)
            sync(file)
        sync(fresh)
        if folder.exists():  # a folder with files in it cannot be renamed over
            folder.rename(stale)
        fresh.rename(folder)
        sync(folder.parent)
    except BaseException:
        if stale.exists() and not folder.exists():
            stale.rename(folder)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)


def readable(file: Path) -> None:
    """Gives a file the mode of every new one; libraries that write by a temporary file leave it to its owner alone."""
    if file.is_file():
        umask = os.umask(0)
        os.umask(umask)
        file.chmod(0o666 & ~umask)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all; its folder is made if it is not there."""
    with replacing(path) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text, in UTF-8; half a character, as JSON can have one, is written as its escape."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def append(path: Path, data: bytes, *, synced: bool = True) -> None:
    """Adds to the end of a file. What is killed in between leaves a last line that is torn.

    Not `synced`, it costs microseconds, survives the end of the process, and may be lost with the machine's power.
    """
    if not processes.is_first():
        return
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        if synced:
            os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # where folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # not every file system syncs folders
            raise
    finally:
        os.close(handle)


def check_writable(folder: Path, option: str = "--out") -> None:
    """Tries to write where `folder` is or is to be, and leaves nothing behind.

    Raises:
      ValueError: if it cannot be written, with the reason.
    """
    try:
        there = folder.absolute()
        while not there.exists() and there != there.parent:
            if there.is_symlink():
                why = f"{option} {folder} cannot be written ({there} is a link to nothing)"
                raise ValueError(f"{why}: remove it, or name another folder.")
            there = there.parent
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is a file")
        missing = folder.absolute().relative_to(there).parts
        # What is to be made is tried too: a name may be too long, or a file system may refuse folders.
        trial = _beside(there / (missing[0] if missing else "trial"))
        if missing and len(os.fsencode(max(missing, key=len))) > 255:
            raise OSError("the name is too long")
        try:
            trial.mkdir()
            with (trial / "trial").open("wb") as file:
                file.write(b"\0" * PROBE)
                file.flush()
                os.fsync(file.fileno())
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{option} {folder} cannot be written ({reason}): name another folder.") from error


def _beside(path: Path) -> Path:
    # The ending stays, which is what a writer of figures goes by.
    return path.with_name(f"{PART}{uuid.uuid4().hex[:8]}{path.suffix if len(path.suffix) < 16 else ''}")
