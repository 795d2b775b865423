"""The two files of a PEFT adapter: written together or not at all, and read with their errors explained."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_ENTRIES = {SETTINGS, WEIGHTS, "README.md"}  # what a folder may hold and still be replaced
# What PEFT's config may switch on that our hook does not do, and the value that leaves it off.
_UNSUPPORTED = {"bias": "none", "lora_bias": False, "trainable_token_indices": None, "target_parameters": None}


class Module(NamedTuple):
    """One module's adapter: a `[in, r]`, b `[r, out]`, for DoRA m `[out]`, and its `lora_alpha`."""

    a: np.ndarray
    b: np.ndarray
    m: np.ndarray | None
    alpha: float


def write(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a folder that appears complete or not at all, in place of an adapter that is there already.

    Raises:
      FileExistsError: if the folder holds something else than an adapter.
    """
    from safetensors.numpy import save_file

    _refuse_strangers(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    stale = fresh.with_name(fresh.name + "-old")
    try:
        fresh.mkdir()
        # safetensors writes the buffer as it lies in memory.
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, fresh / WEIGHTS, {"format": "pt"})
        (fresh / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if folder.exists():  # a folder with files in it cannot be renamed over
            folder.rename(stale)
        fresh.rename(folder)
    except BaseException:
        if stale.exists() and not folder.exists():
            stale.rename(folder)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)


def read_settings(path: Path) -> dict[str, Any]:
    """`adapter_config.json` of a LoRA.

    Raises:
      FileNotFoundError: if it is missing.
      ValueError: if it is damaged, of another kind of adapter, or asks for what our hook does not do.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: a PEFT adapter is a folder with {SETTINGS} and {WEIGHTS}.")
    try:
        settings = json.loads(path.read_bytes())
        kind, r, alpha = settings["peft_type"], settings["r"], settings["lora_alpha"]
        bad = not isinstance(r, int) or r < 1 or not float(alpha) > 0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no adapter config ({type(error).__name__}: {error}).") from error
    if kind != "LORA" or bad:
        raise ValueError(f"{path} is of peft_type {kind} with r={r} and lora_alpha={alpha}, which is no LoRA.")
    for key, off in _UNSUPPORTED.items():
        if settings.get(key) not in (off, None, [], False):
            raise ValueError(f"{path} sets {key}={settings[key]!r}, which our LoRA cannot represent.")
    return settings


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """`adapter_model.safetensors`, its names without PEFT's prefix.

    Raises:
      FileNotFoundError: if it is missing.
      ValueError: if it is damaged, or empty.
    """
    import ml_dtypes  # noqa: F401  (gives numpy its bfloat16)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: adapters are read from safetensors only, never from pickles.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again.") from error
    if not tensors:
        raise ValueError(f"{path} holds no tensor.")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def pattern(settings: Mapping[str, Any], table: str, module: str, default: float) -> float:
    """PEFT's look-up: the first key that, as a regular expression, matches the end of the module's name."""
    for key, value in (settings.get(table) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _refuse_strangers(folder: Path) -> None:
    if folder.exists():
        strangers = sorted({entry.name for entry in folder.iterdir()} - _ENTRIES) if folder.is_dir() else [folder.name]
        if strangers:
            raise FileExistsError(f"{folder} is not replaced by an adapter, since it holds {strangers[0]}.")
