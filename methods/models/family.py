"""What a model family tells the loader: one `Family` per file, listed in `methods.models.loading`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from methods.models.keys import Table


class Tensor(NamedTuple):
    """Where one array of the weights is found. Names with "{layer}" are read once per layer and stacked.

    path: its place in the weights, ("blocks", "q_proj", "kernel").
    shape: as the model wants it, of one layer; -1 where the file decides (labels of a head).
    hf, gguf: its name in a safetensors and in a GGUF checkpoint.
    transpose: stored [out, in], wanted [in, out].
    interleaved_heads: in a GGUF file of the architectures `Family.gguf_interleaved`, its rows hold this many
    heads whose rotary pairs are neighbours (2i, 2i+1); wanted is (i, i + head_dim/2). 0: not so.
    conv1d: stored [in, out] in safetensors all the same.
    cut: (first, whole), it is the part of a stored output axis of length `whole` that begins at `first`; (0, 0): all.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    hf: str
    gguf: str = ""
    transpose: bool = False
    interleaved_heads: int = 0
    conv1d: bool = False
    cut: tuple[int, int] = (0, 0)

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf

    def turned(self, kind: str) -> bool:
        """Whether a checkpoint of this kind stores it transposed."""
        return self.transpose and not (self.conv1d and kind == "hf")

    def stored_shape(self, kind: str) -> tuple[int, ...]:
        """Its shape in a checkpoint of this kind."""
        shape = (*self.shape[:-1], self.cut[1] or self.shape[-1])
        return shape[::-1] if self.turned(kind) else shape


def decoder_head(config: Any) -> tuple[Tensor, ...]:
    """The classification head that transformers puts on a decoder: one matrix, without a bias."""
    return (Tensor(("out", "kernel"), (config.hidden_size, -1), "score.weight", transpose=True),)


DECODER_HEADS = ("score.*", "classifier.*", "qa_outputs.*", "multiple_choice_head.*")
"""Names of the heads that transformers puts on decoders, as `Family.heads`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How checkpoints of one family become a config, a model and its weights.

    keys: `model_type` of config.json -> every key that such a file may have. gguf_keys: `general.architecture` of GGUF
    files -> every key that begins with it, without it.
    from_hf: settings as transformers' config class gives them (defaults filled in), tensor names -> config.
    from_gguf: metadata, tensor names, a reader of tensors -> the same settings, for `from_hf`; None if no GGUF file is
    read.
    tensors: config -> every array of the weights. head: config -> every array of a `Classifier`'s.
    build: the module's class, called with (config, param_dtype=, accumulate=).
    modules: site -> name of the module in Hugging Face's model, with "{layer}".
    base_prefix: what a headless checkpoint leaves out of its tensor names; other_prefix: what some have instead.
    renamed: (ending of a tensor's name, its ending in older checkpoints).
    buffers: pattern (`fnmatch`) of names that hold no weights -> whether an array is what the model has in its place.
    heads: patterns of the tensors of heads that are not read; loading says so.
    """

    name: str
    keys: Mapping[str, Table]
    gguf_keys: Mapping[str, Table] = dataclasses.field(default_factory=dict)
    gguf_interleaved: tuple[str, ...] = ()
    from_hf: Callable[[Mapping[str, Any], frozenset[str]], Any]
    from_gguf: Callable[[Mapping[str, Any], frozenset[str], Callable[[str], np.ndarray]], dict[str, Any]] | None = None
    tensors: Callable[[Any], tuple[Tensor, ...]]
    head: Callable[[Any], tuple[Tensor, ...]] = decoder_head
    build: Callable[..., Any]
    modules: Mapping[str, str]
    base_prefix: str = ""
    other_prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    buffers: Mapping[str, Callable[[np.ndarray, Any], bool]] = dataclasses.field(default_factory=dict)
    heads: tuple[str, ...] = DECODER_HEADS
