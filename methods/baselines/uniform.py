"""Uniform LoRA: every module, at the rank that the budget allows.

Published: the usual comparison at equal parameters. Our choice: the smaller rank is a mask of LoRA's first ranks, so
that the factor s = alpha / r stays that of the whole rank, as it does where whole modules are chosen.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from methods.baselines.base import Found, Setting, train_lora


def find(setting: Setting, key: jax.Array) -> Found:
    """LoRA of rank max(1, floor(share r)) everywhere."""
    rank = max(1, setting.budget() * setting.lora.rank // sum(int(cost.sum()) for cost in setting.costs().values()))
    on = jnp.broadcast_to(jnp.arange(setting.lora.rank) < rank, (setting.num_layers, setting.lora.rank))
    return train_lora(setting, key, {site: on for site in setting.sites})
