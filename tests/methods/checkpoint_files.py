"""Tiny checkpoints of every family, written from the family's own table of names; nothing of them is compiled."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from methods.models.loading import FAMILIES

_LLAMA = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "architectures": ["ForCausalLM"],
}
_BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 34,
    "pad_token_id": 1,
}
_GEMMA = _LLAMA | {"head_dim": 4, "tie_word_embeddings": True}
SETTINGS = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 3},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 4},
    "phi3": _LLAMA | {"num_key_value_heads": 4, "pad_token_id": 1},
    "gemma": _GEMMA,
    "gemma2": _GEMMA | {"sliding_window": 3, "query_pre_attn_scalar": 4},
    "gemma3_text": _GEMMA | {"sliding_window": 3, "query_pre_attn_scalar": 4},
    "gpt2": {"vocab_size": 50, "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "opt": {
        "vocab_size": 50,
        "hidden_size": 16,
        "word_embed_proj_dim": 8,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    },
    "bert": _BERT | {"type_vocab_size": 2},
    "roberta": _BERT | {"type_vocab_size": 1},
    "xlm-roberta": _BERT | {"type_vocab_size": 1},
    "camembert": _BERT | {"type_vocab_size": 1},
    "mpnet": _BERT | {"relative_attention_num_buckets": 8},
}
"""`model_type` -> what its config.json says here."""


def save(path: Path, kind: str, **changes) -> Path:
    """A folder of this kind, with drawn weights; `changes` are written into config.json and nowhere else."""
    from transformers import CONFIG_MAPPING

    family = next(family for family in FAMILIES if kind in family.keys)
    config = family.from_hf(CONFIG_MAPPING[kind](**SETTINGS[kind]).to_dict(), frozenset())
    rng, tensors = np.random.default_rng(0), {}
    for tensor in family.tensors(config):
        for layer in range(config.num_layers) if tensor.stacked else [None]:
            shape = tensor.stored_shape("hf")
            tensors[tensor.hf.format(layer=layer)] = rng.normal(size=shape).astype(np.float32)
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": kind} | SETTINGS[kind] | changes))
    return path


def add(path: Path, **tensors) -> None:
    """More tensors in a folder's file, or others in the place of some."""
    file = path / "model.safetensors"
    save_file(load_file(file) | {name: np.ascontiguousarray(array) for name, array in tensors.items()}, file)


def shard(path: Path, first: str, second: str) -> None:
    """A folder's file becomes two, named in an index as `first` and `second`, relative to the folder."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    home = {name: first if i % 2 else second for i, name in enumerate(names)}
    for file in (first, second):
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensors[name] for name in names if home[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
