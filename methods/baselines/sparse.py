r"""SAM, second-order approximation: train the single entries of the weights whose gradient is largest.

Published (Fu et al. 2023, arXiv 2211.15583): parameter-efficient tuning as a sparse mask on the weights. With the loss
expanded to second order and its Hessian taken diagonal and the same everywhere, changing entry i is worth

$$ \max_{\delta} -g_i \delta - \tfrac{h}{2} \delta^2 = g_i^2 / 2h, $$

so the mask is the entries of largest $g_i^2$; it is chosen once, before training.

Our choice: the entries compete within the linears that LoRA would adapt; there are as many as LoRA's budget has
parameters; g is the gradient of one batch of at most 256 training rows. The update is a masked matrix, not a product:
it can be merged into the kernels, but is no PEFT adapter.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.extend import PyTree
from methods.baselines.base import Found, PerSite, Setting, fit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse:
    """y + x D at the sites of `deltas`, `{site: [L, in, out]}`."""

    deltas: dict[str, jax.Array]

    def __call__(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        if site not in self.deltas:
            return y
        delta = self.deltas[site]
        return y + (x.astype(delta.dtype) @ delta).astype(y.dtype)


def zeros(setting: Setting) -> PerSite:
    return {site: jnp.zeros((setting.num_layers, *setting.shapes[site]), setting.dtype) for site in setting.sites}


def mask(setting: Setting, head: PyTree) -> PerSite:
    """With this head, the entries of largest squared gradient, as many as the budget: bool `{site: [L, in, out]}`."""
    sample = jax.tree.map(lambda rows: rows[:256], setting.train)

    @jax.jit
    def gradients(weights, head, sample):
        return jax.grad(lambda deltas: setting.loss(weights, Sparse(deltas), head, sample))(zeros(setting))

    gradient = gradients(setting.weights, head, sample)
    squares = {site: np.asarray(g, np.float64) ** 2 for site, g in gradient.items()}
    flat = np.concatenate([s.ravel() for s in squares.values()])
    on = np.zeros(len(flat), bool)
    on[np.argsort(-flat, kind="stable")[: setting.budget()]] = True
    parts = np.split(on, np.cumsum([s.size for s in squares.values()])[:-1])
    return {site: jnp.asarray(p.reshape(s.shape)) for p, (site, s) in zip(parts, squares.items(), strict=True)}


def find(setting: Setting, key: jax.Array) -> Found:
    """A mask, and the training of its entries from 0."""
    on = mask(setting, setting.with_head(key, {})["head"])

    def masked(deltas: PerSite) -> Sparse:
        return Sparse({site: jnp.where(on[site], delta, jnp.zeros_like(delta)) for site, delta in deltas.items()})

    trained = fit(setting, key, lambda key: zeros(setting), masked).params
    used = {site: np.asarray(m, np.float64).mean((1, 2)) for site, m in on.items()}
    return Found(masked(trained["adapter"]), trained["head"], used, setting.budget(), None, used)
