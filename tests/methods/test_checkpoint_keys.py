"""What a checkpoint says is used, known to change nothing, or refused by name; what it leaves out is said."""

import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from methods import models
from methods.models import rope
from methods.models.gguf_tokenizer import build
from methods.models.loading import FAMILIES
from tests.conftest import require
from tests.methods import checkpoint_files as files
from tests.methods.decoder_files import PLAIN, draw, save_folder, save_gguf

KINDS = list(files.SETTINGS)


def test_every_kind_has_a_tiny_checkpoint():
    assert set(KINDS) == {kind for family in FAMILIES for kind in family.keys}


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_shapes_are_those_the_model_asks_for(kind, tmp_path):
    loaded = models.load(files.save(tmp_path, kind))
    wanted = jax.eval_shape(loaded.model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert jax.tree.map(jnp.shape, loaded.weights) == jax.tree.map(jnp.shape, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_nothing_is_taken_and_what_is_unknown_is_not(kind, tmp_path):
    plain = models.load(files.save(tmp_path, kind))
    inert = {"torch_dtype": "float16", "use_cache": False, "attention_dropout": 0.3, "transformers_version": "4.2.0"}
    inert |= {"id2label": {"0": "a"}, "_name_or_path": "x", "auto_map": {"AutoModel": "evil.Model"}, "top_k": 3}
    assert models.load(files.save(tmp_path, kind, **inert)).config == plain.config
    for name in ("attention_sinks", "rotary_pct", "logit_scale", "n_experts"):
        with pytest.raises(ValueError, match=rf"config\.json has the key '{name}' \(2\), which is not known") as caught:
            models.load(files.save(tmp_path, kind, **{name: 2}))
        assert "\n" not in str(caught.value)


ROPE = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"sliding_window": 4}, "sliding_window is 4"),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, "layer_types is "),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        ("llama", {"rope_scaling": ROPE | {"partial_rotary_factor": 0.5}}, "as its partial_rotary_factor"),
        ("llama", {"rope_scaling": ROPE | {"attention_factor": 2.0}}, "no 'attention_factor' in it"),
        ("llama", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "a rope_type of default, dynamic, linear"),
        ("llama", {"rope_scaling": ROPE | {"type": "yarn"}}, "a rope_type of"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "a factor in it with rope_type 'linear'"),
        ("llama", {"rope_scaling": ROPE | {"factor": 0}}, "a number above 0, up to 1e[+]38 as its factor"),
        ("llama", {"rope_parameters": {"full_attention": ROPE}}, "no 'full_attention' in it with rope_type 'default'"),
        ("gemma3_text", {"rope_parameters": ROPE}, "an object with full_attention and sliding_attention"),
        ("gemma3_text", {"rope_parameters": {"chunked_attention": ROPE}}, "an object with full_attention and"),
        ("phi3", {"num_key_value_heads": 2}, "has shape|num_key_value_heads=2 is not supported"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor is"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved is True"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder is True"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', but .* true or false"),
        ("llama", {"hidden_act": "relu2"}, "activation 'relu2' is not supported"),
        ("llama", {"num_attention_heads": True}, "num_attention_heads is True"),
        ("llama", {"num_hidden_layers": 2.0}, r"num_hidden_layers is 2\.0"),
        ("llama", {"num_hidden_layers": 1}, "tensors? that a Llama model does not use"),
        ("llama", {"compression_config": {}}, "the key 'compression_config'"),
        ("mistral", {"attention_bias": True}, "attention_bias is True"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is "),
        ("qwen2", {"attention_bias": False}, "attention_bias is False"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "sliding_window gives them no window"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types is "),
        ("qwen3", {"use_mrope": True}, "use_mrope is True"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is "),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 2}, "layer_types is "),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"n_positions": 33}, "n_positions is 33 |has shape"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
        ("opt", {"enable_bias": False}, "tensors? that a OPT model does not use"),
        ("opt", {"word_embed_proj_dim": 16}, "has shape"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads is "),
        ("roberta", {"pad_token_id": None}, "pad_token_id is null"),
        ("roberta", {"pad_token_id": 2, "max_position_embeddings": 33}, "has shape"),
    ],
)
def test_another_computation_is_refused_by_name(kind, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        models.load(files.save(tmp_path, kind, **changes))
    assert "\n" not in str(caught.value)


def test_mpnet_counts_positions_from_two_whatever_its_padding():
    from transformers import MPNetConfig

    settings = MPNetConfig(**files.SETTINGS["mpnet"]).to_dict() | {"pad_token_id": 0}
    family = next(family for family in FAMILIES if family.name == "MPNet")
    assert family.from_hf(settings, frozenset()).position_offset == 2


# --- rotary positions ----------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [9.0] * 4}
LLAMA3 = YARN | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    LLAMA3,
    YARN,
    YARN | {"beta_fast": 8.0, "beta_slow": 2.0},
    YARN | {"beta_fast": 0.01, "beta_slow": 8.0},
    YARN | {"original_max_position_embeddings": 4},
    YARN | {"truncate": False},
    YARN | {"mscale": 0.7, "mscale_all_dim": 0.3},
    YARN | {"mscale": 0.7},
    YARN | {"attention_factor": 1.3},
    LONG | {"original_max_position_embeddings": 32},
    LONG | {"original_max_position_embeddings": 32, "factor": 6.0},
    LONG | {"original_max_position_embeddings": 32, "attention_factor": 1.1},
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: "-".join(map(str, scaling.values()))[:40])
def test_rotary_scalings_equal_transformers(scaling):
    require("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=16, num_attention_heads=2, max_position_embeddings=128, rope_parameters=scaling)
    assert rope.KEY.wanted(scaling, None) == ""
    frequencies, scale = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    got = rope.from_hf(config.to_dict()["rope_parameters"], 8, 128)
    ours = got.theta ** -(np.arange(0, 8, 2) / 8) / np.asarray(got.factors or 1.0)
    np.testing.assert_allclose(ours, frequencies.numpy(), rtol=1e-6)
    np.testing.assert_allclose(got.scale, scale, rtol=1e-12)
    # what is longer than the original length turns by long_factor, and is refused
    assert got.max_positions == (32 if scaling["rope_type"] == "longrope" else 128)


def gguf_of(path, kind="qwen2", **keys):
    config = PLAIN if kind == "llama" else PLAIN.__class__(**vars(PLAIN) | {"qkv_bias": True})
    return save_gguf(path, config, draw(config, dtype=jnp.float32), kind, keys=keys)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 8}, YARN | {"original_max_position_embeddings": 8}),
        ({"type": "yarn", "factor": 4.0}, YARN | {"original_max_position_embeddings": PLAIN.max_positions}),
        (
            {"type": "yarn", "factor": 4.0, "attn_factor": 1.5, "yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0},
            YARN | {"attention_factor": 1.5, "beta_fast": 8.0, "beta_slow": 2.0},
        ),
        (
            {"type": "yarn", "factor": 4.0, "yarn_attn_factor": 1.5, "yarn_ext_factor": 1.0},
            YARN | {"attention_factor": 1.5},
        ),
    ],
)
def test_rotary_keys_of_gguf_mean_what_the_config_says(keys, scaling, tmp_path):
    kind = "llama" if keys["type"] == "linear" else "qwen2"
    keys = {f"rope.scaling.{name}": one for name, one in keys.items()}
    file = models.load(gguf_of(tmp_path / "a.gguf", kind, **keys))
    config = PLAIN.__class__(**vars(PLAIN) | {"qkv_bias": kind == "qwen2"})
    weights = draw(config, dtype=jnp.float32)
    folder = models.load(save_folder(tmp_path / "folder", config, weights, kind, rope_scaling=scaling))
    assert file.config == folder.config and file.config.rope_factors


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope.dimension_count": 4}, r"qwen2\.rope\.dimension_count is 4, but only 6"),
        ({"attention.value_length": 4}, r"qwen2\.attention\.value_length is 4, but only 6"),
        ({"vocab_size": 200}, r"qwen2\.vocab_size is 200, but only 260"),
        ({"rope.scaling.type": "longrope"}, "of type 'longrope'"),
        ({"rope.scaling.factor": 4.0}, "given without rope.scaling.type"),
        ({"rope.scaling.type": "linear", "rope.scaling.yarn_beta_fast": 8.0}, "yarn_beta_fast is not supported"),
        ({"rope.scaling.type": "linear", "rope.scaling.attn_factor": 8.0}, "attn_factor is not supported"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 0.5}, "yarn_log_multiplier is 0.5"),
        ({"rope.scaling.alpha": 4.0}, r"the key 'qwen2\.rope\.scaling\.alpha'"),
        ({"attention.sliding_window": 8}, r"the key 'qwen2\.attention\.sliding_window'"),
        ({"final_logit_softcapping": 30.0}, r"the key 'qwen2\.final_logit_softcapping'"),
        ({"expert_count": 8}, r"qwen2\.expert_count is 8"),
        ({"attention.head_count": 3_473_412}, r"attention\.head_count is 3473412, .* the largest dimension"),
        ({"block_count": 10**9}, r"block_count is 1000000000, .* the number of tensors"),
        ({"general.type": "adapter"}, "general.type is 'adapter'"),
        ({"split.count": 3}, "split.count is 3"),
        ({"tokenizer.ggml.precompiled_charsmap": "x"}, "the key 'tokenizer.ggml.precompiled_charsmap'"),
        ({"tokenizer.ggml.add_space_prefix": True}, "puts a space before texts"),
        ({"tokenizer.ggml.eos_token_id": 260}, "eos_token_id is 260, but there are only 260 tokens"),
    ],
)
def test_gguf_keys_are_used_or_refused_by_name(keys, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        models.load(gguf_of(tmp_path / "a.gguf", **keys))
    assert "\n" not in str(caught.value)


def test_gguf_keys_that_change_nothing_or_are_used(tmp_path):
    inert = {"general.name": "x", "general.base_model.0.name": "y", "general.sampling.top_k": 3}
    inert |= {"rope.dimension_count": 6, "attention.value_length": 6, "rope.scaling.finetuned": True}
    plain = models.load(gguf_of(tmp_path / "a.gguf"))
    assert models.load(gguf_of(tmp_path / "b.gguf", **inert)).config == plain.config
    scaled = models.load(gguf_of(tmp_path / "c.gguf", **{"attention.scale": 0.25, "rope.scaling.attn_factor": 1.5}))
    assert (scaled.config.query_scalar, scaled.config.rope_scale) == (16.0, 1.5)


def test_a_tokenizer_that_does_not_fit_its_lists_is_one_sentence():
    meta = {"tokenizer.ggml.model": "llama", "general.architecture": "llama", "tokenizer.ggml.tokens": ["a", "b"]}
    for more, message in (
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "a token twice"),
        ({"tokenizer.ggml.scores": [1.0]}, "2 tokens, but 1 entries in tokenizer.ggml.scores"),
        ({}, "no tokenizer.ggml.scores"),
        ({"tokenizer.ggml.tokens": ["a", "b" * 300], "tokenizer.ggml.scores": [1.0, 2.0]}, "a token of 300 characters"),
        ({"tokenizer.ggml.scores": [1.0, 2.0], "tokenizer.ggml.bos_token_id": 2}, "bos_token_id is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            build(meta | more, "m.gguf")


# --- tensors -------------------------------------------------------------------------------------------------------


def test_buffers_are_what_the_model_computes(tmp_path):
    inverse = (10_000.0 ** -(np.arange(0, 4, 2) / 4)).astype(np.float32)
    good = {
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": inverse},
        "gpt2": {"transformer.h.0.attn.bias": np.tri(32)[None, None] > 0, "transformer.h.0.attn.masked_bias": -1e4},
        "bert": {"bert.embeddings.position_ids": np.arange(34)[None]},
    }
    for kind, buffers in good.items():
        for name, array in buffers.items():
            folder = files.save(tmp_path / kind, kind)
            plain = models.load(folder)
            files.add(folder, **{name: np.asarray(array)})
            jax.tree.map(np.testing.assert_array_equal, models.load(folder).weights, plain.weights)
            files.add(folder, **{name: np.asarray(array) * 0 + 1})
            with pytest.raises(ValueError, match=f"the buffer '{name}' .* is not what a"):
                models.load(folder)


HEADS = {
    "llama": ("score.weight", "score.bias", "qa_outputs.weight"),
    "gpt2": ("classifier.weight", "multiple_choice_head.summary.weight"),
    "opt": ("qa_outputs.bias",),
    "bert": ("cls.predictions.bias", "classifier.weight"),
    "roberta": ("lm_head.dense.weight", "roberta.pooler.dense.weight"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_is_not_read_is_said(kind, tmp_path):
    folder = files.save(tmp_path, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.load(folder)
    for name in HEADS[kind]:
        files.add(files.save(tmp_path, kind), **{name: np.zeros((3, 16), np.float32)})
        with pytest.warns(UserWarning, match=rf"holds a head that is not read \({name}\)"):
            models.load(folder)


def test_labels_are_as_many_as_the_head_has_rows(tmp_path):
    for labels, fits in (({"num_labels": 3}, True), ({"id2label": {"0": "a"}}, False), ({"num_labels": 2}, False)):
        folder = files.save(tmp_path, "llama", architectures=["LlamaForSequenceClassification"], **labels)
        files.add(folder, **{"score.weight": np.ones((3, 16), np.float32)})
        if fits:
            np.testing.assert_array_equal(models.load(folder).head["out"]["kernel"], np.ones((16, 3)))
        else:
            with pytest.raises(ValueError, match=r"labels \(id2label, num_labels\), but .* has 3 rows"):
                models.load(folder)


@pytest.mark.parametrize(("kind", "more"), [("llama", "score.bias"), ("roberta", "classifier.norm.weight")])
def test_a_head_is_read_whole_or_not_at_all(kind, more, tmp_path):
    folder = files.save(tmp_path, kind, architectures=["SomeForSequenceClassification"])
    names = {"llama": ["score.weight"], "roberta": ["classifier.out_proj.weight", "classifier.out_proj.bias"]}[kind]
    tensors = {name: np.ones((3, 16)[: 2 - name.endswith("bias")], np.float32) for name in names}
    if kind == "roberta":
        tensors |= {"classifier.dense.weight": np.ones((16, 16)), "classifier.dense.bias": np.ones(16)}
    files.add(folder, **tensors)
    assert models.load(folder).head is not None
    files.add(folder, **{more: np.ones(3)})
    with pytest.raises(ValueError, match=f"tensors? that a .* model does not use, such as '{more}'"):
        models.load(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_an_untied_model_without_a_head_is_incomplete_or_headless(kind, tmp_path):
    folder = files.save(tmp_path, kind, tie_word_embeddings=False, architectures=["SomeForCausalLM"])
    files.add(folder, **{"lm_head.weight": np.ones((50, 8 if kind == "opt" else 16), np.float32)})
    assert not models.load(folder).config.tied
    if kind != "llama":  # whose drawn weights have a head already
        files.save(tmp_path, kind, tie_word_embeddings=False, architectures=["SomeForCausalLM"])
        with pytest.raises(ValueError, match=r"lacks the tensor 'lm_head\.weight': the download is incomplete"):
            models.load(folder)
        headless = models.load(files.save(tmp_path, kind, tie_word_embeddings=False, architectures=["SomeModel"]))
        assert headless.config.headless and "head" not in headless.weights
        with pytest.raises(ValueError, match="this model has no language-model head"):
            jax.eval_shape(headless.model.apply, {"params": headless.weights}, jnp.zeros((1, 3), jnp.int32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(dtype, value, tmp_path):
    folder, name = files.save(tmp_path, "llama"), "model.layers.1.mlp.up_proj.weight"
    array = np.ones((24, 16), dtype)
    array[3, 5] = value
    files.add(folder, **{name: array})
    for wanted in (jnp.float32, jnp.bfloat16, jnp.float16):
        with pytest.raises(ValueError, match=rf"tensor '{name}' of .* holds values that are not finite"):
            models.load(folder, dtype=wanted)


def test_weights_of_gguf_that_are_not_finite_are_named(tmp_path):
    weights = draw(PLAIN, dtype=jnp.float32)
    weights["blocks"]["o_proj"]["kernel"][1, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"tensor 'blk\.1\.attn_output\.weight' of .*a\.gguf holds values"):
        models.load(save_gguf(tmp_path / "a.gguf", PLAIN, weights))


def test_weights_too_large_for_the_dtype_are_named(tmp_path):
    folder = files.save(tmp_path, "llama")
    files.add(folder, **{"model.norm.weight": np.full(16, 1e30, np.float32)})
    assert np.isfinite(models.load(folder).weights["norm"]["scale"]).all()
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' of .* holds values too large for float16"):
        models.load(folder, dtype=jnp.float16)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.int8, np.int32])
def test_weights_of_other_dtypes_are_refused_by_name(dtype, tmp_path):
    folder = files.save(tmp_path, "llama")
    files.add(folder, **{"model.norm.weight": np.ones(16, dtype)})
    with pytest.raises(ValueError, match=r"tensor 'model\.norm\.weight' of .* is stored as (F8_E4M3|I8|I32), but only"):
        models.load(folder)
