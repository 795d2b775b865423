"""What the results of a run depend on beside its settings: versions, model files, rows. Compared when it goes on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

PACKAGES = ("bilevel", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "tokenizers", "safetensors", "gguf")
"""Those whose code the numbers of a run come from."""
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.gguf")
"""The files of a model's folder that are read."""
SEEDED = ("encoded training rows", "encoded outer rows")
"""Inputs that the seed decides, by how it splits the rows that were read."""


def versions() -> dict[str, str]:
    """Version of each package, and whether floats are 64 bits wide."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"float": "64" if jax.config.read("jax_enable_x64") else "32"}


def rows(published: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How many rows there are, and the sha256 of what they hold, wherever they were read from."""
    digest, count = hashlib.sha256(), 0
    for row in published:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        count += 1
    return {"rows": count, "sha256": digest.hexdigest()}


def arrays(tree: Any) -> dict[str, Any]:
    """The shapes of arrays, and the sha256 of what they hold."""
    leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(tree)]
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return {"shapes": [list(leaf.shape) for leaf in leaves], "sha256": digest.hexdigest()}


def model_files(path: Path, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For every file that a model is read from, its sha256, and what tells that it was not touched since.

    `known` is what an earlier call gave. Gigabytes are not read again for a file whose size, times and inode are as
    they were. The time of the last change of the inode is among them since a program can set the other one back, as
    `cp -p` does; what was only touched or copied is read, and found to be the same.
    """
    files = sorted({file for pattern in PATTERNS for file in path.glob(pattern)}) if path.is_dir() else [path]
    found = {}
    for file in files:
        if not file.is_file():
            continue
        status = os.stat(file)
        marks = {"size": status.st_size, "times": [status.st_mtime_ns, status.st_ctime_ns], "inode": status.st_ino}
        before = known.get(file.name)
        if isinstance(before, dict) and all(before.get(name) == value for name, value in marks.items()):
            found[file.name] = before
            continue
        with file.open("rb") as data:
            found[file.name] = {"sha256": hashlib.file_digest(data, "sha256").hexdigest()} | marks
    return found


def digest(path: Path) -> str:
    """The sha256 of what a model is read from: of its file, or of the names and digests of its folder's files."""
    found = {name: told["sha256"] for name, told in model_files(path, {}).items()}
    if not path.is_dir():
        return found[path.name]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first thing that two fingerprints' parts disagree in, with both values; None if they agree.

    A part is `{name: value}`, the value a text or a dict whose "sha256" is what counts.
    """
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = (_shown(part.get(name)) for part in (before, now))
        if old != new:
            return f"{name} was {old} and is {new}"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        count = f"{value['rows']} rows, " if "rows" in value else ""
        return f"{count}sha256 {str(value.get('sha256'))[:16]}"
    return "not there" if value is None else str(value)


def damaged(told: Mapping[str, Any]) -> str | None:
    """The first part that `fingerprint.json` does not tell as it should, `{name: text or dict}`; None for none."""
    for part in ("versions", "inputs", "model files"):
        found = told.get(part)
        if not isinstance(found, Mapping) or not all(isinstance(each, (str, Mapping)) for each in found.values()):
            return part
    return None


def but_for_the_seed(told: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a whole `fingerprint.json` tells, all that runs share which differ in their seed alone."""
    return {
        "versions": told["versions"],
        "inputs": {name: value for name, value in told["inputs"].items() if name not in SEEDED},
        # Not when each file was last touched.
        "model files": {name: _shown(value) for name, value in told["model files"].items()},
    }
