"""Checkpoints of GPT-2: how their settings and tensor names map onto `methods.models.gpt`.

Read off transformers' configuration and modeling files of gpt2, and llama.cpp's conversion script. q, k and v are one
matrix there, and safetensors hold matrices as [in, out].
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from methods.models.family import Family, Tensor
from methods.models.gpt import GPT, GPTConfig
from methods.models.layers import hf_activation

_LINEARS = {  # ours: (Hugging Face's, GGUF's, which part of it)
    "q_proj": ("attn.c_attn", "attn_qkv", (0, 3)),
    "k_proj": ("attn.c_attn", "attn_qkv", (1, 3)),
    "v_proj": ("attn.c_attn", "attn_qkv", (2, 3)),
    "o_proj": ("attn.c_proj", "attn_output", (0, 1)),
    "up_proj": ("mlp.c_fc", "ffn_up", (0, 1)),
    "down_proj": ("mlp.c_proj", "ffn_down", (0, 1)),
}
_NORMS = {"attention_norm": ("ln_1", "attn_norm"), "ffn_norm": ("ln_2", "ffn_norm")}


def from_hf(settings: Mapping[str, Any], names: frozenset[str]) -> GPTConfig:
    """The config behind transformers' settings. Raises ValueError on what the model does not do."""
    del names
    for key, value in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if settings.get(key, value) != value:
            raise ValueError(f"{key}={settings[key]} is not supported.")
    if settings.get("add_cross_attention"):
        raise ValueError("cross-attention (add_cross_attention) is not supported.")
    return GPTConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["n_embd"],
        intermediate_size=settings.get("n_inner") or 4 * settings["n_embd"],
        num_layers=settings["n_layer"],
        num_heads=settings["n_head"],
        max_positions=settings["n_positions"],
        norm_eps=settings["layer_norm_epsilon"],
        activation=hf_activation(settings["activation_function"]),
    )


def from_gguf(meta: Mapping[str, Any], names: frozenset[str], read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """The settings behind a GGUF file's metadata, named as in transformers. KeyError if one is missing."""
    del names, read
    return {
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "n_embd": meta["gpt2.embedding_length"],
        "n_inner": meta["gpt2.feed_forward_length"],
        "n_layer": meta["gpt2.block_count"],
        "n_head": meta["gpt2.attention.head_count"],
        "n_positions": meta["gpt2.context_length"],
        "layer_norm_epsilon": meta["gpt2.attention.layer_norm_epsilon"],
        "activation_function": "gelu_new",
    }


def tensors(config: GPTConfig) -> tuple[Tensor, ...]:
    """Every array of the weights, with its names in the two kinds of checkpoint."""
    del config
    out = [
        Tensor(("embed",), "transformer.wte.weight", "token_embd.weight"),
        Tensor(("positions",), "transformer.wpe.weight", "position_embd.weight"),
        Tensor(("norm", "scale"), "transformer.ln_f.weight", "output_norm.weight"),
        Tensor(("norm", "bias"), "transformer.ln_f.bias", "output_norm.bias"),
    ]
    for ours, (hf, gguf) in _NORMS.items():
        hf, gguf = f"transformer.h.{{layer}}.{hf}", f"blk.{{layer}}.{gguf}"
        out.append(Tensor(("blocks", ours, "scale"), f"{hf}.weight", f"{gguf}.weight"))
        out.append(Tensor(("blocks", ours, "bias"), f"{hf}.bias", f"{gguf}.bias"))
    for ours, (hf, gguf, part) in _LINEARS.items():
        hf, gguf = f"transformer.h.{{layer}}.{hf}", f"blk.{{layer}}.{gguf}"
        matrix = {"transpose": True, "conv1d": True, "part": part}
        out.append(Tensor(("blocks", ours, "kernel"), f"{hf}.weight", f"{gguf}.weight", **matrix))
        out.append(Tensor(("blocks", ours, "bias"), f"{hf}.bias", f"{gguf}.bias", part=part))
    return tuple(out)


FAMILY = Family(
    name="GPT-2",
    model_types=("gpt2",),
    gguf_architectures=("gpt2",),
    from_hf=from_hf,
    from_gguf=from_gguf,
    tensors=tensors,
    build=GPT,
    modules=MappingProxyType({site: f"transformer.h.{{layer}}.{hf}" for site, (hf, _, _) in _LINEARS.items()}),
    base_prefix="transformer.",
    # Buffers of older checkpoints, a classification head that was not asked for, and the tied head of GGUF files.
    ignored=("*.attn.bias", "*.attn.masked_bias", "score.weight", "output.weight"),
)
