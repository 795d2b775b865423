"""The two files of a PEFT adapter: written together or not at all, and read with their errors explained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from methods.adapters.patterns import shortened
from methods.adapters.peft_fields import Fields, understood
from methods.files import replacing_folder

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float32", "BF16": "float32"}
_MOST_BYTES = 10**7  # of a config; PEFT's own are a few thousand


class Module(NamedTuple):
    """One module's adapter: a `[in, r]`, b `[r, out]`, for DoRA m `[out]`, and its `lora_alpha`."""

    a: np.ndarray
    b: np.ndarray
    m: np.ndarray | None
    alpha: float


def write(
    folder: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    names: tuple[str, str] = (SETTINGS, WEIGHTS),
) -> None:
    """Writes a folder that appears complete or not at all, in place of an adapter that is there already.

    Raises:
      FileExistsError: if the folder holds something else than an adapter.
    """
    from safetensors.numpy import save_file

    _refuse_strangers(folder, {*names, "README.md"})
    with replacing_folder(folder) as fresh:
        # safetensors writes the buffer as it lies in memory.
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, fresh / names[1], {"format": "pt"})
        (fresh / names[0]).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def base_model(name: str) -> str:
    """A name on the hub as it is; what lies on this machine by a path that holds wherever the adapter is loaded."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def read_settings(path: Path) -> Fields:
    """`adapter_config.json` of a LoRA.

    Raises:
      FileNotFoundError: if it is missing.
      ValueError: if it is damaged, of another kind of adapter, or asks for what our hook does not do.
    """
    return understood(read_json(path, f"a PEFT adapter is a folder with {SETTINGS} and {WEIGHTS}"), str(path))


def read_json(path: Path, what: str) -> Any:
    """The value in a config file; `what` an adapter is, for the message if there is none.

    Raises:
      FileNotFoundError: if it is missing.
      ValueError: if it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: {what}.")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, which no adapter config needs: it is damaged.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no adapter config ({type(error).__name__}: {error}).") from error


def read_tensors(path: Path, *, as_stored: bool = False, integers: bool = False) -> dict[str, np.ndarray]:
    """A file of weights, all finite; half precision becomes float32, in which PEFT computes it, unless `as_stored`.

    With `integers` int32 is read too.

    Raises:
      FileNotFoundError: if it is missing.
      ValueError: if it is damaged or empty, or a tensor is of no floating-point type or not finite.
    """
    import ml_dtypes  # noqa: F401  (gives numpy its bfloat16)
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: adapters are read from safetensors only, never from pickles.")
    tensors = {}
    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():
                kind = file.get_slice(name).get_dtype()
                if kind not in _DTYPES and not (integers and kind == "I32"):
                    known = ", ".join(_DTYPES)
                    raise ValueError(f"{path} has tensor {shortened(name)} of type {kind}: only {known} are read.")
                tensor = file.get_tensor(name)
                tensors[name] = tensor if as_stored else tensor.astype(_DTYPES[kind], copy=False)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error)[:200].split())}): copy it again.") from error
    if not tensors:
        raise ValueError(f"{path} holds no tensor.")
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"{path} has NaN or infinity in {shortened(name)}: its training diverged.")
    return tensors


def _refuse_strangers(folder: Path, known: set[str]) -> None:
    """`known`: what a folder may hold and still be replaced."""
    if folder.exists():
        strangers = sorted({entry.name for entry in folder.iterdir()} - known) if folder.is_dir() else [folder.name]
        if strangers:
            raise FileExistsError(f"{folder} is not replaced by an adapter, since it holds {strangers[0]}.")
