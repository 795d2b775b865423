"""GPT-2 and OPT against transformers; classification heads behind decoders."""

import warnings

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from methods import models
from methods.models import GPT, GPTConfig, gpt2
from tests.conftest import require
from tests.methods import checkpoint_files as files
from tests.methods import helpers
from tests.methods.helpers import MASK, TOKENS, logits

TINY = GPTConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, max_positions=32, position_offset=2
)
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
OPT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}
QWEN = LLAMA | {"num_key_value_heads": 4}
UNTIED = LLAMA | {"tie_word_embeddings": False}
ORACLES = {
    "gpt2": ("GPT2", GPT2),
    "opt": ("OPT", OPT),
    "gpt2-untied": ("GPT2", GPT2 | {"tie_word_embeddings": False}),
    "opt-untied": ("OPT", OPT | {"word_embed_proj_dim": 16, "tie_word_embeddings": False}),
    "opt-350m": ("OPT", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False, "enable_bias": False}),
}


def config_of(kind, settings):
    return getattr(require("transformers"), f"{kind}Config")(**settings, attn_implementation="eager")


def pretrained_and_oracle(kind, settings, task, path):
    config = config_of(kind, settings)
    oracle = helpers.random_oracle(f"{kind}{task}", config)
    oracle.save_pretrained(path)
    return models.load(path), oracle


def run_oracle(oracle, mask, **options):
    torch = require("torch")
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    inputs = {"input_ids": TOKENS, "attention_mask": mask, "position_ids": positions} | options
    with torch.no_grad():
        return oracle(**{name: torch.tensor(value.astype(np.int64)) for name, value in inputs.items()}).logits.numpy()


@pytest.mark.filterwarnings("default")  # the oracle's own
@pytest.mark.parametrize("name", ORACLES)
def test_equals_transformers(name, tmp_path):
    pretrained, oracle = pretrained_and_oracle(
        *ORACLES[name], "LMHeadModel" if name.startswith("gpt2") else "ForCausalLM", tmp_path
    )
    assert set(oracle.state_dict()) >= {
        pretrained.hf_names.module(site, 2) + ".weight" for site in pretrained.config.site_shapes()
    }
    for mask in (MASK, MASK[:, ::-1]):  # padding right and left
        wanted = run_oracle(oracle, mask)
        got = logits(pretrained.model, pretrained.weights, TOKENS, mask)
        assert got.dtype == jnp.float32 and np.abs(wanted[mask]).max() > 3
        np.testing.assert_allclose(got[mask], wanted[mask], rtol=0, atol=1e-4)
    sites = pretrained.config.site_shapes()
    kernels = {site: pretrained.weights["blocks"][site]["kernel"].shape for site in sites}
    assert kernels == {site: (3, *shape) for site, shape in sites.items()}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("kind", "settings"), [("GPT2", GPT2), ("OPT", OPT), ("Llama", LLAMA), ("Llama", UNTIED)])
def test_heads_equal_transformers(kind, settings, tmp_path):
    settings = settings | {"num_labels": 3, "pad_token_id": 1}
    pretrained, oracle = pretrained_and_oracle(kind, settings, "ForSequenceClassification", tmp_path)
    wanted = run_oracle(oracle, MASK, input_ids=np.where(MASK, TOKENS, 1))
    features = logits(pretrained.model, pretrained.weights, TOKENS, MASK, method="features")
    got = pretrained.classifier(3).apply({"params": pretrained.head}, features)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)
    whole = logits(pretrained.model, pretrained.weights, TOKENS, np.ones_like(MASK), method="features")
    unmasked = logits(pretrained.model, pretrained.weights, TOKENS, method="features")
    np.testing.assert_allclose(whole, unmasked, rtol=1e-6)
    assert dict(pretrained.hf_names.head) == {("out", "kernel"): "score.weight"}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("kind", "settings"), [("Qwen2", QWEN), ("GPT2", GPT2), ("OPT", OPT)])
def test_a_head_that_differs_from_the_embedding_it_is_tied_to_counts(kind, settings, tmp_path):
    torch = require("torch")
    task = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    tied, oracle = pretrained_and_oracle(kind, settings, task, tmp_path)
    embedding = oracle.get_input_embeddings().weight.detach().numpy()
    files.add(tmp_path, **{"lm_head.weight": embedding})
    same = models.load(tmp_path)
    assert same.config.tied and same.config == tied.config and "head" not in same.weights
    files.add(tmp_path, **{"lm_head.weight": embedding + 0.3 * np.random.default_rng(0).normal(size=embedding.shape)})
    other = models.load(tmp_path)
    oracle = type(oracle).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = oracle(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits(other.model, other.weights), wanted, rtol=0, atol=1e-4)
    assert np.abs(logits(tied.model, tied.weights) - wanted).max() > 1 and not other.config.tied


@pytest.mark.filterwarnings("default")
def test_base_models_and_heads_of_other_tasks_give_hidden_states(tmp_path):
    torch = require("torch")
    for kind, task in (("Mistral", "Model"), ("Llama", "ForTokenClassification"), ("Llama", "ForQuestionAnswering")):
        oracle = helpers.random_oracle(f"{kind}{task}", config_of(kind, UNTIED | {"num_key_value_heads": 4}))
        oracle.save_pretrained(tmp_path / task)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            pretrained = models.load(tmp_path / task)
        body = oracle if task == "Model" else oracle.base_model
        with torch.no_grad():
            wanted = body(torch.tensor(TOKENS.astype(np.int64))).last_hidden_state.numpy()
        hidden = logits(pretrained.model, pretrained.weights, method="hidden")
        np.testing.assert_allclose(hidden, wanted, rtol=0, atol=1e-4)
        heads = [str(one.message) for one in said if "holds a head that is not read" in str(one.message)]
        assert len(heads) == (task != "Model") and pretrained.config.headless and pretrained.head is None


def test_gguf_and_folder_give_the_same_gpt2(tmp_path):
    config = GPTConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, max_positions=32,
        activation="gelu_tanh", norm_eps=2**-17,
    )  # fmt: skip
    weights = helpers.draw(GPT(config), np.float32)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(0x100 + i) for i in range(config.vocab_size)])
    writer.add_token_merges([])
    stored: dict[str, list[np.ndarray]] = {}
    for tensor in gpt2.tensors(config):
        array = weights
        for key in tensor.path:
            array = array[key]
        for layer, one in enumerate(array) if tensor.stacked else [(None, array)]:
            one = np.ascontiguousarray(one.T if tensor.transpose else one)
            stored.setdefault(tensor.gguf.format(layer=layer), []).append(one)  # q, k and v become one
    for name, parts in stored.items():
        writer.add_tensor(name, np.concatenate(parts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = models.load(tmp_path / "model.gguf")
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, weights)


def test_each_site_is_called_with_the_documented_shapes():
    b, t, d, f = 2, 6, 16, 24
    stream, maps = ((b, t, d), (b, t, d)), ((b, 1, t, t), (b, TINY.num_heads, t, t))
    wanted = {site: ((b, t, i), (b, t, o)) for site, (i, o) in TINY.site_shapes().items()}
    wanted |= dict.fromkeys(("attention_logits", "attention_weights"), maps)
    streams = ("residual_attention", "ffn_input", "residual_ffn", "block_hidden", "attention_hidden")
    wanted |= dict.fromkeys(streams, stream)
    wanted |= {"ffn_hidden": ((b, t, d), (b, t, f))}
    assert helpers.record_sites(GPT(TINY)) == wanted


def test_no_token_sees_the_future_and_padding_does_not_matter():
    model, weights = GPT(TINY), helpers.draw(GPT(TINY))
    changed = TOKENS.copy()
    changed[:, 3:] += 1
    before, after = logits(model, weights, TOKENS), logits(model, weights, changed)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.abs(before - after)[:, 3:].max() > 1e-2
    left = np.concatenate([TOKENS[:1, 4:], TOKENS[:1, :4]], axis=1)
    short = logits(model, weights, TOKENS[:1, :4])
    np.testing.assert_allclose(logits(model, weights, left, MASK[:1, ::-1])[:, 2:], short, rtol=1e-11)


@pytest.mark.filterwarnings("default")
def test_what_the_loader_refuses(tmp_path):
    _, oracle = pretrained_and_oracle("GPT2", GPT2, "LMHeadModel", tmp_path)
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        setattr(oracle.config, key, True)
        oracle.config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=key):
            models.load(tmp_path)
        setattr(oracle.config, key, False)
