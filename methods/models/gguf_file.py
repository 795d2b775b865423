"""The header of a GGUF file: its metadata, and where its tensors lie.

Written here because a reader must not trust a count before it has compared it with the file's size: the `gguf` package
loops as often as an array says it is long, beyond the end of the file. It still undoes the quantisation.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NESTED = 4  # arrays of arrays of ...; no file is known to have any
_DIMENSIONS = 4


class GGUFTensor(NamedTuple):
    """shape: as NumPy has it, rows first. kind: a `gguf.GGMLQuantizationType`. start, size: its bytes in the file."""

    shape: tuple[int, ...]
    kind: Any
    start: int
    size: int


class GGUFFile(NamedTuple):
    """A whole header. data: the file's bytes, mapped."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    data: np.ndarray


class _Cursor:
    """Reads on through the mapped file; every read is checked against what is left of it."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size} bytes are announced at byte {self.at}, {len(self.data) - self.at} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, least: int) -> int:
        """A number of things that take at least `least` bytes each."""
        count = self.number("Q")
        if count * least > len(self.data) - self.at:
            raise ValueError(f"{count} entries are announced at byte {self.at}, which the file is too short for")
        return count

    def text(self) -> str:
        return str(self.take(self.count(1)), "utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth == _NESTED:
            raise ValueError(f"no value is of the kind {kind}")
        kind = self.number("I")
        if kind in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[kind])
            count = self.count(size)
            return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self.take(count * size)))
        count = self.count(8 if kind == _STRING else 12)
        read: Callable[[], Any] = self.text if kind == _STRING else lambda: self.value(kind, depth + 1)
        return [read() for _ in range(count)]


def read_header(path: Path) -> GGUFFile:
    """The metadata and the places of the tensors, each within the file. Raises ValueError and OSError."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # ValueError for an empty file
    data, cursor = np.frombuffer(mapped, np.uint8), _Cursor(memoryview(mapped))
    if bytes(cursor.take(4)) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} of the format is not read, only 2 and 3")
    tensors, entries = cursor.count(24), cursor.count(13)
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        _once(metadata, name := cursor.text())
        metadata[name] = cursor.value(cursor.number("I"))
    places: dict[str, GGUFTensor] = {}
    for _ in range(tensors):
        _once(places, name := cursor.text())
        if (dimensions := cursor.number("I")) > _DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)])) or (1,)
        kind = GGMLQuantizationType(cursor.number("I"))
        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"{name} has rows of {shape[-1]}, no multiple of its blocks of {block}")
        places[name] = GGUFTensor(shape, kind, cursor.number("Q"), math.prod(shape) // block * size)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
        raise ValueError(f"general.alignment is {alignment}")
    start = -(-cursor.at // alignment) * alignment
    left = len(data) - start
    for name, place in places.items():
        if place.start % alignment or place.start + place.size > left:
            raise ValueError(f"the {place.size} bytes of {name} are not within the file")
        places[name] = place._replace(start=start + place.start)
    if sum(place.size for place in places.values()) > left:
        raise ValueError("the tensors overlap")
    return GGUFFile(metadata, places, data)


def _once(seen: dict[str, Any], name: str) -> None:
    if name in seen:
        raise ValueError(f"{name[:80]!r} is there twice")


def dequantised(file: GGUFFile, name: str) -> np.ndarray:
    """One tensor as numbers. Raises NotImplementedError on a kind that the `gguf` package cannot undo."""
    import gguf

    place = file.tensors[name]
    data = file.data[place.start : place.start + place.size]
    plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(place.kind.name)
    if plain is not None:
        return data.view(plain).reshape(place.shape)
    rows = math.prod(place.shape[:-1])
    # The package undoes 16 rows at a time, however short. Rows are whole blocks of it: many pass for one.
    rows = rows // math.gcd(rows, 64)
    return gguf.quants.dequantize(data.reshape(rows, -1), place.kind).reshape(place.shape)
