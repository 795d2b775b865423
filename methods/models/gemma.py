"""Checkpoints of Gemma 1, 2 and 3 (text): what they have beside the Llama family's settings and names.

Read off transformers' configuration and modeling files of gemma, gemma2 and gemma3, and llama.cpp's conversion script
and model files.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from methods.models import llama, rope
from methods.models.decoder import Decoder, DecoderConfig
from methods.models.family import Family
from methods.models.keys import COUNT, FLAG, POSITIVE, TEXT, Table, every, inert, only, optional

_COMMON: Table = {
    **llama.COMMON,
    "attention_bias": FLAG,
    "use_bidirectional_attention": only(False, None),
}
_LOCAL: Table = {
    "hidden_activation": TEXT,
    "hidden_act": only("gelu_pytorch_tanh", None)._replace(used=False),  # hidden_activation is what counts
    "query_pre_attn_scalar": POSITIVE,
    "sliding_window": optional(COUNT),
    "layer_types": optional(every("full_attention", "sliding_attention")),
    "attn_logit_softcapping": optional(POSITIVE),
    "final_logit_softcapping": optional(POSITIVE),
}
KEYS: Mapping[str, Table] = {
    # hidden_act is what counts here, and "gelu" means the other one, as in transformers
    "gemma": {**_COMMON, "hidden_activation": only("gelu_pytorch_tanh", None)._replace(used=False)},
    "gemma2": {**_COMMON, **_LOCAL},
    "gemma3_text": {
        **_COMMON,
        **_LOCAL,
        # transformers reads it and caps nothing, other programs cap: no released model of this kind sets it
        "attn_logit_softcapping": only(None),
        "rope_parameters": rope.EACH,
        "rope_local_base_freq": POSITIVE,
        "sliding_window_pattern": COUNT,
        **inert("written beside layer_types, which say it", "_sliding_window_pattern"),
    },
}
_GGUF_LOCAL: Table = {"attention.sliding_window": COUNT}
_CAPS: Table = {"attn_logit_softcapping": POSITIVE, "final_logit_softcapping": POSITIVE}
GGUF_KEYS: Mapping[str, Table] = {
    "gemma": llama.GGUF_COMMON,
    "gemma2": {**llama.GGUF_COMMON, **_GGUF_LOCAL, **_CAPS},
    "gemma3": {**llama.GGUF_COMMON, **_GGUF_LOCAL, "rope.freq_base_swa": POSITIVE},
}


def from_hf(settings: Mapping[str, Any], names: frozenset[str]) -> DecoderConfig:
    """The config behind transformers' settings. Raises ValueError on what the decoder does not do."""
    kind, turns = settings["model_type"], settings["rope_parameters"]
    local_theta = 0.0
    if kind == "gemma3_text":
        local, turns = turns["sliding_attention"], turns["full_attention"]
        if local.get("rope_type", "default") != "default":
            raise ValueError(f"rotary scaling {local['rope_type']!r} of local layers is not supported.")
        local_theta = float(local["rope_theta"])
    act = settings["hidden_act" if kind == "gemma" else "hidden_activation"]
    config = llama.from_hf(dict(settings) | {"rope_parameters": turns, "hidden_act": act}, names)
    if local_theta and config.rope_scale != 1.0:
        raise ValueError("rotary scaling 'yarn' of global layers alone is not supported.")
    return dataclasses.replace(
        config,
        norm_offset=settings.get("norm_offset", True),
        branch_norms=kind != "gemma",
        local_rope_theta=local_theta if config.windows else 0.0,
        attention_cap=settings.get("attn_logit_softcapping") or 0.0,
        logit_cap=settings.get("final_logit_softcapping") or 0.0,
        qk_norm=kind == "gemma3_text",
        embed_scale=math.sqrt(config.hidden_size),
    )


def from_gguf(meta: Mapping[str, Any], names: frozenset[str], read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """The settings behind a GGUF file's metadata, named as in transformers. KeyError if one is missing."""
    settings = llama.from_gguf(meta, names, read)
    kind, layers = meta["general.architecture"], settings["num_hidden_layers"]
    # What the file does not say is the same in all models of its kind, but for the largest one's query scale.
    every = {"gemma": 0, "gemma2": 2, "gemma3": 6}[kind]
    largest = layers == {"gemma2": 46, "gemma3": 62}.get(kind)
    settings |= {
        "model_type": "gemma3_text" if kind == "gemma3" else kind,
        "norm_offset": False,  # the file's norms are stored with the 1 added
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention" if every and (i + 1) % every else "full_attention" for i in range(layers)],
    }
    if kind != "gemma" and not settings["query_pre_attn_scalar"]:
        width = settings["hidden_size"] // settings["num_attention_heads"]
        settings["query_pre_attn_scalar"] = width if largest else settings["head_dim"]
    if kind == "gemma2":
        settings["attn_logit_softcapping"] = meta.get("gemma2.attn_logit_softcapping", 50.0)
        settings["final_logit_softcapping"] = meta.get("gemma2.final_logit_softcapping", 30.0)
    if kind == "gemma3":
        local = {"rope_theta": meta.get("gemma3.rope.freq_base_swa", 10_000.0)}
        turns = settings["rope_parameters"] | {"rope_theta": meta.get("gemma3.rope.freq_base", 1e6)}
        settings["rope_parameters"] = {"full_attention": turns, "sliding_attention": local}
    return settings


def begin_with_bos(tokenizer: Any) -> None:
    """Has every text begin with the first-token mark, whatever the tokenizer's files say.

    Gemma was trained with it alone and writes nonsense without; files made by others often leave the rule out. A
    tokenizer that does it, or has no such mark, stays as it is.
    """
    if (mark := tokenizer.bos_token) is None or tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[mark, "$A"], pair=[mark, "$A", f"{mark}:1", "$B:1"], special_tokens=[(mark, tokenizer.bos_token_id)]
    )


FAMILY = Family(
    name="Gemma",
    keys=KEYS,
    gguf_keys=GGUF_KEYS,
    from_hf=from_hf,
    from_gguf=from_gguf,
    tensors=llama.tensors,
    build=Decoder,
    modules=llama.MODULES,
    base_prefix=llama.FAMILY.base_prefix,
    other_prefix=llama.FAMILY.other_prefix,
    buffers=llama.BUFFERS,
)
