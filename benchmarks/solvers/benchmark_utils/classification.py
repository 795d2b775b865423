"""A linear classifier trained on softmax cross-entropy: what mnist and covtype share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def cross_entropy(w: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Cross-entropy of each row of `batch["x"]` with integer labels `batch["y"]`; `w[features, classes]`."""
    return optax.softmax_cross_entropy_with_integer_labels(batch["x"] @ w, batch["y"])


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
