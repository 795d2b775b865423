r"""LoRA-drop: keep LoRA where its output is large, let all other layers share one.

Published (Zhou et al. 2024, arXiv 2402.07721): LoRA is trained for a few steps; the importance of a layer is

$$ I_i = \sum_x \|s\, x A_i B_i\|^2 \Big/ \sum_j \sum_x \|s\, x A_j B_j\|^2 $$

over a sample of the training data; the most important layers, until their importances sum to a threshold, keep a LoRA
of their own, and the others share one.

Our choice: as many layers are kept as the budget allows, in place of the threshold, so that methods compare at equal
parameters (the one shared LoRA comes on top, as published); the sample is one batch of at most 256 rows, with its
padding; training then starts anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.extend import PyTree
from methods.adapters.lora import LoRA
from methods.baselines.base import Found, PerSite, Setting, choose, fit, found
from methods.models.hooks import Hook


@jax.custom_vjp
def _tap(y: jax.Array, measured: jax.Array, probe: jax.Array) -> jax.Array:
    """y; the gradient with respect to `probe` is `measured`, whatever comes after. A value leaves a scan this way."""
    return y


_tap.defvjp(
    lambda y, measured, probe: (y, measured),
    lambda measured, cotangent: (cotangent, jnp.zeros_like(measured), measured),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tapped:
    """LoRA whose probes `{site: [L]}` have the squared norms of the updates as gradients."""

    lora: LoRA
    probes: dict[str, jax.Array]

    def __call__(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        if site not in self.probes:
            return y
        adapted = self.lora(site, x, y)
        size = jnp.sum((adapted - y) ** 2)
        return _tap(adapted, size.astype(self.probes[site].dtype), self.probes[site])


def output_norms(loss: Callable[[Hook], jax.Array], lora: LoRA) -> PerSite:
    r"""Squared norm of every module's output, $\sum_x \|s\, x A B\|^2$: `{site: [L]}`.

    The x are those that `loss(adapt)`, any scalar of the model's output, sends through it.
    """
    probes = {site: jnp.zeros(len(leaves["a"]), leaves["a"].dtype) for site, leaves in lora.params.items()}
    return jax.grad(lambda probes: loss(Tapped(lora, probes)))(probes)


def measuring(steps: int) -> int:
    """Steps of the training that chooses."""
    return max(1, steps // 5)


def find(setting: Setting, key: jax.Array) -> Found:
    """A fifth of the steps to measure, a choice of layers, and the training with one shared LoRA."""
    short, draw, train = jax.random.split(key, 3)
    start = setting.start
    first = fit(setting, short, start, setting.lora.bind, steps=measuring(setting.steps), part="choice").params
    sample = jax.tree.map(lambda rows: rows[:256], setting.train)

    @jax.jit
    def measure(weights, trained, sample):
        loss = lambda adapt: setting.loss(weights, adapt, trained["head"], sample)  # noqa: E731
        return output_norms(loss, setting.lora.bind(trained["adapter"]))

    norms = measure(setting.weights, first, sample)
    importance = sum(norms.values())
    importance = importance / jnp.maximum(importance.sum(), jnp.finfo(setting.dtype).tiny)
    # By cost, so that the ratio of score and cost, which the choice goes by, is a layer's importance.
    scores = {site: importance * cost for site, cost in setting.costs().items()}
    own = choose(setting, scores, draw)

    def shared(params: PyTree) -> PyTree:
        """The LoRA of every layer: its own, or layer 0's, which no other parameter then is."""

        def pick(site: str, leaf: jax.Array, common: jax.Array) -> jax.Array:
            return jnp.where(own[site][:, None, None], leaf, common[None])

        each, common = params
        return {s: {n: pick(s, each[s][n], common[s][n]) for n in each[s]} for s in each}

    def fresh(key: jax.Array) -> Any:
        keys = jax.random.split(key)
        return start(keys[0]), jax.tree.map(lambda leaf: leaf[0], start(keys[1]))

    trained = fit(setting, train, fresh, lambda params: setting.lora.bind(shared(params))).params
    everywhere = {site: jnp.ones(setting.num_layers, bool) for site in own}
    whole = trained | {"adapter": shared(trained["adapter"])}
    result = found(setting, whole, None, everywhere, {site: importance for site in own})
    costs = setting.costs()
    kept = sum(int((np.asarray(own[site]) * cost).sum()) for site, cost in costs.items())
    common = sum(int(cost[0]) for site, cost in costs.items() if not bool(own[site].all()))
    on = {site: np.asarray(mask, np.float64) for site, mask in own.items()}
    return result._replace(parameters=kept + common, on=on)
