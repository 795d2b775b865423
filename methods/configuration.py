"""`config.yaml`: what a run was made with, complete, and `--config`, which reads it to repeat the run.

    command: flexora
    settings:          # every option, with the value that was used
      model: ...
    made:              # when and with what; not read again
      date: ...
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import yaml

from methods import ranges
from methods.causes import BadInput, reading
from methods.fingerprint import versions

FILE = "config.yaml"
LARGEST = 2**20
"""Bytes of a configuration: those of a run have a few thousand."""


class _Once(yaml.SafeLoader):
    """YAML, in which a name that is there twice is an error; the last would be heard alone.

    A number that YAML would write otherwise stays text, as a word of the command line is: it has 010 as 8, 1:30 as 90.
    """


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    _check_once([key.value for key, _ in node.value], f" (line {node.start_mark.line + 1} and on)")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float | str:
    kind = node.tag.rpartition(":")[2]
    value = getattr(loader, f"construct_yaml_{kind}")(node)
    return value if yaml.safe_dump(value).split()[0] == node.value else node.value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_once([name for name, _ in pairs])
    return dict(pairs)


def _check_once(names: list[Any], where: str = "") -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(f"A configuration has {twice!r} twice{where}: give it once.")


_Once.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _kind in ("int", "float"):
    _Once.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


PATHS = ("model", "data", "test_data", "task")
"""Options that may name a file; a task does before its colon."""


def read(file: str, command: str) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """The options that a file holds, at its top or under `settings`, and what a run noted that wrote them, all it had.

    Args:
      file: .yaml, .yml, .toml or .json.
      command: for which it is read.

    Raises:
      ValueError: for a file that is not there, of another kind, damaged, or of another command.
    """
    path = Path(file)
    kinds = (".yaml", ".yml", ".toml", ".json")
    if not path.is_file():
        raise BadInput(f"There is no file {file!r}, which --config names: it is such as runs/x/{FILE}.")
    if path.suffix.lower() not in kinds:
        raise BadInput(f"--config {file} is of no kind that is read: its name must end in {', '.join(kinds)}.")
    if path.stat().st_size > LARGEST:
        raise BadInput(f"--config {file} is larger than a configuration can be, {LARGEST:,} bytes.")
    with reading(f"The configuration {file}", "look at its lines"):
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".toml":
            found: Any = tomllib.loads(text)
        elif path.suffix.lower() == ".json":
            found = json.loads(text, object_pairs_hook=_pairs)
        else:
            found = yaml.load(text, _Once)  # which is YAML's safe loader
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise BadInput(f"{file} holds no options, but {type(found).__name__}: a line of it is such as rank: 8.")
    of = found.get("command") or command
    if of != command:
        raise BadInput(f"{file} is of the command {of!r}, and not of {command!r}: run bilevel {of} --config {file}.")
    inner = found.get("settings", {name: value for name, value in found.items() if name not in ("command", "made")})
    if not isinstance(inner, Mapping):
        raise BadInput(f"{file} has settings that are no options, but {type(inner).__name__}.")
    if "settings" in found and (others := sorted(found.keys() - {"command", "settings", "made"})):
        raise BadInput(f"{file} has {others[0]!r} beside its settings: options belong under one of the two.")
    noted = found.get("made", {})
    return dict(inner), (noted if isinstance(noted, Mapping) else {}) if "made" in found else None


def check_place(file: str, settings: Any, configured: Mapping[str, Any], noted: Mapping[str, Any]) -> None:
    """Makes sure that the paths of a run's configuration are seen from here.

    Raises:
      ValueError: for one that is not, but would be from the folder where the run was made.
    """
    folder = Path(str(noted.get("folder", "")))
    for name in PATHS:
        value = getattr(settings, name, None)
        if not isinstance(value, str) or value != configured.get(name):
            continue
        path = Path(value.rpartition(":")[0] if name == "task" else value)
        if path.name and not path.is_absolute() and not path.exists() and (folder / path).exists():
            raise BadInput(
                f"{file} was made in {folder}, from where its {name} {value} is seen, but not from here: run the "
                f"command there, or give --{name.replace('_', '-')}."
            )


def text(command: str, settings: Any, options: type) -> str:
    """`config.yaml` of a run.

    Args:
      command: its name.
      settings: with the values that were used.
      options: the dataclass of the options that the command takes; what `settings` has beside them is left out.
    """
    whole = {"command": command, "settings": _values(settings, options), "made": made()}
    head = f"# bilevel {command} --config THIS_FILE --out ANOTHER_FOLDER makes this run again;\n"
    head += "# paths that are not absolute are seen from the folder below `made`.\n"
    return head + yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=100)


def check(file: Path, command: str, settings: Any, options: type, free: Collection[str]) -> None:
    """Makes sure that a run's `config.yaml` tells what the run was made with, settings in `free` aside.

    Raises:
      ValueError: if it does not.
    """
    try:
        found, _ = read(str(file), command)
    except BadInput as error:
        raise BadInput(f"{file} is damaged, or of another command: delete it to have it made again.") from error
    used = _values(settings, options)
    for name in sorted({*found, *used}.difference(free)):
        told, value = (yaml.safe_dump(each.get(name), allow_unicode=True).split("\n...")[0] for each in (found, used))
        if name not in found or name not in used or told != value:
            with_ = f"what this run was made with, {name} = {value.strip()}"
            raise BadInput(f"{file} does not tell {with_}: delete it to have it made again.")


def _values(settings: Any, options: type) -> dict[str, Any]:
    return {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(options)}


def made() -> dict[str, Any]:
    """When, on what, and with which versions."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "folder": os.getcwd(),
        "git": git_state(),
        "versions": versions(),
    }


def git_state() -> str | None:
    """The commit that the command is run in, with "and changes" where files differ from it; None outside of git."""

    def asked(*words: str) -> str:
        found = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True)
        return found.stdout.strip()

    try:
        commit = asked("rev-parse", "HEAD")
        return f"{commit} and changes" if asked("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _plain(value: Any) -> Any:
    """A value as YAML has it."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, ranges.AtMost):
        return int(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
