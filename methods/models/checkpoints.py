"""Checkpoint files, read as data: a Hugging Face folder (safetensors) or a GGUF file. Never pickle, never
code.

Both become a `Checkpoint`: settings, tensor names, and a function that reads one tensor.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint.

    kind: which of a tensor's names hold. where: the file or folder, for messages. settings: config.json, or
    the GGUF metadata. architecture: `model_type` or `general.architecture`. read: name -> array as stored,
    dequantised.
    """

    kind: Literal["hf", "gguf"]
    where: str
    architecture: str
    settings: Mapping[str, Any]
    names: frozenset[str]
    read: Callable[[str], np.ndarray]


@contextlib.contextmanager
def explain(message: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn any of `errors` raised inside into one ValueError: `message`, and the reason if it has one."""
    try:
        yield
    except errors as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{message} ({type(error).__name__}{': ' + reason if reason else ''}).") from error


def open_folder(folder: Path) -> Checkpoint:
    """A folder with config.json and model.safetensors, or shards and their model.safetensors.index.json.

    Raises FileNotFoundError if a file is missing, ValueError if one cannot be read or the weights are
    quantised.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give a folder in Hugging Face layout or a .gguf file.")
    with explain(f"{path} is not valid JSON: fetch it again", ValueError):
        settings = json.loads(path.read_text(encoding="utf-8"))
    if "quantization_config" in settings:
        raise ValueError(
            f"{folder} holds quantised weights, which are not read: use the unquantised checkpoint or GGUF."
        )
    home = _tensor_files(folder)
    return Checkpoint(
        kind="hf",
        where=str(folder),
        architecture=str(settings.get("model_type")),
        settings=settings,
        names=frozenset(home),
        read=_safetensors_reader(folder, home),
    )


def _tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file of the folder that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with explain(f"{index} is no index of shards: fetch it again", ValueError, KeyError):
            home = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        missing = sorted({name for name in home.values() if not (folder / name).is_file()})
        if missing:
            raise FileNotFoundError(f"{folder} lacks the shard {missing[0]} that its index names: fetch it again.")
        return home
    found = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors").is_file():
        found = [folder / "model.safetensors"]
    if len(found) != 1:
        pickled = "" if found or not list(folder.glob("*.bin")) else " (its .bin files are pickles, which are not read)"
        raise FileNotFoundError(
            f"{folder} has {len(found) or 'no'} .safetensors files and no index{pickled}: save the "
            "model with safetensors as model.safetensors."
        )
    return dict.fromkeys(_safetensors_names(found[0]), found[0].name)


def _safetensors_names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    with explain(f"{path} is truncated or no safetensors file: fetch it again", SafetensorError, OSError):
        with safe_open(path, "numpy") as file:
            return list(file.keys())


def _safetensors_reader(folder: Path, home: Mapping[str, str]) -> Callable[[str], np.ndarray]:
    """name -> array; each file is opened once, when it is first needed."""
    import ml_dtypes  # noqa: F401  (gives numpy its bfloat16)
    from safetensors import SafetensorError, safe_open

    opened: dict[str, Any] = {}

    def read(name: str) -> np.ndarray:
        path = folder / home[name]
        with explain(f"{path} cannot give the tensor {name!r}: fetch it again", SafetensorError, OSError, TypeError):
            if path.name not in opened:
                opened[path.name] = safe_open(path, "numpy")
            return opened[path.name].get_tensor(name)

    return read


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF file, in any quantisation that the `gguf` package can undo. Raises ValueError if damaged."""
    import gguf

    broken = f"{path} is truncated or no GGUF file: fetch it again"
    with explain(broken, ValueError, IndexError, KeyError, OverflowError, MemoryError, OSError):
        reader = gguf.GGUFReader(path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
    if "general.architecture" not in meta:
        raise ValueError(f"{path} names no general.architecture: it holds no model.")
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        with explain(f"{path} cannot give the tensor {name!r}", ValueError, NotImplementedError):
            data = tensor.data
            # The package undoes 16 rows at a time, however short. Rows are whole blocks of it: many pass for one.
            many = math.gcd(len(data), 64) if data.ndim == 2 else 1
            array = gguf.quants.dequantize(data.reshape(-1, many * data.shape[-1]), tensor.tensor_type)
            return array.reshape(tensor.shape[::-1])

    return Checkpoint("gguf", str(path), str(meta["general.architecture"]), meta, frozenset(tensors), read)
