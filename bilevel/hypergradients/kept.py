"""Where a replayed training keeps its states: on the device, in the host's memory, or in a folder.

A folder holds one estimate. Its journal says how far it has come and names the files that this needs; a file is written
whole, under a name of its own, before the journal names it, so that a process may be killed at any moment.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.sharding.processes import on_host, put
from bilevel.trees import PyTree, leaf_names

JOURNAL = "replay.json"
_VERSION = 2


class Store(Protocol):
    """Trees of plain arrays by name; random keys come as their words."""

    def put(self, name: str, tree: PyTree) -> None:
        """Keeps a tree, in place of an older one of that name."""
        ...

    def get(self, name: str, like: PyTree) -> PyTree:
        """The tree of that name, each leaf where that of `like` lies."""
        ...

    def drop(self, name: str) -> None:
        """Lets go of a tree; of one that is not kept, nothing."""
        ...

    def commit(self, done: int) -> None:
        """Says that `done` actions are done, and that what was put and dropped so far belongs to that."""
        ...

    def clear(self) -> None:
        """Lets go of everything."""
        ...


class OnDevice:
    """Trees stay where they are."""

    def __init__(self):
        self._trees: dict[str, PyTree] = {}

    def put(self, name: str, tree: PyTree) -> None:
        self._trees[name] = self._outward(tree)

    def get(self, name: str, like: PyTree) -> PyTree:
        return self._inward(self._trees[name], like)

    def drop(self, name: str) -> None:
        self._trees.pop(name, None)

    def commit(self, done: int) -> None:
        pass

    def clear(self) -> None:
        self._trees.clear()

    def _outward(self, tree: PyTree) -> PyTree:
        return tree

    def _inward(self, tree: PyTree, like: PyTree) -> PyTree:
        del like
        return tree


class OnHost(OnDevice):
    """Trees lie in the host's memory."""

    def _outward(self, tree: PyTree) -> PyTree:
        return jax.tree.map(on_host, tree)

    def _inward(self, tree: PyTree, like: PyTree) -> PyTree:
        return _placed(tree, like)


class InFolder:
    """Trees lie in files, and what was committed is found again.

    Args:
      folder: one that is there, and writable.
      problem: what the estimate computes, by name, as hashes: a folder of another problem is refused.
      point: where it computes that: an unfinished estimate at another point is begun anew, with a warning.

    Attributes:
      done: actions done, as the journal has it.

    Raises:
      ValueError: for a folder that holds something else, or a journal that cannot be read; names it.
    """

    def __init__(self, folder: str | Path, problem: Mapping[str, str], point: Mapping[str, str]):
        self.folder, self.done = Path(folder), 0
        self._problem, self._point = dict(problem), dict(point)
        self._files: dict[str, str] = {}
        self._count = 0
        found = self._journal()
        if found is not None and self._is_this(found):
            self.done, self._files, self._count = found["done"], found["files"], found["count"]
            for file in self._files.values():
                if not (self.folder / file).is_file():
                    raise ValueError(f"{self.folder / file} is missing, which {JOURNAL} beside it names: {_REMEDY}.")
        self._sweep()

    def put(self, name: str, tree: PyTree) -> None:
        self._count += 1
        file = f"{name}.{self._count}{_STATE}"
        arrays: dict[str, Any] = {"name": np.frombuffer(file.encode(), np.uint8)}
        for number, (path, leaf) in enumerate(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)):
            array = on_host(leaf)
            words = f"{number} {path} {array.dtype} {list(array.shape)}"
            arrays[f"{number}"] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            arrays[f"{number} is"] = np.frombuffer(words.encode(), np.uint8)
        self._write(file, lambda stream: np.savez(stream, **arrays))
        self._files[name] = file

    def get(self, name: str, like: PyTree) -> PyTree:
        file = self.folder / self._files[name]
        found = []
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                if arrays["name"].tobytes().decode() != file.name:
                    raise KeyError(file.name)
                for number, (path, leaf) in enumerate(zip(leaf_names(like), jax.tree.leaves(like), strict=True)):
                    wanted = f"{number} {path} {np.dtype(leaf.dtype)} {list(leaf.shape)}"
                    if arrays[f"{number} is"].tobytes().decode() != wanted:
                        raise KeyError(number)
                    found.append(arrays[f"{number}"].view(leaf.dtype).reshape(leaf.shape))
                if len(arrays.files) != 2 * len(found) + 1:
                    raise KeyError(len(found))
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            said = "holds other arrays" if isinstance(error, KeyError) else "is damaged"
            raise ValueError(f"{file} {said}: {_REMEDY}.") from None
        return _placed(jax.tree.unflatten(jax.tree.structure(like), found), like)

    def drop(self, name: str) -> None:
        self._files.pop(name, None)

    def commit(self, done: int) -> None:
        self.done = done
        note = {"version": _VERSION, "problem": self._problem, "point": self._point}
        note |= {"done": done, "count": self._count, "files": self._files}
        self._write(JOURNAL, lambda stream: stream.write(json.dumps(note, indent=1).encode()))
        self._sweep()

    def clear(self) -> None:
        self._files.clear()
        (self.folder / JOURNAL).unlink(missing_ok=True)
        self._sweep()

    def _journal(self) -> Any:
        """What the journal says; None in a folder without one."""
        others = sorted(path.name for path in self.folder.iterdir())
        if JOURNAL not in others:
            if foreign := [name for name in others if not _is_ours(name)]:
                raise ValueError(
                    f"{self.folder} holds {foreign[0]}, which is none of Replay's files: name a folder of its own."
                )
            return None
        try:
            found = json.loads((self.folder / JOURNAL).read_text())
            assert found["version"] == _VERSION and isinstance(found["done"], int) and isinstance(found["count"], int)
            assert all(_is_ours(file) for file in found["files"].values())
            assert isinstance(found["problem"], dict) and isinstance(found["point"], dict)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
            raise ValueError(f"{self.folder / JOURNAL} is damaged, or of another version: {_REMEDY}.") from None
        return found

    def _is_this(self, found: Any) -> bool:
        if differing := [name for name, value in self._problem.items() if found["problem"].get(name) != value]:
            raise ValueError(
                f"{self.folder} holds an unfinished estimate of another problem (other: {', '.join(differing)}): "
                "name another folder, or remove this one."
            )
        if differing := [name for name, value in self._point.items() if found["point"].get(name) != value]:
            warnings.warn(
                f"{self.folder} holds an unfinished estimate at another point (other: {', '.join(differing)}): it is "
                "begun anew.",
                stacklevel=2,
            )
            return False
        return True

    def _sweep(self) -> None:
        """Removes what the journal no longer names."""
        wanted = set(self._files.values()) | {JOURNAL}
        for path in self.folder.iterdir():
            if path.name not in wanted and _is_ours(path.name):
                path.unlink(missing_ok=True)

    def _write(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        try:
            part = self.folder / f"{uuid.uuid4().hex[:8]}{_PART}"
            try:
                with part.open("wb") as stream:
                    write(stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(part, self.folder / name)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(
                f"{self.folder / name} cannot be written ({error.strerror or error}): what was done before is "
                "kept, and the same estimate goes on from it once there is room."
            ) from error


# Ends that no other program gives its files: what has one of them may be removed.
_STATE, _PART = ".replay-state.npz", ".replay-part"
_REMEDY = "remove the folder to begin this estimate anew, unless another estimate uses it just now"


def _is_ours(name: Any) -> bool:
    if not isinstance(name, str) or Path(name).name != name:
        return False
    return name.endswith((_STATE, _PART))


def _placed(tree: PyTree, like: PyTree) -> PyTree:
    """Arrays of the host, each where that of `like` lies."""
    place = lambda x, leaf: jnp.asarray(x) if leaf.sharding is None else put(x, leaf.sharding)  # noqa: E731
    return jax.tree.map(place, tree, like)


def refuse_without_room(folder: str | Path, size: int) -> None:
    """Makes a folder, if it is not there, for so many bytes, those of states that lie there already included.

    Raises:
      ValueError: if it cannot be made.
      OSError: if its disk has fewer free; the folder is then not left behind.
    """
    there, known = Path(folder), Path(folder).exists()
    try:
        there.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = "a file of that name is there" if there.is_file() else error.strerror
        raise ValueError(f"Replay(store={str(folder)!r}): no such folder can be made ({said}): name another.") from None
    kept = sum(path.stat().st_size for path in there.iterdir() if _is_ours(path.name))
    if (free := shutil.disk_usage(there).free) < size - kept:
        if not known:
            there.rmdir()
        raise OSError(
            f"Replay(store={str(folder)!r}) needs {_bytes(size - kept)} there, and the disk has {_bytes(free)} free: "
            "make room, take longer segments, or a schedule that keeps fewer (keep='sqrt')."
        )


def _bytes(size: int) -> str:
    power = min(int(math.log(max(size, 1), 1000)), 4)
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
