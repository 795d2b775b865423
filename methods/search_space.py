r"""The modules that compete for a budget of LoRA parameters, and the outer transformation that keeps it.

A module is LoRA on one linear of one block, or a LoRA-adapted shortcut; its gate $m \in \{0, 1\}$ is an outer
variable. Shortcuts, D x D, on the residual stream of block l, x being its input, u what its feed-forward branch starts
from:

    residual_attention   u <- x + s x A B + attention          the attention residual (residual_1)
    residual_ffn         y <- u + s u A B + feed-forward       the feed-forward residual (residual_2)
    block_hidden         y <- y + s x A B                      across the block (shortcut_sa)
    ffn_input            u <- u + s u' A B, u' of block l - 1  to the next block (shortcut_ffn), not in block 0

With B = 0 all of them leave the model's function as it is. The authors' code (names in brackets) normalises once more
after the last two, which changes the pretrained model even where they are off; ours add before a norm that is there
anyway.

Zhang, Gao, Mullins, Constantinides, Zhao, "Unlocking the Global Synergies in Low-Rank Adapters", 2024,
arXiv 2406.14956.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel.extend import PyTree
from methods import proxies
from methods.adapters.lora import LoRAConfig
from methods.models.hooks import Chain
from methods.ranges import part

SHORTCUTS = ("residual_attention", "residual_ffn", "block_hidden", "ffn_input")
"""The sites of the four kinds of shortcuts."""

Gates = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Space:
    """The modules that can be on or off.

    Attributes:
      lora: LoRA on linears.
      shortcut: LoRA on shortcuts, its targets among `SHORTCUTS`; None for none. Published: rank as `lora`, alpha 4.
      shapes: `{site: (in, out)}` of the model's linears.
      width: D.
      num_layers: L.
    """

    lora: LoRAConfig
    shortcut: LoRAConfig | None
    shapes: Mapping[str, tuple[int, int]]
    width: int
    num_layers: int

    def _kinds(self) -> dict[str, tuple[LoRAConfig, Mapping[str, tuple[int, int]]]]:
        kinds = {"lora": (self.lora, self.shapes)}
        if self.shortcut is not None:
            kinds["shortcut"] = self.shortcut, {site: (self.width, self.width) for site in SHORTCUTS}
        return kinds

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> PyTree:
        """Fresh parameters, `{"lora": ..., "shortcut": ...}`, each as from `LoRAConfig.init`."""
        kinds = zip(self._kinds().items(), jax.random.split(key), strict=False)
        return {kind: config.init(k, shapes, self.num_layers, dtype) for (kind, (config, shapes)), k in kinds}

    def bind(self, params: PyTree, gates: Gates) -> Chain:
        """The hook: a module multiplied by its gate; at 0 an exact no-op, without gradient."""
        return Chain(
            tuple(
                config.bind(params[kind], gates[kind], {site: gate > 0 for site, gate in gates[kind].items()})
                for kind, (config, _) in self._kinds().items()
            )
        )

    def gates(self) -> Gates:
        """Every module on: ones `[L]` for each site."""
        return jax.tree.map(lambda cost: jnp.ones(len(cost)), self.costs())

    def costs(self, *, each: bool = False) -> Gates:
        """Trainable parameters of a module, r (in + out), `[L]` for each site; 1 with `each`, which counts modules.

        `inf` for the shortcut into block 0, which nothing leads to.
        """

        def cost(config: LoRAConfig, site: str, shape: tuple[int, int]) -> np.ndarray:
            costs = np.full(self.num_layers, 1.0 if each else float(config.rank * sum(shape)))
            costs[: 1 if site == "ffn_input" else 0] = np.inf
            return costs

        return {
            kind: {site: cost(config, site, shapes[site]) for site in config.sites(shapes)}
            for kind, (config, shapes) in self._kinds().items()
        }


def frozen_where_off(optimizer: optax.GradientTransformation) -> Callable[[Gates], optax.GradientTransformation]:
    """`gates -> optimizer` that leaves modules alone whose gate is 0; Adam's momentum would still move them."""

    def at(gates: Gates) -> optax.GradientTransformation:
        def stop(gate, updates):
            return jax.tree.map(lambda u: jnp.where(_leading(gate > 0, u.ndim), u, jnp.zeros_like(u)), updates)

        def only_on(updates, params):
            return updates | jax.tree.map(stop, gates, proxies.gated(gates, updates))

        return optax.chain(optimizer, optax.stateless(only_on))

    return at


def by_type() -> optax.GradientTransformation:
    """Divides every leaf (the modules of one site) by its mean absolute value: modules compete within their type.

    Raw proxies mostly tell types apart, v from q above all.
    """

    def scale(u: jax.Array) -> jax.Array:
        mean = jnp.mean(jnp.abs(u))
        return jnp.where(mean > 0, u / jnp.where(mean > 0, mean, 1), u)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates))


def allocation(space: Space, share: float, key: jax.Array, *, separated: bool = False, normalised: bool = False) -> Any:
    """The outer transformation: the `share` of modules with the best scores, counted as published.

    Args:
      share: p; p of all modules stay on, rounded down.
      separated: p of the LoRA modules and p of the shortcuts (rounded), instead of one ranking ("combined").
      normalised: scores are divided by their type's mean first (`by_type`).
      key: of the ties.

    Raises:
      ValueError: for a share outside (0, 1], or too small for a single module.
    """
    if not 0 < share <= 1:
        raise ValueError(f"The share {share:g} of modules that stay on must be above 0 and at most 1.")
    costs = space.costs(each=True)
    counts = {k: sum(int(np.isfinite(c).sum()) for c in sites.values()) for k, sites in costs.items()}
    budgets = {"all": part(share, sum(counts.values()))}
    if separated:
        budgets = {
            kind: part(share, count) if kind == "lora" else round(share * count) for kind, count in counts.items()
        }
    if min(budgets.values()) < 1:
        raise ValueError(f"The share {share:g} of {counts} modules is less than one: raise it.")
    if separated:
        groups: dict[Any, Any] = {
            kind: bilevel.allocate(budgets[kind], {**dict.fromkeys(costs, 1), kind: costs[kind]}, key=k)
            for kind, k in zip(costs, jax.random.split(key, len(costs)), strict=True)
        }
        allocate = optax.partition(groups, {kind: kind for kind in costs})
    else:
        allocate = bilevel.allocate(budgets["all"], costs, key=key)
    return optax.chain(by_type(), allocate) if normalised else allocate


def _leading(mask: jax.Array, ndim: int) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))
