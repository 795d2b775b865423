"""Checkpoints of Phi-3: what they have beside the Llama family's settings and names.

Read off transformers' configuration and modeling files of phi3. q, k and v are one matrix there, and so are the gate
and the up projection. Heads share no keys here: adapters need the parts of the one matrix to be of one width.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from methods.models import llama
from methods.models.decoder import Decoder, DecoderConfig
from methods.models.family import Family, Tensor
from methods.models.keys import COUNT, Table, only, optional

_PARTS = {  # ours: (Hugging Face's, which part of how many)
    "q_proj": ("self_attn.qkv_proj", 0, 3),
    "k_proj": ("self_attn.qkv_proj", 1, 3),
    "v_proj": ("self_attn.qkv_proj", 2, 3),
    "gate_proj": ("mlp.gate_up_proj", 0, 2),
    "up_proj": ("mlp.gate_up_proj", 1, 2),
}

KEYS: Table = {
    **{name: key for name, key in llama.COMMON.items() if name != "head_dim"},
    "original_max_position_embeddings": COUNT,
    "sliding_window": optional(COUNT),
    "attention_bias": only(False),
    "lm_head_bias": only(False),
}


def from_hf(settings: Mapping[str, Any], names: frozenset[str]) -> DecoderConfig:
    """The config behind transformers' settings. Raises ValueError on what the decoder does not do."""
    config = llama.from_hf(settings, names)
    if config.num_kv_heads != config.num_heads:
        raise ValueError(
            f"num_key_value_heads={config.num_kv_heads} is not supported, only as many as there are heads, "
            f"{config.num_heads}."
        )
    window = settings["sliding_window"]  # of all layers
    return dataclasses.replace(config, windows=(window,) * config.num_layers if window else ())


def _module(site: str) -> str:
    return f"model.layers.{{layer}}.{_PARTS[site][0]}" if site in _PARTS else llama.MODULES[site]


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Every array of the weights, with its name in a checkpoint."""
    out = []
    for tensor in llama.tensors(config):
        site, width = tensor.path[1] if len(tensor.path) > 1 else "", tensor.shape[-1]
        if site in _PARTS:
            _, index, count = _PARTS[site]
            tensor = tensor._replace(hf=f"{_module(site)}.weight", cut=(index * width, count * width))
        out.append(tensor)
    return tuple(out)


FAMILY = Family(
    name="Phi-3",
    keys={"phi3": KEYS},
    from_hf=from_hf,
    tensors=tensors,
    build=Decoder,
    modules=MappingProxyType({site: _module(site) for site in llama.MODULES}),
    base_prefix=llama.FAMILY.base_prefix,
    buffers=llama.BUFFERS,
)
