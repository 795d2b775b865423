"""Pretrained models from a folder, a GGUF file or the hub, as a linen module and its stacked weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from methods.models import llama
from methods.models.checkpoints import Checkpoint, explain, open_folder, open_gguf
from methods.models.family import Family, Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FAMILIES: tuple[Family, ...] = (llama.FAMILY,)
"""Every family that `load` knows. A new one is a new file and an entry here."""

_HUB_FILES = ("*.json", "model*.safetensors", "tokenizer.model", "*.txt", "*.jinja")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclasses.dataclass(frozen=True)
class HFNames:
    """What the model is called in Hugging Face's world: all that writing a PEFT adapter needs.

    base_model: for `base_model_name_or_path`. modules: site -> module name with "{layer}".
    """

    base_model: str
    modules: Mapping[str, str]

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
    brings none.
    """

    name: str
    model: nn.Module
    config: Any
    weights: dict[str, Any]
    tokenizer: "PreTrainedTokenizerFast | None"
    hf_names: HFNames


def load(name_or_path: str | Path, *, dtype: Any = jnp.float32) -> Pretrained:
    """A pretrained model: a folder in Hugging Face layout, a .gguf file (dequantised), or a name on the hub.

    Weights become `dtype`, whatever they were stored as. At most one array more than the weights is held at a
    time.

    Raises FileNotFoundError if there is no such file, folder or model, and ValueError if a file is damaged,
    the architecture is not known, a tensor is missing, left over or of the wrong shape, the tokenizer has
    more tokens than the embedding, or `dtype` is not available.
    """
    dtype = _check_dtype(dtype)
    path = _locate(str(name_or_path))
    checkpoint = open_folder(path) if path.is_dir() else open_gguf(path)
    family = _family(checkpoint)
    message = f"{checkpoint.where} cannot be read as a {family.name} model"
    with explain(message, ValueError, KeyError, TypeError, OSError):
        settings = _settings(checkpoint, family, path)
        config = family.from_hf(settings)
    model = family.build(config, dtype)
    tokenizer = _tokenizer(checkpoint, path)
    if tokenizer is not None and max(tokenizer.get_vocab().values()) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of {checkpoint.where} has ids up to {max(tokenizer.get_vocab().values())}, but "
            f"the embedding has {config.vocab_size} rows: tokenizer and weights are of different models."
        )
    return Pretrained(
        name=str(name_or_path),
        model=model,
        config=config,
        weights=_weights(checkpoint, family, config, model, dtype),
        tokenizer=tokenizer,
        hf_names=HFNames(str(name_or_path), family.modules),
    )


def _check_dtype(dtype: Any) -> np.dtype:
    dtype = np.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"weights cannot be {dtype}: choose a floating-point dtype.")
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError('dtype float64 needs jax.config.update("jax_enable_x64", True) before the first array.')
    return dtype


def _locate(name: str) -> Path:
    """The folder or file that a name stands for, fetched from the hub if it is none here."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise FileNotFoundError(f"there is no model at {name}: give a folder, a .gguf file or a name on the hub.")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
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
    if checkpoint.kind == "gguf":
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


def _weights(checkpoint: Checkpoint, family: Family, config: Any, model: nn.Module, dtype: np.dtype) -> dict[str, Any]:
    """The stacked weights, one array at a time: read into its place layer by layer, then handed to jax."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    wanted = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    table, used = family.tensors(config), set()
    weights: dict[str, Any] = {}
    for tensor in table:
        shape = wanted
        for key in tensor.path:
            shape = shape[key]
        out = np.empty(shape.shape, dtype)
        for layer in range(config.num_layers) if tensor.stacked else (None,):
            name = _name(checkpoint, family, tensor, layer)
            used.add(name)
            array = _oriented(checkpoint.read(name), tensor, checkpoint, family)
            place = out if layer is None else out[layer]
            if array.shape != place.shape:
                raise ValueError(
                    f"tensor {name!r} of {checkpoint.where} has shape {array.shape} where the config asks "
                    f"for {place.shape}: config and weights are of different models."
                )
            place[...] = array
        node = weights
        for key in tensor.path[:-1]:
            node = node.setdefault(key, {})
        node[tensor.path[-1]] = jnp.asarray(out)
    _refuse_leftovers(checkpoint, family, config, used)
    return weights


def _name(checkpoint: Checkpoint, family: Family, tensor: Tensor, layer: int | None) -> str:
    name = (tensor.hf if checkpoint.kind == "hf" else tensor.gguf).format(layer=layer)
    for candidate in (name, name.removeprefix(family.base_prefix)):
        if candidate in checkpoint.names:
            return candidate
    raise ValueError(
        f"{checkpoint.where} lacks the tensor {name!r}: the download is incomplete, or config and weights "
        "are of different models."
    )


def _oriented(array: np.ndarray, tensor: Tensor, checkpoint: Checkpoint, family: Family) -> np.ndarray:
    if tensor.interleaved_heads and checkpoint.kind == "gguf" and checkpoint.architecture in family.gguf_interleaved:
        heads = array.reshape(tensor.interleaved_heads, -1, 2, *array.shape[1:])
        array = heads.swapaxes(1, 2).reshape(array.shape)
    return array.T if tensor.transpose else array


def _refuse_leftovers(checkpoint: Checkpoint, family: Family, config: Any, used: set[str]) -> None:
    """A tensor nobody read is a part of the network that the model would silently do without."""
    ignored = family.ignored + (("lm_head.weight",) if getattr(config, "tied", False) else ())
    left = sorted(name for name in checkpoint.names - used if not name.endswith(ignored))
    if left:
        raise ValueError(
            f"{checkpoint.where} has {len(left)} tensors that a {family.name} model does not use, such as "
            f"{left[0]!r}: it is of another architecture than it says."
        )
