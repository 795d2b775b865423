"""A budget of adapter parameters, modules or layers: what a unit costs, what is bought, and the LoRA it makes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from methods.adapters.lora import LoRAConfig

Units = dict[str, jax.Array]
"""A number for each unit: `{site: [L]}` for modules, `{site: [L, groups]}` for ranks, `{"layers": [L]}` for layers."""
LAYERS = "layers"


def amount(text: str) -> int:
    """A number of parameters out of such as 200000, 200k, 1.5M.

    Raises:
      ValueError: for anything else.
    """
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([kKmMgGbB]?)", text.strip())
    if found is None:
        raise ValueError(f"--budget-params {text!r} is no number of parameters: give such as 200000, 200k or 2M.")
    times = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}[found[2].lower()]
    value = Decimal(found[1].replace("_", "").replace(",", "")) * times  # 2.01 in binary is a little less
    if not 1 <= value < 2**31:
        raise ValueError(f"--budget-params {text} must be at least 1 and below {2**31:,}.")
    return int(value)


def costs(settings: Any, shapes: Mapping[str, tuple[int, int]], sites: Sequence[str], layers: int) -> dict[str, Any]:
    """What a unit costs, in parameters for ranks and 1 for modules and layers; in the form of `Units`."""
    if settings.per == "layer":
        return {LAYERS: np.ones(layers)}
    if settings.per == "module":
        return {site: np.ones(layers) for site in sites}
    ends = settings.group * np.arange(1, settings.max_rank // settings.group + 1)
    found = {}
    for site in sites:
        # A matrix has at most as many ranks as its smaller side: what is beyond is not for sale.
        each = np.where(ends <= min(shapes[site]), float(settings.group * sum(shapes[site])), np.inf)
        found[site] = np.tile(each, (layers, 1))
    return found


def bought(settings: Any, scores: Mapping[str, Any], prices: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which units the budget buys, bool in the form of `Units`: those of the largest score for their cost.

    What is left of the budget pays for no other unit. Equal scores are put in an order by the settings' seed.
    """
    scores = {name: np.asarray(value, float) for name, value in scores.items()}
    largest = max(float(np.abs(value).max()) for value in scores.values()) or 1.0
    rule = bilevel.allocate(settings.budget, prices, key=jax.random.key(settings.seed))
    closed = {name: jnp.zeros(value.shape, jnp.float32) for name, value in scores.items()}
    against = {name: jnp.asarray(-value / largest, jnp.float32) for name, value in scores.items()}
    opened: Any = rule.update(against, rule.init(closed), closed)[0]
    return {name: np.asarray(value) > 0 for name, value in opened.items()}


def spent(chosen: Mapping[str, np.ndarray], prices: Mapping[str, np.ndarray]) -> int:
    """What the chosen units cost together."""
    return round(sum(float(prices[name][on].sum()) for name, on in chosen.items()))


def ranks_of(
    settings: Any, chosen: Mapping[str, np.ndarray], sites: Sequence[str], layers: int
) -> dict[str, list[int]]:
    """The rank of each module, `{site: [L]}`, 0 where there is none."""
    if settings.per == "layer":
        return {site: (settings.rank * chosen[LAYERS]).tolist() for site in sites}
    if settings.per == "module":
        return {site: (settings.rank * chosen[site]).tolist() for site in sites}
    return {site: (settings.group * chosen[site].sum(axis=1)).tolist() for site in sites}


def adapter(base: LoRAConfig, ranks: Mapping[str, Sequence[int]]) -> tuple[LoRAConfig, dict[str, jax.Array]]:
    """A LoRA of these ranks and where it is, bool `{site: [L]}`; its scale is that of `base` in every module.

    Raises:
      ValueError: if there is no module at all.
    """
    there = [rank for each in ranks.values() for rank in each if rank]
    if not there:
        raise ValueError("No module has a rank: there is no adapter to train.")
    common = max(sorted(set(there)), key=there.count)
    of = lambda rank: base.scale * (math.sqrt(rank) if base.rslora else rank)  # noqa: E731
    others = {
        rf"{layer}\.{re.escape(site)}": rank
        for site, each in ranks.items()
        for layer, rank in enumerate(each)
        if rank not in (0, common)
    }
    config = dataclasses.replace(
        base,
        rank=common,
        alpha=of(common),
        targets=tuple(ranks),
        rank_pattern=others,
        alpha_pattern={pattern: of(rank) for pattern, rank in others.items()},
    )
    return config, {site: jnp.asarray(each) > 0 for site, each in ranks.items()}
