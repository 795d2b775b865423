r"""MELoRA: n small LoRAs side by side, each on its own part of the inputs and outputs.

Published (Ren et al. 2024, arXiv 2402.17263): A and B are block-diagonal with n blocks of rank r, so the update has
rank up to n r with the parameters of one LoRA of rank r.

Our choice: the rank of a mini LoRA is the budget's share of LoRA's; n = 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.extend import PyTree
from methods.adapters.lora import LoRAConfig
from methods.baselines.base import Found, Setting, resized, train_kind
from methods.ranges import part


@dataclasses.dataclass(frozen=True)
class MELoRA:
    """`{site: {"a": [L, n, in/n, r], "b": [L, n, r, out/n]}}`.

    Args:
      lora: of a mini LoRA: its rank r and factor s.
      groups: n.
    """

    lora: LoRAConfig
    groups: int

    def init(self, key: jax.Array, shapes: Mapping[str, tuple[int, int]], num_layers: int, dtype: Any) -> PyTree:
        """As LoRA's.

        Raises:
          ValueError: if n does not divide the sizes of a site.
        """
        for site in self.lora.sites(shapes):
            if any(size % self.groups for size in shapes[site]):
                raise ValueError(f"MELoRA cannot cut site {site!r}, {shapes[site]}, into {self.groups} equal parts.")
        whole = self.lora.init(key, shapes, num_layers, dtype)
        n, rank = self.groups, self.lora.rank
        return {
            site: {
                "a": leaves["a"].reshape(num_layers, n, -1, rank),
                "b": leaves["b"].reshape(num_layers, rank, n, -1).swapaxes(1, 2),
            }
            for site, leaves in whole.items()
        }

    def factors(self, params: PyTree) -> tuple[LoRAConfig, PyTree]:
        """Block-diagonal factors of rank n r."""
        rank = self.groups * self.lora.rank

        def spread(a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
            eye = jnp.eye(self.groups, dtype=a.dtype)
            wide_a = jnp.einsum("lgir,gh->lgihr", a, eye)
            wide_b = jnp.einsum("lgro,gh->lgrho", b, eye)
            return {"a": wide_a.reshape(len(a), -1, rank), "b": wide_b.reshape(len(b), rank, -1)}

        return resized(self.lora, rank), {site: spread(leaves["a"], leaves["b"]) for site, leaves in params.items()}


def find(setting: Setting, key: jax.Array) -> Found:
    """Four mini LoRAs a module."""
    setting.budget()
    rank = max(1, part(setting.share, setting.lora.rank))
    return train_kind(setting, key, MELoRA(resized(setting.lora, rank), groups=4))
