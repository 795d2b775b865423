r"""BiLoRA: singular vectors trained on one part of the data, singular values on the other.

Published (Qiang et al. 2024, arXiv 2403.13037): $\Delta W = P \Lambda Q$; the lower level trains P, Q on one
part with a penalty that keeps them orthogonal, the upper level trains $\Lambda$ on the other part through one
step; nothing is trained again. The point is less overfitting, not a selection: every module stays.

Our choice: $\Lambda$ is real and starts at 1, P as LoRA's A and Q = 0, so that the search starts at the
pretrained model; the penalty, of weight 0.1, is on P alone (a Q that starts at 0 has no directions yet); the upper
gradient is the exact unrolled one of a single Adam step (published: finite differences).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel
from bilevel.extend import PyTree
from methods.baselines.base import Found, PerSite, Setting, found, search


def orthogonality(params: PyTree) -> jax.Array:
    r"""$\|P^\top P - I\|_F^2$, summed over modules, the columns of P brought to length 1."""
    total = jnp.zeros(())
    for leaves in params.values():
        p = leaves["a"] / jnp.linalg.norm(leaves["a"], axis=1, keepdims=True)
        gram = jnp.einsum("lir,lis->lrs", p, p)
        total = total + jnp.sum((gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)[None]) ** 2).astype(total.dtype)
    return total


def find(setting: Setting, key: jax.Array) -> Found:
    """One search, which is the training."""

    def gated(loss: Any, params: PyTree, values: PerSite, training: bool) -> jax.Array:
        value = loss(setting.lora.bind(params, values))
        return value + (0.1 * orthogonality(params)).astype(value.dtype) if training else value

    def start() -> PerSite:
        return {s: jnp.ones((setting.num_layers, setting.lora.rank), setting.dtype) for s in setting.sites}

    estimator = bilevel.Unrolled(optax.adam(setting.learning_rate), 1, checkpoint="step")
    result = search(setting, key, gated, start, estimator)
    everywhere = {site: jnp.ones(setting.num_layers, bool) for site in setting.sites}
    scores = {site: jnp.abs(values).sum(1) for site, values in result.outer.items()}
    return found(setting, result.inner.params, result.outer, everywhere, scores)
