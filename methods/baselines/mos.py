r"""MoS, mixture of shards: the factors of all layers are put together from shards of a global pool.

Published (Wang et al. 2024, arXiv 2410.00938): a pool a linear holds vectors for A and for B, shared by all layers.
Each layer picks vectors by a fixed random index, with four refinements: a subset of the pool a layer (selection);
separate indices for A and B (pair dissociation); vectors cut into shards that are picked one by one (vector sharding);
some shards that belong to one layer alone (shard privatisation).

Our choice: the index is drawn with replacement by `seed`; the pool holds the budget's share of the vectors that LoRA
has; a layer picks LoRA's rank; one vector in four, rounded down, is private; two shards a vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.extend import PyTree
from methods.adapters.lora import LoRAConfig
from methods.baselines.base import Found, Setting, train_kind
from methods.ranges import part


@dataclasses.dataclass(frozen=True)
class MoS:
    """`{site: {"a": [pool * shards, in / shards], "b": [pool * shards, out / shards]}}`.

    Args:
      lora: rank r and factor.
      num_layers: L.
      pool: vectors in the pool of a linear.
      private: vectors of each layer that no other picks, below r.
      shards: a vector is cut into so many.
      seed: of the index.

    Raises:
      ValueError: if the pool has no vector to share beside the private ones.
    """

    lora: LoRAConfig
    num_layers: int
    pool: int
    private: int = 0
    shards: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.private < 0 or self.private > self.lora.rank or self.pool <= self.num_layers * self.private:
            raise ValueError(
                f"MoS has {self.pool} vectors for {self.num_layers} layers with {self.private} private ones each of "
                f"rank {self.lora.rank}: the pool must be larger than the private part."
            )

    def index(self, site: str, factor: str) -> np.ndarray:
        """Which shards a layer puts together, `[L, r, shards]`."""
        draw = np.random.default_rng((self.seed, *f"{site}.{factor}".encode()))
        own = self.num_layers * self.private * self.shards
        shape = self.num_layers, self.lora.rank - self.private, self.shards
        shared = draw.integers(own, self.pool * self.shards, shape)
        private = np.arange(own).reshape(self.num_layers, self.private, self.shards)
        return np.concatenate([private, shared], axis=1)

    def init(self, key: jax.Array, shapes: Mapping[str, tuple[int, int]], num_layers: int, dtype: Any) -> PyTree:
        """A's pool uniform as LoRA's, B's 0.

        Raises:
          ValueError: if the shards do not divide the sizes of a site.
        """
        params = {}
        for number, site in enumerate(self.lora.sites(shapes)):
            fan_in, fan_out = shapes[site]
            if fan_in % self.shards or fan_out % self.shards:
                raise ValueError(f"MoS cannot cut the vectors of site {site!r}, {shapes[site]}, into {self.shards}.")
            rows, bound = self.pool * self.shards, fan_in**-0.5
            drawn = jax.random.uniform(
                jax.random.fold_in(key, number), (rows, fan_in // self.shards), dtype, -bound, bound
            )
            params[site] = {"a": drawn, "b": jnp.zeros((rows, fan_out // self.shards), dtype)}
        return params

    def factors(self, params: PyTree) -> tuple[LoRAConfig, PyTree]:
        """The picked shards, end to end."""

        def of(site: str, factor: str) -> jax.Array:
            picked = params[site][factor][self.index(site, factor)]
            return picked.reshape(self.num_layers, self.lora.rank, -1)

        return self.lora, {site: {"a": of(site, "a").swapaxes(1, 2), "b": of(site, "b")} for site in params}


def find(setting: Setting, key: jax.Array) -> Found:
    """LoRA's rank in every module, from a pool of the budget's share of its vectors."""
    setting.budget()
    layers, rank = setting.num_layers, setting.lora.rank
    pool = max(2, part(setting.share, layers * rank))
    private = min(rank // 4, (pool - 1) // layers)
    return train_kind(setting, key, MoS(setting.lora, layers, pool, private, shards=2))
