"""Pretrained models from a folder, a GGUF file or the hub, as a linen module and its stacked weights."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from methods.models import bert, gemma, gpt2, llama, opt
from methods.models.checkpoints import Checkpoint, explain, open_folder, open_gguf
from methods.models.family import Family, Tensor
from methods.models.heads import Classifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FAMILIES: tuple[Family, ...] = (llama.FAMILY, gemma.FAMILY, gpt2.FAMILY, opt.FAMILY, *bert.FAMILIES)
"""Every family that `load` knows. A new one is a new file and an entry here."""

_HUB_FILES = ("*.json", "model*.safetensors", "tokenizer.model", "*.txt", "*.jinja")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclasses.dataclass(frozen=True)
class HFNames:
    """What the model is called in Hugging Face's world: all that writing a PEFT adapter needs.

    base_model: for `base_model_name_or_path`. modules: site -> module name with "{layer}". head: path in a
    `Classifier`'s parameters, ("out", "kernel") -> tensor name; kernels are stored transposed, [out, in]. conv1d: its
    linears are of the class Conv1D, which PEFT is to be told.
    """

    base_model: str
    modules: Mapping[str, str]
    head: Mapping[tuple[str, ...], str] = dataclasses.field(default_factory=dict)
    conv1d: bool = False

    def module(self, site: str, layer: int) -> str:
        """The module at a site: ("q_proj", 3) -> "model.layers.3.self_attn.q_proj". Raises ValueError."""
        if site not in self.modules:
            raise ValueError(f"{site!r} is no linear of this model: choose from {', '.join(self.modules)}.")
        return self.modules[site].format(layer=layer)


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A model and its weights: `model.apply({"params": weights}, tokens, mask, adapt)`.

    config has num_layers, vocab_size, hidden_size, max_positions and site_shapes(). Weights of the layers are
    stacked: weights["blocks"]["q_proj"]["kernel"] is [num_layers, in, out]. tokenizer is None if a folder
    brings none. head: parameters of a `Classifier`, if the checkpoint is of a classification or regression model.
    """

    name: str
    model: nn.Module
    config: Any
    weights: dict[str, Any]
    tokenizer: "PreTrainedTokenizerFast | None"
    hf_names: HFNames
    head: dict[str, Any] | None = None

    def classifier(self, num_labels: int, dtype: Any = jnp.float32) -> Classifier:
        """The head that transformers puts on this model; one label for regression.

        Features come from `model.apply({"params": weights}, tokens, mask, adapt, method="features")`, parameters from
        `classifier.init(key, features)["params"]`, or `head`. Raises ValueError for less than one label.
        """
        if num_labels < 1:
            raise ValueError(f"num_labels={num_labels} must be at least 1: the number of classes, or 1 for regression.")
        paths = self.hf_names.head
        return Classifier(num_labels, ("dense", "kernel") in paths, ("out", "bias") in paths, dtype)


def load(
    name_or_path: str | Path,
    *,
    dtype: Any = jnp.float32,
    accumulate: Any = None,
    check: Callable[[Any, nn.Module], None] | None = None,
) -> Pretrained:
    """A pretrained model: a folder in Hugging Face layout, a .gguf file (dequantised), or a name on the hub.

    Weights become `dtype`, whatever they were stored as; the model computes in it, and with `accumulate` only the
    products, whose results are of that dtype: `dtype=bfloat16, accumulate=float32`. At most one array more than the
    weights is held at a time. `check(config, model)` is called before weights are read, to refuse a model that does not
    fit.

    Raises FileNotFoundError if there is no such file, folder or model, and ValueError if a file is damaged,
    the architecture is not known, a tensor is missing, left over or of the wrong shape, the tokenizer has
    more tokens than the embedding, or a dtype is not available.
    """
    dtype = _check_dtype(dtype)
    accumulate = None if accumulate is None else _check_dtype(accumulate)
    path = locate(str(name_or_path))
    checkpoint = open_folder(path) if path.is_dir() else open_gguf(path)
    family = _family(checkpoint)
    message = f"{checkpoint.where} cannot be read as a {family.name} model"
    with explain(message, ValueError, KeyError, TypeError, OSError):
        settings = _settings(checkpoint, family, path)
        config = family.from_hf(settings, checkpoint.names)
    model = family.build(config, param_dtype=dtype, accumulate=accumulate)
    if check is not None:
        check(config, model)
    tokenizer = _tokenizer(checkpoint, path)
    if tokenizer is not None and family is gemma.FAMILY:
        gemma.begin_with_bos(tokenizer)
    if tokenizer is not None and max(tokenizer.get_vocab().values()) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of {checkpoint.where} has ids up to {max(tokenizer.get_vocab().values())}, but "
            f"the embedding has {config.vocab_size} rows: tokenizer and weights are of different models."
        )
    head = {tensor.path: tensor.hf for tensor in family.head(config)}
    conv1d = any(tensor.conv1d for tensor in family.tensors(config))
    weights, head_weights = _weights(checkpoint, family, config, model, dtype)
    return Pretrained(
        name=str(name_or_path),
        model=model,
        config=config,
        weights=weights,
        tokenizer=tokenizer,
        hf_names=HFNames(str(name_or_path), family.modules, head, conv1d),
        head=head_weights,
    )


def _check_dtype(dtype: Any) -> np.dtype:
    dtype = np.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"weights cannot be {dtype}: choose a floating-point dtype.")
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError('dtype float64 needs jax.config.update("jax_enable_x64", True) before the first array.')
    return dtype


def locate(name: str) -> Path:
    """The folder or file that a name stands for, fetched from the hub if it is none here."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    local = path.is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf") or name.count("/") > 1
    # A name on the hub looks like a path of two parts; where the first is a folder here, the second was meant to be.
    if local or (len(path.parts) == 2 and Path(path.parts[0]).is_dir()):
        raise FileNotFoundError(f"there is no model at {name}: give a folder, a .gguf file or a name on the hub.")
    import huggingface_hub

    def fetched(**options: Any) -> Path:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES), **options))

    try:
        # One question without retries: what downloads asks again for half a minute where there is no network.
        huggingface_hub.HfApi().model_info(name, timeout=10)
        return fetched()
    except Exception as error:  # whatever stops the hub, the remedy is the same
        try:
            return fetched(local_files_only=True)
        except Exception:
            raise FileNotFoundError(
                f"{name!r} is no folder or .gguf file here, and the hub did not give it "
                f"({type(error).__name__}): check the name and the network, or download the model and give its folder."
            ) from error


def _family(checkpoint: Checkpoint) -> Family:
    attribute = "model_types" if checkpoint.kind == "hf" else "gguf_architectures"
    for family in FAMILIES:
        if checkpoint.architecture in getattr(family, attribute):
            return family
    known = ", ".join(name for family in FAMILIES for name in getattr(family, attribute))
    raise ValueError(
        f"{checkpoint.where} is of architecture {checkpoint.architecture!r}, which is not known: {known} are."
    )


def _settings(checkpoint: Checkpoint, family: Family, path: Path) -> Mapping[str, Any]:
    if checkpoint.kind == "gguf" and family.from_gguf is not None:
        return family.from_gguf(checkpoint.settings, checkpoint.names, checkpoint.read)
    from transformers import AutoConfig  # knows each architecture's defaults and old spellings

    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).to_dict()


def _tokenizer(checkpoint: Checkpoint, path: Path) -> "PreTrainedTokenizerFast | None":
    if checkpoint.kind == "gguf":
        from methods.models import gguf_tokenizer

        return gguf_tokenizer.build(checkpoint.settings, checkpoint.where)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    message = f"the tokenizer of {path} cannot be read: fetch its files again"
    with explain(message, OSError, ValueError, KeyError, TypeError, ImportError):
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _weights(
    checkpoint: Checkpoint, family: Family, config: Any, model: nn.Module, dtype: np.dtype
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The stacked weights and those of a classification head, one array at a time."""
    wanted = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
    weights, head, used = {}, {}, set()
    for tensor in family.tensors(config):
        shape = wanted
        for key in tensor.path:
            shape = shape[key]
        names = [_name(checkpoint, family, tensor, layer) for layer in range(config.num_layers)]
        used.update(names)
        _put(weights, tensor.path, _array(checkpoint, family, tensor, names, shape.shape, dtype))
    classifies = any(
        kind.endswith("ForSequenceClassification") for kind in checkpoint.settings.get("architectures") or ()
    )
    for tensor in family.head(config) if classifies else ():
        name = _name(checkpoint, family, tensor, None)
        array = _oriented(checkpoint.read(name), tensor, checkpoint, family)
        used.add(name)
        _put(head, tensor.path, jnp.asarray(np.ascontiguousarray(array, dtype)))
    _refuse_leftovers(checkpoint, family, config, used)
    return weights, head or None


def _array(
    checkpoint: Checkpoint, family: Family, tensor: Tensor, names: list[str], shape: tuple[int, ...], dtype: np.dtype
) -> jax.Array:
    """One array of the weights, read into its place layer by layer."""
    out = _aligned(shape, dtype)
    for name, place in zip(names, out if tensor.stacked else [out], strict=False):
        array = _oriented(checkpoint.read(name), tensor, checkpoint, family)
        if array.shape != place.shape:
            raise ValueError(
                f"tensor {name!r} of {checkpoint.where} has shape {array.shape} where the config asks "
                f"for {place.shape}: config and weights are of different models."
            )
        place[...] = array
    return jax.device_put(out)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts at a multiple of 64 bytes: such a one jax takes over as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _name(checkpoint: Checkpoint, family: Family, tensor: Tensor, layer: int | None) -> str:
    """What the checkpoint calls the tensor: by today's name, an older one, or either without the base's prefix."""
    name = (tensor.hf if checkpoint.kind == "hf" else tensor.gguf).format(layer=layer)
    older = [name.removesuffix(new) + old for new, old in family.renamed if name.endswith(new)]
    for known in (name, *older):
        for candidate in (known, known.removeprefix(family.base_prefix)):
            if candidate in checkpoint.names:
                return candidate
    raise ValueError(
        f"{checkpoint.where} lacks the tensor {name!r}: the download is incomplete, or config and weights "
        "are of different models."
    )


def _oriented(array: np.ndarray, tensor: Tensor, checkpoint: Checkpoint, family: Family) -> np.ndarray:
    """As the model wants it: rotary pairs half a head apart, [in, out], and only the tensor's part of it."""
    if tensor.interleaved_heads and checkpoint.kind == "gguf" and checkpoint.architecture in family.gguf_interleaved:
        heads = array.reshape(tensor.interleaved_heads, -1, 2, *array.shape[1:])
        array = heads.swapaxes(1, 2).reshape(array.shape)
    if tensor.transpose and not (tensor.conv1d and checkpoint.kind == "hf"):
        array = array.T
    index, count = tensor.part
    size = array.shape[-1] // count
    return array[..., index * size : (index + 1) * size] if count > 1 else array


def _refuse_leftovers(checkpoint: Checkpoint, family: Family, config: Any, used: set[str]) -> None:
    """A tensor nobody read is a part of the network that the model would silently do without."""
    ignored = family.ignored + (("*lm_head.weight",) if getattr(config, "tied", False) else ())
    left = sorted(
        name for name in checkpoint.names - used if not any(fnmatch.fnmatchcase(name, rule) for rule in ignored)
    )
    if left:
        raise ValueError(
            f"{checkpoint.where} has {len(left)} tensors that a {family.name} model does not use, such as "
            f"{left[0]!r}: it is of another architecture than it says."
        )
