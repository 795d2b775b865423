"""What is cut out of a model leaves what the gated model computes, with smaller matrices."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from methods import models
from methods.adapters import gates, slicing
from methods.adapters.lora import LoRAConfig
from tests.methods import helpers
from tests.methods.helpers import MASK, TOKENS

COMMON = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "max_positions": 32}
MODELS = {
    "decoder": models.Decoder(
        models.DecoderConfig(
            **COMMON, num_heads=4, num_kv_heads=2, head_dim=6, windows=(0, 3, 4), qkv_bias=True, tied=False
        )
    ),
    "qk_norm": models.Decoder(models.DecoderConfig(**COMMON, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True)),
    "encoder": models.Encoder(models.EncoderConfig(**COMMON, num_heads=4, relative_buckets=8, pooler=True)),
    "gpt": models.GPT(models.GPTConfig(**COMMON, num_heads=4)),
}
LORA = LoRAConfig(rank=2, targets=("q_proj", "v_proj", "down_proj"))


@functools.cache
def setting(name):
    """`(model, weights, structures, gates, biases, LoRA parameters)`, half of the gates closed, unevenly."""
    model = MODELS[name].clone(param_dtype=jnp.float64)
    weights = helpers.draw(model)
    structures, rng = gates.tied(model.config), np.random.default_rng(0)
    values = {}
    for key, structure in structures.items():
        drawn = rng.uniform(-0.3, 0.4, (3, structure.size))
        values[key] = np.where(rng.uniform(size=drawn.shape) < 0.5, -2.0, drawn)
    groups = structures["value"].shape[0]
    values["value"].reshape(3, groups, -1)[0, 0] = -2.0  # a head is gone
    values["value"][1] = -2.0  # and a whole attention
    values["ffn"][2] = -2.0  # and a feed-forward layer
    shapes = model.config.site_shapes()
    biases = {site: rng.normal(0, 0.1, (3, out)) for site, (_, out) in shapes.items()}
    lora = jax.tree.map(lambda x: x + 0.05, LORA.init(jax.random.key(0), shapes, 3, jnp.float64))
    return model, weights, structures, jax.tree.map(jnp.asarray, values), jax.tree.map(jnp.asarray, biases), lora


def sliced(name):
    model, weights, structures, values, biases, lora = setting(name)
    kernels = LORA.merge({site: linear["kernel"] for site, linear in linears(weights).items()}, lora)
    blocks = weights["blocks"] | {s: weights["blocks"][s] | {"kernel": kernel} for s, kernel in kernels.items()}
    return slicing.cut(model, weights | {"blocks": blocks}, values, structures, "stg", biases)


def linears(weights):
    return {site: value for site, value in weights["blocks"].items() if site.endswith("_proj")}


def gated(name, adapt=models.identity):
    model, weights, structures, values, biases, lora = setting(name)
    chain = models.Chain((LORA.bind(lora), gates.Bias(biases), gates.bind(values, structures), adapt))
    return helpers.logits(model, weights, TOKENS, MASK, chain)


@pytest.mark.parametrize("name", MODELS)
def test_the_sliced_model_is_the_gated_one(name, tmp_path):
    small, weights = sliced(name)
    expected = gated(name)
    np.testing.assert_allclose(helpers.logits(small, weights, TOKENS, MASK), expected, rtol=1e-10, atol=1e-12)
    model, dense, structures, values, *_ = setting(name)
    total = sum(np.asarray(linear["kernel"]).size for linear in linears(dense).values())
    # What closed gates take away is at least what is counted, but for the padding of uneven heads.
    assert slicing.parameters(weights) < total
    assert slicing.removed(values, structures, "stg", model.config) > 0.5

    slicing.save(tmp_path / "small", small, weights)
    again, read = slicing.load(tmp_path / "small")
    np.testing.assert_array_equal(
        helpers.logits(again, read, TOKENS, MASK), helpers.logits(small, weights, TOKENS, MASK)
    )


def test_the_precision_of_products_is_kept(tmp_path):
    small, weights = sliced("gpt")
    accurate = dataclasses.replace(small, model=small.model.clone(accumulate=jnp.float32))
    slicing.save(tmp_path, accurate, weights)
    assert slicing.load(tmp_path)[0].model.accumulate == jnp.float32
    slicing.save(tmp_path, small, weights)
    assert slicing.load(tmp_path)[0].model.accumulate is None


def test_even_gates_leave_exactly_the_counted_weights():
    model, weights, structures, *_ = setting("decoder")
    values = {name: jnp.full((3, s.size), 2.0) for name, s in structures.items()}
    values["ffn"] = values["ffn"].at[:, ::2].set(-2.0)
    values["query_key"] = values["query_key"].reshape(3, 2, 3).at[:, :, 0].set(-2.0).reshape(3, 6)
    values["value"] = values["value"].reshape(3, 2, 6).at[:, 0].set(-2.0).reshape(3, 12)
    _, small = slicing.cut(model, weights, values, structures)
    total = sum(linear["kernel"].size for linear in linears(weights).values())
    np.testing.assert_allclose(
        1 - slicing.parameters(small) / total, slicing.removed(values, structures, "stg", model.config)
    )


def test_a_layer_without_features_runs_in_float32():
    model, weights, structures, *_ = setting("gpt")
    model = model.clone(param_dtype=jnp.float32)
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), weights)
    values = {name: jnp.full((3, s.size), -2.0, jnp.float32) for name, s in structures.items()}
    small, small_weights = slicing.cut(model, weights, values, structures)
    assert slicing.parameters(small_weights) == 0
    expected = helpers.logits(model, weights, TOKENS, MASK, gates.bind(values, structures))
    np.testing.assert_allclose(helpers.logits(small, small_weights, TOKENS, MASK), expected, rtol=1e-5, atol=1e-5)


def test_open_gates_change_nothing_and_hooks_still_act():
    model, weights, structures, *_ = setting("decoder")
    values = {name: jnp.full((3, s.size), 2.0) for name, s in structures.items()}
    small, small_weights = slicing.cut(model, weights, values, structures)
    scale = helpers.Scale(jnp.asarray([0.3, 0.0, -0.2]))
    expected = helpers.logits(model, weights, TOKENS, MASK, scale)
    np.testing.assert_allclose(helpers.logits(small, small_weights, TOKENS, MASK, scale), expected, rtol=1e-11)


def test_what_cannot_be_cut_or_read_is_said(tmp_path):
    model, weights, *_ = setting("gpt")
    untied = gates.untied(model.config)
    with pytest.raises(ValueError, match="Only tied gates can be cut out"):
        slicing.cut(model, weights, gates.init(jax.random.key(0), "stg", untied, 3), untied)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        slicing.load(tmp_path)
    small, small_weights = sliced("gpt")
    slicing.save(tmp_path, small, small_weights)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="is damaged"):
        slicing.load(tmp_path)


@pytest.mark.parametrize("name", ["gpt", "decoder"])
def test_arrays_of_a_sliced_model_are_all_there_and_no_others(name, tmp_path):
    small, weights = sliced(name)
    slicing.save(tmp_path, small, weights)
    path, whole = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    for key in (*(k for k in whole if not k.startswith("layers.1")), "layers.3.heads", "stranger", "layers.0.q_proj.x"):
        value = whole.get(key, np.ones(3, np.float32))
        wrong = np.full_like(value, 10**6) if value.dtype.kind == "i" else np.full_like(value, np.nan)
        for change in (None, value[None], *([wrong] if value.size else [])) if key in whole else (value,):
            save_file({k: v for k, v in (whole | {key: change}).items() if v is not None}, path)
            with pytest.raises(ValueError, match=r"damaged|has NaN or infinity in") as caught:
                slicing.load(tmp_path)
            assert "\n" not in str(caught.value)
    save_file(whole, path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in (
        {"model": "load"}, {"model": ["GPT"]}, {"config": {}}, {"accumulate": "float99"}, {"more": 1},
        {"config": config["config"] | {"num_layers": 10**12}}, {"config": config["config"] | {"num_layers": -1}},
        {"config": config["config"] | {"more": 1}}, {"config": config["config"] | {"hidden_size": 10**9}},
        {"config": config["config"] | {"num_heads": 0}}, {"config": config["config"] | {"num_kv_heads": 0}},
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r"The sliced model in .* is damaged \("):
            slicing.load(tmp_path)
