"""BERT, RoBERTa and MPNet against transformers, their heads, hooks and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from methods import models
from methods.models import Encoder, EncoderConfig
from methods.models.encoder import relative_bucket
from tests.conftest import require
from tests.methods import helpers
from tests.methods.helpers import MASK, TOKENS, Scale, logits

TINY = EncoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    max_positions=32,
    token_types=2,
    relative_buckets=8,
    pooler=True,
)
TYPES = np.asarray([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]], np.int32)
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "num_labels": 3,
}
ORACLES = {
    "Bert": {"type_vocab_size": 2},
    "Roberta": {"type_vocab_size": 1, "hidden_act": "gelu_new"},
    "MPNet": {},
    "XLMRoberta": {"type_vocab_size": 1, "pad_token_id": 0},
    "Camembert": {"type_vocab_size": 1},
}


def pretrained_and_oracle(kind, task, path):
    transformers = require("transformers")
    settings = SMALL | ORACLES[kind]
    config = getattr(transformers, f"{kind}Config")(**settings, attn_implementation="eager")
    oracle = helpers.random_oracle(f"{kind}{task}", config)
    oracle.save_pretrained(path)
    return models.load(path), oracle


def run_oracle(oracle, mask, kind, tokens=TOKENS, **options):
    """transformers' output on TOKENS with padding; positions as `Encoder` counts them."""
    torch, pad = require("torch"), oracle.config.pad_token_id
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0) + (0 if kind == "Bert" else pad + 1)
    inputs = {"input_ids": np.where(mask, tokens, pad), "attention_mask": mask, "position_ids": positions} | options
    with torch.no_grad():
        return oracle(**{name: torch.tensor(value.astype(np.int64)) for name, value in inputs.items()})


@pytest.mark.filterwarnings("default")  # the oracle's own
@pytest.mark.parametrize("kind", ORACLES)
def test_equals_transformers(kind, tmp_path):
    pretrained, oracle = pretrained_and_oracle(kind, "ForSequenceClassification", tmp_path)
    base, model, weights = oracle.base_model, pretrained.model, pretrained.weights
    assert set(oracle.state_dict()) >= {
        pretrained.hf_names.module(site, 2) + ".weight" for site in pretrained.config.site_shapes()
    }
    options = {"token_types": TYPES} if kind == "Bert" else {}
    theirs = {"token_type_ids": TYPES} if kind == "Bert" else {}
    for mask in (MASK, MASK[:, ::-1]):  # padding right and left
        wanted = run_oracle(base, mask, kind, **theirs).last_hidden_state.numpy()
        got = logits(model, weights, TOKENS, mask, method="hidden", **options)
        assert got.dtype == jnp.float32 and np.abs(wanted[mask]).max() > 1
        np.testing.assert_allclose(got[mask], wanted[mask], rtol=0, atol=1e-4)

    wanted = run_oracle(oracle, MASK, kind, **theirs).logits.numpy()
    features = logits(model, weights, TOKENS, MASK, **options)
    head = pretrained.classifier(3)
    np.testing.assert_allclose(head.apply({"params": pretrained.head}, features), wanted, rtol=0, atol=1e-4)
    fresh = head.init(jax.random.key(0), features)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, pretrained.head)
    for path, name in pretrained.hf_names.head.items():
        ours, stored = pretrained.head[path[0]][path[1]], oracle.state_dict()[name].numpy()
        np.testing.assert_array_equal(ours, stored.T)
    number = jax.eval_shape(pretrained.classifier(1).init_with_output, jax.random.key(0), features)[0]
    assert number.shape == (2, 1) and number.dtype == jnp.float32


@pytest.mark.filterwarnings("default")
def test_a_language_model_gives_its_base_and_no_head(tmp_path):
    for kind in ("Bert", "Roberta"):
        pretrained, oracle = pretrained_and_oracle(kind, "ForMaskedLM", tmp_path / kind)
        wanted = run_oracle(oracle.base_model, MASK, kind).last_hidden_state.numpy()
        got = logits(pretrained.model, pretrained.weights, TOKENS, MASK, method="hidden")
        np.testing.assert_allclose(got[MASK], wanted[MASK], rtol=0, atol=1e-4)
        # no pooler in the file: the head brings a layer of its own, under transformers' name
        assert pretrained.head is None and not pretrained.config.pooler
        dense = {"Bert": "bert.pooler.dense.weight", "Roberta": "classifier.dense.weight"}[kind]
        assert pretrained.hf_names.head["dense", "kernel"] == dense


@pytest.mark.filterwarnings("default")
def test_old_names_and_a_missing_prefix_are_understood(tmp_path):
    pretrained, _ = pretrained_and_oracle("Bert", "Model", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "embeddings.LayerNorm.weight" in tensors  # no "bert." in front
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensors[name] for name in tensors
    }
    save_file(old, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path).weights, pretrained.weights)


@pytest.mark.filterwarnings("default")
def test_relative_positions_equal_transformers(tmp_path):
    torch, transformers = require("torch"), require("transformers")
    distances = np.arange(-700, 701)
    theirs = transformers.models.mpnet.modeling_mpnet.MPNetEncoder.relative_position_bucket
    for buckets in (32, 16):
        wanted = theirs(torch.tensor(distances), num_buckets=buckets).numpy()
        np.testing.assert_array_equal(relative_bucket(distances, buckets), wanted)


SENTENCES = (
    ("A man is playing a guitar.", "Someone plays an instrument."),
    ("The naïve café — it's closed!", "2,345 people can't be wrong about that, can they?"),
)


def check_real_weights(folder):
    """Hidden states and, if there is one, the pooler's, on sentence pairs of different lengths; the tokens too."""
    torch, transformers = require("torch"), require("transformers")
    pretrained = models.load(folder)
    batch = pretrained.tokenizer(*map(list, zip(*SENTENCES, strict=True)), padding=True, return_tensors="np")
    oracle = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = oracle(**{name: torch.tensor(value) for name, value in batch.items()})
    tokens, mask = batch["input_ids"], batch["attention_mask"].astype(bool)
    assert not mask.all()
    types = {"token_types": batch["token_type_ids"]} if pretrained.config.token_types else {}
    hidden = logits(pretrained.model, pretrained.weights, tokens, mask, method="hidden", **types)
    np.testing.assert_allclose(hidden[mask], out.last_hidden_state.numpy()[mask], rtol=0, atol=1e-4)
    if pretrained.config.pooler:
        pooled = logits(pretrained.model, pretrained.weights, tokens, mask, **types)
        np.testing.assert_allclose(pooled, out.pooler_output.numpy(), rtol=0, atol=1e-4)
    return pretrained


@pytest.mark.weights
@pytest.mark.filterwarnings("default")
def test_minilm_equals_transformers(minilm_dir):
    config = check_real_weights(minilm_dir).config
    assert (config.num_layers, config.token_types, config.pooler) == (6, 2, True)


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mpnet_equals_transformers(mpnet_dir):
    config = check_real_weights(mpnet_dir).config
    assert (config.num_layers, config.relative_buckets, config.max_positions) == (12, 32, 512)


def test_each_site_is_called_with_the_documented_shapes():
    b, t, d, f = 2, 6, 16, 24
    stream, maps = ((b, t, d), (b, t, d)), ((b, 1, t, t), (b, TINY.num_heads, t, t))
    wanted = {site: ((b, t, i), (b, t, o)) for site, (i, o) in TINY.site_shapes().items()}
    wanted |= dict.fromkeys(("attention_logits", "attention_weights"), maps)
    streams = ("residual_attention", "ffn_input", "residual_ffn", "block_hidden", "attention_hidden")
    wanted |= dict.fromkeys(streams, stream)
    wanted |= {"ffn_hidden": ((b, t, d), (b, t, f))}
    assert helpers.record_sites(Encoder(TINY)) == wanted
    assert set(wanted) == set(models.SITES) - {"gate_proj"}


def test_padding_does_not_matter_and_every_site_does():
    model, weights = Encoder(TINY), helpers.draw(Encoder(TINY))
    short = logits(model, weights, TOKENS[:1, :4])
    np.testing.assert_allclose(logits(model, weights, TOKENS, MASK)[:1], short, rtol=1e-11)
    left = np.concatenate([TOKENS[:1, 4:], TOKENS[:1, :4]], axis=1)
    np.testing.assert_allclose(logits(model, weights, left, MASK[:1, ::-1]), short, rtol=1e-11)
    plain = logits(model, weights, TOKENS, MASK)
    sites = [site for site in models.SITES if site != "gate_proj"]

    def bend(s, site, x, y):
        return y if site.endswith(".input") else y + s[sites.index(site)] * y * y

    for number, site in enumerate(sites):
        adapt = jax.tree_util.Partial(bend, jnp.zeros((3, len(sites))).at[1, number].set(0.1))
        assert np.abs(logits(model, weights, TOKENS, MASK, adapt) - plain).max() > 1e-5, site


def test_second_and_third_derivatives_agree_in_both_modes():
    weights = helpers.draw(Encoder(TINY))

    def loss(gates):
        features = Encoder(TINY).apply({"params": weights}, TOKENS, MASK, Scale(gates), None, TYPES)
        return jnp.sum(jnp.sin(3 * features))

    helpers.check_derivatives(loss, jnp.asarray([0.1, -0.2, 0.05]), jnp.asarray([0.5, -1.0, 2.0]))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m, w: m.apply(w, np.zeros((1, 33), np.int32)), "33 tokens but the model was made for 32"),
        (lambda m, w: m.apply(w, TOKENS, MASK, token_types=TYPES[:1]), r"token_types of shape \(1, 6\)"),
        (lambda m, w: m.apply(w, TOKENS, None, Scale(jnp.zeros(2))), r"leaf \.s has shape \(2,\)"),
        (lambda m, w: EncoderConfig(**{**vars(TINY), "num_heads": 3}), "must be a multiple of num_heads=3"),
        (lambda m, w: EncoderConfig(**{**vars(TINY), "activation": "mish"}), "unknown activation 'mish'"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(Encoder(TINY), {"params": helpers.draw(Encoder(TINY))})


@pytest.mark.filterwarnings("default")
def test_what_the_loader_refuses(tmp_path):
    pretrained, oracle = pretrained_and_oracle("Bert", "ForSequenceClassification", tmp_path)
    with pytest.raises(ValueError, match="num_labels=0 must be at least 1"):
        pretrained.classifier(0)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensors[name] for name in tensors if name != "classifier.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks the tensor 'classifier\.weight'"):
        models.load(tmp_path)
    oracle.config.is_decoder = True
    oracle.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_decoder is True, but a BERT model here needs False"):
        models.load(tmp_path)
