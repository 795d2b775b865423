"""Attention in blocks of queries: the same numbers and derivatives, and memory that is linear in the length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from methods.models import GPT, Chain, Decoder, Encoder, EncoderConfig, GPTConfig, identity, layers
from tests.methods import helpers
from tests.methods.decoder_files import TINY
from tests.methods.helpers import Scale

LENGTH = 29  # four blocks of eight, the last of them filled up
COMMON = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 4}
MODELS = {
    "windows and a cap": Decoder(dataclasses.replace(TINY, attention_cap=2.0)),
    "learned positions": GPT(GPTConfig(**COMMON, max_positions=32)),
    "relative positions": Encoder(EncoderConfig(**COMMON, max_positions=32, relative_buckets=8)),
}
KINDS = {"causal": {}, "window and cap": {"cap": 2.0, "window": jnp.int32(5)}, "encoder with bias": {}}


def padded():
    rng = np.random.default_rng(1)
    mask = np.ones((2, LENGTH), bool)
    mask[0, 20:] = mask[1, :3] = False
    return rng.integers(0, 50, (2, LENGTH)), mask


def attention(kind):
    """A smooth scalar of queries, keys and values (and a bias), and where it is taken."""
    mask, draw = padded()[1], np.random.default_rng(2).standard_normal
    at = {"q": draw((2, LENGTH, 4, 6)), "k": draw((2, LENGTH, 2, 6)), "v": draw((2, LENGTH, 2, 6))}
    at |= {"bias": draw((1, 4, LENGTH, LENGTH))} if kind == "encoder with bias" else {}
    start = None if kind == "encoder with bias" else jnp.int32(0)

    def loss(at):
        context = layers.Context(mask, None, at.get("bias"), start)
        precision = layers.Precision(jnp.float64, jnp.float64)
        options = {"scale": 0.5} | KINDS[kind]
        hidden = layers.attend(at["q"], at["k"], at["v"], at["q"], identity, context, precision, **options)
        return jnp.where(mask[:, :, None], jnp.sin(3 * hidden), 0).sum()

    return loss, jax.tree.map(jnp.asarray, at)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_give_the_values_and_derivatives_of_whole_maps(kind, monkeypatch):
    loss, at = attention(kind)

    def everything(length):
        monkeypatch.setattr(layers, "LONGEST_MAP", length)
        forward = lambda at: jax.jvp(jax.grad(loss), (at,), (at,))[1]  # noqa: E731
        third = jax.grad(lambda at: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, forward(at), at))))
        # A new function each time: a trace of the other length must not be found again.
        return jax.jit(lambda at: (jax.value_and_grad(loss)(at), forward(at), third(at)))(at)

    jax.tree.map(
        lambda block, whole: np.testing.assert_allclose(block, whole, rtol=1e-10, atol=1e-11),
        everything(16),
        everything(LENGTH),
    )


@pytest.mark.parametrize("kind", MODELS)
def test_models_give_the_same_in_blocks(kind, monkeypatch):
    model, (tokens, mask) = MODELS[kind], padded()
    weights, hook = helpers.draw(model), Chain((identity, Scale(jnp.asarray([0.1, -0.2, 0.05]), "q_proj")))
    run = lambda: model.apply({"params": weights}, tokens, mask, hook, method="hidden")[mask]  # noqa: E731
    whole = run()
    monkeypatch.setattr(layers, "LONGEST_MAP", 16)
    np.testing.assert_allclose(run(), whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("site", ["attention_logits", "attention_weights"])
def test_a_hook_that_acts_on_maps_is_given_them_whole(site, monkeypatch):
    model, (tokens, mask) = MODELS["windows and a cap"], padded()
    weights, shapes = helpers.draw(model), []

    def bend(s, name, x, y):
        if name != site:
            return y
        shapes.append((x.shape, y.shape))
        return y + s * jnp.where(x, jnp.sin(y), 0)

    adapt = Chain((identity, jax.tree_util.Partial(bend, jnp.full(3, 0.3))))
    run = lambda: model.apply({"params": weights}, tokens, mask, adapt, method="hidden")  # noqa: E731
    whole = run()
    monkeypatch.setattr(layers, "LONGEST_MAP", 16)
    np.testing.assert_array_equal(run(), whole)
    assert set(shapes) == {((2, 1, LENGTH, LENGTH), (2, 4, LENGTH, LENGTH))}


@pytest.mark.parametrize("site", ["attention_weights", "ffn_input"])
def test_a_hook_that_only_looks_is_called(site, monkeypatch):
    monkeypatch.setattr(layers, "LONGEST_MAP", 16)
    model, (tokens, mask) = MODELS["windows and a cap"], padded()
    seen = []

    def look(layer, name, x, y):
        if name == site:
            jax.debug.callback(lambda layer, y: seen.append((int(layer), y.shape)), layer, y)
        return y

    adapt = jax.tree_util.Partial(look, jnp.arange(3))
    model.apply({"params": helpers.draw(model)}, tokens, mask, adapt, method="hidden").block_until_ready()
    jax.effects_barrier()
    shape = (2, 4, LENGTH, LENGTH) if site == "attention_weights" else (2, LENGTH, 16)
    assert sorted(seen) == [(layer, shape) for layer in range(3)]


def kept(length, *others, **settings):
    """Bytes of temporary memory of a Hessian-vector product of gates, compiled and never run."""
    model = Decoder(dataclasses.replace(TINY, max_positions=4096, windows=(), **settings))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    weights = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

    def product(gates, weights, tokens):
        def loss(gates):
            hook = Chain((Scale(gates, "q_proj"), *(jax.tree_util.Partial(other, gates) for other in others)))
            return jnp.sum(jnp.sin(model.apply({"params": weights}, tokens, None, hook, method="hidden")))

        return jax.jvp(jax.grad(loss), (gates,), (gates,))[1]

    gates = jax.ShapeDtypeStruct((model.config.num_layers,), jnp.float32)
    return jax.jit(product).lower(gates, weights, tokens).compile().memory_analysis().temp_size_in_bytes


def test_memory_per_token_does_not_grow_with_the_length():
    assert kept(4096) / 4096 <= 1.3 * kept(512) / 512


def test_a_second_stream_is_carried_for_hooks_that_read_it_alone():
    read = lambda s, site, x, y: y + s * x if site == "ffn_input" else y  # noqa: E731
    plain, both = kept(256, num_layers=24, hidden_size=64), kept(256, read, num_layers=24, hidden_size=64)
    # Of each layer one more stream [1, 256, 64] in float32 is kept.
    assert both - plain >= 24 * 256 * 64 * 4
