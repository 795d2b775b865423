r"""Tied-LoRA: one A and one B for all layers, told apart by two vectors a layer.

Published (Renduchintala et al. 2023, arXiv 2311.09578): $\Delta W_l = A\, \mathrm{diag}(u_l)\, B\,
\mathrm{diag}(v_l)$ with A, B tied across layers; A, B, u and v may each be trained or frozen.

Our choice: A and B are tied across layers only, not across the linears of a layer (which may differ in size); u and v
start at 1 and B at 0; all four are trained unless `trained` says otherwise.
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
class TiedLoRA:
    """`{site: {"a": [in, r], "b": [r, out], "u": [L, r], "v": [L, out]}}`.

    Args:
      lora: rank and factor.
      trained: which of "a", "b", "u", "v" have a gradient.

    Raises:
      ValueError: for another name.
    """

    lora: LoRAConfig
    trained: tuple[str, ...] = ("a", "b", "u", "v")

    def __post_init__(self):
        if unknown := set(self.trained) - set("abuv"):
            raise ValueError(f"Tied-LoRA trains some of 'a', 'b', 'u', 'v', not {sorted(unknown)[0]!r}.")

    def init(self, key: jax.Array, shapes: Mapping[str, tuple[int, int]], num_layers: int, dtype: Any) -> PyTree:
        """A as LoRA's, B = 0, u = v = 1."""
        return {
            site: {
                "a": leaves["a"][0],
                "b": leaves["b"][0],
                "u": jnp.ones((num_layers, self.lora.rank), dtype),
                "v": jnp.ones((num_layers, shapes[site][1]), dtype),
            }
            for site, leaves in self.lora.init(key, shapes, 1, dtype).items()
        }

    def factors(self, params: PyTree) -> tuple[LoRAConfig, PyTree]:
        """A diag(u) and B diag(v) of every layer."""

        def of(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
            held = {n: x if n in self.trained else jax.lax.stop_gradient(x) for n, x in leaves.items()}
            return {"a": held["a"][None] * held["u"][:, None, :], "b": held["b"][None] * held["v"][:, None, :]}

        return self.lora, {site: of(leaves) for site, leaves in params.items()}


def find(setting: Setting, key: jax.Array) -> Found:
    """All layers share A and B of LoRA's whole rank."""
    return train_kind(setting, key, TiedLoRA(setting.lora))
