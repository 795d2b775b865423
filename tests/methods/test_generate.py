"""Greedy decoding with a cache against the models without one, and against transformers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from methods import models
from methods.models import GPT, Decoder, DecoderConfig, Encoder, EncoderConfig, GPTConfig, HFNames, Pretrained
from methods.models.generate import greedy
from tests.conftest import require
from tests.methods import helpers
from tests.methods.helpers import MASK, TOKENS, Scale, logits

DECODER = DecoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_positions=32,
    windows=(0, 3, 4),
    local_rope_theta=100.0,
    attention_cap=5.0,
    logit_cap=9.0,
    qk_norm=True,
    branch_norms=True,
)
PLAIN = dataclasses.replace(
    DECODER, windows=(), local_rope_theta=0.0, attention_cap=0.0, logit_cap=0.0, qk_norm=False, branch_norms=False
)
GPT_TINY = GPTConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, max_positions=32, position_offset=2
)
MODELS = {"gemma": Decoder(DECODER), "llama": Decoder(PLAIN), "gpt": GPT(GPT_TINY)}
LENGTH = 7


def pretrained(model):
    return Pretrained("drawn", model, model.config, helpers.draw(model), None, HFNames("drawn", {}))


def by_hand(model, weights, prompt, adapt):
    """One sequence without padding: the whole of it again for each token."""
    tokens = np.zeros((1, 32), np.int32)  # what comes later is not seen, so one compiled length will do
    tokens[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + LENGTH):
        tokens[0, at] = np.argmax(logits(model, weights, tokens, None, adapt)[0, at - 1])
    return tokens[0, len(prompt) : len(prompt) + LENGTH]


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_model_without_a_cache(name):
    ours, adapt = pretrained(MODELS[name]), Scale(jnp.asarray([0.3, -0.2, 0.1]))
    wanted = np.stack(
        [by_hand(ours.model, ours.weights, row[keep], adapt) for row, keep in zip(TOKENS, MASK, strict=True)]
    )
    assert len(np.unique(wanted)) > 3
    for tokens, mask in ((TOKENS, MASK), (np.roll(TOKENS[:1], 2, axis=1), np.roll(MASK[:1], 2, axis=1))):
        out = greedy(ours, tokens, mask, LENGTH, adapt=adapt)
        np.testing.assert_array_equal(out.tokens, wanted[: len(tokens)])
        assert out.mask.all() and out.tokens.dtype == np.int32


def test_stops_each_sequence_at_its_first_stop_token():
    ours = pretrained(MODELS["llama"])
    free = greedy(ours, TOKENS, MASK, LENGTH).tokens
    ends = [free[0, 3], free[1, 5]]
    stopped = greedy(ours, TOKENS, MASK, LENGTH, stop=ends)
    for row, kept, whole in zip(stopped.tokens, stopped.mask, free, strict=True):
        first = int(np.argmax(np.isin(whole, ends)))
        np.testing.assert_array_equal(kept, np.arange(LENGTH) < first)
        np.testing.assert_array_equal(row[kept], whole[:first])
    assert not greedy(ours, TOKENS, MASK, LENGTH, stop=range(50)).mask.any()


@pytest.mark.filterwarnings("default")  # the oracle's own
def test_equals_transformers(tmp_path):
    torch, transformers = require("torch"), require("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    oracle = helpers.random_oracle("LlamaForCausalLM", config)
    oracle.save_pretrained(tmp_path)
    left = np.stack([np.roll(TOKENS[0], 2), TOKENS[1]]), np.stack([np.roll(MASK[0], 2), MASK[1]])
    inputs = {
        "input_ids": torch.tensor(left[0].astype(np.int64)),
        "attention_mask": torch.tensor(left[1].astype(np.int64)),
    }
    wanted = oracle.generate(**inputs, do_sample=False, max_new_tokens=LENGTH, eos_token_id=None, pad_token_id=0)
    out = greedy(models.load(tmp_path), *left, LENGTH)
    np.testing.assert_array_equal(out.tokens, wanted[:, TOKENS.shape[1] :].numpy())


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p: greedy(p, TOKENS, MASK, 0), "max_new_tokens=0 must be at least 1"),
        (
            lambda p: greedy(p, TOKENS, MASK, 27),
            "6 tokens and max_new_tokens=27 are more than the model's 32",
        ),
        (lambda p: greedy(p, TOKENS, MASK & [[True], [False]], 2), "prompt 1 has no token"),
        (lambda p: greedy(p, TOKENS, MASK[:1], 2), r"mask must be bool\[2, 6\]"),
        (lambda p: greedy(p, TOKENS[0], None, 2), "tokens must be integers"),
        (lambda p: greedy(p, TOKENS, None, 2, adapt=Scale(jnp.zeros(2))), r"leaf \.s has shape \(2,\)"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(pretrained(MODELS["llama"]))


def test_an_encoder_does_not_generate():
    config = EncoderConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4, max_positions=32
    )
    with pytest.raises(ValueError, match="Encoder does not predict next tokens"):
        greedy(pretrained(Encoder(config)), TOKENS, MASK, 2)
