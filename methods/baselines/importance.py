r"""What AdaLoRA and IncreLoRA share: updates of the form P diag(v) Q, kept orthogonal, and a smoothed sensitivity.

The parameters are `{"factors": LoRA's, "values": {site: [L, r]}}`; v is LoRA's gate, one a rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel.extend import PyTree
from methods.baselines.base import Found, PerSite, Setting, fit, found


def start(setting: Setting, key: jax.Array, value: float) -> PyTree:
    """P and Q Gaussian with variance 1 / fan-in of their shape, every v at `value`."""
    factors, tree = jax.tree.flatten(setting.start(key))
    keys = jax.random.split(key, len(factors))
    drawn = [jax.random.normal(k, x.shape, x.dtype) / x.shape[1] ** 0.5 for k, x in zip(keys, factors, strict=True)]
    values = {site: jnp.full((setting.num_layers, setting.lora.rank), value, setting.dtype) for site in setting.sites}
    return {"factors": jax.tree.unflatten(tree, drawn), "values": values}


def train(setting: Setting, key: jax.Array, spending: optax.GradientTransformationExtraArgs) -> Any:
    """One training from v = 0, kept near orthogonal, by Adam and then `spending`: the inner state.

    `spending` takes ranks away, or gives them; its own state is the last of `.opt_state`.
    """
    return fit(
        setting,
        key,
        lambda key: start(setting, key, 0.0),
        lambda params: setting.lora.bind(params["factors"], params["values"]),
        optimizer=optax.chain(optax.adam(setting.learning_rate), spending),
        penalty=lambda params: 0.1 * orthogonality(params["factors"]),
    )


def handed_back(setting: Setting, params: PyTree, mask: PerSite, scores: PerSite) -> Found:
    """What `train` has trained, with the ranks of a mask."""
    trained = params["adapter"]
    return found(setting, params | {"adapter": trained["factors"]}, trained["values"], mask, scores)


def orthogonality(factors: PyTree) -> jax.Array:
    r"""$\|P^\top P - I\|_F^2 + \|Q Q^\top - I\|_F^2$, summed over modules."""

    def distance(gram: jax.Array) -> jax.Array:
        return jnp.sum((gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)[None]) ** 2)

    grams = [jnp.einsum("lir,lis->lrs", leaves["a"], leaves["a"]) for leaves in factors.values()]
    grams += [jnp.einsum("lro,lso->lrs", leaves["b"], leaves["b"]) for leaves in factors.values()]
    return jnp.stack([distance(gram) for gram in grams]).sum()


class Smoothed(NamedTuple):
    """Running mean of the sensitivity |w dL/dw|, and of its distance from that mean; trees like the parameters."""

    mean: PyTree
    spread: PyTree


def smooth(state: Smoothed, params: PyTree, grads: PyTree, beta: float) -> Smoothed:
    """One step of both averages with decay `beta`."""
    sensitivity = jax.tree.map(lambda w, g: jnp.abs(w * g), params, grads)
    mean = jax.tree.map(lambda m, s: beta * m + (1 - beta) * s, state.mean, sensitivity)
    spread = jax.tree.map(lambda u, s, m: beta * u + (1 - beta) * jnp.abs(s - m), state.spread, sensitivity, mean)
    return Smoothed(mean, spread)


def unsmoothed(params: PyTree) -> Smoothed:
    """Both averages at 0."""
    zeros = optax.tree.zeros_like(params)
    return Smoothed(zeros, zeros)


def product(state: Smoothed) -> PyTree:
    """Sensitivity times uncertainty, the importance of every number."""
    return optax.tree.mul(state.mean, state.spread)
