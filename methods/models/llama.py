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
from methods.models.keys import (
    COUNT,
    FLAG,
    LAYERS,
    POSITIVE,
    REAL,
    SIZE,
    TEXT,
    WHOLE,
    Table,
    every,
    inert,
    only,
    optional,
)
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


COMMON: Table = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), SIZE),
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": optional(SIZE),
    "head_dim": optional(SIZE),
    "max_position_embeddings": COUNT,
    "rms_norm_eps": REAL,
    "hidden_act": TEXT,
    "rope_theta": POSITIVE,
    "rope_parameters": rope.KEY,
    "rope_scaling": rope.KEY,
    "partial_rotary_factor": only(1, 1.0, None),
    **inert("of models that decode for an encoder", "is_decoder"),
}
"""What config.json has in all these decoders, beside `keys.COMMON`."""

_PLAIN: Table = {  # no windows, no choice of biases
    "attention_bias": only(False),
    "mlp_bias": only(False),
    "sliding_window": only(None),
    "use_sliding_window": only(False),
    "layer_types": every("full_attention"),
}
_QWEN: Table = {
    "use_sliding_window": FLAG,
    "sliding_window": optional(COUNT),
    "max_window_layers": optional(WHOLE),
    "layer_types": optional(every("full_attention", "sliding_attention")),
    "use_mrope": only(False),
}
KEYS: Mapping[str, Table] = {
    "llama": {
        **COMMON,
        **_PLAIN,
        "attention_bias": FLAG,
        "mlp_bias": FLAG,
        "rope_interleaved": only(False),
        **inert("which tool wrote it", "is_llama_config"),
    },
    # All layers have the window, in transformers also where layer_types say otherwise.
    "mistral": {**COMMON, **_PLAIN, "sliding_window": optional(COUNT), "layer_types": every("sliding_attention")},
    # Always with biases on q, k and v, and none on o.
    "qwen2": {**COMMON, **_PLAIN, **_QWEN, "attention_bias": only(True)._replace(used=False)},
    "qwen3": {**COMMON, **_PLAIN, **_QWEN, "attention_bias": FLAG},
}

GGUF_COMMON: Table = {
    **dict.fromkeys(("embedding_length", "feed_forward_length", "vocab_size"), SIZE),
    **dict.fromkeys(("attention.head_count", "attention.head_count_kv", "rope.dimension_count"), SIZE),
    **dict.fromkeys(("attention.key_length", "attention.value_length"), SIZE),
    "block_count": LAYERS,
    "context_length": COUNT,
    "attention.layer_norm_rms_epsilon": REAL,
    "attention.causal": only(True),
    "attention.scale": POSITIVE,
    "rope.freq_base": POSITIVE,
    "rope.scale_linear": only(1.0),
    "rope.scaling.type": TEXT,
    "rope.scaling.factor": POSITIVE,
    "rope.scaling.original_context_length": COUNT,
    "rope.scaling.attn_factor": POSITIVE,
    "rope.scaling.yarn_attn_factor": POSITIVE,
    "rope.scaling.yarn_beta_fast": POSITIVE,
    "rope.scaling.yarn_beta_slow": POSITIVE,
    "rope.scaling.yarn_ext_factor": only(1.0),
    "rope.scaling.yarn_log_multiplier": only(0.0),
    **inert("a note of the authors", "rope.scaling.finetuned"),
    **inert("how the hidden states are made one embedding, which is the caller's", "pooling_type"),
    **dict.fromkeys(("expert_count", "expert_used_count"), only(0)),
}
"""What GGUF files have of all these decoders, behind the architecture's name and beside `keys.GGUF`."""

_WINDOW: Table = {"attention.sliding_window": COUNT}  # of all layers, as in Mistral
GGUF_KEYS: Mapping[str, Table] = {
    "llama": {**GGUF_COMMON, **_WINDOW},
    "mistral": {**GGUF_COMMON, **_WINDOW},
    "qwen2": GGUF_COMMON,
    "qwen3": GGUF_COMMON,
}


def _module(site: str) -> str:
    return f"model.layers.{{layer}}.{'self_attn' if site in _ATTENTION else 'mlp'}.{site}"


def from_hf(settings: Mapping[str, Any], names: frozenset[str]) -> DecoderConfig:
    """The config behind transformers' settings. Raises ValueError on what the decoder does not do."""
    del names
    kind, heads, layers = settings["model_type"], settings["num_attention_heads"], settings["num_hidden_layers"]
    head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
    positions = settings["max_position_embeddings"]
    turns = rope.from_hf(settings["rope_parameters"], head_dim, positions)
    window = settings.get("sliding_window") or 0
    every = "sliding_attention" if kind == "mistral" else "full_attention"
    local = settings.get("layer_types") or [every] * layers
    if not window and kind != "mistral" and "sliding_attention" in local:
        raise ValueError("layer_types has layers of sliding attention, but sliding_window gives them no window.")
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
        max_positions=turns.max_positions,
        norm_eps=settings["rms_norm_eps"],
        activation=hf_activation(settings["hidden_act"]),
        rope_theta=turns.theta,
        rope_factors=turns.factors,
        rope_scale=turns.scale,
        windows=windows if any(windows) else (),
        query_scalar=float(settings.get("query_pre_attn_scalar") or 0.0),
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias,
        mlp_bias=bool(settings.get("mlp_bias")),
        qk_norm=kind == "qwen3",
        tied=bool(settings["tie_word_embeddings"]),
    )


def from_gguf(meta: Mapping[str, Any], names: frozenset[str], read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """The settings behind a GGUF file's metadata, named as in transformers.

    KeyError if one is missing, ValueError if two contradict each other.
    """
    kind, tokens = meta["general.architecture"], len(meta["tokenizer.ggml.tokens"])
    own = {name.removeprefix(f"{kind}."): value for name, value in meta.items() if name.startswith(f"{kind}.")}
    heads, width, layers = own["attention.head_count"], own["embedding_length"], own["block_count"]
    head_dim = own.get("attention.key_length", width // heads)
    for name, wanted, why in (
        ("attention.value_length", head_dim, "keys and values of one length"),
        ("rope.dimension_count", head_dim, "rotary positions on all of a head"),
        ("vocab_size", tokens, "as many rows as tokens"),
    ):
        if own.get(name, wanted) != wanted:
            raise ValueError(f"{kind}.{name} is {own[name]}, but only {wanted} is supported here: {why}.")
    window, scale = own.get("attention.sliding_window"), own.get("attention.scale")
    return {
        "model_type": kind,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if window else "full_attention"] * layers,
        "vocab_size": tokens,
        "hidden_size": width,
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv"),
        "head_dim": head_dim,
        "query_pre_attn_scalar": scale and scale**-2,
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": own["attention.layer_norm_rms_epsilon"],
        "hidden_act": "silu",
        "rope_parameters": rope.from_gguf(own, read("rope_freqs.weight") if "rope_freqs.weight" in names else None),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_output.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
    }


def tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """Every array of a decoder's weights, with its names in the two kinds of checkpoint."""
    biased = {site: config.mlp_bias for site in _GGUF_LINEARS} | dict.fromkeys(_ATTENTION, config.qkv_bias)
    biased["o_proj"] = config.o_bias
    rotary = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    shapes, embedding, width = config.site_shapes(), (config.vocab_size, config.hidden_size), (config.hidden_size,)
    out = [
        Tensor(("embed",), embedding, "model.embed_tokens.weight", "token_embd.weight"),
        Tensor(("norm", "scale"), width, "model.norm.weight", "output_norm.weight"),
    ]
    if not config.tied and not config.headless:
        out.append(Tensor(("head",), embedding, "lm_head.weight", "output.weight"))
    norms = (_BRANCH_NORMS if config.branch_norms else _NORMS) | (_QK_NORMS if config.qk_norm else {})
    for ours, (hf, gguf) in norms.items():
        out.append(
            Tensor(
                ("blocks", ours, "scale"),
                (config.head_dim,) if ours in _QK_NORMS else width,
                f"model.layers.{{layer}}.{hf}.weight",
                f"blk.{{layer}}.{gguf}.weight",
            )
        )
    for site, gguf in _GGUF_LINEARS.items():
        hf, gguf, turned, shape = _module(site), f"blk.{{layer}}.{gguf}", rotary.get(site, 0), shapes[site]
        out.append(Tensor(("blocks", site, "kernel"), shape, f"{hf}.weight", f"{gguf}.weight", True, turned))
        if biased[site]:
            out.append(Tensor(("blocks", site, "bias"), shape[1:], f"{hf}.bias", f"{gguf}.bias", False, turned))
    return tuple(out)


def same_frequencies(array: np.ndarray, config: DecoderConfig) -> bool:
    """Whether a stored buffer of rotary frequencies is the config's, before or after they are stretched."""
    plain = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    wanted = [plain, plain / np.asarray(config.rope_factors or 1.0)]
    array = array.astype(float)
    # They may be stored in bfloat16.
    return array.shape == plain.shape and any(np.allclose(array, one, rtol=1e-2, atol=0) for one in wanted)


MODULES = MappingProxyType({site: _module(site) for site in _GGUF_LINEARS})
"""Site -> module in Hugging Face's model."""

def _is_used(array: np.ndarray, config: DecoderConfig) -> bool:
    return array.shape == (len(config.rope_factors),)


BUFFERS: Mapping[str, Callable[[np.ndarray, Any], bool]] = {
    "*rotary_emb.inv_freq": same_frequencies,
    "rope_freqs.weight": _is_used,  # by `from_gguf`
}

FAMILY = Family(
    name="Llama",
    keys=KEYS,
    gguf_keys=GGUF_KEYS,
    gguf_interleaved=("llama", "mistral"),
    from_hf=from_hf,
    from_gguf=from_gguf,
    tensors=tensors,
    build=Decoder,
    modules=MODULES,
    base_prefix="model.",
    other_prefix="transformer.",
    buffers=BUFFERS,
)
"""Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3."""
