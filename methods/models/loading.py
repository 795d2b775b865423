"""Pretrained models from a folder, a GGUF file or the hub, as a linen module and its stacked weights."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from methods.models import bert, gemma, gpt2, keys, llama, opt, phi3
from methods.models.checkpoints import Checkpoint, explain, open_folder, open_gguf
from methods.models.family import Family
from methods.models.heads import Classifier
from methods.models.weights import read_weights, with_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    phi3.FAMILY,
    gemma.FAMILY,
    gpt2.FAMILY,
    opt.FAMILY,
    *bert.FAMILIES,
)
"""Every family that `load` knows. A new one is a new file and an entry here."""

_HUB_FILES = ("*.json", "model*.safetensors", "tokenizer.model", "*.txt", "*.jinja")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclasses.dataclass(frozen=True)
class HFNames:
    """What the model is called in Hugging Face's world: all that writing a PEFT adapter needs.

    base_model: for `base_model_name_or_path`: an absolute path, or a name on the hub. modules: site -> module name with
    "{layer}". head: path in a `Classifier`'s parameters, ("out", "kernel") -> tensor name; kernels are stored
    transposed, [out, in]. conv1d: its linears are of the class Conv1D, which PEFT is to be told.
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

    def multiple_choice(self) -> "HFNames":
        """Those of an encoder's multiple-choice model: its pooler, and a linear to one score."""
        base = next(iter(self.modules.values())).partition(".")[0]
        places = {"dense": f"{base}.pooler.dense", "out": "classifier"}
        kinds = {"kernel": "weight", "bias": "bias"}
        head = {(module, leaf): f"{places[module]}.{kinds[leaf]}" for module, leaf in self.head}
        return dataclasses.replace(self, head=head)


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A model and its weights: `model.apply({"params": weights}, tokens, mask, adapt)`.

    config has num_layers, vocab_size, hidden_size, max_positions and site_shapes(). Weights of the layers are
    stacked: `weights["blocks"]["q_proj"]["kernel"]` is `[num_layers, in, out]`. tokenizer is None if a folder
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
    sharding: bilevel.Sharding | None = None,
) -> Pretrained:
    """A pretrained model: a folder in Hugging Face layout, a .gguf file (dequantised), or a name on the hub.

    Weights become `dtype`, whatever they were stored as; the model computes in it, and with `accumulate` only the
    products, whose results are of that dtype: `dtype=bfloat16, accumulate=float32`. At most one array more than the
    weights is held at a time. `check(config, model)` is called before weights are read, to refuse a model that does not
    fit. With `sharding` each array (of all layers) is split over its mesh before the next one is read, so that neither
    the host nor a device ever holds the whole model; its rule `weights` is one `PartitionSpec`, a function or None. Of
    safetensors each process reads what its own devices hold.

    Raises FileNotFoundError if there is no such file, folder or model, and ValueError if a file is damaged,
    the architecture is not known, a key of its config is not known or means another computation, a tensor is missing,
    left over, of the wrong shape or not finite, the tokenizer has more tokens than the embedding, or a dtype is not
    available. Warns of a head in the file that is not read.
    """
    dtype = _check_dtype(dtype)
    accumulate = None if accumulate is None else _check_dtype(accumulate)
    path = locate(str(name_or_path))
    checkpoint = open_folder(path) if path.is_dir() else open_gguf(path)
    family = _family(checkpoint)
    used = _used_settings(checkpoint, family)
    message = f"{checkpoint.where} cannot be read as a {family.name} model"
    with explain(message, Exception):  # transformers' config classes raise errors of their own
        config = family.from_hf(_settings(checkpoint, family, used), checkpoint.names)
    config = with_head(checkpoint, family, config)
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
    weights, head_weights = read_weights(checkpoint, family, config, dtype, sharding)
    head = {tensor.path: tensor.hf for tensor in family.head(config)}
    conv1d = any(tensor.conv1d for tensor in family.tensors(config))
    return Pretrained(
        name=str(name_or_path),
        model=model,
        config=config,
        weights=weights,
        tokenizer=tokenizer,
        hf_names=HFNames(_base_model(str(name_or_path)), family.modules, head, conv1d),
        head=head_weights,
    )


def _base_model(name: str) -> str:
    """What lies here by its absolute path, which holds wherever the process goes on; a name on the hub as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


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
    attribute = "keys" if checkpoint.kind == "hf" else "gguf_keys"
    for family in FAMILIES:
        if checkpoint.architecture in getattr(family, attribute):
            return family
    known = ", ".join(name for family in FAMILIES for name in getattr(family, attribute))
    raise ValueError(
        f"{checkpoint.where} is of architecture {checkpoint.architecture!r}, which is not known: {known} are."
    )


def _used_settings(checkpoint: Checkpoint, family: Family) -> dict[str, Any]:
    """What the model depends on, of all that the file says; the rest is known to change nothing."""
    kind = checkpoint.architecture
    if checkpoint.kind == "gguf":
        own = {f"{kind}.{name}": key for name, key in family.gguf_keys[kind].items()}
        table = {**keys.GGUF, **own}
    else:
        table = {**keys.COMMON, **family.keys[kind]}
    return keys.read(checkpoint.settings, table, checkpoint.sizes, checkpoint.settings_file, family.name)


def _settings(checkpoint: Checkpoint, family: Family, used: dict[str, Any]) -> Mapping[str, Any]:
    if checkpoint.kind == "gguf" and family.from_gguf is not None:
        return family.from_gguf(used, checkpoint.names, checkpoint.read)
    from transformers import CONFIG_MAPPING  # knows each architecture's defaults and old spellings

    # It changes what it is given.
    return CONFIG_MAPPING[checkpoint.architecture](**copy.deepcopy(used)).to_dict()


def _tokenizer(checkpoint: Checkpoint, path: Path) -> "PreTrainedTokenizerFast | None":
    if checkpoint.kind == "gguf":
        from methods.models import gguf_tokenizer

        return gguf_tokenizer.build(checkpoint.settings, checkpoint.where)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import CONFIG_MAPPING, AutoTokenizer

    # Without it, transformers would read config.json again, all of it.
    config = CONFIG_MAPPING[checkpoint.architecture]()
    named = checkpoint.settings.get("tokenizer_class")
    config.tokenizer_class = named if isinstance(named, str) else None
    message = f"the tokenizer of {path} cannot be read: fetch its files again"
    with explain(message, Exception):  # the Rust library raises bare Exceptions
        return AutoTokenizer.from_pretrained(path, config=config, local_files_only=True, trust_remote_code=False)
