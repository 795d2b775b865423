"""The folder of one run: its settings, its metrics, its results, all written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.extend import Tracker
from methods import files, fingerprint, integrity, locks, processes, seconds, tracking
from methods.causes import reading
from methods.integrity import CONFIG, FINGERPRINT, FINISHED, METRICS, OTHERWISE, read_json, read_object
from methods.locks import Lock
from methods.logs import LOGGER
from methods.seconds import Clock

_MOVE = "move it away, or name another folder with --out"
FREE = ("mesh", "coordinator", "processes", "process", "quiet", "track", "keep_checkpoints")
"""Settings that change no result, to rounding: a run goes on with others."""
OF_STEPS = (METRICS, seconds.FILE, "checkpoints", "tensorboard", "tracking.json")
"""Files and folders that are written at every step, or tell of the run alone."""
FILES = (FINGERPRINT, METRICS, seconds.FILE, "report.md", "config.yaml", "selection.json", f"{FINISHED}.json")
FOLDERS = ("adapter", "peft", "checkpoints", "figures", "results", "tried", "validation")


def check(path: Path, settings: Any, unsettled: Sequence[str] = ()) -> None:
    """All that can be said of a run folder before there is anything to put into it. Leaves nothing behind.

    Args:
      path: the folder.
      settings: as of `RunFolder`.
      unsettled: settings whose values are not known yet, and are not compared.

    Raises:
      ValueError: if it cannot be written, is being written by another process, holds a run with other settings or of
        other versions, or something that is not a run; and where the processes of a command have different settings.
      ModuleNotFoundError: if what `--track` needs is not installed.
    """
    shared = {name: value for name, value in _config(settings).items() if name not in FREE or name in ("mesh", "track")}
    processes.agree("The options", shared | {"out": str(path)})
    processes.decided(lambda: _check(path, settings, unsettled))
    tracking.check(getattr(settings, "track", None))


def _check(path: Path, settings: Any, unsettled: Sequence[str]) -> None:
    files.check_writable(path)
    locks.check(path)
    if not (path / CONFIG).is_file():
        # What a run leaves that was killed while it made its folder is no run, and no stranger's file.
        strangers = path.is_dir() and any(
            entry.name not in (FINGERPRINT, locks.FILE) and not entry.name.startswith(files.PART)
            for entry in path.iterdir()
        )
        if strangers:
            raise ValueError(f"{path} exists and holds no run: name another folder with --out.")
        return
    for name in (*FOLDERS, *FILES):
        if (path / name).is_symlink() and not (path / name).exists():
            raise ValueError(f"{path / name} is a link to nothing: remove it, or name another folder with --out.")
    for name in FOLDERS:
        if (path / name).exists() and not (path / name).is_dir():
            raise ValueError(f"{path / name} is a file where a run has a folder: {_MOVE}.")
    for name in FILES:
        if (path / name).is_dir():
            raise ValueError(f"{path / name} is a folder where a run has a file: {_MOVE}.")
    if not (path / FINGERPRINT).is_file():
        raise ValueError(
            f"{path} is no run, or one that does not tell which data, model and versions it is of (no {FINGERPRINT}): "
            "name another folder with --out."
        )
    config, there = _config(settings), read_object(path / CONFIG)
    compared = {**config, **there}.keys() - {*FREE, *unsettled}
    changed = sorted(name for name in compared if config.get(name) != there.get(name))
    derived = {field.name for field in dataclasses.fields(settings) if field.metadata.get("derived")}
    changed = [name for name in changed if name not in derived] or changed
    if changed:
        first = f"{changed[0]} was {there.get(changed[0])!r} and is {config.get(changed[0])!r}"
        raise ValueError(
            f"{path} holds a run with other settings ({', '.join(changed)}): {first}; "
            "repeat them to continue it, or name another folder with --out."
        )
    if changed := fingerprint.difference(_read_fingerprint(path / FINGERPRINT)["versions"], fingerprint.versions()):
        raise ValueError(
            f"{path} holds a run of other versions: {changed}; continue it with those, or name another folder with "
            "--out."
        )
    if told := integrity.changed_metrics(path):
        raise ValueError(f"{told}: {OTHERWISE}.")


class RunFolder:
    """`config.json`, `fingerprint.json`, `metrics.jsonl` and results of one run. What is the same continues it.

    Args:
      path: the folder; made if it is not there.
      settings: a dataclass; what `config.json` holds, the folder's own path left out.
      inputs: what the run reads, `{name: fingerprint.rows(...) or fingerprint.arrays(...)}`.
      model: the folder or file of the model.
      found: settings whose values were not asked for, but found in the rows.

    Raises:
      ValueError: as `check`; and if the folder holds a run of other inputs, or of another model.
    """

    def __init__(
        self,
        path: Path,
        settings: Any,
        inputs: Mapping[str, Any] | None = None,
        model: Path | None = None,
        found: Sequence[str] = (),
    ):
        check(path, settings)
        self.path, self._known = path, {}
        self._used: set[str] = set()
        self._touched: set[str] = set()
        self._options, self._track = _config(settings), getattr(settings, "track", None)
        now = {"versions": fingerprint.versions(), "inputs": dict(inputs or {}), "found": sorted(found)}
        processes.agree("Versions", now["versions"])
        processes.agree("Rows, of --data or the hub,", now["inputs"])
        self._lock: Lock | None = None
        processes.decided(lambda: self._open(settings, now, model))

    def _open(self, settings: Any, now: dict[str, Any], model: Path | None) -> None:
        path = self.path
        self._lock = Lock(path)  # as long as this object is there; the process that writes has it
        before = _read_fingerprint(path / FINGERPRINT) if (path / CONFIG).is_file() else {}
        known = before.get("model files", {})
        if isinstance(before.get("found"), list):  # a run that goes on may be given what it has found
            now["found"] = before["found"]
        now = now | {"model files": {} if model is None else fingerprint.model_files(model, known)}
        for part, title in (("inputs", "rows"), ("model files", "model files")):
            if before and (changed := fingerprint.difference(before[part], now[part])):
                raise ValueError(
                    f"{path} holds a run of other {title}: {changed}; put the old ones back to continue it, or name "
                    "another folder with --out."
                )
        for name, value in (("fingerprint", now), ("config", _config(settings))):  # with the last the folder is a run
            self._write(name, value)
        self._known = {of: _mark(line) for of, line in self._lines()}
        _whole_lines(path / seconds.FILE)

    def write(self, name: str, value: Any) -> None:
        """Writes `value` as `name.json`."""
        self._used.add(name)
        self._write(name, value)

    def _write(self, name: str, value: Any) -> None:
        self.write_text(f"{name}.json", json.dumps(value, indent=2, default=_plain) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file, whole or not at all."""
        self._check_lock()
        self._touched.add(name)
        files.write_text(self.path / name, text)

    def _check_lock(self) -> None:
        """Raises ValueError if another process may write here by now."""
        if self._lock is not None:
            self._lock.check()

    def has(self, name: str) -> bool:
        """Whether there is a `name.json`."""
        return processes.decided(lambda: (self.path / f"{name}.json").is_file())

    def write_arrays(self, name: str, tree: Any) -> None:
        """Writes the arrays of a pytree as `name.safetensors`."""
        from safetensors.numpy import save

        self._check_lock()
        arrays = {key: np.ascontiguousarray(leaf) for key, leaf in _leaves(tree).items()}
        files.write_bytes(self.path / f"{name}.safetensors", save(arrays))

    def read_arrays(self, name: str, like: Any) -> Any:
        """What `name.safetensors` holds, in the structure of `like`.

        Raises:
          ValueError: if it is damaged, or of another structure.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        processes.decided(lambda: None)  # the first has written
        self._touched.add(f"{name}.safetensors")
        file = self.path / f"{name}.safetensors"
        try:
            arrays = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): delete the run's folder and start again.") from None
        if set(arrays) != set(_leaves(like)):
            raise ValueError(f"{file} holds other parameters than this run trains: delete it and start again.")
        leaves = [jnp.asarray(arrays[key]) for key in _leaves(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def read(self, name: str) -> Any:
        """What `name.json` holds.

        Raises:
          ValueError: if it is damaged.
        """
        self._used.add(name)
        self._touched.add(f"{name}.json")
        return processes.decided(lambda: read_json(self.path / f"{name}.json"))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """`name.json`, made by `make()` if it is not there yet, or a file that it names under "files" is not.

        Raises:
          ValueError: as `has_all`.
        """
        if not self.has_all(name):
            with processes.attempt():
                self.write(name, make())
        elif processes.is_first():
            LOGGER.info("%s: already finished, in %s", name, self.path)
        return self.read(name)

    def has_all(self, name: str) -> bool:
        """Whether there is a `name.json`, and every file of the run that it names under "files".

        Raises:
          ValueError: if such a file is not what it was when it was made, as its sha256 tells.
        """
        return processes.decided(lambda: integrity.is_whole(self.path, name))

    def made_by(self, make: Callable[[], Any]) -> dict[str, str]:
        """Calls `make()`; the files of the run that it wrote, without those of every step, and their sha256.

        What it reads counts as written: a run that goes on finds there what one that was not interrupted writes.
        """
        before, self._touched = self._marks(), set()
        make()
        now, found = self._marks(), self._touched
        made = sorted(name for name, mark in now.items() if before.get(name) != mark or name in found)
        return processes.decided(lambda: {name: integrity.sha256(self.path / name) for name in made})

    def _marks(self) -> dict[str, list[int]]:
        return processes.decided(lambda: integrity.marks(self.path, OF_STEPS))

    def finish(self, arms: Sequence[str], selection: bool) -> None:
        """Writes down that all is there: the rows of the results, in their order, and whether there is a selection.

        With the sha256 of these files, of all others that were read or written on the way, and of `metrics.jsonl`.
        """
        used = sorted(name for name in self._used if name not in (FINISHED, "tracking"))
        digests = processes.decided(lambda: {name: integrity.sha256(self.path / f"{name}.json") for name in used})
        if short := seconds.in_short(self.path / seconds.FILE):
            self.write_text(seconds.FILE, short)
        metrics = processes.decided(lambda: integrity.sha256(self.path / METRICS))
        self.write(FINISHED, {"arms": list(arms), "selection": selection, "sha256": digests, "metrics": metrics})

    def finished(self) -> tuple[list[str], bool] | None:
        """What `finish` was given; None where a run is not finished, or something of it has been deleted since.

        Such a run goes on, and is not finished until it is again: what it makes may differ, to rounding.

        Raises:
          ValueError: if something of it is not what it was.
        """
        if not self.has(FINISHED):
            return None
        finished = integrity.read_finished(self.read(FINISHED), self.path / f"{FINISHED}.json")
        processes.decided(lambda: integrity.check_unchanged(self.path, finished))
        read = sorted({name for name, digest in finished.sha256.items() if digest} - finished.results)
        if not all([*map(self.has_all, sorted(finished.results)), *map(self.has, read)]):
            processes.decided(lambda: (self.path / f"{FINISHED}.json").unlink())
            return None
        if processes.is_first():
            LOGGER.info("%s: already finished; only its page is made again", self.path)
        return finished.arms, finished.selection

    def forget_checkpoints(self) -> None:
        """Deletes the states of searches and trainings, which a finished run no longer needs."""
        processes.decided(lambda: shutil.rmtree(self.path / "checkpoints", ignore_errors=True))

    def log(self, stage: str) -> Callable[[int, Any, Mapping[str, Any]], None]:
        """A callback of `bilevel.run` that adds its rows to `metrics.jsonl`; a repeated step replaces its row."""

        def callback(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
            if not processes.is_first():
                return
            self._check_lock()
            count, new, replaced = len(next(iter(metrics.values()))), [], False
            for i in range(count):
                row = {"stage": stage, "step": step - count + i + 1}
                row |= {name: np.asarray(v[i]).tolist() for name, v in metrics.items()}
                line = json.dumps(row, default=_plain)
                of = stage, row["step"]
                # A run that resumes from before the last rows comes by them again, and finds the same.
                if self._known.get(of) != _mark(line):
                    replaced |= of in self._known
                    new.append((of, line))
                    self._known[of] = _mark(line)
            if replaced:
                whole = dict(self._lines()) | dict(new)
                self.write_text(METRICS, "".join(f"{line}\n" for line in whole.values()))
            elif new:
                files.append(self.path / METRICS, "".join(f"{line}\n" for _, line in new).encode())

        return callback

    def callbacks(self, stage: str) -> list[Any]:
        """Callbacks of `bilevel.run` for a stage: `log`, the seconds that it takes, and what `--track` asks for."""
        log = [self.log(stage), Clock(self.path, stage)]
        if self._track is None:
            return log
        if not self.has("tracking"):
            with processes.attempt():
                self.write("tracking", {"id": uuid.uuid4().hex[:12]})
        return [*log, tracking.tracker(self._track, self.path, stage, self.read("tracking")["id"], self._options)]

    def track(self, stage: str, values: Mapping[str, float]) -> None:
        """Hands numbers to what `--track` asks for, as one step of a stage; `metrics.jsonl` has the steps alone."""
        for callback in self.callbacks(stage):
            if processes.is_first() and isinstance(callback, Tracker):
                callback(1, None, {name: np.array([value]) for name, value in values.items()})
                callback.close()

    def tell(self, stage: str, metrics: Mapping[str, Any]) -> None:
        """What `callbacks` do with the rows of a stage that no `bilevel.run` has computed, all at once."""
        for callback in self.callbacks(stage):
            # Which process it is, a tracker knows by itself in a run alone; nobody has waited for these rows.
            if not processes.is_first() or isinstance(callback, Clock):
                continue
            callback(len(next(iter(metrics.values()))), None, metrics)
            if isinstance(callback, Tracker):
                callback.close()

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The logged rows of one stage, by step."""
        return processes.decided(
            lambda: [json.loads(line) for (of, _), line in sorted(self._lines()) if of == stage]
        )

    def _lines(self) -> list[tuple[tuple[str, int], str]]:
        """`((stage, step), line)` of `metrics.jsonl`, from which a last line that was not written whole is cut off."""
        file = self.path / METRICS
        data = _whole_lines(file)
        with reading(str(file), OTHERWISE):
            lines = data.decode("utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            return [((str(row["stage"]), int(row["step"])), line) for row, line in zip(rows, lines, strict=True)]


def _whole_lines(file: Path) -> bytes:
    """What a file holds that lines are added to, from which a last one that was not written whole is cut off."""
    if not file.is_file():
        return b""
    data = file.read_bytes()
    if torn := len(data) - (data.rfind(b"\n") + 1):
        data = data[:-torn]
        os.truncate(file, len(data))
    return data


def _read_fingerprint(file: Path) -> dict[str, Any]:
    found = read_object(file)
    if part := fingerprint.damaged(found):
        raise ValueError(f"{file} is damaged (it does not tell the {part} of the run): {OTHERWISE}.")
    return found


def _config(settings: Any) -> dict[str, Any]:
    """Settings as `config.json` holds them."""
    config = {name: value for name, value in dataclasses.asdict(settings).items() if name != "out"}
    return json.loads(json.dumps(config, default=str))


def _mark(line: str) -> int:
    """By which a repeated row is known to be the same, without keeping it."""
    return hash(line)


def _leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by the names of their places."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.generic, np.ndarray, jax.Array)) else str(value)
