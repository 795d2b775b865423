"""Trainings whose rows are judged: a network on MNIST, and a small language model on text, each in several settings."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from methods.attribution import Training, numbered, problem
from methods.models.decoder import Decoder, DecoderConfig
from methods.models.hooks import identity

QUESTIONS = 10


class Setting(NamedTuple):
    """How a case is trained.

    Attributes:
      name: of the setting.
      optimizer: of the network.
      steps: K.
      smooth: whether the network has smooth activations.
    """

    name: str
    optimizer: optax.GradientTransformation
    steps: int = 200
    smooth: bool = True


MNIST_ROWS, MNIST_BATCH, WIDTH = 500, 100, 32
TEXT_ROWS, TEXT_BATCH, TEXT_LENGTH = 128, 16, 64

MNIST = [
    Setting("sgd .02", optax.sgd(0.02)),
    Setting("sgd .05", optax.sgd(0.05)),
    Setting("sgd .2", optax.sgd(0.2)),
    Setting("sgd 1", optax.sgd(1.0)),
    Setting("sgd 1, relu", optax.sgd(1.0), smooth=False),
    Setting("sgd .2, relu", optax.sgd(0.2), smooth=False),
    Setting("sgd .2, 1,000 steps", optax.sgd(0.2), steps=1000),
    Setting("momentum .2", optax.sgd(0.2, momentum=0.9)),
    Setting("adam .001", optax.adam(1e-3)),
    Setting("adam .001, eps_root 1e-5", optax.adam(1e-3, eps_root=1e-5)),
    Setting("adam .01", optax.adam(1e-2)),
    Setting("adam .01, eps_root 1e-5", optax.adam(1e-2, eps_root=1e-5)),
    Setting("adam .01, eps_root 1e-3", optax.adam(1e-2, eps_root=1e-3)),
    Setting("adam .03", optax.adam(3e-2)),
    Setting("adam .01, relu", optax.adam(1e-2), smooth=False),
]
TEXT = [
    Setting("sgd .005", optax.sgd(0.005), steps=64),
    Setting("sgd .02", optax.sgd(0.02), steps=64),
    Setting("sgd .2", optax.sgd(0.2), steps=64),
    Setting("sgd .5", optax.sgd(0.5), steps=64),
    Setting("adam .003", optax.adam(3e-3), steps=64),
    Setting("adam .001", optax.adam(1e-3), steps=64),
    Setting("adam .001, eps_root 1e-5", optax.adam(1e-3, eps_root=1e-5), steps=64),
    Setting("adam .01, eps_root 1e-3", optax.adam(1e-2, eps_root=1e-3), steps=64),
]
PRETRAINING = 800
"""Steps of Adam on other text, from which the language model starts."""


def data_folder(name: str) -> Path:
    """The folder of a data set. Raises FileNotFoundError."""
    folder = Path(os.environ.get("BILEVEL_DATA") or ".") / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: set BILEVEL_DATA to the folder that holds {name}/.")
    return folder


def images(name: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` random images of MNIST's "train" or "test" set, `[count, 784]` in [0, 1], and their labels."""
    with np.load(data_folder("mnist") / "mnist.npz") as arrays:
        x, y = arrays[f"x_{name}"], arrays[f"y_{name}"]
    rows = np.random.default_rng(seed).choice(len(x), count, replace=False)
    return x[rows].reshape(count, -1).astype(np.float32) / 255, y[rows].astype(np.int32)


def cross_entropy(params: Any, x: Any, y: Any, smooth: bool = True) -> jax.Array:
    """Of each image, for a network of one hidden layer."""
    bend = jnp.tanh if smooth else jax.nn.relu
    logits = bend(x @ params["in"] + params["in_bias"][None]) @ params["out"] + params["out_bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def network(key: jax.Array) -> dict[str, jax.Array]:
    """Its parameters at first."""
    first, second = jax.random.split(key)
    return {
        "in": jax.random.normal(first, (784, WIDTH)) / 28,
        "in_bias": jnp.zeros(WIDTH),
        "out": jax.random.normal(second, (WIDTH, 10)) / WIDTH**0.5,
        "out_bias": jnp.zeros(10),
    }


def mnist(setting: Setting) -> Training:
    """The network on random images of MNIST; a question is the loss of one test image."""

    def losses(weights: Any, params: Any, outer: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
        found = cross_entropy(params, *rows, setting.smooth)
        return found, jnp.ones_like(found)

    def question(weights: Any, params: Any, outer: Any, batch: Any) -> jax.Array:
        return cross_entropy(params, *batch, setting.smooth).mean()

    x, y = images("test", QUESTIONS, 1)
    return Training(
        problem(losses, question, network, MNIST_ROWS),
        setting.optimizer,
        setting.steps,
        bilevel.Batches(numbered(images("train", MNIST_ROWS, 0)), MNIST_BATCH),
        (x[:, None], y[:, None]),
        jax.random.key(0),
    )


def text(setting: Setting) -> Training:
    """A decoder of two layers on the bytes of GSM8K's word problems: all weights, trained further on other problems."""
    config = DecoderConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        max_positions=TEXT_LENGTH,
    )
    model = Decoder(config, remat=False, param_dtype=jnp.float32)

    begun = jax.tree.map(jnp.asarray, pretrained(model))

    def each(params: Any, tokens: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, tokens, None, identity)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean(axis=1)

    def losses(weights: Any, params: Any, outer: Any, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = each(params, rows)
        return found, jnp.ones_like(found)

    train, test = (sentences(name, count) for name, count in (("train", TEXT_ROWS), ("test", QUESTIONS)))
    question = lambda weights, params, outer, batch: each(params, batch).mean()  # noqa: E731
    return Training(
        problem(losses, question, lambda key: begun, TEXT_ROWS),
        setting.optimizer,
        setting.steps,
        bilevel.Batches(numbered(train), TEXT_BATCH),
        test[:, None],
        jax.random.key(0),
    )


@functools.cache
def pretrained(model: Decoder) -> Any:
    """The decoder after `PRETRAINING` steps on problems that no setting trains on, on the host."""
    rows = sentences("train", 4000)[TEXT_ROWS:]

    def loss(params: Any, outer: Any, batch: Any, key: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch, None, identity)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:]).mean()

    start = lambda key, outer: model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]  # noqa: E731
    of = bilevel.Problem(loss, None, start, lambda key: jnp.zeros(()))
    data = bilevel.Batches(rows, 32)
    fitted = bilevel.fit(
        of, jnp.zeros(()), optimizer=optax.adam(3e-3), data=data, steps=PRETRAINING, progress=False
    )
    return jax.tree.map(np.asarray, fitted.inner.params)


def sentences(name: str, count: int) -> np.ndarray:
    """The first bytes of the first questions of GSM8K that are long enough, int32 `[at most count, TEXT_LENGTH]`."""
    found = []
    with (data_folder("gsm8k") / f"{name}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            words = json.loads(line)["question"].encode("ascii", "ignore")[:TEXT_LENGTH]
            if len(words) == TEXT_LENGTH:
                found.append(np.frombuffer(words, np.uint8).astype(np.int32))
            if len(found) == count:
                break
    return np.stack(found)


CASES: dict[str, tuple[Callable[[Setting], Training], list[Setting]]] = {"mnist": (mnist, MNIST), "text": (text, TEXT)}
"""By name, what makes the training of a setting, and the settings."""
EVERY_SCORE = {"mnist": "sgd .2"}
"""The setting of a case in which every score there is is measured: linear solvers take minutes each on the text."""
