"""Whether the files of a run still are what they were when it made them, by their sha256.

A result names the files that were made with it under "files", with their sha256. `finished.json` has that of every
result, of all else that the run read or wrote on its way, and of the rows of its steps, `metrics.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from methods import files, seconds

CONFIG, FINGERPRINT, METRICS = "config.json", "fingerprint.json", "metrics.jsonl"
FINISHED = "finished"
OTHERWISE = "put the old one back, or make the run again in another folder"
"""What to do about a damaged file that is not made again, or without which a folder holds no run, or not a known one:
`METRICS`, `CONFIG`, `FINGERPRINT`."""


def sha256(file: Path) -> str | None:
    """Of what a file holds; None where it is not there."""
    if not file.is_file():
        return None
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def read_json(file: Path) -> Any:
    """What a JSON file of a run folder holds, its texts as `writable`.

    Raises:
      ValueError: if it is damaged.
    """
    try:
        return writable(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        remedy = OTHERWISE if file.name in (CONFIG, FINGERPRINT) else "delete it to have it made again"
        raise ValueError(f"{file} is damaged ({error}): {remedy}.") from None


def writable(value: Any) -> Any:
    """A value of JSON whose texts can be written and drawn: half a character, which JSON can have, is its escape."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, list):
        return [each if type(each) in (int, float) else writable(each) for each in value]
    if isinstance(value, dict):
        return {writable(name): writable(each) for name, each in value.items()}
    return value


def read_object(file: Path) -> dict[str, Any]:
    """As `read_json`, of a file that holds an object."""
    found = read_json(file)
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged (no object but {type(found).__name__}): {OTHERWISE}.")
    return found


def marks(path: Path, passed_over: tuple[str, ...]) -> dict[str, list[int]]:
    """Each file below a folder, by what tells that it was written anew; not what lies under the names passed over."""
    every = (file for file in path.rglob("*") if file.is_file())
    named = {file.relative_to(path).as_posix(): file.stat() for file in every}
    return {
        name: [status.st_ino, status.st_mtime_ns, status.st_size]
        for name, status in named.items()
        if name.split("/")[0] not in passed_over and not Path(name).name.startswith(files.PART)
    }


def is_whole(path: Path, name: str) -> bool:
    """Whether a run folder has `name.json`, and every file that it names under "files".

    Raises:
      ValueError: if such a file is not what it was when it was made.
    """
    file = path / f"{name}.json"
    if not file.is_file():
        return False
    made = {path / each: digest for each, digest in _made_with(read_json(file)).items()}
    if not all(each.is_file() for each in made):
        return False
    for each, digest in made.items():
        if digest not in (None, sha256(each)):
            raise ValueError(
                f"{each} is not what it was when {name} was made: put the old one back, or delete it to have it made "
                "again."
            )
    return True


def _made_with(told: Any) -> dict[str, str | None]:
    """The files that a result names, by their sha256; None where it only says that there are some."""
    made = told.get("files") if isinstance(told, dict) else None
    if isinstance(made, dict):
        return {str(name): str(digest) for name, digest in made.items()}
    return {str(name): None for name in made} if isinstance(made, list) else {}


class Finished(NamedTuple):
    """What a finished run has.

    Attributes:
      arms: the rows of its results, in their order.
      selection: whether it has a selection.
      sha256: of each `name.json` that it read or wrote, by name; None of those that were not there.
      metrics: the sha256 of `METRICS`; None where there is none, and where an earlier version did not write it down.
    """

    arms: list[str]
    selection: bool
    sha256: dict[str, str | None]
    metrics: str | None = None

    @property
    def results(self) -> set[str]:
        """The names of its results, and of its selection."""
        return {*(f"results/{name}" for name in self.arms), *(["selection"] if self.selection else [])}


def read_finished(told: Any, file: Path) -> Finished:
    """`finished.json`, as it was read.

    Raises:
      ValueError: if it does not tell what it is there for.
    """
    kinds = {"arms": list, "selection": bool, "sha256": dict}
    if isinstance(told, dict) and all(isinstance(told.get(name), kind) for name, kind in kinds.items()):
        found = Finished(*(told[name] for name in kinds), metrics=told.get("metrics"))
        named = {name for name in found.sha256 if name.startswith("results/") or name == "selection"}
        if found.arms and found.results == named and isinstance(found.metrics, str | None):
            return found
    raise ValueError(
        f"{file} does not tell which models the run has, and what their files hold: delete it to have it made again."
    )


def check_unchanged(path: Path, finished: Finished) -> None:
    """Raises ValueError if something of a finished run is not what it was; what is not there has not changed."""
    for name, digest in finished.sha256.items():
        file = path / f"{name}.json"
        if file.is_file() and sha256(file) != digest:
            raise ValueError(
                f"{file} is not what it was when the run was finished: put the old one back, or delete it to have it "
                "made again."
            )


def changed_metrics(path: Path) -> str | None:
    """What became of `METRICS` since a run was finished; None where they are what they were, or nothing tells of it."""
    told, file = path / f"{FINISHED}.json", path / METRICS
    try:
        digest = read_finished(read_json(told), told).metrics
    except (OSError, ValueError):  # no finished run, or a sentence of its own
        return None
    gone = not file.is_file() or not file.stat().st_size
    if digest is None:  # where it is not told, the seconds of steps tell that there were some
        changed = gone and bool(seconds.read(path / seconds.FILE))
    else:
        changed = digest != sha256(file)
    what = "gone, which was there" if gone else "not what it was"
    return f"{file} is {what} when the run was finished" if changed else None
