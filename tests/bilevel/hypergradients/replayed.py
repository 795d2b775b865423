"""A small training with keys, aux and a start from `outer`, which `Replay` is tried on, in processes of its own too."""

import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from tests.bilevel.helpers import KEY

STEPS, ROWS = 11, 4


def inner_loss(w, outer, batch, key):
    x, y = batch
    mask = jax.random.bernoulli(key, 0.9, (6,)).astype(x.dtype)
    fit = jnp.mean((jnp.tanh(x @ w["a"]) * mask[None] @ w["b"] - y) ** 2)
    return fit + jnp.exp(outer["decay"]) * jnp.sum(w["a"] ** 2), {"fit": fit}


def outer_loss(w, outer, batch, key):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ w["a"]) @ w["b"] - y) ** 2), {"rows": len(x) * jnp.ones(2)}


def init_inner(key, outer):
    first, second = jax.random.split(key)
    a, b = jax.random.normal(first, (3, 6)), jax.random.normal(second, (6, 1))
    return {"a": outer["size"] * a, "b": b, "layers": 3}


def init_outer(key):
    return {"decay": jnp.asarray(-2.0), "size": jnp.asarray(0.5), "rate": jnp.asarray(-3.0), "key": key}


PROBLEM = bilevel.Problem(inner_loss, outer_loss, init_inner, init_outer, has_aux=True)
X = jnp.asarray(np.random.default_rng(0).normal(size=(STEPS, ROWS, 3)))
Y = jnp.sin(X.sum(axis=-1, keepdims=True))
OPTIMIZERS = {
    "adam": optax.adam(0.05),
    "momentum of a learned rate": lambda outer: optax.sgd(jnp.exp(outer["rate"]), momentum=0.9),
    "injected": lambda outer: optax.inject_hyperparams(optax.adamw)(jnp.exp(outer["rate"]), weight_decay=0.1),
}


def batch(step):
    return X[step], Y[step]


def estimate(hypergradient, batches=(X, Y), state=None, problem=PROBLEM, key=KEY, outer=None):
    outer = problem.start_outer(KEY) if outer is None else outer
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=bilevel.StructuralZeroWarning)  # the rate, where it is not learned
        return hypergradient.estimate(problem, state, outer, batches, batch(0), key)


def in_folder(folder, answer):
    """A process of its own: an estimate that is kept in a folder, and whose bits go to a file."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def slow(step):
        time.sleep(0.01)
        return batch(step)

    found = estimate(bilevel.Replay(OPTIMIZERS["adam"], STEPS, segment=2, store=str(folder)), slow)
    answer.write_text(" ".join(float(leaf).hex() for leaf in (found.value, found.grad["decay"], found.grad["size"])))
