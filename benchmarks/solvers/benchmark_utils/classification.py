"""A linear classifier trained on softmax cross-entropy: what mnist and covtype share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmark_utils.data import scaler


def cross_entropy(w: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Cross-entropy of each row of `batch["x"]` with integer labels `batch["y"]`; `w[features, classes]`."""
    return optax.softmax_cross_entropy_with_integer_labels(batch["x"] @ w, batch["y"])


def regularised_classes(train, val, test):
    """The covtype problem on these `(x, y)`: one regularisation weight a class; x is scaled as train's has to be."""
    scale = scaler(train[0])
    sets = {name: (scale(x), y) for name, (x, y) in (("train", train), ("val", val), ("test", test))}
    features, classes = train[0].shape[1], 1 + max(int(y.max()) for _, y in sets.values())

    def outer_loss(z, x, batch, key):
        return jnp.mean(cross_entropy(z, batch))

    def inner_loss(z, x, batch, key):
        return outer_loss(z, x, batch, key) + 0.5 * jnp.sum(jnp.exp(x) * jnp.sum(z**2, axis=0))

    problem = bilevel.Problem(
        inner_loss, outer_loss, lambda key, outer: jnp.zeros((features, classes)), lambda key: jnp.full(classes, -2.0)
    )
    inner, outer = ({"x": jnp.asarray(sets[n][0]), "y": jnp.asarray(sets[n][1])} for n in ("train", "val"))
    return {"problem": problem, "inner": inner, "outer": outer, "metrics": error_rates(**sets)}


def error_rates(**sets):
    """`metrics(w, outer) -> {name_error: share of wrong predictions}`; benchopt watches `value`, that of val."""
    sets = {name: (jnp.asarray(x), jnp.asarray(y)) for name, (x, y) in sets.items()}

    @jax.jit
    def rates(w):
        return {name: jnp.mean(jnp.argmax(x @ w, axis=1) != y) for name, (x, y) in sets.items()}

    def metrics(inner, outer):
        found = {name: float(rate) for name, rate in rates(inner).items()}
        norm = float(np.linalg.norm(outer))
        return {f"{name}_error": rate for name, rate in found.items()} | {"value": found["val"], "norm_outer": norm}

    return metrics
