"""A tiny decoder, and its weights as a folder of Hugging Face's layout and as a GGUF file."""

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

from methods.models import llama
from methods.models.decoder import Decoder, DecoderConfig
from tests.methods import helpers

TINY = DecoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_positions=32,
    windows=(0, 3, 4),
    qkv_bias=True,
    qk_norm=True,
)
PLAIN = dataclasses.replace(
    TINY, windows=(), qkv_bias=False, qk_norm=False, vocab_size=260, tied=False, norm_eps=2**-17
)
ADD = {str: "string", bool: "bool", int: "uint32", float: "float32"}


def draw(config, dtype=np.float64):
    return helpers.draw(Decoder(config), dtype)


def save_folder(path: Path, config, weights, kind="llama", **settings):
    """A Hugging Face folder, written from our weights by the family's own table of names."""
    path.mkdir(exist_ok=True)
    tensors = {}
    for tensor in llama.tensors(config):
        array = weights
        for key in tensor.path:
            array = array[key]
        for layer, one in enumerate(array) if tensor.stacked else [(None, array)]:
            tensors[tensor.hf.format(layer=layer)] = np.ascontiguousarray(one.T if tensor.transpose else one)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(
        json.dumps(
            {
                "model_type": kind,
                "vocab_size": config.vocab_size,
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "head_dim": config.head_dim,
                "max_position_embeddings": config.max_positions,
                "rms_norm_eps": config.norm_eps,
                "rope_theta": config.rope_theta,
                "tie_word_embeddings": config.tied,
            }
            | settings
        )
    )
    return path


def save_gguf(path: Path, config, weights, kind="llama", tokens=None, scores=None, keys=None, **settings):
    """A GGUF file as llama.cpp's converter writes it: rotary pairs of llama side by side, Gemma's norms plus 1.

    keys: more of them, or others in the place of some; the architecture's own without its name.
    """
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    tokens = tokens or ["<s>", "</s>", *(chr(0x100 + i) for i in range(config.vocab_size - 2))]
    writer.add_tokenizer_model("llama" if scores else "gpt2")
    writer.add_tokenizer_pre(settings.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    if scores:
        writer.add_token_scores(scores)
    else:
        writer.add_token_merges([])
    writer.add_bos_token_id(0)
    for key, value in (keys or {}).items():
        key = key if key.startswith(("general.", "split.", "tokenizer.")) else f"{kind}.{key}"
        writer.kv_data[0].pop(key, None)
        getattr(writer, f"add_{ADD[type(value)]}")(key, value)
    if "window" in settings:
        writer.add_sliding_window(settings["window"])
    for tensor in llama.tensors(config):
        array = weights
        for key in tensor.path:
            array = array[key]
        for layer, one in enumerate(array) if tensor.stacked else [(None, array)]:
            one = np.asarray(one.T if tensor.transpose else one, np.float32)
            if tensor.interleaved_heads and kind == "llama":
                one = one.reshape(tensor.interleaved_heads, 2, -1, *one.shape[1:]).swapaxes(1, 2).reshape(one.shape)
            if tensor.path[-1] == "scale" and kind.startswith("gemma"):
                one = one + 1
            name = tensor.gguf.format(layer=layer)
            if name != settings.get("leave_out"):
                writer.add_tensor(name, one)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
