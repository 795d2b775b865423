"""Random modules: as many as the budget allows, drawn evenly.

Published: the control of every selection paper, and HeteroLoRA's CONSTANT proxy. A selection that does not beat it has
selected nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from methods.baselines.base import Found, Setting, choose, train_lora


def find(setting: Setting, key: jax.Array) -> Found:
    """LoRA on modules drawn by `key`."""
    draw, train = jax.random.split(key)
    scores = {site: jnp.zeros(setting.num_layers) for site in setting.sites}
    return train_lora(setting, train, choose(setting, scores, draw))
