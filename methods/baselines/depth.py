"""The first or the last layers: as many as the budget allows.

Published: "last-k" is the folklore of fine-tuning (upper layers are task-specific), "first-k" its control. Our choice:
what is left of the
budget when no whole layer fits goes to single modules that do, nearest first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from methods.baselines.base import Found, Setting, choose, train_lora


def first_k(setting: Setting, key: jax.Array) -> Found:
    """LoRA on the layers next to the embedding."""
    return _along(setting, key, -jnp.arange(setting.num_layers, dtype=float))


def last_k(setting: Setting, key: jax.Array) -> Found:
    """LoRA on the layers next to the head."""
    return _along(setting, key, jnp.arange(setting.num_layers, dtype=float))


def _along(setting: Setting, key: jax.Array, order: jax.Array) -> Found:
    draw, train = jax.random.split(key)
    # By cost, so that the ratio of score and cost is the layer's place, whatever its modules cost.
    scores = {site: (order - order.min() + 1) * cost for site, cost in setting.costs().items()}
    return train_lora(setting, train, choose(setting, scores, draw))
