"""Saving and restoring the state of a run, typed random keys included. Atomic: a checkpoint is whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel.running.feeds import noted
from bilevel.running.fingerprint import differences
from bilevel.running.interrupts import uninterrupted
from bilevel.settings.fields import checked
from bilevel.settings.rules import is_folder
from bilevel.sharding.processes import attempt, count, everyone, is_first, several
from bilevel.trees import PyTree, is_key

_HASHES = "sha256.json"
"""In a checkpoint's folder: the hash of every other file."""
_FINGERPRINT = "fingerprint.json"
"""Beside the checkpoints: what run they are of."""
_UNHASHED = f"{_HASHES} is missing"
_KEPT = 2
_NAMED = 8
"""Most differences that a message names."""


class Checkpoints:
    """Numbered checkpoints of a pytree in `folder`, the newest two kept, and the fingerprint of their run.

    Saving is orbax's: it writes beside and renames, so that a run killed at any moment leaves whole checkpoints only.
    Hashes of the files are added after that, so that damage is seen before anything is read. Other files and folders
    may lie there too, with a number for a name: only what holds a checkpoint is read, renamed or removed.

    Raises:
      ValueError: if it is no folder, or cannot be made or written.

    Examples:
      >>> import tempfile
      >>> from bilevel.extend import Checkpoints
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     print(Checkpoints(folder).note(steps=10))  # noted with the newest checkpoint: there is none
      None
    """

    def __init__(self, folder: str | Path):
        checked("Checkpoints", "folder", folder, is_folder)
        self._folder = Path(folder).absolute()
        try:
            with attempt("looking at its checkpoint_dir"):
                self._folder.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".probe"):
                    pass
            if several():
                self._refuse_unshared()
        except OSError as error:
            raise ValueError(
                f"checkpoint_dir {self._folder} cannot be written ({error.strerror or error}): name another folder."
            ) from None
        self._managed: Any = None

    def _refuse_unshared(self) -> None:
        """Raises ValueError if the folder is another one in another process: by a file that the first leaves there."""
        probe = self._folder / f".probe-{everyone(os.urandom(8).hex())[0]}"
        with attempt("writing to its checkpoint_dir"):
            if is_first():
                probe.touch()
        try:
            with attempt("looking at its checkpoint_dir"):
                if not _appears(probe):
                    raise ValueError(
                        f"checkpoint_dir {self._folder} is another folder in process {jax.process_index()} than in "
                        "process 0: name one that all hosts see."
                    )
        finally:
            if is_first():
                probe.unlink(missing_ok=True)

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return max(self._steps(), default=None)

    def note(self, steps: int) -> dict[str, Any] | None:
        """What `save` noted with the newest whole checkpoint, by its names; None if there is none.

        Warns:
          RuntimeWarning: if a newer one is damaged; names it.

        Raises:
          ValueError: if all are damaged, or if the run is beyond `steps`.
        """
        damaged = {step: why for step in self._steps() if (why := self._damage(step)) is not None}
        whole = [step for step in self._steps() if step not in damaged]
        # Killed between orbax's renaming and the hashes: whole as far as anybody knows, and taken if there is no other.
        new = [step for step, why in damaged.items() if why == _UNHASHED]
        if not (usable := whole or new):
            # What has the name of a checkpoint and is none would be in the way of those to come.
            damaged = damaged or {step: "it is no checkpoint" for step in self._steps(ours=False)}
            if not damaged:
                return None
            told = "; ".join(f"{step}: {why}" for step, why in sorted(damaged.items()))
            raise ValueError(
                f"checkpoint_dir {self._folder} holds no checkpoint that can be read ({told}): restore its files, or "
                "name an empty folder to start again."
            )
        if (step := max(usable)) > steps:
            raise ValueError(
                f"run(steps={steps}): {self._folder} holds a checkpoint of step {step}; ask for at least as many "
                "steps, or name another checkpoint_dir."
            )
        for other, why in sorted(damaged.items()):
            if other > step:
                warnings.warn(
                    f"Checkpoint {self._folder / str(other)} is damaged ({why}): the run goes on from {step}.",
                    RuntimeWarning,
                    stacklevel=3,
                )
        note = self._read_note(step)
        if note["processes"] != count() and any(note["feeds"]):
            raise ValueError(
                f"Checkpoint {self._folder / str(step)} was written by {note['processes']} processes with an iterator, "
                f"of which each has read rows of its own, but there are {count()} now: resume with as many."
            )
        return note

    def claim(self, fingerprint: Mapping[str, str], record: str, note: Mapping[str, Any] | None) -> None:
        """Makes the folder that of the run of `fingerprint`, which records `record` and resumes from `note`.

        Warns:
          RuntimeWarning: if it holds checkpoints without a fingerprint.

        Raises:
          ValueError: if it holds checkpoints of another run: names what differs; and in a run of one of several
            processes alone.
        """
        if count() < jax.process_count():
            raise ValueError(
                f"checkpoint_dir {self._folder}: this run is that of one of {jax.process_count()} processes alone, and "
                "what is not of all of them is not saved: give a sharding over jax.devices(), or start the process "
                "without jax.distributed."
            )
        file = self._folder / _FINGERPRINT
        if file.is_dir():
            raise ValueError(f"{file} is a folder, where the fingerprint of the run belongs: move it away.")
        if note:
            if note["record"] != record:
                raise ValueError(
                    f"{self._folder} holds a run that recorded {note['record']}, but record= gives {record} now: "
                    "record the same to continue it, or name another checkpoint_dir."
                )
            if not file.exists():
                warnings.warn(
                    f"{self._folder} has no {_FINGERPRINT}: whether its checkpoints are of this run is not checked.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            elif changed := self._differences(file, fingerprint):
                more = f"; and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
                raise ValueError(
                    f"{self._folder} holds another run, which differs in {'; '.join(changed[:_NAMED])}{more}: repeat "
                    "what it was started with to continue it, or name another checkpoint_dir; where the difference is "
                    f"meant, delete {file} to continue all the same."
                )
        if is_first():
            _write(file, json.dumps(fingerprint, indent=1) + "\n")

    def _differences(self, file: Path, fingerprint: Mapping[str, str]) -> list[str]:
        try:
            old = _read_json(file)
            if not isinstance(old, dict) or not all(isinstance(value, str) for value in old.values()):
                raise ValueError(f"{file.name} is damaged (it holds no texts by name)")
            return differences(old, fingerprint)
        except (OSError, ValueError) as error:
            raise ValueError(f"{_line(error)}: delete {file} to continue its run unchecked.") from None

    def save(
        self,
        step: int,
        state: PyTree,
        history: dict[str, np.ndarray],
        positions: list[Any],
        *,
        due: bool,
        called: int,
        record: str,
    ) -> bool:
        """Saves checkpoint `step`; whether it could. Signals wait until it is whole.

        Args:
          step: outer steps done.
          state: of the solver.
          history: the rows of metrics so far.
          positions: `Feed.position` of each feed.
          due: whether callbacks have yet to be called for this step, or have stopped the run.
          called: the step that callbacks were called for last.
          record: what the run records.

        Warns:
          RuntimeWarning: if it cannot be written. Those that are there stay.
        """
        args, folder = self._ocp.args, self._folder / str(step)
        feeds = [noted(at) for at in positions]
        note = {"step": step, "due": due, "called": called, "record": record, "feeds": feeds}
        if several():  # each has read rows of its own
            note["feeds_of"] = everyone(feeds)
        items = args.Composite(
            state=args.StandardSave(_without_keys(state)),
            history=args.StandardSave(history),
            note=args.JsonSave(note),
        )
        with uninterrupted():
            try:
                # What was moved goes on there, and what was removed is not wanted: neither is made anew.
                if not self._folder.is_dir():
                    raise FileNotFoundError("its folder was moved or removed")
                if folder.exists() and not _is_checkpoint(folder):
                    raise FileExistsError("something that is no checkpoint has its name: move it away")
                with attempt(f"saving checkpoint {folder}"), _quiet():
                    self._manager.save(step, args=items, force=True)
                with attempt(f"finishing checkpoint {folder}"):
                    if is_first():
                        hashes = {str(file.relative_to(folder)): _hash(file) for file in _files(folder)}
                        _write(folder / _HASHES, json.dumps(hashes))
                        for old in sorted(self._steps())[:-_KEPT]:
                            shutil.rmtree(self._folder / str(old))
            except Exception as error:  # a full disk comes as many kinds
                self._clear()
                warnings.warn(
                    f"Checkpoint {folder} could not be written ({_line(error)}); earlier ones are as they were.",
                    RuntimeWarning,
                    stacklevel=3,
                )
                return False
        return True

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, np.ndarray]]:
        """`(state, history)` of checkpoint `step`; the state has the structure, shapes and key types of `like`.

        Raises:
          ValueError: if the checkpoint does not fit `like` or cannot be read.
        """
        args = self._ocp.args
        with attempt("putting damaged checkpoints aside"):
            for other in self._steps() if is_first() else ():
                if other > step:  # damaged: out of the way of those to come
                    names = (f"{other}.damaged{f'-{i}' * (i > 1)}" for i in itertools.count(1))
                    aside = next(path for name in names if not (path := self._folder / name).exists())
                    os.replace(self._folder / str(other), aside)
        target = jax.tree.map(_abstract, _without_keys(like))
        items = args.Composite(state=args.StandardRestore(target), history=args.StandardRestore())
        try:
            with _quiet():
                saved = self._manager.restore(step, args=items)
        except Exception as error:  # orbax raises many kinds, none of which names what to do
            raise ValueError(
                f"Checkpoint {self._folder / str(step)} does not fit this solver or is damaged ({_line(error)}): "
                "continue with the solver it was written by, or name another checkpoint_dir."
            ) from error
        history = {name: np.asarray(rows) for name, rows in saved["history"].items()}
        return jax.tree.map(_with_keys, like, saved["state"]), history

    @property
    def _ocp(self) -> Any:
        import orbax.checkpoint as ocp  # takes seconds to import

        return ocp

    @property
    def _manager(self) -> Any:
        if self._managed is None:
            self._clear()
            # It would count, and remove, every folder with a number for a name: old ones are removed by `save`.
            options = self._ocp.CheckpointManagerOptions(
                max_to_keep=None, create=False, enable_async_checkpointing=False
            )
            self._managed = self._ocp.CheckpointManager(self._folder, options=options)
        return self._managed

    def _clear(self) -> None:
        """Removes what an interrupted or failed save has left."""
        for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
            if is_first() and path.name.partition(".")[0].isdecimal():
                shutil.rmtree(path, ignore_errors=True)
        self._managed = None

    def _steps(self, *, ours: bool = True) -> list[int]:
        found = [path for path in self._folder.iterdir() if path.name.isdecimal()]
        return [int(path.name) for path in found if not ours or _is_checkpoint(path)]

    def _damage(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint; None if nothing is."""
        folder = self._folder / str(step)
        try:
            if (noted := self._read_note(step)["step"]) != step:
                return f"it is the one of step {noted}"
            if not (folder / _HASHES).is_file():
                return _UNHASHED
            for name, value in _read_json(folder / _HASHES).items():
                if _hash(folder / name) != value:
                    return f"{name} has changed"
        except FileNotFoundError as error:
            return f"{Path(error.filename).relative_to(folder)} is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return _line(error)
        return None

    def _read_note(self, step: int) -> dict[str, Any]:
        note = _read_json(self._folder / str(step) / "note" / "metadata")
        feeds = note.get("feeds_of", [note["feeds"]])
        return {name: note[name] for name in ("step", "due", "record")} | {
            "called": note.get("called", 0),
            "feeds": feeds[jax.process_index()] if several() and len(feeds) == count() else note["feeds"],
            "processes": len(feeds),
        }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the log of orbax: what is wrong is said in a sentence by our own errors."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _appears(path: Path, seconds: float = 10.0) -> bool:
    """Whether a file is there, or comes within a while: a network's file system may take a moment to show it."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            return False
        os.listdir(path.parent)  # has some file systems look again
        time.sleep(0.1)
    return True


def _is_checkpoint(path: Path) -> bool:
    """Whether `path` is one of our checkpoints, by what is in it: damaged ones and empty folders included."""
    if not path.is_dir() or str(int(path.name)) != path.name:
        return False
    if ((path / "note" / "metadata").is_file() and (path / "state").is_dir()) or not any(path.iterdir()):
        return True
    try:
        hashes = _read_json(path / _HASHES)
    except (OSError, ValueError):
        return False
    return isinstance(hashes, dict) and "note/metadata" in hashes


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _HASHES)


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} is damaged ({error})") from None


def _write(file: Path, text: str) -> None:
    """Writes a new file beside the old one, then renames it, so that there is a whole one at any moment."""
    part = file.with_name(f".{uuid.uuid4().hex[:8]}")  # not a temporary file, which its owner alone may read
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _without_keys(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _with_keys(like: Any, x: Any) -> Any:
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like)) if is_key(like) else x
