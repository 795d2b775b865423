r"""AdaLoRA: start with too many ranks everywhere, and take away the least important ones during training.

Published (Zhang et al. 2023, arXiv 2303.10512): the update is $P \Lambda Q$ with P, Q kept orthogonal by a
penalty $\gamma (\|P^\top P - I\|^2 + \|Q Q^\top - I\|^2)$ and $\Lambda = 0$ at the start. The importance of
a number is its sensitivity |w dL/dw|, smoothed, times the smoothed distance from that mean; that of triplet j is

$$ S_j = s(\lambda_j) + \mathrm{mean}_i\, s(P_{ij}) + \mathrm{mean}_i\, s(Q_{ji}). $$

After each step $\Lambda$ is set to 0 outside the b(t) triplets of largest S; b falls from b(0) to its target
along a cubic, after a warm-up, and stays there for the last steps. A triplet set to 0 may return while b falls.

Our choice: b(0) is every rank of LoRA and the target is the share of them that the budget allows (published: 1.5 times
the target at the start); warm-up a tenth, last part three tenths of the steps; both averages decay by 0.85;
$\gamma$ = 0.1. The factor of the update is LoRA's alpha / r.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel.extend import PyTree
from methods.baselines.base import Found, PerSite, Setting
from methods.baselines.importance import Smoothed, handed_back, product, smooth, train, unsmoothed
from methods.ranges import part


class PruneState(NamedTuple):
    """Steps taken, the averages, and which triplets are on."""

    step: jax.Array
    smoothed: Smoothed
    on: PerSite


def triplets(importance: PyTree) -> PerSite:
    """S, `{site: [L, r]}`."""
    return {
        site: values + importance["factors"][site]["a"].mean(1) + importance["factors"][site]["b"].mean(2)
        for site, values in importance["values"].items()
    }


def kept(step: Any, total: int, target: int, steps: int) -> jax.Array:
    """b(t): `total` for a tenth of the steps, a cubic down, `target` for the last three tenths."""
    first, last = max(1, steps // 10), max(1, 3 * steps // 10)
    progress = jnp.clip((step - first) / max(1, steps - first - last), 0.0, 1.0)
    return jnp.round(target + (total - target) * (1 - progress) ** 3).astype(jnp.int32)


def prune(target: int, steps: int, beta: float = 0.85) -> optax.GradientTransformationExtraArgs:
    """After an optimizer of `{"adapter": ..., "head": ...}` in a chain: all values but the b(t) best triplets' to 0."""

    def init(params: PyTree) -> PruneState:
        params = params["adapter"]
        on = jax.tree.map(lambda v: jnp.ones(v.shape, bool), params["values"])
        return PruneState(jnp.zeros((), jnp.int32), unsmoothed(params), on)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any):
        moved, params = updates["adapter"], params["adapter"]
        smoothed = smooth(state.smoothed, params, extra["grad"]["adapter"], beta)
        scores = triplets(product(smoothed))
        leaves, tree = jax.tree.flatten(scores)
        flat = jnp.concatenate([leaf.ravel() for leaf in leaves])
        place = jnp.argsort(jnp.argsort(-flat, stable=True))
        best = place < kept(state.step, len(flat), target, steps)
        ends = [sum(leaf.size for leaf in leaves[: i + 1]) for i in range(len(leaves) - 1)]
        on = [part.reshape(leaf.shape) for part, leaf in zip(jnp.split(best, ends), leaves, strict=True)]
        on = jax.tree.unflatten(tree, on)
        values = jax.tree.map(lambda u, v, m: jnp.where(m, u, -v), moved["values"], params["values"], on)
        return {**updates, "adapter": {**moved, "values": values}}, PruneState(state.step + 1, smoothed, on)

    return optax.GradientTransformationExtraArgs(init, update)


def find(setting: Setting, key: jax.Array) -> Found:
    """One training, at the end of which only the budget's share of ranks is on."""
    setting.budget()
    target = max(1, part(setting.share, len(setting.sites) * setting.num_layers * setting.lora.rank))
    state = train(setting, key, prune(target, setting.steps))
    pruned: PruneState = state.opt_state[-1]
    scores = {site: s.sum(1) for site, s in triplets(product(pruned.smoothed)).items()}
    return handed_back(setting, state.params, pruned.on, scores)
