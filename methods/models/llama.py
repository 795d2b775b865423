"""Checkpoints of the Llama family: how their settings and tensor names map onto `methods.models.decoder`.

Read off transformers' configuration and modeling files of llama, mistral, qwen2, qwen3 and gemma, and off
llama.cpp's conversion script, which stores q and k of its "llama" architecture (Mistral is one) with rotary
pairs side by side.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from methods.models.decoder import Decoder, DecoderConfig
from methods.models.family import Family, Tensor

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
_QK_NORMS = {"q_norm": ("self_attn.q_norm", "attn_q_norm"), "k_norm": ("self_attn.k_norm", "attn_k_norm")}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def _module(site: str) -> str:
    return f"model.layers.{{layer}}.{'self_attn' if site in _ATTENTION else 'mlp'}.{site}"


def llama3_factors(
    theta: float, head_dim: int, *, factor: float, low: float, high: float, original: int
) -> tuple[float, ...]:
    r"""What Llama 3.1 divides each rotary frequency by, so that it reads beyond its `original` number of
    positions.

    A frequency that turns n times within `original` positions is divided by 1 if n >= high, by `factor` if n
    <= low, and by 1 / (s + (1 - s) / factor) with s = (n - low) / (high - low) between. [head_dim / 2].
    Source: arXiv:2407.21783, and `rope_type="llama3"` in transformers.
    """
    turns = original * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return tuple((1 / (share + (1 - share) / factor)).tolist())


def _rope(settings: Mapping[str, Any], head_dim: int) -> tuple[float, tuple[float, ...]]:
    rope = settings["rope_parameters"]
    kind, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("rotary positions on a part of each head (partial_rotary_factor) are not supported.")
    if kind == "default":
        return theta, ()
    if kind == "linear":
        return theta, (float(rope["factor"]),) * (head_dim // 2)
    if kind == "factors":  # ours: a GGUF file spells them out
        return theta, tuple(rope["factors"])
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings") or settings["max_position_embeddings"]
        bands = {"low": rope["low_freq_factor"], "high": rope["high_freq_factor"], "original": original}
        return theta, llama3_factors(theta, head_dim, factor=rope["factor"], **bands)
    raise ValueError(f"rotary scaling {kind!r} is not supported: default, linear and llama3 are.")


def from_hf(settings: Mapping[str, Any]) -> DecoderConfig:
    """The config behind transformers' settings. Raises ValueError on what the decoder does not do."""
    kind, heads, layers = (
        settings["model_type"],
        settings["num_attention_heads"],
        settings["num_hidden_layers"],
    )
    head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
    theta, factors = _rope(settings, head_dim)
    if settings["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"activation {settings['hidden_act']!r} is not supported: {', '.join(_ACTIVATIONS)} are.")
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
        max_positions=settings["max_position_embeddings"],
        norm_eps=settings["rms_norm_eps"],
        norm_offset=settings.get("norm_offset", kind == "gemma"),
        activation=_ACTIVATIONS[settings["hidden_act"]],
        rope_theta=theta,
        rope_factors=factors,
        windows=windows if any(windows) else (),
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias,
        mlp_bias=bool(settings.get("mlp_bias")),
        qk_norm=kind == "qwen3",
        tied=bool(settings["tie_word_embeddings"]),
        embed_scale=math.sqrt(settings["hidden_size"]) if kind == "gemma" else 1.0,
    )


def from_gguf(meta: Mapping[str, Any], names: frozenset[str], read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """The settings behind a GGUF file's metadata, named as in transformers. KeyError if one is missing."""
    kind = meta["general.architecture"]
    rope: dict[str, Any] = {"rope_theta": meta.get(f"{kind}.rope.freq_base", 10_000.0)}
    scaling = meta.get(f"{kind}.rope.scaling.type", "none")
    if "rope_freqs.weight" in names:
        rope |= {"rope_type": "factors", "factors": read("rope_freqs.weight").tolist()}
    elif scaling != "none":
        rope |= {"rope_type": scaling, "factor": meta.get(f"{kind}.rope.scaling.factor", 1.0)}
    layers, window = meta[f"{kind}.block_count"], meta.get(f"{kind}.attention.sliding_window")
    return {
        "model_type": kind,
        "norm_offset": False,  # the file's norms are stored with Gemma's 1 added
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
        "hidden_act": "gelu_pytorch_tanh" if kind == "gemma" else "silu",
        "rope_parameters": rope,
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
    for ours, (hf, gguf) in (_NORMS | (_QK_NORMS if config.qk_norm else {})).items():
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


FAMILY = Family(
    name="Llama",
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma"),
    gguf_architectures=("llama", "mistral", "qwen2", "qwen3", "gemma"),
    gguf_interleaved=("llama", "mistral"),
    from_hf=from_hf,
    from_gguf=from_gguf,
    tensors=tensors,
    build=lambda config, dtype: Decoder(config, param_dtype=dtype),
    modules=MappingProxyType({site: _module(site) for site in _GGUF_LINEARS}),
    base_prefix="model.",
    ignored=("rotary_emb.inv_freq", "rope_freqs.weight", "score.weight"),
)
"""Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 1."""
