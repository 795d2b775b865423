r"""LoRTA: the updates of all layers, heads and linears as one tensor of low rank.

Published (Hounie et al. 2024, arXiv 2410.04060): the updates, stacked over layers l, linears m and heads h, are one
5-way tensor with a CP decomposition of rank r,

$$ \Delta W_{lm}[i, (h, d)] = s \sum_{j=1}^r A_{ij}\, D_{dj}\, H_{hj}\, L_{lj}\, M_{mj}, $$

one to two orders of magnitude fewer parameters than LoRA. The factor of the layers is a learned scale a layer and rank:
Flexora's gate is the special case that ties it over ranks.

Our choice: linears with fewer heads (grouped keys and values) have a head factor of their own; A starts as LoRA's, D at
0, all others at 1, so that the start is the pretrained model and LoRA shared by all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.extend import PyTree
from methods.adapters.lora import LoRAConfig
from methods.baselines.base import Found, Setting, train_kind


@dataclasses.dataclass(frozen=True)
class LoRTA:
    """`{"a": [in, r], "d": [head_dim, r], "h": {heads: [heads, r]}, "l": [L, r], "m": {site: [r]}}`.

    Args:
      lora: rank and factor.
      shapes: `{site: (in, out)}` of the model.
      head_dim: entries of a head; it divides the outputs of all adapted sites, which share one input size.

    Raises:
      ValueError: where they do not.
    """

    lora: LoRAConfig
    shapes: Mapping[str, tuple[int, int]]
    head_dim: int

    def __post_init__(self):
        adapted = [self.shapes[site] for site in self.lora.sites(self.shapes)]
        if len({fan_in for fan_in, _ in adapted}) > 1 or any(out % self.head_dim for _, out in adapted):
            raise ValueError(
                f"LoRTA needs sites of one input size and of whole heads of {self.head_dim}, not {adapted}: "
                "adapt q_proj and v_proj, for instance."
            )

    def init(self, key: jax.Array, shapes: Mapping[str, tuple[int, int]], num_layers: int, dtype: Any) -> PyTree:
        """A as LoRA's, D = 0, all others 1."""
        sites, rank = self.lora.sites(shapes), self.lora.rank
        heads = sorted({shapes[site][1] // self.head_dim for site in sites})
        return {
            "a": self.lora.init(key, shapes, 1, dtype)[sites[0]]["a"][0],
            "d": jnp.zeros((self.head_dim, rank), dtype),
            "h": {str(count): jnp.ones((count, rank), dtype) for count in heads},
            "l": jnp.ones((num_layers, rank), dtype),
            "m": {site: jnp.ones(rank, dtype) for site in sites},
        }

    def factors(self, params: PyTree) -> tuple[LoRAConfig, PyTree]:
        """A diag(L_l M_m) and (H x D) of every layer."""
        a, d, layers = params["a"], params["d"], params["l"]

        def of(site: str) -> dict[str, jax.Array]:
            heads = params["h"][str(self.shapes[site][1] // self.head_dim)]
            columns = jnp.einsum("hr,dr->rhd", heads, d).reshape(self.lora.rank, -1)
            scaled = a[None] * (layers * params["m"][site][None, :])[:, None, :]
            return {"a": scaled, "b": jnp.broadcast_to(columns[None], (len(layers), *columns.shape))}

        return self.lora, {site: of(site) for site in params["m"]}


def find(setting: Setting, key: jax.Array) -> Found:
    """One tensor; heads as wide as the greatest size, at most 64, that divides the outputs of all sites."""
    outs = [setting.shapes[site][1] for site in setting.sites]
    head_dim = next(size for size in range(64, 0, -1) if not any(out % size for out in outs))
    return train_kind(setting, key, LoRTA(setting.lora, setting.shapes, head_dim))
