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
from methods.models.keys import LAYERS, REAL, SIZE, TEXT, Table, inert, only, optional
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


KEYS: Table = {
    **dict.fromkeys(("vocab_size", "n_embd", "n_head", "n_positions"), SIZE),
    **dict.fromkeys(("hidden_size", "num_attention_heads", "max_position_embeddings"), SIZE),  # other names of these
    **dict.fromkeys(("n_layer", "num_hidden_layers"), LAYERS),
    "n_inner": optional(SIZE),
    "layer_norm_epsilon": REAL,
    "activation_function": TEXT,
    "scale_attn_weights": only(True),
    "scale_attn_by_inverse_layer_idx": only(False),
    **inert("an older name of n_positions", "n_ctx"),
    **inert("a head for multiple choice", "summary_type", "summary_use_proj", "summary_activation"),
    **inert("a head for multiple choice", "summary_proj_to_labels", "summary_last_dropout"),
}
GGUF_KEYS: Table = {
    **dict.fromkeys(("embedding_length", "feed_forward_length", "vocab_size", "context_length"), SIZE),
    **dict.fromkeys(("attention.head_count", "attention.head_count_kv"), SIZE),
    "block_count": LAYERS,
    "attention.layer_norm_epsilon": REAL,
    "attention.causal": only(True),
}


def from_hf(settings: Mapping[str, Any], names: frozenset[str]) -> GPTConfig:
    """The config behind transformers' settings. Raises ValueError on what the model does not do."""
    del names
    return GPTConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["n_embd"],
        intermediate_size=settings.get("n_inner") or 4 * settings["n_embd"],
        num_layers=settings["n_layer"],
        num_heads=settings["n_head"],
        max_positions=settings["n_positions"],
        norm_eps=settings["layer_norm_epsilon"],
        activation=hf_activation(settings["activation_function"]),
        tied=settings["tie_word_embeddings"],
    )


def from_gguf(meta: Mapping[str, Any], names: frozenset[str], read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """The settings behind a GGUF file's metadata, named as in transformers.

    KeyError if one is missing, ValueError if two contradict each other.
    """
    del read
    tokens, heads = len(meta["tokenizer.ggml.tokens"]), meta["gpt2.attention.head_count"]
    for name, wanted in (("gpt2.attention.head_count_kv", heads), ("gpt2.vocab_size", tokens)):
        if meta.get(name, wanted) != wanted:
            raise ValueError(f"{name} is {meta[name]}, but only {wanted} is supported here.")
    return {
        "vocab_size": tokens,
        "n_embd": meta["gpt2.embedding_length"],
        "n_inner": meta["gpt2.feed_forward_length"],
        "n_layer": meta["gpt2.block_count"],
        "n_head": heads,
        "n_positions": meta["gpt2.context_length"],
        "layer_norm_epsilon": meta["gpt2.attention.layer_norm_epsilon"],
        "activation_function": "gelu_new",
        "tie_word_embeddings": "output.weight" not in names,
    }


def tensors(config: GPTConfig) -> tuple[Tensor, ...]:
    """Every array of the weights, with its names in the two kinds of checkpoint."""
    width, shapes = (config.hidden_size,), config.site_shapes()
    embedding = (config.vocab_size, config.hidden_size)
    out = [
        Tensor(("embed",), embedding, "transformer.wte.weight", "token_embd.weight"),
        Tensor(("positions",), (config.max_positions, *width), "transformer.wpe.weight", "position_embd.weight"),
        Tensor(("norm", "scale"), width, "transformer.ln_f.weight", "output_norm.weight"),
        Tensor(("norm", "bias"), width, "transformer.ln_f.bias", "output_norm.bias"),
    ]
    if not config.tied and not config.headless:
        out.append(Tensor(("head",), embedding, "lm_head.weight", "output.weight"))
    for ours, (hf, gguf) in _NORMS.items():
        hf, gguf = f"transformer.h.{{layer}}.{hf}", f"blk.{{layer}}.{gguf}"
        out.append(Tensor(("blocks", ours, "scale"), width, f"{hf}.weight", f"{gguf}.weight"))
        out.append(Tensor(("blocks", ours, "bias"), width, f"{hf}.bias", f"{gguf}.bias"))
    for ours, (hf, gguf, (index, count)) in _LINEARS.items():
        hf, gguf, shape = f"transformer.h.{{layer}}.{hf}", f"blk.{{layer}}.{gguf}", shapes[ours]
        cut = (index * shape[1], count * shape[1])
        matrix = {"transpose": True, "conv1d": True, "cut": cut}
        out.append(Tensor(("blocks", ours, "kernel"), shape, f"{hf}.weight", f"{gguf}.weight", **matrix))
        out.append(Tensor(("blocks", ours, "bias"), shape[1:], f"{hf}.bias", f"{gguf}.bias", cut=cut))
    return tuple(out)


def _causal(array: np.ndarray, config: GPTConfig) -> bool:
    """A mask of who sees whom, as older checkpoints store it: [1, 1, n, n]."""
    del config
    return array.ndim == 4 and np.array_equal(array[0, 0], np.tri(array.shape[-1], dtype=array.dtype))


def _dropped(array: np.ndarray, config: GPTConfig) -> bool:
    """The logit of what is not seen: large and negative."""
    del config
    return array.size == 1 and float(array.reshape(())) <= -1e4


FAMILY = Family(
    name="GPT-2",
    keys={"gpt2": KEYS},
    gguf_keys={"gpt2": GGUF_KEYS},
    from_hf=from_hf,
    from_gguf=from_gguf,
    tensors=tensors,
    build=GPT,
    modules=MappingProxyType({site: f"transformer.h.{{layer}}.{hf}" for site, (hf, _, _) in _LINEARS.items()}),
    base_prefix="transformer.",
    buffers={"*.attn.bias": _causal, "*.attn.masked_bias": _dropped},
)
