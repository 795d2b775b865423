r"""APL, activated parameter locating: merge fine-tuned models by how much each part of an update matters to its task.

Published (Kong et al. 2024, arXiv 2408.09485): the update of a fine-tuned model is cut into parts; the importance of a
part is causal, the rise of the loss on a few examples when the pretrained weights are put back there, or its gradient
approximation :math:`|\langle \Delta W_m, \partial L / \partial W_m \rangle|`. Important parts lose fewer of their
entries before merging (dropping with rescaling, as DARE), and weigh more in the sum.

Our choice: a part is a module, a site of a layer. With importances brought to sum to 1 over a model's M modules, a
module's drop rate is :math:`p\, (1 - q)^{\gamma}`, q its importance divided by the model's largest and p the highest
rate; the models' weights at a module are their importances there, divided by their sum. Entries are dropped by `key`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from methods.baselines.sparse import Sparse

Update = dict[str, jax.Array]


def approximate(loss: Callable[[Any, Any], jax.Array], update: Update, batch: Any) -> dict[str, jax.Array]:
    """|<update, gradient>| of every module, `{site: [L]}`, at the fine-tuned model. One gradient.

    `loss(adapt, batch)` is that of the update's own task.
    """
    gradient = jax.grad(lambda deltas: loss(Sparse(deltas), batch))(update)
    return {site: jnp.abs(jnp.sum(update[site] * g, axis=(1, 2))) for site, g in gradient.items()}


def causal(loss: Callable[[Any, Any], jax.Array], update: Update, batch: Any) -> dict[str, jax.Array]:
    """Rise of the loss when a module's update is taken away, `{site: [L]}`. One loss a module, and one."""
    whole = loss(Sparse(update), batch)

    def without(site: str, layer: jax.Array) -> jax.Array:
        return loss(Sparse({**update, site: update[site].at[layer].set(0.0)}), batch) - whole

    return {site: jax.lax.map(lambda i, s=site: without(s, i), jnp.arange(len(update[site]))) for site in update}


def merge(
    updates: Sequence[Update],
    importance: Sequence[dict[str, jax.Array]],
    key: jax.Array,
    *,
    drop: float = 0.8,
    sharpness: float = 1.0,
) -> Update:
    r"""One update `{site: [L, in, out]}` out of those of several models; its hook is `Sparse`.

    Args:
      updates, importance: of every model; negative importances count as 0.
      key: of the dropped entries.
      drop: p, in [0, 1).
      sharpness: :math:`\gamma`.

    Raises:
      ValueError: for no update, as many importances as updates not being given, or p out of range.
    """
    if not updates or len(updates) != len(importance):
        raise ValueError(f"APL was given {len(updates)} updates and {len(importance)} importances: one each is needed.")
    if not 0 <= drop < 1:
        raise ValueError(f"APL's drop rate {drop:g} must be at least 0 and below 1.")
    shares = [_shares(scores) for scores in importance]
    merged = {}
    for number, site in enumerate(updates[0]):
        weights = jnp.stack([share[site] for share in shares])
        total = weights.sum(0, keepdims=True)
        weights = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 1 / len(updates))
        parts = []
        for model, (update, share) in enumerate(zip(updates, shares, strict=True)):
            top = jnp.max(jnp.stack([s.max() for s in share.values()]))
            rate = drop * (1 - share[site] / jnp.where(top > 0, top, 1)) ** sharpness
            entries = jax.random.fold_in(jax.random.fold_in(key, model), number)
            kept = jax.random.uniform(entries, update[site].shape) >= rate[:, None, None]
            parts.append(jnp.where(kept, update[site] / (1 - rate)[:, None, None].astype(update[site].dtype), 0))
        merged[site] = sum(w[:, None, None].astype(p.dtype) * p for w, p in zip(weights, parts, strict=True))
    return merged


def _shares(scores: dict[str, jax.Array]) -> dict[str, jax.Array]:
    positive = {site: jnp.maximum(score, 0.0) for site, score in scores.items()}
    total = sum(score.sum() for score in positive.values())
    return {site: score / jnp.where(total > 0, total, 1) for site, score in positive.items()}
