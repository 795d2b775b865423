r"""AutoLoRA: a weight for every rank, learned on held-out rows; ranks above the average stay.

Published (Zhang et al. 2024, arXiv 2403.09113): $\Delta W = \sum_j \mathrm{softmax}(\alpha)_j\, a_j b_j$ with
one $\alpha \in R^r$ a module; A, B are trained on one part of the data and alpha on the other, through one step
of training by DARTS's finite differences; the ranks with weight at least 1 / r are kept, and trained anew with plain
LoRA. Adam at the same learning rate on both levels.

Our choice: the held-out rows are `setting.outer`, the last training sees `setting.train` alone (published: both parts);
the inner step is Adam's (published: Adam too, whose step the finite differences take for SGD's). How many ranks stay is
the method's own doing: `setting.share` does not bind it, and `Found.parameters` says what came of it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel.extend import PyTree
from methods.baselines.base import Found, PerSite, Setting, search, train_lora


def weights(alpha: PerSite) -> PerSite:
    """softmax over the ranks, `{site: [L, r]}`."""
    return jax.tree.map(lambda a: jax.nn.softmax(a, axis=-1), alpha)


def keep(alpha: PerSite) -> PerSite:
    """Ranks whose weight is at least 1 / r, up to rounding; there is always one."""
    return {site: jnp.asarray(np.asarray(w) >= (1 - 1e-6) / w.shape[-1]) for site, w in weights(alpha).items()}


def find(setting: Setting, key: jax.Array) -> Found:
    """A search of `setting.steps` alternating steps, a choice of ranks, a training from scratch."""
    first, second = jax.random.split(key)

    def gated(loss: Any, params: PyTree, alpha: PerSite, training: bool) -> jax.Array:
        return loss(setting.lora.bind(params, weights(alpha)))

    def start() -> PerSite:
        return {s: jnp.zeros((setting.num_layers, setting.lora.rank), setting.dtype) for s in setting.sites}

    estimator = bilevel.FiniteDifference(optax.adam(setting.learning_rate), 1)
    mask = keep(search(setting, first, gated, start, estimator, "choice").outer)
    return train_lora(setting, second, mask, {site: m.sum(1) for site, m in mask.items()})
