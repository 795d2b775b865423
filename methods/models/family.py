"""What a model family tells the loader: one `Family` per file, listed in `methods.models.loading`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Tensor(NamedTuple):
    """Where one array of the weights is found. Names with "{layer}" are read once per layer and stacked.

    path: its place in the weights, ("blocks", "q_proj", "kernel").
    hf, gguf: its name in a safetensors and in a GGUF checkpoint.
    transpose: stored [out, in], wanted [in, out].
    interleaved_heads: in a GGUF file of the architectures `Family.gguf_interleaved`, its rows hold this many
    heads whose rotary pairs are neighbours (2i, 2i+1); wanted is (i, i + head_dim/2). 0: not so.
    conv1d: stored [in, out] in safetensors all the same.
    part: (index, count), which of how many equal parts of the stored output axis.
    """

    path: tuple[str, ...]
    hf: str
    gguf: str = ""
    transpose: bool = False
    interleaved_heads: int = 0
    conv1d: bool = False
    part: tuple[int, int] = (0, 1)

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf


def decoder_head(config: Any) -> tuple[Tensor, ...]:
    """The classification head that transformers puts on a decoder: one matrix, without a bias."""
    del config
    return (Tensor(("out", "kernel"), "score.weight", transpose=True),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How checkpoints of one family become a config, a model and its weights.

    model_types: `model_type` values of config.json. gguf_architectures: `general.architecture` values of GGUF
    files.
    from_hf: settings as transformers' config class gives them (defaults filled in), tensor names -> config.
    from_gguf: metadata, tensor names, a reader of tensors -> the same settings, for `from_hf`; None if no GGUF file is
    read.
    tensors: config -> every array of the weights. head: config -> every array of a `Classifier`'s.
    build: the module's class, called with (config, param_dtype=, accumulate=).
    modules: site -> name of the module in Hugging Face's model, with "{layer}".
    base_prefix: what a headless checkpoint leaves out of its tensor names.
    renamed: (ending of a tensor's name, its ending in older checkpoints).
    ignored: patterns (`fnmatch`) of tensor names that carry nothing (buffers, and heads we do not read).
    """

    name: str
    model_types: tuple[str, ...]
    gguf_architectures: tuple[str, ...] = ()
    gguf_interleaved: tuple[str, ...] = ()
    from_hf: Callable[[Mapping[str, Any], frozenset[str]], Any]
    from_gguf: Callable[[Mapping[str, Any], frozenset[str], Callable[[str], np.ndarray]], dict[str, Any]] | None = None
    tensors: Callable[[Any], tuple[Tensor, ...]]
    head: Callable[[Any], tuple[Tensor, ...]] = decoder_head
    build: Callable[..., Any]
    modules: Mapping[str, str]
    base_prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
