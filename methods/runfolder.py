"""The folder of one run: its settings, its metrics, its results, all written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class RunFolder:
    """`config.json`, `metrics.jsonl` and results of one run. The same settings continue it, others are refused.

    Args:
      path: the folder; made if it is not there.
      settings: a dataclass; what `config.json` holds, the folder's own path left out.

    Raises:
      ValueError: if the folder holds a run with other settings, or something that is not a run.
    """

    def __init__(self, path: Path, settings: Any):
        self.path = path
        config = {k: v for k, v in dataclasses.asdict(settings).items() if k != "out"}
        config = json.loads(json.dumps(config, default=str))
        if (path / "config.json").is_file():
            there = self.read("config")
            changed = [k for k in {**config, **there} if config.get(k) != there.get(k)]
            if changed:
                raise ValueError(
                    f"{path} holds a run with other settings ({', '.join(sorted(changed))}): "
                    "repeat them to continue it, or name another folder with --out."
                )
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path} exists and holds no run: name another folder with --out.")
        path.mkdir(parents=True, exist_ok=True)
        self.write("config", config)
        self._rows = self._read_rows()

    def write(self, name: str, value: Any) -> None:
        """Writes `value` as `name.json`."""
        self.write_text(f"{name}.json", json.dumps(value, indent=2, default=_plain) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file: beside it first, then renamed."""
        self._write_bytes(name, text.encode("utf-8"))

    def write_arrays(self, name: str, tree: Any) -> None:
        """Writes the arrays of a pytree as `name.safetensors`."""
        from safetensors.numpy import save

        arrays = {key: np.ascontiguousarray(leaf) for key, leaf in _leaves(tree).items()}
        self._write_bytes(f"{name}.safetensors", save(arrays))

    def read_arrays(self, name: str, like: Any) -> Any:
        """What `name.safetensors` holds, in the structure of `like`.

        Raises:
          ValueError: if it is damaged, or of another structure.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

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
        file = self.path / f"{name}.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is damaged ({error}): delete it to have it made again.") from None

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """`name.json`, made by `make()` if it is not there yet."""
        if not (self.path / f"{name}.json").is_file():
            self.write(name, make())
        return self.read(name)

    def log(self, stage: str) -> Callable[[int, Any, Mapping[str, Any]], None]:
        """A callback of `bilevel.run` that adds its rows to `metrics.jsonl`; a repeated step replaces its row."""

        def callback(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
            count = len(next(iter(metrics.values())))
            for i in range(count):
                row = {"stage": stage, "step": step - count + i + 1}
                self._rows[stage, row["step"]] = row | {name: np.asarray(v[i]).tolist() for name, v in metrics.items()}
            text = "".join(json.dumps(row, default=_plain) + "\n" for row in self._rows.values())
            self.write_text("metrics.jsonl", text)

        return callback

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The logged rows of one stage, by step."""
        return [row for (of, _), row in sorted(self._rows.items()) if of == stage]

    def _write_bytes(self, name: str, data: bytes) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=target.name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise

    def _read_rows(self) -> dict[tuple[str, int], dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        try:
            rows = [json.loads(line) for line in lines]
            return {(row["stage"], row["step"]): row for row in rows}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it to have it made again.") from None


def _leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by the names of their places."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return value.tolist() if isinstance(value, np.ndarray) else str(value)
