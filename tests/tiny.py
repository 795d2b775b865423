"""A model of two layers and data sets of a few rows, as files, for tests of whole commands."""

import json

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder in Hugging Face layout: a Llama of two layers with a word-level tokenizer."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    words = ["[UNK]", "Question", ":", "Answer", "wash", "it", "eat", "the", "pot", "with", "soap", "a", "now", "fast"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"})
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(words),
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    shapes = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
    tensors = {"model.embed_tokens.weight": (len(words), 16), "model.norm.weight": None}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}self_attn.{name}.weight": shape for name, shape in shapes.items()}
        tensors |= {f"{prefix}mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")}
        tensors[f"{prefix}mlp.down_proj.weight"] = (16, 24)
        tensors |= {f"{prefix}{name}.weight": None for name in ("input_layernorm", "post_attention_layernorm")}
    save_file(
        {
            name: np.ones(16, np.float32) if shape is None else rng.normal(0, 0.3, shape).astype(np.float32)
            for name, shape in tensors.items()
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A PIQA of 40 training and 6 validation rows over the words of `tiny_model`."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "piqa").mkdir()
    rng = np.random.default_rng(0)
    words = ["wash", "eat", "pot", "soap", "now", "fast", "with", "the"]

    def row(i):
        goal = f"{i} " + " ".join(rng.choice(words, 3))
        choices = ["wash it with soap", "eat the pot fast"]
        return {"id": i, "goal": goal, "choices": choices, "label": int(rng.integers(2))}

    for split, count, first in (("train", 40, 0), ("validation", 6, 100)):
        lines = [json.dumps(row(first + i)) for i in range(count)]
        (folder / "piqa" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_glue(tmp_path_factory):
    """An RTE and an STS-B over the words of `tiny_model`."""
    folder = tmp_path_factory.mktemp("glue")
    rng = np.random.default_rng(0)
    words = ["wash", "eat", "pot", "soap", "now", "fast", "with", "the"]
    for name, label in (("rte", lambda: int(rng.integers(2))), ("stsb", lambda: float(rng.integers(6)))):
        (folder / f"glue_{name}").mkdir()
        for split, count in (("train", 40), ("validation", 6)):
            rows = [
                {"sentence1": f"{split} {i} {' '.join(rng.choice(words, 3))}", "sentence2": "the pot", "label": label()}
                for i in range(count)
            ]
            lines = [json.dumps(row) for row in rows]
            (folder / f"glue_{name}" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def float32_by_default():
    """The command line as users have it, where a Python float is a float32."""
    with jax.enable_x64(False):
        yield
