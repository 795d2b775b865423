"""Checkpoints of the Llama family: how their settings and tensor names map onto `methods.models.decoder`.

Read off transformers' configuration and modeling files of llama, mistral, qwen2, qwen3 and gemma, and off
llama.cpp's conversion script, which stores q and k of its "llama" architecture (Mistral is one) with rotary
pairs side by side.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from methods.models import rope
from methods.models.decoder import Decoder, DecoderConfig
from methods.models.family import Family, Tensor
from methods.models.layers import hf_activation

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GGUF_LINEARS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_NORMS = {  # ours: (Hugging Face's, GGUF's)
    "attention_norm": ("input_layernorm", "attn_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
}
_BRANCH_NORMS = {  # where a branch ends on one as well, the names shift
    "attention_norm": ("input_layernorm", "attn_norm"),
    "attention_out_norm": ("post_attention_layernorm", "post_attention_norm"),
    "ffn_norm": ("pre_feedforward_layernorm", "ffn_norm"),
    "ffn_out_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
}
_QK_NORMS = {"q_norm": ("self_attn.q_norm", "attn_q_norm"), "k_norm": ("self_attn.k_norm", "attn_k_norm")}


def _module(site: str) -> str:
    return f"model.layers.{{layer}}.{'self_attn' if site in _ATTENTION else 'mlp'}.{site}"


def from_hf(settings: Mapping[str, Any], names: frozenset[str]) -> DecoderConfig:
    """The config behind transformers' settings. Raises ValueError on what the decoder does not do."""
    del names
    kind, heads, layers = settings["model_type"], settings["num_attention_heads"], settings["num_hidden_layers"]
    head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
    positions = settings["max_position_embeddings"]
    theta, factors, rope_scale = rope.from_hf(settings["rope_parameters"], head_dim, positions)
    window = settings.get("sliding_window") or 0
    local = settings.get("layer_types") or ["sliding_attention" if kind == "mistral" else "full_attention"] * layers
    windows = tuple(window if layer == "sliding_attention" else 0 for layer in local)
    bias = bool(settings.get("attention_bias"))
    return DecoderConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["hidden_size"],
        intermediate_size=settings["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=settings.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=settings["rms_norm_eps"],
        activation=hf_activation(settings["hidden_act"]),
        rope_theta=theta,
        rope_factors=factors,
        rope_scale=rope_scale,
        windows=windows if any(windows) else (),
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias,
        mlp_bias=bool(settings.get("mlp_bias")),
        qk_norm=kind == "qwen3",
        tied=bool(settings["tie_word_embeddings"]),
    )


def from_gguf(meta: Mapping[str, Any], names: frozenset[str], read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """The settings behind a GGUF file's metadata, named as in transformers. KeyError if one is missing."""
    kind = meta["general.architecture"]
    parameters: dict[str, Any] = {"rope_theta": meta.get(f"{kind}.rope.freq_base", 10_000.0)}
    scaling = meta.get(f"{kind}.rope.scaling.type", "none")
    if "rope_freqs.weight" in names:
        parameters |= {"rope_type": "factors", "factors": read("rope_freqs.weight").tolist()}
    elif scaling != "none":
        parameters |= {"rope_type": scaling, "factor": meta.get(f"{kind}.rope.scaling.factor", 1.0)}
    layers, window = meta[f"{kind}.block_count"], meta.get(f"{kind}.attention.sliding_window")
    return {
        "model_type": kind,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if window else "full_attention"] * layers,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": meta[f"{kind}.embedding_length"],
        "intermediate_size": meta[f"{kind}.feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": meta[f"{kind}.attention.head_count"],
        "num_key_value_heads": meta.get(f"{kind}.attention.head_count_kv"),
        "head_dim": meta.get(f"{kind}.attention.key_length"),
        "max_position_embeddings": meta[f"{kind}.context_length"],
        "rms_norm_eps": meta[f"{kind}.attention.layer_norm_rms_epsilon"],
        "hidden_act": "silu",
        "rope_parameters": parameters,
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_output.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
    }


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Every array of a decoder's weights, with its names in the two kinds of checkpoint."""
    biased = {site: config.mlp_bias for site in _GGUF_LINEARS} | dict.fromkeys(_ATTENTION, config.qkv_bias)
    biased["o_proj"] = config.o_bias
    rotary = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    out = [
        Tensor(("embed",), "model.embed_tokens.weight", "token_embd.weight"),
        Tensor(("norm", "scale"), "model.norm.weight", "output_norm.weight"),
    ]
    if not config.tied:
        out.append(Tensor(("head",), "lm_head.weight", "output.weight"))
    norms = (_BRANCH_NORMS if config.branch_norms else _NORMS) | (_QK_NORMS if config.qk_norm else {})
    for ours, (hf, gguf) in norms.items():
        out.append(
            Tensor(
                ("blocks", ours, "scale"),
                f"model.layers.{{layer}}.{hf}.weight",
                f"blk.{{layer}}.{gguf}.weight",
            )
        )
    for site, gguf in _GGUF_LINEARS.items():
        hf, gguf, turned = _module(site), f"blk.{{layer}}.{gguf}", rotary.get(site, 0)
        out.append(Tensor(("blocks", site, "kernel"), f"{hf}.weight", f"{gguf}.weight", True, turned))
        if biased[site]:
            out.append(Tensor(("blocks", site, "bias"), f"{hf}.bias", f"{gguf}.bias", False, turned))
    return tuple(out)


MODULES = MappingProxyType({site: _module(site) for site in _GGUF_LINEARS})
"""Site -> module in Hugging Face's model."""

IGNORED = ("*rotary_emb.inv_freq", "rope_freqs.weight", "score.weight")

FAMILY = Family(
    name="Llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    gguf_architectures=("llama", "mistral", "qwen2", "qwen3"),
    gguf_interleaved=("llama", "mistral"),
    from_hf=from_hf,
    from_gguf=from_gguf,
    tensors=tensors,
    build=Decoder,
    modules=MODULES,
    base_prefix="model.",
    ignored=IGNORED,
)
"""Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3."""
