"""LoRA parameters of a stack of three layers, and PEFT's folders of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from methods.models import HFNames

SHAPES = {"q_proj": (6, 8), "v_proj": (6, 4), "down_proj": (10, 6)}
L = 3
BASE = {
    site: {"kernel": jax.random.normal(jax.random.key(i), (L, *shape)), "bias": jnp.ones((L, shape[1]))}
    for i, (site, shape) in enumerate(SHAPES.items())
}
NAMES = HFNames(
    "base",
    {
        "q_proj": "model.layers.{layer}.self_attn.q_proj",
        "v_proj": "model.layers.{layer}.self_attn.v_proj",
        "down_proj": "model.layers.{layer}.mlp.down_proj",
    },
)
# PEFT 0.21 still asks transformers for a name that is to go.
old_name = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def trained(config, seed=0, dtype=jnp.float64):
    """Parameters with B != 0, as after some training."""
    params = config.init(jax.random.key(seed), SHAPES, L, dtype, BASE)
    keys = jax.random.split(jax.random.key(seed + 1), len(params))
    noise = {site: jax.random.normal(k, params[site]["b"].shape, dtype) for k, site in zip(keys, params, strict=True)}
    return {site: {**leaves, "b": noise[site]} for site, leaves in params.items()}


def forward(hook, weights, x):
    """A stack of L layers scanned with the hook beside them, as a model does it."""

    def layer(carry, sliced):
        w, adapt = sliced
        return carry + jnp.tanh(adapt("q_proj", carry, carry @ w))[..., :6], None

    return jax.lax.scan(layer, x, (weights, hook))[0]


def same_bits(left, right):
    return np.asarray(left).tobytes() == np.asarray(right).tobytes()


def settings_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())
