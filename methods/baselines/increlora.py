r"""IncreLoRA: start with one rank everywhere, and give the most important modules more during training.

Published (Zhang et al. 2023, arXiv 2308.12043): the update is P diag(v) Q with the orthogonality penalty of AdaLoRA.
After a warm-up, at every interval, the h most important modules get one rank more, until the average rank is reached.
The importance of a module is $\sum |w\, dL/dw| / \sqrt{n}$ over its n numbers, smoothed, times its smoothed
distance from that mean. Every module keeps one component in reserve whose value is fixed at 1e-5 ("advance learning"):
P and Q of a rank are trained before it is given out.

Our choice: the sum of ranks aimed at is the budget's share of all ranks of LoRA, or one a module where that is more;
the warm-up is a tenth of the steps; the interval is such that the last rank is given out at four fifths of them, with h
an eighth of the modules; decay 0.85; penalty 0.1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel.extend import PyTree
from methods.baselines.base import Found, PerSite, Setting
from methods.baselines.importance import Smoothed, handed_back, smooth, train, unsmoothed
from methods.ranges import part

RESERVE = 1e-5
"""The value of a component in reserve."""


class GrowState(NamedTuple):
    """Steps taken, the averages, and every module's rank `{site: int32 [L]}`."""

    step: jax.Array
    smoothed: Smoothed
    ranks: PerSite


def importance(smoothed: Smoothed) -> PerSite:
    """Of every module, `{site: [L]}`: smoothed mean and spread of the module's sum, multiplied."""

    def total(tree: PyTree, site: str) -> jax.Array:
        leaves = [*tree["factors"][site].values(), tree["values"][site]]
        numbers = sum(leaf[0].size for leaf in leaves)
        return sum(leaf.reshape(len(leaf), -1).sum(1) for leaf in leaves) / numbers**0.5

    mean, spread = smoothed
    return {site: total(mean, site) * total(spread, site) for site in mean["values"]}


def grow(target: int, warm_up: int, interval: int, at_once: int, beta: float = 0.85) -> Any:
    """After an optimizer of `{"adapter": ..., "head": ...}` in a chain: holds what is not in use, hands out ranks."""

    def init(params: PyTree) -> GrowState:
        ranks = jax.tree.map(lambda v: jnp.ones(len(v), jnp.int32), params["adapter"]["values"])
        return GrowState(jnp.zeros((), jnp.int32), unsmoothed(params["adapter"]), ranks)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any):
        params = params["adapter"]
        smoothed = smooth(state.smoothed, params, extra["grad"]["adapter"], beta)
        scores, tree = jax.tree.flatten(importance(smoothed))
        ranks = jnp.stack(jax.tree.leaves(state.ranks))
        most = next(iter(params["values"].values())).shape[1]
        flat = jnp.where(ranks < most, jnp.stack(scores), -jnp.inf).ravel()
        place = jnp.argsort(jnp.argsort(-flat, stable=True)).reshape(ranks.shape).astype(jnp.int32)
        due = (state.step >= warm_up) & ((state.step - warm_up) % interval == 0)
        more = jnp.where(due, jnp.minimum(at_once, target - ranks.sum(dtype=jnp.int32)), 0)
        ranks = ranks + ((place < more) & (ranks < most)).astype(jnp.int32)
        new = jax.tree.unflatten(tree, list(ranks))
        moved = updates | {"adapter": _only(updates["adapter"], params, new)}
        return moved, GrowState(state.step + 1, smoothed, new)

    return optax.GradientTransformationExtraArgs(init, update)


def _only(updates: PyTree, params: PyTree, ranks: PerSite) -> PyTree:
    """Steps for the ranks in use; P and Q of the reserve move too, and its value stays at `RESERVE`."""
    factors, values = {}, {}
    for site, u in updates["values"].items():
        index = jnp.arange(u.shape[1], dtype=jnp.int32)[None, :]
        used, moving = index < ranks[site][:, None], index <= ranks[site][:, None]
        fixed = jnp.where(moving, RESERVE, 0.0).astype(u.dtype)
        values[site] = jnp.where(used, u, fixed - params["values"][site])
        a, b = updates["factors"][site]["a"], updates["factors"][site]["b"]
        kept = {"a": jnp.where(moving[:, None, :], a, 0), "b": jnp.where(moving[:, :, None], b, 0)}
        factors[site] = kept
    return {"factors": factors, "values": values}


def find(setting: Setting, key: jax.Array) -> Found:
    """One training, at the end of which the budget's share of ranks has been given out."""
    setting.budget()
    modules = len(setting.sites) * setting.num_layers
    target = max(modules, part(setting.share, modules * setting.lora.rank))
    at_once = max(1, modules // 8)
    times = -(-(target - modules) // at_once)
    warm_up = max(1, setting.steps // 10)
    interval = max(1, (4 * setting.steps // 5 - warm_up) // max(1, times))
    state = train(setting, key, grow(target, warm_up, interval, at_once))
    grown: GrowState = state.opt_state[-1]
    rank = jnp.arange(setting.lora.rank, dtype=jnp.int32)[None, :]
    mask = {site: rank < ranks[:, None] for site, ranks in grown.ranks.items()}
    return handed_back(setting, state.params, mask, importance(grown.smoothed))
