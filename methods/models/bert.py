"""Checkpoints of BERT, RoBERTa and MPNet: how their settings and tensor names map onto `methods.models.encoder`.

Read off transformers' configuration and modeling files of bert, roberta and mpnet.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from methods.models.encoder import Encoder, EncoderConfig
from methods.models.family import Family, Tensor
from methods.models.keys import LAYERS, REAL, SIZE, TEXT, WHOLE, Table, inert, only, optional
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
# In order: heads for masked tokens and next sentences, a pooler that our head does not read, and all other heads.
_HEADS = ("cls.*", "lm_head.*", "*pooler.dense.*", "classifier.*", "qa_outputs.*")

_COMMON: Table = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), SIZE),
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": SIZE,
    "layer_norm_eps": REAL,
    "hidden_act": TEXT,
    "is_decoder": only(False),
}
_ROBERTA: Table = {
    **_COMMON,
    "type_vocab_size": SIZE,
    "position_embedding_type": only("absolute"),
    "pad_token_id": optional(WHOLE),  # positions begin behind it
}
KEYS: Mapping[str, Table] = {
    "bert": {
        **_COMMON,
        "type_vocab_size": SIZE,
        "position_embedding_type": only("absolute"),
        **inert("of another pooler, which no model in PyTorch has", "directionality", "pooler_fc_size", "pooler_type"),
        **inert("of another pooler", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head"),
    },
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "mpnet": {**_COMMON, "relative_attention_num_buckets": SIZE},
}


def from_hf(settings: Mapping[str, Any], names: frozenset[str]) -> EncoderConfig:
    """The config behind transformers' settings. Raises ValueError on what the encoder does not do."""
    kind = settings["model_type"]
    pad = 1 if kind == "mpnet" else settings["pad_token_id"]
    if pad is None:
        raise ValueError("pad_token_id is null, but positions begin behind it.")
    offset = 0 if kind == "bert" else pad + 1
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


def _family(name: str, kinds: tuple[str, ...], layer: Mapping[str, str]) -> Family:
    prefix = kinds[0]
    stem = f"{prefix}.encoder.layer.{{layer}}."
    modules = {site: stem + module for site, module in layer.items() if site not in _NORMS}

    def tensors(config: EncoderConfig) -> tuple[Tensor, ...]:
        embeddings, shapes = f"{prefix}.embeddings.", config.site_shapes()
        width, positions = config.hidden_size, config.position_offset + config.max_positions
        out = [
            Tensor(("embed",), (config.vocab_size, width), f"{embeddings}word_embeddings.weight"),
            Tensor(("positions",), (positions, width), f"{embeddings}position_embeddings.weight"),
            Tensor(("embed_norm", "scale"), (width,), f"{embeddings}LayerNorm.weight"),
            Tensor(("embed_norm", "bias"), (width,), f"{embeddings}LayerNorm.bias"),
        ]
        if config.token_types:
            out.append(Tensor(("types",), (config.token_types, width), f"{embeddings}token_type_embeddings.weight"))
        if config.relative_buckets:
            bias = (config.relative_buckets, config.num_heads)
            out.append(Tensor(("relative",), bias, f"{prefix}.encoder.relative_attention_bias.weight"))
        if config.pooler:
            out.append(Tensor(("pooler_kernel",), (width, width), f"{prefix}.pooler.dense.weight", transpose=True))
            out.append(Tensor(("pooler_bias",), (width,), f"{prefix}.pooler.dense.bias"))
        for ours, module in layer.items():
            kernel = ours not in _NORMS
            shape = shapes[ours] if kernel else (width,)
            path = ("blocks", ours, "kernel" if kernel else "scale")
            out.append(Tensor(path, shape, f"{stem}{module}.weight", transpose=kernel))
            out.append(Tensor(("blocks", ours, "bias"), shape[-1:], f"{stem}{module}.bias"))
        return tuple(out)

    def head(config: EncoderConfig) -> tuple[Tensor, ...]:
        if prefix == "bert":
            names = {"out": "classifier"} | ({} if config.pooler else {"dense": "bert.pooler.dense"})
        else:
            names = {"dense": "classifier.dense", "out": "classifier.out_proj"}
        out, sizes = [], {"dense": config.hidden_size, "out": -1}
        for ours, module in names.items():
            shape = (config.hidden_size, sizes[ours])
            out.append(Tensor((ours, "kernel"), shape, f"{module}.weight", transpose=True))
            out.append(Tensor((ours, "bias"), shape[1:], f"{module}.bias"))
        return tuple(out)

    return Family(
        name=name,
        keys={kind: KEYS[kind] for kind in kinds},
        from_hf=from_hf,
        tensors=tensors,
        head=head,
        build=Encoder,
        modules=MappingProxyType(modules),
        base_prefix=f"{prefix}.",
        renamed=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
        buffers={"*embeddings.position_ids": _counted},
        heads=_HEADS,
    )


def _counted(array: np.ndarray, config: EncoderConfig) -> bool:
    """The numbers 0, 1, ... of the table's rows: [1, n]."""
    del config
    return array.ndim == 2 and np.array_equal(array[0], np.arange(array.shape[1]))


FAMILIES = (
    _family("BERT", ("bert",), _BERT),
    _family("RoBERTa", ("roberta", "xlm-roberta", "camembert"), _BERT),
    _family("MPNet", ("mpnet",), _MPNET),
)
