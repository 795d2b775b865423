"""Checkpoints of BERT, RoBERTa and MPNet: how their settings and tensor names map onto `methods.models.encoder`.

Read off transformers' configuration and modeling files of bert, roberta and mpnet.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from methods.models.encoder import Encoder, EncoderConfig
from methods.models.family import Family, Tensor
from methods.models.layers import hf_activation

_BERT = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "o_proj": "attention.output.dense",
    "up_proj": "intermediate.dense",
    "down_proj": "output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_norm": "output.LayerNorm",
}
_MPNET = _BERT | {
    "q_proj": "attention.attn.q",
    "k_proj": "attention.attn.k",
    "v_proj": "attention.attn.v",
    "o_proj": "attention.attn.o",
    "attention_norm": "attention.LayerNorm",
}
_NORMS = ("attention_norm", "ffn_norm")
# In order: MLM and next-sentence heads, a pooler that no head reads, buffers, and what is read as a head.
_IGNORED = ("cls.*", "lm_head.*", "*pooler.dense.*", "*embeddings.position_ids", "classifier.*")


def from_hf(settings: Mapping[str, Any], names: frozenset[str]) -> EncoderConfig:
    """The config behind transformers' settings. Raises ValueError on what the encoder does not do."""
    kind = settings["model_type"]
    if settings.get("is_decoder") or settings.get("add_cross_attention"):
        raise ValueError("an encoder that is used as a decoder (is_decoder) is not supported.")
    if settings.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"position_embedding_type {settings['position_embedding_type']!r} is not supported.")
    offset = 0 if kind == "bert" else (1 if settings["pad_token_id"] is None else settings["pad_token_id"]) + 1
    return EncoderConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["hidden_size"],
        intermediate_size=settings["intermediate_size"],
        num_layers=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        max_positions=settings["max_position_embeddings"] - offset,
        position_offset=offset,
        norm_eps=settings["layer_norm_eps"],
        activation=hf_activation(settings["hidden_act"]),
        token_types=settings.get("type_vocab_size") or 0,
        relative_buckets=settings["relative_attention_num_buckets"] if kind == "mpnet" else 0,
        pooler=kind == "bert" and any(name.endswith("pooler.dense.weight") for name in names),
    )


def _family(name: str, prefix: str, layer: Mapping[str, str]) -> Family:
    stem = f"{prefix}.encoder.layer.{{layer}}."
    modules = {site: stem + module for site, module in layer.items() if site not in _NORMS}

    def tensors(config: EncoderConfig) -> tuple[Tensor, ...]:
        embeddings = f"{prefix}.embeddings."
        out = [
            Tensor(("embed",), f"{embeddings}word_embeddings.weight"),
            Tensor(("positions",), f"{embeddings}position_embeddings.weight"),
            Tensor(("embed_norm", "scale"), f"{embeddings}LayerNorm.weight"),
            Tensor(("embed_norm", "bias"), f"{embeddings}LayerNorm.bias"),
        ]
        if config.token_types:
            out.append(Tensor(("types",), f"{embeddings}token_type_embeddings.weight"))
        if config.relative_buckets:
            out.append(Tensor(("relative",), f"{prefix}.encoder.relative_attention_bias.weight"))
        if config.pooler:
            out.append(Tensor(("pooler_kernel",), f"{prefix}.pooler.dense.weight", transpose=True))
            out.append(Tensor(("pooler_bias",), f"{prefix}.pooler.dense.bias"))
        for ours, module in layer.items():
            matrix = "scale" if ours in _NORMS else "kernel"
            out.append(Tensor(("blocks", ours, matrix), f"{stem}{module}.weight", transpose=matrix == "kernel"))
            out.append(Tensor(("blocks", ours, "bias"), f"{stem}{module}.bias"))
        return tuple(out)

    def head(config: EncoderConfig) -> tuple[Tensor, ...]:
        if prefix == "bert":
            names = {"out": "classifier"} | ({} if config.pooler else {"dense": "bert.pooler.dense"})
        else:
            names = {"dense": "classifier.dense", "out": "classifier.out_proj"}
        kernels = [Tensor((ours, "kernel"), f"{module}.weight", transpose=True) for ours, module in names.items()]
        return (*kernels, *(Tensor((ours, "bias"), f"{module}.bias") for ours, module in names.items()))

    return Family(
        name=name,
        model_types=(prefix,),
        from_hf=from_hf,
        tensors=tensors,
        head=head,
        build=Encoder,
        modules=MappingProxyType(modules),
        base_prefix=f"{prefix}.",
        renamed=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
        ignored=_IGNORED,
    )


FAMILIES = (
    _family("BERT", "bert", _BERT),
    _family("RoBERTa", "roberta", _BERT),
    _family("MPNet", "mpnet", _MPNET),
)
