"""Meshes of eight devices, a problem for them, and how far two results are apart."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

import bilevel
from bilevel import Batches, Nested, Sharding, Unrolled

SHAPES = {"data": {"data": 8}, "fsdp": {"fsdp": 8}, "both": {"data": 4, "fsdp": 2}}


def devices(count):
    """The flags of a process whose processor is told to be so many devices."""
    return f"{os.environ.get('BILEVEL_QUICK_FLAGS', '')} --xla_force_host_platform_device_count={count}"


def on(name="both", kind=AxisType.Auto, count=8, **rules):
    """A sharding over so many devices; rows are split over all axes."""
    shape = SHAPES[name] if count == 8 else {"data": 2, "fsdp": count // 2}
    mesh = jax.make_mesh(
        tuple(shape.values()), tuple(shape), axis_types=(kind,) * len(shape), devices=jax.devices()[:count]
    )
    return Sharding(mesh, batch=tuple(shape), **rules)


def apart(found, wanted):
    """The largest relative difference of a leaf."""
    sizes = jax.tree.map(
        lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / max(np.max(np.abs(b)), 1e-300)),
        found,
        wanted,
    )
    return max(jax.tree.leaves(sizes))


# A model with weights that are split: stacked layers, low-rank changes of the first and a head of its own.


def forward(weights, inner, x):
    h = x @ (weights["up"] + inner["a"] @ inner["b"])
    h, _ = jax.lax.scan(lambda h, kernel: (jnp.tanh(h @ kernel), None), h, weights["stack"])
    return h @ inner["head"]


def inner_loss(weights, inner, outer, batch, key):
    x, y = batch
    decay = sum(jnp.sum(leaf**2) for leaf in inner.values())
    return jnp.mean((forward(weights, inner, x) - y) ** 2) + 1e-3 * jnp.exp(outer["decay"]) * decay


def outer_loss(weights, inner, outer, batch, key):
    x, y = batch
    return jnp.mean((forward(weights, inner, x) - y) ** 2)


def start(key, outer):
    keys = jax.random.split(key, 3)
    shapes = {"a": (16, 4), "b": (4, 256), "head": (256, 3)}
    return {name: 0.1 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


@functools.cache
def case(dtype=np.float64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 16))
    data = tuple(a.astype(dtype) for a in (x, np.tanh(x @ rng.normal(size=(16, 3)))))
    weights = {"up": rng.normal(size=(16, 256)) / 4, "stack": rng.normal(size=(2, 256, 256)) / 16}
    weights = {name: leaf.astype(dtype) for name, leaf in weights.items()}
    bind = jax.tree_util.Partial
    begin = lambda key, outer: jax.tree.map(lambda x: x.astype(dtype), start(key, outer))  # noqa: E731
    zero = lambda key: {"decay": jnp.zeros((), dtype)}  # noqa: E731
    return bilevel.Problem(bind(inner_loss, weights), bind(outer_loss, weights), begin, zero), data


INNER, OUTER = optax.sgd(0.1), optax.adam(0.1)  # optimizers compare by identity: others would be compiled anew


def nested(problem, optimizer=INNER):
    return Nested(problem, Unrolled(optimizer, 2), OUTER)


def run(solver, data, steps=20, **settings):
    settings = {"inner_data": Batches(data, 16), "outer_data": Batches(data, 32)} | settings
    return bilevel.run(solver, steps=steps, progress=False, **settings)
