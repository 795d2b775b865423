"""Checkpoints of OPT: how their settings and tensor names map onto `methods.models.gpt`.

Read off transformers' configuration and modeling files of opt. No GGUF: llama.cpp does not convert OPT.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from methods.models.family import Family, Tensor
from methods.models.gpt import GPT, GPTConfig
from methods.models.keys import FLAG, LAYERS, SIZE, TEXT, Table, inert, only
from methods.models.layers import hf_activation

_LINEARS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.out_proj",
    "up_proj": "fc1",
    "down_proj": "fc2",
}
_NORMS = {"attention_norm": "self_attn_layer_norm", "ffn_norm": "final_layer_norm"}
_LAYER = "model.decoder.layers.{layer}."


KEYS: Table = {
    **dict.fromkeys(("vocab_size", "hidden_size", "ffn_dim", "num_attention_heads"), SIZE),
    **dict.fromkeys(("max_position_embeddings", "word_embed_proj_dim"), SIZE),
    **dict.fromkeys(("do_layer_norm_before", "enable_bias", "_remove_final_layer_norm"), FLAG),
    "num_hidden_layers": LAYERS,
    "activation_function": TEXT,
    "layer_norm_elementwise_affine": only(True),
    **inert("which tool trained it", "sep_token"),
}


def from_hf(settings: Mapping[str, Any], names: frozenset[str]) -> GPTConfig:
    """The config behind transformers' settings. Raises ValueError on what the model does not do."""
    del names
    width, hidden = settings["word_embed_proj_dim"], settings["hidden_size"]
    return GPTConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=hidden,
        intermediate_size=settings["ffn_dim"],
        num_layers=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        max_positions=settings["max_position_embeddings"],
        position_offset=2,
        activation=hf_activation(settings["activation_function"]),
        norm_first=settings["do_layer_norm_before"],
        bias=settings["enable_bias"],
        final_norm=settings["do_layer_norm_before"] and not settings.get("_remove_final_layer_norm"),
        embed_size=0 if width == hidden else width,
        tied=settings["tie_word_embeddings"],
    )


def tensors(config: GPTConfig) -> tuple[Tensor, ...]:
    """Every array of the weights, with its name in a checkpoint."""
    width, narrow, shapes = config.hidden_size, config.embed_size or config.hidden_size, config.site_shapes()
    embedding, norm, positions = (config.vocab_size, narrow), (width,), config.position_offset + config.max_positions
    out = [
        Tensor(("embed",), embedding, "model.decoder.embed_tokens.weight"),
        Tensor(("positions",), (positions, width), "model.decoder.embed_positions.weight"),
    ]
    if not config.tied and not config.headless:
        out.append(Tensor(("head",), embedding, "lm_head.weight"))
    if config.final_norm:
        out.append(Tensor(("norm", "scale"), norm, "model.decoder.final_layer_norm.weight"))
        out.append(Tensor(("norm", "bias"), norm, "model.decoder.final_layer_norm.bias"))
    if config.embed_size:
        out += [
            Tensor((name,), shape, f"model.decoder.{name}.weight", transpose=True)
            for name, shape in (("project_in", (narrow, width)), ("project_out", (width, narrow)))
        ]
    for ours, hf in _NORMS.items():
        out.append(Tensor(("blocks", ours, "scale"), norm, f"{_LAYER}{hf}.weight"))
        out.append(Tensor(("blocks", ours, "bias"), norm, f"{_LAYER}{hf}.bias"))
    for ours, hf in _LINEARS.items():
        out.append(Tensor(("blocks", ours, "kernel"), shapes[ours], f"{_LAYER}{hf}.weight", transpose=True))
        if config.bias:
            out.append(Tensor(("blocks", ours, "bias"), shapes[ours][1:], f"{_LAYER}{hf}.bias"))
    return tuple(out)


FAMILY = Family(
    name="OPT",
    keys={"opt": KEYS},
    from_hf=from_hf,
    tensors=tensors,
    build=GPT,
    modules=MappingProxyType({site: f"{_LAYER}{hf}" for site, hf in _LINEARS.items()}),
    base_prefix="model.",
)
