"""A Llama written out in NumPy: the parity that needs no torch, so that every Python can check it."""

import json

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from methods import models
from tests.methods.helpers import MASK, TOKENS, logits

VOCABULARY, WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD = 50, 24, 40, 2, 4, 2, 6
THETA, EPS = 1e4, 1e-5


def checkpoint(folder):
    """A random untied Llama as a Hugging Face folder; its tensors."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (VOCABULARY, WIDTH), "lm_head": (VOCABULARY, WIDTH), "model.norm": (WIDTH,)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.input_layernorm": (WIDTH,), f"{at}.post_attention_layernorm": (WIDTH,)}
        shapes |= {f"{at}.self_attn.q_proj": (HEADS * HEAD, WIDTH), f"{at}.self_attn.o_proj": (WIDTH, HEADS * HEAD)}
        shapes |= {f"{at}.self_attn.{n}_proj": (KV_HEADS * HEAD, WIDTH) for n in "kv"}
        shapes |= {f"{at}.mlp.{n}_proj": (HIDDEN, WIDTH) for n in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj": (WIDTH, HIDDEN)}
    tensors = {
        f"{name}.weight": (0.4 * rng.normal(size=shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": 32,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {name.removesuffix(".weight"): x.astype(np.float64) for name, x in tensors.items()}


def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPS) * scale


def rotate(x, positions):
    """The second half of a head is turned with the first: (a, b) -> (a cos - b sin, b cos + a sin)."""
    angle = positions[:, None, None] / THETA ** (np.arange(HEAD // 2) / (HEAD // 2))
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def by_hand(w, tokens):
    """Logits of one unpadded row."""
    x, positions = w["model.embed_tokens"][tokens], np.arange(len(tokens))
    for i in range(LAYERS):
        at = {n.removeprefix(f"model.layers.{i}."): t for n, t in w.items() if n.startswith(f"model.layers.{i}.")}
        h = norm(x, at["input_layernorm"])
        q, k, v = (
            (h @ at[f"self_attn.{n}_proj"].T).reshape(len(x), heads, HEAD)
            for n, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        q, k = rotate(q, positions), rotate(k, positions)
        k, v = (np.repeat(t, HEADS // KV_HEADS, axis=1) for t in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD)
        scores[:, positions[:, None] < positions[None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(len(x), -1) @ at["self_attn.o_proj"].T
        h = norm(x, at["post_attention_layernorm"])
        gate, up = h @ at["mlp.gate_proj"].T, h @ at["mlp.up_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ at["mlp.down_proj"].T
    return norm(x, w["model.norm"]) @ w["lm_head"].T


def test_a_llama_equals_its_formulas(tmp_path):
    w = checkpoint(tmp_path)
    pretrained = models.load(tmp_path, dtype=jnp.float64)
    found = np.asarray(logits(pretrained.model, pretrained.weights, TOKENS, MASK))
    for row, tokens, mask in zip(found, TOKENS, MASK, strict=True):
        np.testing.assert_allclose(row[mask], by_hand(w, tokens[mask]), rtol=1e-9, atol=1e-9)
