"""What a model family tells the loader: one `Family` per file, listed in `methods.models.loading`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np


class Tensor(NamedTuple):
    """Where one array of the weights is found. Names with "{layer}" are read once per layer and stacked.

    path: its place in the weights, ("blocks", "q_proj", "kernel").
    hf, gguf: its name in a safetensors and in a GGUF checkpoint.
    transpose: stored [out, in], wanted [in, out].
    interleaved_heads: in a GGUF file of the architectures `Family.gguf_interleaved`, its rows hold this many
    heads whose rotary pairs are neighbours (2i, 2i+1); wanted is (i, i + head_dim/2). 0: not so.
    """

    path: tuple[str, ...]
    hf: str
    gguf: str
    transpose: bool = False
    interleaved_heads: int = 0

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf


@dataclasses.dataclass(frozen=True)
class Family:
    """How checkpoints of one family become a config, a model and its weights.

    model_types: `model_type` values of config.json. gguf_architectures: `general.architecture` values of GGUF
    files.
    from_hf: settings as transformers' config class gives them (defaults filled in) -> config.
    from_gguf: metadata, tensor names, a reader of tensors -> the same settings, for `from_hf`.
    tensors: config -> every array of the weights. build: config, dtype -> module.
    modules: site -> name of the module in Hugging Face's model, with "{layer}".
    base_prefix: what a headless checkpoint leaves out of its tensor names.
    ignored: endings of tensor names that carry nothing (buffers, and heads we do not read).
    """

    name: str
    model_types: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    gguf_interleaved: tuple[str, ...]
    from_hf: Callable[[Mapping[str, Any]], Any]
    from_gguf: Callable[[Mapping[str, Any], frozenset[str], Callable[[str], np.ndarray]], dict[str, Any]]
    tensors: Callable[[Any], tuple[Tensor, ...]]
    build: Callable[[Any, Any], nn.Module]
    modules: Mapping[str, str]
    base_prefix: str = ""
    ignored: tuple[str, ...] = ()
