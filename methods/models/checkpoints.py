"""Checkpoint files, read as data: a Hugging Face folder (safetensors) or a GGUF file. Never pickle, never
code.

Both become a `Checkpoint`: settings, what is stored, and a function that reads one tensor. Opening one reads headers
only, and no number of a header is believed before it has been compared with the size of its file.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np

from methods.models.keys import Sizes, shown

_LARGEST_JSON = {"config.json": 2**24, "model.safetensors.index.json": 2**26, "adapter_config.json": 2**24}
"""Bytes; the largest that are known have a tenth of it."""
_ADAPTER = "adapter_config.json"


class Stored(NamedTuple):
    """What a header says of one tensor. kind: its dtype, as the file's format names it."""

    shape: tuple[int, ...]
    kind: str


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint.

    kind: which of a tensor's names hold. where: the file or folder, for messages. settings: config.json, or
    the GGUF metadata. architecture: `model_type` or `general.architecture`. stored: name -> what its header says.
    read: name, and slices of its axes, none for all of it -> array as stored, dequantised.
    """

    kind: Literal["hf", "gguf"]
    where: str
    architecture: str
    settings: Mapping[str, Any]
    stored: Mapping[str, Stored]
    read: Callable[..., np.ndarray]

    @property
    def names(self) -> frozenset[str]:
        """Of all tensors."""
        return frozenset(self.stored)

    @property
    def sizes(self) -> Sizes:
        """What bounds the numbers in the settings."""
        longest = max((size for stored in self.stored.values() for size in stored.shape), default=0)
        return Sizes(len(self.stored), longest)

    @property
    def settings_file(self) -> str:
        """Where the settings are, for messages."""
        return str(Path(self.where) / "config.json") if self.kind == "hf" else self.where


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

    Raises FileNotFoundError if a file is missing, ValueError if one cannot be read, the weights are quantised, or the
    folder is that of an adapter, with its model or without.
    """
    path = folder / "config.json"
    if (folder / _ADAPTER).is_file():
        _refuse_adapter(folder, path.is_file())
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give a folder in Hugging Face layout or a .gguf file.")
    settings = read_json(path)
    if "quantization_config" in settings:
        raise ValueError(
            f"{folder} holds quantised weights, which are not read (quantization_config in its config.json): use the "
            "unquantised checkpoint or GGUF."
        )
    stored, read = _open_safetensors(*_tensor_files(folder))
    return Checkpoint("hf", str(folder), shown(settings.get("model_type")).strip("'"), settings, stored, read)


def _refuse_adapter(folder: Path, whole: bool) -> None:
    """Raises ValueError: for a whole model with an adapter, which other programs load with it, and for one alone."""
    if whole:
        raise ValueError(
            f"{folder} holds an adapter beside the model ({_ADAPTER}), which is not read: merge it into the model, or "
            "move it to a folder of its own."
        )
    base = read_json(folder / _ADAPTER).get("base_model_name_or_path")
    name = f"its base, {shown(base)}" if isinstance(base, str) and base else "its base, which it does not name"
    raise ValueError(f"{folder} is an adapter ({_ADAPTER}, and no config.json), not a model: give {name}.")


def read_json(path: Path) -> dict[str, Any]:
    """The one object in a file of JSON. Raises ValueError on anything else, a key that is there twice, and too much."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"the key {shown(name)} is there twice")
            found[name] = value
        return found

    if (size := path.stat().st_size) > (largest := _LARGEST_JSON[path.name]):
        raise ValueError(f"{path} has {size} bytes, more than the {largest} of any that is known: fetch it again.")
    with explain(f"{path} is not valid JSON: fetch it again", ValueError, RecursionError):
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {shown(settings)}, not an object of keys and values: fetch it again.")
    return settings


def _tensor_files(folder: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The files that hold the tensors; and, if an index says it, which is in which."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        home = read_json(index).get("weight_map")
        if not isinstance(home, dict) or not home or not all(isinstance(name, str) for name in home.values()):
            raise ValueError(f"{index} is no index of shards: its weight_map must give each tensor's file.")
        shards = {name: _shard(folder, name) for name in sorted(set(home.values()))}
        if single.is_file() and single not in shards.values():
            raise ValueError(
                f"{folder} holds model.safetensors and an index of other files, {sorted(shards)[0]} and so on: remove "
                "one of the two, for they may be of different models."
            )
        return list(shards.values()), {tensor: shards[name] for tensor, name in home.items()}
    found = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        pickled = "" if found or not list(folder.glob("*.bin")) else " (its .bin files are pickles, which are not read)"
        raise FileNotFoundError(
            f"{folder} has {len(found) or 'no'} .safetensors files and no index{pickled}: save the "
            "model with safetensors as model.safetensors."
        )
    return found, None


def _shard(folder: Path, name: str) -> Path:
    """A file that an index names: inside the folder, also if it is a link; or in the hub's cache that it links to."""
    pure = PurePosixPath(name)
    inside = bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in name
    path = folder / pure if inside and "\0" not in name else None
    with explain(f"the index of {folder} names the shard {shown(name)}, which cannot be opened", OSError):
        exists = path is not None and path.is_file()
    if path is not None and exists:
        real, home = path.resolve(), folder.resolve()
        cached = home.parent.name == "snapshots" and real.is_relative_to(home.parent.parent / "blobs")
        inside = cached or real.is_relative_to(home)
    if not inside or path is None:
        raise ValueError(
            f"the index of {folder} names the shard {shown(name)}, which is outside the folder and is not read: put "
            "the shards beside the index."
        )
    if not exists:
        raise FileNotFoundError(f"{folder} lacks the shard {name[:80]} that its index names: fetch it again.")
    return path


def _open_safetensors(
    paths: list[Path], index: Mapping[str, Path] | None
) -> tuple[dict[str, Stored], Callable[[str], np.ndarray]]:
    """What the files hold, and name -> array."""
    import ml_dtypes  # noqa: F401  (gives numpy its bfloat16)
    from safetensors import SafetensorError, safe_open

    stored, home = {}, {}
    for path in paths:
        with explain(f"{path} is truncated or no safetensors file: fetch it again", SafetensorError, OSError):
            file = safe_open(path, "numpy")
            for name in file.keys():
                if name in home:
                    raise ValueError(f"the tensor {shown(name)} is in {home[name][0]} and in {path}: fetch both again.")
                part = file.get_slice(name)
                stored[name], home[name] = Stored(tuple(part.get_shape()), part.get_dtype()), (path, file)
    for name, path in (index or {}).items():
        if name not in home or home[name][0] != path:
            raise ValueError(f"{path} cannot give the tensor {shown(name)} that its index promises: fetch both again.")
    if index is not None and (extra := sorted(home.keys() - index.keys())):
        path, _ = home[extra[0]]
        raise ValueError(f"{path} holds the tensor {shown(extra[0])}, which its index does not name: fetch both again.")

    def read(name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        path, file = home[name]
        with explain(f"{path} cannot give the tensor {name!r}: fetch it again", SafetensorError, OSError, TypeError):
            return file.get_slice(name)[part] if part else file.get_tensor(name)

    return stored, read


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF file, in any quantisation that the `gguf` package can undo. Raises ValueError if damaged."""
    from methods.models.gguf_file import dequantised, read_header

    broken = f"{path} is truncated or no GGUF file: fetch it again"
    with explain(broken, ValueError, KeyError, OverflowError, OSError):
        file = read_header(path)
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError(f"{path} names no general.architecture: it holds no model.")

    def read(name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        kind = file.tensors[name].kind.name
        with explain(f"{path} cannot give the tensor {name!r} of type {kind}", ValueError, NotImplementedError):
            return dequantised(file, name)[part]

    stored = {name: Stored(tensor.shape, tensor.kind.name) for name, tensor in file.tensors.items()}
    return Checkpoint("gguf", str(path), architecture, file.metadata, stored, read)
