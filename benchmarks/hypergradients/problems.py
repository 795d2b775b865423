"""The problems that estimators are measured on, from closed form to transformer."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel
from methods.adapters.lora import LoRAConfig
from methods.models.decoder import Decoder, DecoderConfig

PyTree = Any

DECAY = 0.01
"""Weight decay inside the loss of `data_weighting`: without it no minimum is near, and nothing implicit is meant."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem with an inner optimizer and random data for K steps."""

    name: str
    problem: bilevel.Problem
    optimizer: Any
    batch: Any  # batch(key) -> one batch

    def batches(self, steps: int, key: jax.Array) -> PyTree:
        """`steps` inner batches, stacked."""
        return jax.vmap(self.batch)(jax.random.split(key, steps))


def lora_transformer(
    *, layers: int = 6, width: int = 256, tokens: int = 64, size: int = 8, remat: bool = True, optimizer: Any = None
) -> Case:
    """A decoder with LoRA (rank 8 on q, v) inside and a gate per layer outside; GPT-2-small shapes, scaled down."""
    config = DecoderConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=4 * width,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=8,
        head_dim=width // 8,
        max_positions=tokens,
    )
    dtype = jnp.result_type(float)  # float64 where JAX is told to
    model = Decoder(config, remat=remat, param_dtype=dtype)
    lora = LoRAConfig(rank=8, alpha=16.0)

    def batch(key):
        return jax.random.randint(key, (size, tokens), 0, config.vocab_size)

    weights = model.init(jax.random.key(0), batch(jax.random.key(1)))["params"]
    # Weights of a fresh network are small; these give logits, and so second derivatives, of ordinary size.
    weights = jax.tree.map(lambda w: 3.0 * w if w.ndim > 1 else w, weights)

    def loss(weights, params, gate, batch, key):
        logits = model.apply({"params": weights}, batch, None, lora.bind(params, layers * jax.nn.softmax(gate)))
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:]).mean()

    loss = jax.tree_util.Partial(loss, weights)
    problem = bilevel.Problem(
        loss,
        loss,
        lambda key, outer: lora.init(key, config.site_shapes(), layers, dtype=dtype),
        lambda key: jnp.zeros(layers),
    )
    return Case(f"lora-transformer-{layers}x{width}", problem, optimizer or optax.adam(1e-3), batch)


def data_weighting(
    *, samples: int = 512, size: int = 64, features: int = 32, width: int = 64, optimizer: Any = None
) -> Case:
    """An MLP trained on weighted samples, with weight decay; the outer variable is one logit a sample."""
    sizes = (features, width, width, 10)

    def init(key, outer):
        keys = jax.random.split(key, len(sizes) - 1)
        shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
        return [(jax.random.normal(k, (m, n)) / m**0.5, jnp.zeros(n)) for k, m, n in shapes]

    def losses(params, x, y):
        for i, (w, b) in enumerate(params):
            x = x @ w + b[None]
            x = jnp.tanh(x) if i < len(params) - 1 else x
        return optax.softmax_cross_entropy_with_integer_labels(x, y)

    def inner(params, outer, batch, key):
        decay = 0.5 * DECAY * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return jnp.mean(jax.nn.sigmoid(outer[batch["row"]]) * losses(params, batch["x"], batch["y"])) + decay

    def outer(params, outer, batch, key):
        return jnp.mean(losses(params, batch["x"], batch["y"]))

    def batch(key):
        rows, xs, ys = jax.random.split(key, 3)
        return {
            "row": jax.random.choice(rows, samples, (size,), replace=False),
            "x": jax.random.normal(xs, (size, features)),
            "y": jax.random.randint(ys, (size,), 0, sizes[-1]),
        }

    problem = bilevel.Problem(inner, outer, init, lambda key: jnp.zeros(samples))
    return Case("data-weighting", problem, optimizer or optax.adam(1e-2), batch)


def quadratic(*, size: int = 100, optimizer: Any = None) -> Case:
    """Quadratic inner and outer losses in `size` variables each, condition number 10."""
    keys = jax.random.split(jax.random.key(0), 4)
    basis = jnp.linalg.qr(jax.random.normal(keys[0], (size, size)))[0]
    hessian = (basis * jnp.linspace(0.1, 1.0, size)[None]) @ basis.T
    coupling, target = jax.random.normal(keys[1], (size, size)) / size**0.5, jax.random.normal(keys[2], (size,))

    def inner(hessian, coupling, w, outer, batch, key):
        return 0.5 * w @ hessian @ w - (coupling @ outer + batch) @ w

    def outer(target, w, outer, batch, key):
        return 0.5 * jnp.sum((w - target) ** 2) + 0.005 * jnp.sum(outer**2)

    problem = bilevel.Problem(
        jax.tree_util.Partial(inner, hessian, coupling),
        jax.tree_util.Partial(outer, target),
        lambda key, outer: jnp.zeros(size),
        lambda key: jnp.ones(size),
    )
    return Case("quadratic", problem, optimizer or optax.sgd(0.5), partial(_noise, size))


def _noise(size, key):
    return 0.1 * jax.random.normal(key, (size,))
