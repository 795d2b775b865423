"""Checkpoints: a folder and a GGUF file give the same model, and what the loader refuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from methods import models
from methods.models.checkpoints import open_gguf
from methods.models.gguf_tokenizer import build
from methods.models.weights import aligned
from tests.methods.decoder_files import PLAIN, draw, save_folder, save_gguf
from tests.methods.helpers import MASK, TOKENS, logits

GEMMA = {"tied": True, "norm_offset": True, "activation": "gelu_tanh"}
KINDS = {  # what the config has beside PLAIN's, and what else config.json says
    "llama": ({}, {}),
    "qwen2": ({"qkv_bias": True}, {}),
    "gemma": (GEMMA, {}),
    "gemma2": (GEMMA | {"branch_norms": True}, {"sliding_window": 3, "query_pre_attn_scalar": PLAIN.head_dim}),
    "gemma3": (
        GEMMA | {"branch_norms": True, "qk_norm": True, "rope_theta": 1e6},
        {"model_type": "gemma3_text", "sliding_window": 3, "query_pre_attn_scalar": PLAIN.head_dim},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_and_folder_give_the_same_model(kind, tmp_path):
    changes, settings = KINDS[kind]
    config = dataclasses.replace(PLAIN, **changes)
    weights = draw(config, dtype=jnp.float32)
    folder = models.load(save_folder(tmp_path / "folder", config, weights, kind, **settings))
    window = {"window": 3} if "sliding_window" in settings else {}
    file = models.load(save_gguf(tmp_path / "model.gguf", config, weights, kind, **window))
    # "1 + w" is stored added up in the file
    assert dataclasses.replace(file.config, norm_offset=folder.config.norm_offset) == folder.config
    assert bool(folder.config.windows) == bool(window)
    assert folder.tokenizer is None and len(file.tokenizer) == config.vocab_size
    jax.tree.map(np.testing.assert_array_equal, folder.weights, weights)
    outputs = [logits(p.model, p.weights, TOKENS, MASK) for p in (folder, file)]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=2e-4, atol=1e-5)


def test_load_casts_and_drops_a_tied_head(tmp_path):
    config = dataclasses.replace(PLAIN, tied=True)
    weights = draw(config, dtype=jnp.bfloat16)
    path = save_folder(tmp_path, config, weights)
    tensors = load_file(path / "model.safetensors")
    headless = {name.removeprefix("model."): array for name, array in tensors.items()}
    save_file(headless | {"lm_head.weight": headless["embed_tokens.weight"]}, path / "model.safetensors")
    loaded = models.load(path, dtype=jnp.float64)
    assert loaded.config == dataclasses.replace(config, qk_norm=False)
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, jax.tree.map(lambda a: a.astype(jnp.float64), weights))


def test_stacked_arrays_are_handed_over_without_a_copy():
    array = aligned((3, 5, 7), np.dtype(np.float32))
    array[...] = 1
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data
    assert array.flags.c_contiguous and array.dtype == np.float32


@pytest.mark.parametrize("rows", [192, 7])
def test_quantised_tensors_are_what_the_package_says(rows, tmp_path):
    kind = gguf.GGMLQuantizationType.Q5_0
    array = np.random.default_rng(0).standard_normal((rows, 64)).astype(np.float32)
    stored = gguf.quants.quantize(array, kind)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("matrix", stored, raw_dtype=kind)
    writer.add_tensor("norm", array[0])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    read = open_gguf(tmp_path / "a.gguf").read
    np.testing.assert_array_equal(read("matrix"), gguf.quants.dequantize(stored, kind))
    np.testing.assert_array_equal(read("norm"), array[0])


def test_sentencepiece_tokenizer(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab", "abc"]
    scores = [0.0] * len(pieces) + [-9.0, -9.1, -9.2, -9.3, -2.0, -1.0, -3.0, -4.0, -5.0]
    config = dataclasses.replace(PLAIN, vocab_size=len(pieces + words))
    weights = draw(config, dtype=jnp.float32)
    path = save_gguf(tmp_path / "m.gguf", config, weights, tokens=pieces + words, scores=scores)
    meta = dict(open_gguf(path).settings)
    meta |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.unknown_token_id": 0}
    meta["tokenizer.ggml.token_type"] = [2, 3, 3] + [6] * 256 + [1] * len(words)
    tokenizer = build(meta, "m.gguf")

    def cut(text):
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])

    assert cut("abc") == ["<s>", "▁a", "bc"]  # bc scores best, then ▁a beats abc
    assert cut("ab é") == ["<s>", "▁ab", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer("abc é</s>")["input_ids"], skip_special_tokens=True) == "abc é"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """An intact folder and an intact GGUF file."""
    base = tmp_path_factory.mktemp("sources")
    weights = draw(PLAIN, dtype=jnp.float32)
    return save_folder(base / "folder", PLAIN, weights), save_gguf(base / "model.gguf", PLAIN, weights)


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}, folder / "model.safetensors")


def add_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.q_norm.weight": np.ones(6)}, folder / "model.safetensors")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1-of-2.safetensors"}}))


def cut_shard(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    cut(folder)
    (folder / "model.safetensors").rename(folder / "model-1-of-1.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-1-of-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bad_tokenizer(folder: Path) -> None:
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def adapter(folder: Path, *, beside: bool, **config) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if not beside:
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json"),
        (lambda f: adapter(f, beside=True), ValueError, "holds an adapter beside the model .* merge it into"),
        (
            lambda f: adapter(f, beside=False, base_model_name_or_path="org/base"),
            ValueError,
            r"is an adapter .*, not a model: give its base, 'org/base'\.",
        ),
        (lambda f: adapter(f, beside=False), ValueError, "not a model: give its base, which it does not name"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "not valid JSON"),
        (
            lambda f: edit(f, model_type="mamba"),
            ValueError,
            "'mamba', which is not known: llama, mistral, qwen2",
        ),
        (lambda f: edit(f, hidden_act="mish"), ValueError, "activation 'mish' is not supported"),
        (lambda f: edit(f, quantization_config={}), ValueError, "quantised weights"),
        (lambda f: edit(f, intermediate_size=25), ValueError, "has shape .* where the config asks for"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            FileNotFoundError,
            "are pickles",
        ),
        (drop_tensor, ValueError, "lacks the tensor 'model.layers.1.mlp.up_proj.weight'"),
        (add_tensor, ValueError, "1 tensor that a Llama model does not use"),
        (cut, ValueError, "truncated or no safetensors file"),
        (shard, FileNotFoundError, "lacks the shard model-1-of-2.safetensors"),
        (cut_shard, ValueError, r"model-1-of-1\.safetensors is truncated or no safetensors file: fetch it again"),
        (bad_tokenizer, ValueError, "ids up to 299, but the embedding has 260 rows"),
    ],
)
def test_damaged_folder_is_one_sentence(damage, error, sentence, sources, tmp_path):
    folder = Path(shutil.copytree(sources[0], tmp_path / "copy"))
    damage(folder)
    with pytest.raises(error, match=sentence) as caught:
        models.load(folder)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("kept", [0, 3, 200, 20_000, -50])
def test_truncated_gguf_is_one_sentence(kept, sources, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(sources[1].read_bytes()[:kept])
    with pytest.raises(ValueError, match="truncated or no GGUF file"):
        models.load(path)


def test_gguf_without_a_tensor_or_a_known_tokenizer_is_one_sentence(tmp_path):
    weights = draw(PLAIN, dtype=jnp.float32)
    path = save_gguf(tmp_path / "a.gguf", PLAIN, weights, leave_out="blk.2.ffn_down.weight")
    with pytest.raises(ValueError, match=r"lacks the tensor 'blk\.2\.ffn_down\.weight'"):
        models.load(path)
    with pytest.raises(ValueError, match=r"by the rule 'klingon', which is not known \(gpt-2, smollm"):
        models.load(save_gguf(tmp_path / "b.gguf", PLAIN, weights, pre="klingon"))
    with pytest.raises(ValueError, match="architecture 'mamba', which is not known"):
        models.load(save_gguf(tmp_path / "c.gguf", PLAIN, weights, "mamba"))


def test_unknown_names_and_dtypes_are_one_sentence(sources, monkeypatch):
    for name in ("./nowhere", "nowhere.gguf", "/no/such/folder"):
        with pytest.raises(FileNotFoundError, match="there is no model at"):
            models.load(name)
    with pytest.raises(FileNotFoundError, match=r"the hub did not give it .* check the name and the network"):
        models.load("nobody/such-a-model")
    with pytest.raises(ValueError, match="cannot be int32"):
        models.load(sources[0], dtype=jnp.int32)
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        models.load(sources[0], dtype=jnp.float64)
    with pytest.raises(ValueError, match="no linear of this model"):
        models.load(sources[0]).hf_names.module("lm_head", 0)
