"""The tensors of a checkpoint, put where the model wants them: names and shapes first, all of them, then the values.

Nothing of a file is left out in silence. A tensor is a weight; or a buffer, equal to what the model computes in its
place; or of a head that is not read, which is said; or the file is refused.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from methods import processes
from methods.models.checkpoints import Checkpoint
from methods.models.family import Family, Tensor

_LANGUAGE_MODELS = ("ForCausalLM", "LMHead", "DoubleHeads")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}
"""The bits of dtypes of 16."""


def with_head(checkpoint: Checkpoint, family: Family, config: Any) -> Any:
    """`config` with the head that the file has: the embedding, one of its own, or none.

    A head beside a config that ties it to the embedding counts if it differs, as in transformers. Where the config asks
    for one and the model is no language model (a classifier, a base model), there is none.
    """
    if not hasattr(config, "tied"):
        return config
    own = {tensor.path: tensor for tensor in family.tensors(dataclasses.replace(config, tied=False))}
    name = _find(checkpoint, family, own["head",], None)
    if name is not None and config.tied:
        embedding = _name(checkpoint, family, own["embed",], None)
        same = checkpoint.stored[name].shape == checkpoint.stored[embedding].shape and np.array_equal(
            checkpoint.read(name), checkpoint.read(embedding)
        )
        return dataclasses.replace(config, tied=same)
    if name is None and not config.tied and not _is_language_model(checkpoint, family):
        return dataclasses.replace(config, headless=True)
    return config


def _is_language_model(checkpoint: Checkpoint, family: Family) -> bool:
    if architectures := _architectures(checkpoint):
        return any(part in one for one in architectures for part in _LANGUAGE_MODELS)
    return any(name.startswith(family.base_prefix) for name in checkpoint.names)


def _architectures(checkpoint: Checkpoint) -> list[str]:
    found = checkpoint.settings.get("architectures") or []
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"{checkpoint.where}: architectures {found!r} is not a list of names of classes.")
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


def read_weights(
    checkpoint: Checkpoint,
    family: Family,
    config: Any,
    dtype: np.dtype,
    sharding: bilevel.Sharding | None = None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The stacked weights and those of a classification head, one array at a time.

    With `sharding` an array goes to its devices before the next one is read: none but that one is held on the host, and
    of that one, if it is split and stored as safetensors, what the devices of this process hold.

    Raises ValueError on a tensor that is missing, left over, of the wrong shape or dtype, or not finite, and on one
    that is another in another process.
    """
    places = _places(checkpoint, family, config, family.tensors(config))
    classifies = any(kind.endswith("ForSequenceClassification") for kind in _architectures(checkpoint))
    head_places = _places(checkpoint, family, config, family.head(config)) if classifies else []
    _check_labels(checkpoint, head_places)
    read, of_head = ({name for _, names in some for name in names} for some in (places, head_places))
    _account_for_the_rest(checkpoint, family, config, read, of_head)
    weights, head = {}, {}
    for tensor, names in places:
        shape = (config.num_layers, *tensor.shape) if tensor.stacked else tensor.shape

        def part(index, shape=shape, tensor=tensor, names=names):
            """The part of an array that `index`, a slice for each axis, names."""
            index = tuple(slice(*axis.indices(size)) for axis, size in zip(index, shape, strict=True))
            taken = tuple(axis.stop - axis.start for axis in index)
            out = aligned(taken, dtype)
            layers = list(zip(names[index[0]], out, strict=True)) if tensor.stacked else [(names[0], out)]
            first = int(tensor.stacked)
            inside = () if taken[first:] == shape[first:] else index[first:]  # none: all of a tensor
            for name, place in layers:
                _fill(place, name, tensor, checkpoint, family, inside)
            return out

        _put(weights, tensor.path, _placed(tensor, shape, dtype, part, checkpoint.kind, sharding))
    for tensor, (name,) in head_places:
        labels = checkpoint.stored[name].shape[0]
        out = np.empty([labels if size < 0 else size for size in tensor.shape], dtype)
        _fill(out, name, tensor, checkpoint, family)
        _put(head, tensor.path, jnp.asarray(out))
    return weights, head or None


def _places(
    checkpoint: Checkpoint, family: Family, config: Any, tensors: tuple[Tensor, ...]
) -> list[tuple[Tensor, list[str]]]:
    """Each tensor with its name, or its names for all layers. All are there, and of the right shape."""
    places = []
    for tensor in tensors:
        layers = range(config.num_layers) if tensor.stacked else [None]
        names = [_name(checkpoint, family, tensor, layer) for layer in layers]
        wanted = tensor.stored_shape(checkpoint.kind)
        for name in names:
            shape, kind = checkpoint.stored[name]
            if len(shape) != len(wanted) or any(-1 != size != got for size, got in zip(wanted, shape, strict=True)):
                raise ValueError(
                    f"tensor {name!r} of {checkpoint.where} has shape {shape} where the config asks for {wanted}: "
                    "config and weights are of different models."
                )
            if checkpoint.kind == "hf" and kind not in _FLOATS:
                raise ValueError(
                    f"tensor {name!r} of {checkpoint.where} is stored as {kind}, but only {', '.join(sorted(_FLOATS))} "
                    "are read: use the unquantised checkpoint or GGUF."
                )
        places.append((tensor, names))
    return places


def _find(checkpoint: Checkpoint, family: Family, tensor: Tensor, layer: int | None) -> str | None:
    """What the checkpoint calls the tensor: by today's name, an older one, or either with another prefix or none."""
    name = (tensor.hf if checkpoint.kind == "hf" else tensor.gguf).format(layer=layer)
    older = [name.removesuffix(new) + old for new, old in family.renamed if name.endswith(new)]
    for known in (name, *older):
        bare = known.removeprefix(family.base_prefix)
        other = family.other_prefix + bare if family.other_prefix and bare != known else bare
        for candidate in (known, bare, other):
            if candidate in checkpoint.stored:
                return candidate
    return None


def _name(checkpoint: Checkpoint, family: Family, tensor: Tensor, layer: int | None) -> str:
    if (found := _find(checkpoint, family, tensor, layer)) is not None:
        return found
    name = (tensor.hf if checkpoint.kind == "hf" else tensor.gguf).format(layer=layer)
    raise ValueError(
        f"{checkpoint.where} lacks the tensor {name!r}: the download is incomplete, or config and weights "
        "are of different models."
    )


def _check_labels(checkpoint: Checkpoint, places: list[tuple[Tensor, list[str]]]) -> None:
    """A head's rows are as many as the config has labels."""
    labels = checkpoint.settings.get("id2label")
    said = len(labels) if isinstance(labels, dict) else checkpoint.settings.get("num_labels")
    rows = {checkpoint.stored[name].shape[0] for tensor, (name,) in places if -1 in tensor.shape}
    if said is not None and rows and rows != {said}:
        raise ValueError(
            f"{checkpoint.settings_file} has {said!r} labels (id2label, num_labels), but the classification head has "
            f"{', '.join(map(str, sorted(rows)))} rows: config and weights are of different models."
        )


def _account_for_the_rest(
    checkpoint: Checkpoint, family: Family, config: Any, read: set[str], of_head: set[str]
) -> None:
    """A tensor nobody read is a part of the network that the model would silently do without."""
    unread, unknown = [], []
    half_read = {name.partition(".")[0] for name in of_head} - {family.base_prefix.rstrip(".")}
    for name in sorted(checkpoint.names - read - of_head):
        check = next((family.buffers[rule] for rule in family.buffers if fnmatchcase(name, rule)), None)
        if check is not None:
            if not check(checkpoint.read(name), config):
                raise ValueError(
                    f"the buffer {name!r} of {checkpoint.where} is not what a {family.name} model with this config "
                    "computes in its place: config and weights are of different models."
                )
        elif name.partition(".")[0] not in half_read and any(fnmatchcase(name, rule) for rule in family.heads):
            unread.append(name)
        elif not (getattr(config, "tied", False) and name in ("lm_head.weight", "output.weight")):
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{checkpoint.where} has {len(unknown)} tensor{'s' * (len(unknown) != 1)} that a {family.name} model does "
            f"not use, such as {unknown[0]!r}: it is of another architecture than it says."
        )
    if unread:
        warnings.warn(
            f"{checkpoint.where} holds a head that is not read ({', '.join(unread[:3])}"
            f"{f' and {len(unread) - 3} more' if unread[3:] else ''}): what is loaded is the model without it.",
            stacklevel=4,
        )


def _placed(
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: np.dtype,
    part: Callable[[tuple[slice, ...]], np.ndarray],
    kind: str,
    sharding: bilevel.Sharding | None,
) -> jax.Array:
    """An array of the weights where it is to be, made of its parts."""
    path, whole = tensor.path, (slice(None),) * len(shape)
    if sharding is None:
        return jax.device_put(part(whole))
    where = _at(sharding.frozen(_nested(path, jax.ShapeDtypeStruct(shape, dtype))), path).sharding
    if kind == "gguf" or where.is_fully_replicated:  # one tensor of GGUF is dequantised as a whole
        return _at(sharding.frozen(_nested(path, part(whole))), path)
    if not where.is_fully_addressable:
        # Others read the rest, maybe from a file of their own: the first and the last row of each tensor tell another.
        layers = whole[: int(tensor.stacked)]
        with processes.attempt():
            ends = [part((*layers, end, *whole[len(layers) + 1 :])) for end in (slice(0, 1), slice(-1, None))]
        sharding.replicated(_nested(path, ends), what="A weight")
    read: dict[tuple[Any, ...], np.ndarray] = {}  # devices that hold the same part share it

    def once(index: Any) -> np.ndarray:
        key = tuple((axis.start, axis.stop) for axis in index)
        if key not in read:
            read[key] = part(index)
        return read[key]

    with processes.attempt():
        return jax.make_array_from_callback(shape, where, once)


def _fill(
    place: np.ndarray, name: str, tensor: Tensor, checkpoint: Checkpoint, family: Family, index: tuple[slice, ...] = ()
) -> None:
    """Reads one tensor, or the part of it that `index` names, into its place. Raises ValueError if it is not finite."""
    if checkpoint.kind == "hf":
        array = _oriented(checkpoint.read(name, _stored(index, tensor)), tensor, checkpoint, family, cut=not index)
    else:
        array = _oriented(checkpoint.read(name), tensor, checkpoint, family)[index]
    with np.errstate(over="ignore", invalid="ignore"):
        place[...] = array
    if not is_finite(place):
        fault, remedy = "holds values that are not finite", "its training diverged, or the file is damaged"
        if is_finite(np.ascontiguousarray(array)):
            fault, remedy = f"holds values too large for {place.dtype}", "load it with another dtype"
        raise ValueError(f"tensor {name!r} of {checkpoint.where} {fault}: {remedy}.")


def is_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; in one or two passes and, but for 16 bits, without an array beside it."""
    if not array.size:
        return True
    if (infinity := _INFINITY.get(array.dtype.name)) is not None:
        return int((array.view(np.uint16) & 0x7FFF).max()) < infinity
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def _stored(index: tuple[slice, ...], tensor: Tensor) -> tuple[slice, ...]:
    """Slices of a tensor as the model wants it, as slices of what a safetensors file holds."""
    if not index:
        return ()
    first, _ = tensor.cut
    index = (*index[:-1], slice(index[-1].start + first, index[-1].stop + first))
    return index[::-1] if tensor.turned("hf") else index


def _oriented(
    array: np.ndarray, tensor: Tensor, checkpoint: Checkpoint, family: Family, *, cut: bool = True
) -> np.ndarray:
    """As the model wants it: rotary pairs half a head apart, [in, out], and with `cut` only the tensor's part of it."""
    if tensor.interleaved_heads and checkpoint.kind == "gguf" and checkpoint.architecture in family.gguf_interleaved:
        heads = array.reshape(tensor.interleaved_heads, -1, 2, *array.shape[1:])
        array = heads.swapaxes(1, 2).reshape(array.shape)
    if tensor.turned(checkpoint.kind):
        array = array.T
    first, whole = tensor.cut
    return array[..., first : first + tensor.shape[-1]] if whole and cut else array


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts at a multiple of 64 bytes: such a one jax takes over as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _nested(path: tuple[str, ...], value: Any) -> Any:
    return functools.reduce(lambda inside, key: {key: inside}, reversed(path), value)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
