"""The decoder family against transformers, its hook and its derivatives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from methods import models
from methods.models import Chain, Decoder
from tests.conftest import require
from tests.methods import helpers
from tests.methods.decoder_files import TINY, draw
from tests.methods.helpers import MASK, TOKENS, Scale, logits

# --- against transformers ------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA3["original_max_position_embeddings"] = 32
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [9.0] * 4}
PHI3 = {"num_key_value_heads": 4, "pad_token_id": 1}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
ORACLES = {
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {"sliding_window": 3, "head_dim": 16}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 3, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 3, "layer_types": ALTERNATING, "rope_parameters": GEMMA3}),
    "yarn": ("Qwen2", {"rope_parameters": YARN, "max_position_embeddings": 128}),
    "phi3": ("Phi3", PHI3 | {"sliding_window": 3}),
    "longrope": ("Phi3", PHI3 | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
}


@pytest.mark.filterwarnings("default")  # the oracle's own
@pytest.mark.parametrize("name", ORACLES)
def test_equals_transformers(name, tmp_path):
    torch, transformers = require("torch"), require("transformers")
    kind, settings = ORACLES[name]
    config = getattr(transformers, CONFIGS.get(kind, f"{kind}Config"))(
        **(SMALL | settings), attn_implementation="eager"
    )
    oracle = helpers.random_oracle(f"{kind}ForCausalLM", config)
    oracle.save_pretrained(tmp_path, max_shard_size="50KB" if name == "llama" else "1GB")
    pretrained = models.load(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (name == "llama")
    assert set(oracle.state_dict()) >= {
        pretrained.hf_names.module(site, 2) + ".weight" for site in pretrained.config.site_shapes()
    }

    for mask in (MASK, MASK[:, ::-1]):  # padding right and left
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        with torch.no_grad():
            wanted = oracle(
                torch.tensor(TOKENS.astype(np.int64)),
                attention_mask=torch.tensor(mask.astype(np.int64)),
                position_ids=torch.tensor(positions),
            ).logits.numpy()
        got = logits(pretrained.model, pretrained.weights, TOKENS, mask)
        assert got.dtype == jnp.float32 and np.abs(wanted[mask]).max() > 3
        np.testing.assert_allclose(got[mask], wanted[mask], rtol=0, atol=1e-4)


SENTENCES = ["The capital of France is Paris.", "In 1969 two men walked on the Moon, 384,400 km away."]
TRICKY = (
    "a 12345 b",
    "3D printing, 2nd  place; 1,234.56",
    "naïve café — “quotes” 日本語 🙂👩‍👩‍👧",
    "<|im_start|>user\nhi<|im_end|>\n",
    "don't I'LL  we've",
    "   leading and trailing   ",
    "a\u00a0b\u200bc\r\n\tdef f(x):\n    return x**2",
    "",
)


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_smollm2_equals_transformers(smollm2_gguf):
    torch, transformers = require("torch"), require("transformers")
    pretrained = models.load(smollm2_gguf, dtype=jnp.float64)
    where = {"pretrained_model_name_or_path": smollm2_gguf.parent, "gguf_file": smollm2_gguf.name}
    theirs = transformers.AutoTokenizer.from_pretrained(**where)
    for text in (*SENTENCES, *TRICKY):
        ids = pretrained.tokenizer(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert pretrained.tokenizer.decode(ids) == text
    # Digits are cut off before words are: transformers leaves that rule of this tokenizer out of GGUF files.
    assert pretrained.tokenizer.convert_ids_to_tokens(pretrained.tokenizer("  5")["input_ids"]) == ["ĠĠ", "5"]

    batch = pretrained.tokenizer(SENTENCES, padding=True, return_tensors="np")
    mask = batch["attention_mask"].astype(bool)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = oracle(torch.tensor(batch["input_ids"]), attention_mask=torch.tensor(mask)).logits.numpy()
    del oracle
    tokens, single = batch["input_ids"], jax.tree.map(lambda a: a.astype(jnp.float32), pretrained.weights)
    exact = np.asarray(logits(pretrained.model, pretrained.weights, tokens, mask))
    rounded = np.asarray(logits(pretrained.model, single, tokens, mask))
    assert exact.dtype == np.float64 and rounded.dtype == np.float32
    np.testing.assert_allclose(exact[mask], wanted[mask], rtol=0, atol=1e-4)
    np.testing.assert_allclose(rounded[mask], wanted[mask], rtol=0, atol=1e-4)
    assert np.sqrt(np.mean(np.square(rounded[mask] - wanted[mask]))) < 5e-5


# --- the model and its hook ----------------------------------------------------------------------------------------


def test_padding_side_and_selected_positions_do_not_matter():
    model, weights = Decoder(TINY), draw(TINY)
    short = logits(model, weights, TOKENS[:1, :4])
    left = np.concatenate([TOKENS[:1, 4:], TOKENS[:1, :4]], axis=1)
    np.testing.assert_allclose(logits(model, weights, TOKENS, MASK)[:1, :4], short, rtol=1e-11)
    np.testing.assert_allclose(logits(model, weights, left, MASK[:1, ::-1])[:, 2:], short, rtol=1e-11)
    hidden = logits(model, weights, TOKENS[:1, :4], method="hidden")
    assert hidden.shape == (1, 4, TINY.hidden_size)
    chosen = model.apply({"params": weights}, hidden[:, 2], method="head")
    np.testing.assert_allclose(chosen, short[:, 2], rtol=1e-11)


def test_token_outside_the_vocabulary_gives_nan():
    tokens = TOKENS.copy()
    tokens[0, 2] = TINY.vocab_size
    out = logits(Decoder(TINY), draw(TINY), tokens)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_computes_in_the_dtype_of_the_weights(dtype):
    exact = logits(Decoder(TINY), draw(TINY), TOKENS, MASK)
    weights = jax.tree.map(lambda a: a.astype(dtype), draw(TINY))
    got = logits(Decoder(TINY), weights, TOKENS, MASK)
    assert got.dtype == dtype
    error = np.abs(got.astype(jnp.float64) - exact)[MASK].max()
    assert error < {"bfloat16": 0.3, "float32": 1e-5, "float64": 1e-13}[jnp.dtype(dtype).name]


def products(jaxpr):
    """dtypes of the factors and the result of each matrix product in a jaxpr, also inside loops."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(var.aval.dtype.name for var in (*eqn.invars, *eqn.outvars))
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def test_accumulates_products_of_bfloat16_in_float32():
    low, gates = draw(TINY, jnp.bfloat16), jnp.zeros(3, jnp.float32)
    model = Decoder(TINY, accumulate=jnp.dtype("float32"))

    def run(gates):
        return model.apply({"params": low}, TOKENS, MASK, Scale(gates))

    found = list(products(jax.make_jaxpr(run)(gates).jaxpr))
    assert len(found) == 10 and set(found) == {("bfloat16", "bfloat16", "float32")}
    got = run(gates)
    exact = logits(Decoder(TINY), jax.tree.map(lambda a: a.astype(jnp.float64), low), TOKENS, MASK)
    assert got.dtype == jnp.float32
    assert np.sqrt(np.mean(np.square(got.astype(jnp.float64) - exact)[MASK])) < 0.02 * np.std(exact[MASK])
    gradient = jax.grad(lambda gates: jnp.sum(run(gates) ** 2))
    _, curvature = jax.jit(lambda g: jax.jvp(gradient, (g,), (g + 1,)))(gates)
    assert np.isfinite(curvature).all() and np.abs(curvature).max() > 1


def test_each_site_is_called_with_the_documented_shapes():
    seen = helpers.record_sites(Decoder(TINY))
    b, t, d, e, f = 2, 6, 16, 24, 24
    stream, maps = ((b, t, d), (b, t, d)), ((b, 1, t, t), (b, TINY.num_heads, t, t))
    wanted = {site: ((b, t, i), (b, t, o)) for site, (i, o) in TINY.site_shapes().items()}
    wanted |= dict.fromkeys(("attention_logits", "attention_weights"), maps)
    wanted |= dict.fromkeys(("residual_attention", "ffn_input", "residual_ffn", "block_hidden"), stream)
    wanted |= {"attention_hidden": ((b, t, d), (b, t, e)), "ffn_hidden": ((b, t, d), (b, t, f))}
    assert seen == wanted and set(seen) == set(models.SITES)


def test_identity_changes_no_bit_and_every_site_matters():
    model, weights = Decoder(TINY), draw(TINY)
    plain = logits(model, weights, TOKENS, MASK)
    for adapt in (Chain(()), Chain((models.identity, models.identity))):
        np.testing.assert_array_equal(logits(model, weights, TOKENS, MASK, adapt), plain)

    def bend(s, site, x, y):  # the norm of q would undo a mere scale, the softmax a shift
        return y if site.endswith(".input") else y + s[models.SITES.index(site)] * y * y

    for number, site in enumerate(models.SITES):
        adapt = jax.tree_util.Partial(bend, jnp.zeros((3, len(models.SITES))).at[1, number].set(0.1))
        assert np.abs(logits(model, weights, TOKENS, MASK, adapt) - plain)[MASK].max() > 1e-4, site


def test_a_layer_gets_its_own_slice_and_a_chain_its_order():
    model, weights = Decoder(TINY), draw(TINY)

    def shift(s, site, x, y):
        return y + s if site == "down_proj" else y

    shift = jax.tree_util.Partial(shift, jnp.asarray([0.3, 0, 0]))
    double = Scale(jnp.asarray([1.0, 0, 0]), "down_proj")
    chained = logits(model, weights, TOKENS, None, Chain((shift, double)))
    assert np.abs(chained - logits(model, weights, TOKENS, None, Chain((double, shift)))).max() > 1e-2
    # the same through the weights: 2 (x W + 0.3) in layer 0
    kernel = weights["blocks"]["down_proj"]["kernel"]
    weights["blocks"]["down_proj"]["kernel"] = kernel * np.asarray([2, 1, 1.0])[:, None, None]
    by_hand = logits(model, weights, TOKENS, None, jax.tree.map(lambda s: 2 * s, shift))
    np.testing.assert_allclose(chained, by_hand, rtol=1e-11)


def test_ffn_input_is_handed_what_it_gave_one_block_below():
    def swap(s, site, x, y):  # in block 1, the stream becomes the one of block 0; there x is 0
        return jnp.where(s == 1, x, jnp.where(s == 0, y + 5 * x, y)) if site == "ffn_input" else y

    def stop(s, site, x, y):  # nothing is added between the two places
        return jnp.where({"residual_ffn": s > 1, "residual_attention": s == 1}.get(site, False), jnp.zeros_like(y), y)

    weights, swapped = draw(TINY), jax.tree_util.Partial(swap, jnp.asarray([0.0, 1, 2]))
    stopped = jax.tree_util.Partial(stop, jnp.asarray([2.0, 1, 0]))
    one, other = (logits(Decoder(TINY), weights, TOKENS, MASK, adapt) for adapt in (swapped, stopped))
    np.testing.assert_allclose(one[MASK], other[MASK], rtol=1e-11)
    assert np.abs(one - logits(Decoder(TINY), weights, TOKENS, MASK))[MASK].max() > 1e-2


def test_no_hook_sees_the_future():
    def drop(s, site, x, y):
        return jnp.full_like(y, -jnp.inf) if site == "attention_logits" else y

    changed = TOKENS.copy()
    changed[:, 3:] += 1
    adapt, weights = jax.tree_util.Partial(drop, jnp.zeros(3)), draw(TINY)
    before, after = (logits(Decoder(TINY), weights, tokens, None, adapt) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.abs(before - after)[:, 3:].max() > 1e-2


def loss(gates, remat=True):
    """A smooth scalar of one gate per layer, which scales what all sites give."""
    out = Decoder(TINY, remat=remat).apply({"params": draw(TINY)}, TOKENS, MASK, Scale(gates))
    return -jnp.mean(jax.nn.log_softmax(out)[MASK][:, 7])


GATES, DIRECTION = jnp.asarray([0.1, -0.2, 0.05]), jnp.asarray([0.5, -1.0, 2.0])


def test_remat_changes_nothing():
    def run(remat):
        return jax.jit(jax.value_and_grad(functools.partial(loss, remat=remat)))(GATES)

    (value, gradient), (plain_value, plain_gradient) = run(True), run(False)
    np.testing.assert_allclose(value, plain_value, rtol=1e-12)
    np.testing.assert_allclose(gradient, plain_gradient, rtol=1e-10)


def test_second_and_third_derivatives_agree_in_both_modes():
    helpers.check_derivatives(loss, GATES, DIRECTION)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m, w: m.apply(w, TOKENS[0]), "tokens must be integers"),
        (lambda m, w: m.apply(w, TOKENS.astype(np.float32)), "tokens must be integers"),
        (lambda m, w: m.apply(w, np.zeros((1, 33), np.int32)), "33 tokens but the model was made for 32"),
        (lambda m, w: m.apply(w, TOKENS, MASK.astype(np.int32)), "mask must be bool"),
        (lambda m, w: m.apply(w, TOKENS, None, lambda site, x, y: y), "wrap a plain function"),
        (lambda m, w: m.apply(w, TOKENS, None, None), "adapt must be a hook, called with .*, not None: leave it out"),
        (lambda m, w: m.apply(w, TOKENS, None, Scale(jnp.zeros(2))), r"leaf \.s has shape \(2,\)"),
        (
            lambda m, w: m.apply(w, TOKENS, None, Chain((Cast(jnp.zeros(3)),))),
            "the hook Chain returned float32",
        ),
        (lambda m, w: dataclasses.replace(TINY, num_heads=3), "multiple of num_kv_heads"),
        (lambda m, w: dataclasses.replace(TINY, activation="relu6"), "unknown activation 'relu6'"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(Decoder(TINY), {"params": draw(TINY)})


class Cast(Scale):
    def __call__(self, site, x, y, /):
        return y.astype(jnp.float32)


jax.tree_util.register_dataclass(Cast, ["s"], ["only"])
