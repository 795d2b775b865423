r"""ALoRA: prune the ranks that a held-out batch can do without, and give them to modules that lost none.

Published (Liu et al. 2024, arXiv 2403.16187): every rank has a gate of 1. After some training its importance is found
by ablation on a validation batch, with S the metric: what the model loses without the rank, plus what the rank gives
alone in its module. The least important ranks are pruned, as many are handed to the modules that lost none, and
training goes on; and so again. No gradient with respect to a gate is taken.

Our choice: S is minus the loss; the importance of rank j in its module is S(all) - S(all but j) + S(only j), with all
other modules whole; three rounds, a quarter of the steps each, before the last quarter; an eighth of the ranks moves in
each; the modules start with the budget's share of LoRA's r ranks each, and may grow to all r. A rank that is handed out
starts with A drawn and B = 0.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.extend import PyTree
from methods.baselines.base import Found, PerSite, Setting, fit, found
from methods.ranges import part

ROUNDS = 3


def ablation(setting: Setting, trained: PyTree, mask: PerSite, batch: PyTree) -> PerSite:
    """Importance of every rank in use, -inf for the others: `{site: [L, r]}`. Two losses a rank."""

    def score(mask: PerSite) -> jax.Array:
        adapt = setting.lora.bind(trained["adapter"], mask=mask)
        return -setting.loss(setting.weights, adapt, trained["head"], batch)

    def of(site: str, place: jax.Array) -> jax.Array:
        layer, rank = place
        without = mask[site].at[layer, rank].set(False)
        only = jnp.zeros_like(mask[site][layer]).at[rank].set(True)
        alone = mask[site].at[layer].set(only)
        return score(mask) - score({**mask, site: without}) + score({**mask, site: alone})

    shape = setting.num_layers, setting.lora.rank
    places = jnp.stack(jnp.meshgrid(*map(jnp.arange, shape), indexing="ij"), -1).reshape(-1, 2)
    every = {site: jax.lax.map(lambda place, s=site: of(s, place), places).reshape(shape) for site in mask}
    return {site: jnp.where(mask[site], value, -jnp.inf) for site, value in every.items()}


def hand_over(importance: PerSite, mask: PerSite, moved: int) -> PerSite:
    """Masks after the `moved` least important ranks went to modules that lost none, the most important first."""
    sites = list(mask)
    on = np.stack([np.asarray(mask[site]) for site in sites])
    value = np.stack([np.asarray(importance[site], np.float64) for site in sites])
    lost = np.zeros(on.shape[:2], bool)
    worst = np.argsort(np.where(on, value, np.inf), axis=None, kind="stable")
    for index in worst[: min(moved, on.sum() - 1)]:
        place = np.unravel_index(index, on.shape)
        on[place], lost[place[:2]] = False, True
    means = np.where(on, value, 0).sum(-1) / np.maximum(on.sum(-1), 1)
    free = [m for m in np.argsort(-means, axis=None, kind="stable") if not lost.ravel()[m]]
    left = int(sum(np.asarray(m).sum() for m in mask.values())) - int(on.sum())
    while left and any(not on.reshape(-1, on.shape[-1])[m].all() for m in free):
        for m in free:
            row = on.reshape(-1, on.shape[-1])[m]
            if left and not row.all():
                row[np.argmin(row)] = True
                left -= 1
    return {site: jnp.asarray(rows) for site, rows in zip(sites, on, strict=True)}


def find(setting: Setting, key: jax.Array) -> Found:
    """One training with three rounds of pruning and handing over."""
    setting.budget()
    shape = setting.num_layers, setting.lora.rank
    ranks = max(1, part(setting.share, setting.lora.rank))
    mask: PerSite = {site: jnp.broadcast_to(jnp.arange(shape[1])[None, :] < ranks, shape) for site in setting.sites}
    measure = jax.jit(lambda trained, mask, batch: ablation(setting, trained, mask, batch))
    held_out = jax.tree.map(lambda rows: rows[: 4 * setting.batch_size], setting.outer)
    state: Any = None
    importance: PerSite = {}
    parts = zip(jax.random.split(key, ROUNDS + 1), setting.parts(ROUNDS + 1), strict=True)
    for number, (part_key, steps) in enumerate(parts, 1):
        if state is not None:
            importance = measure(state.params, mask, held_out)
            mask = hand_over(importance, mask, max(1, ranks * len(mask) * shape[0] // 8))
        state = _go_on(setting, part_key, state, mask, steps, f"part {number}")
    scores = {site: jnp.where(jnp.isfinite(i), i, 0).sum(1) for site, i in importance.items()}
    return found(setting, state.params, None, mask, scores)


def _go_on(setting: Setting, key: jax.Array, state: Any, mask: PerSite, steps: int, part: str) -> Any:
    """The inner state after more steps with the ranks of a mask, Adam's averages kept; from fresh ones without one."""
    start, optimizer = setting.start, optax.adam(setting.learning_rate)
    if state is not None:
        setting = setting._replace(start_head=lambda key: state.params["head"])
        start = lambda key: state.params["adapter"]  # noqa: E731
        optimizer = optax.GradientTransformation(lambda params: state.opt_state, optimizer.update)
    bind = lambda params: setting.lora.bind(params, mask=mask)  # noqa: E731
    return fit(setting, key, start, bind, optimizer=optimizer, steps=steps, part=part)
