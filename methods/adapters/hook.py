"""Low-rank adapters as a pytree that a model calls after each linear.

At a site of layer i the model has `y = x W + b` and calls `adapt(site, x, y)`, which returns

    y + g_i * s * (x A_i) B_i,        s = alpha / r   (alpha / sqrt(r) with rslora)

with A_i `[in, r]`, B_i `[r, out]` and a gate g_i. With DoRA the columns of the adapted matrix have lengths of their
own, m `[out]`, and LoRA turns them:

    x V (m / |V|) + b,                V = W + g_i * s * A_i B_i,    |V| the lengths of its columns

LoRA: Hu et al., 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski, 2023, arXiv:2312.03732. DoRA: Liu et al., 2024,
arXiv:2402.09353; its authors, and PEFT, train with |V| taken for a constant, which saves memory and leaves out a part
of the gradient. Here the gradient is the whole one.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, dict[str, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA:
    """The hook that a model calls; made by `LoRAConfig.bind`. Every leaf leads with the layer axis.

    Attributes:
      params: `{site: {"a": [L, in, r], "b": [L, r, out]}}`, and `"m": [L, out]` for DoRA.
      gates: `{site: [L] or [L, r]}`, factors of the update; a site that is not in it has no gate.
      masks: `{site: bool [L] or [L, r]}`, False where a layer, or a rank of it, is not there at all.
      scales: `{site: [L]}`, s where it differs between layers; `scale` at all other sites.
      base: the frozen linears, for DoRA.
      scale: s.
    """

    params: Params
    gates: dict[str, jax.Array]
    masks: dict[str, jax.Array]
    scales: dict[str, jax.Array]
    base: dict[str, dict[str, jax.Array]]
    scale: float = dataclasses.field(metadata={"static": True})

    def __call__(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """The adapted output of one layer (the leaves are this layer's, without the layer axis).

        x `[..., in]` is the linear's input, y `[..., out]` its output. The update is computed in the dtype of
        the parameters and added in the dtype of y. A masked layer returns y, bit for bit, without gradient.
        """
        if site not in self.params:
            return y
        a, b = self.params[site]["a"], self.params[site]["b"]
        mask, gate = self.masks.get(site), self.gates.get(site)
        if mask is not None:
            # Both, so that not even a NaN in what is masked gets through, forwards or backwards.
            a = jnp.where(columns(mask, 2), a, jnp.zeros_like(a))
            b = jnp.where(mask if mask.ndim == 0 else mask[:, None], b, jnp.zeros_like(b))
            gate = gate if gate is None else jnp.where(mask, gate, jnp.ones_like(gate))
        hidden = x.astype(a.dtype) @ a
        # The factor meets the r columns of x A, fewer than the outputs; 1 * s is s, so a gate of 1 is exact.
        scale = self.scales[site].astype(a.dtype) if site in self.scales else self.scale
        factor = scale if gate is None else gate.astype(a.dtype) * scale
        update = ((hidden * columns(factor, hidden.ndim)) @ b).astype(y.dtype)
        if "m" in self.params[site]:
            m = self.params[site]["m"]
            m = m if mask is None else jnp.where(mask.any(), m, jnp.ones_like(m))
            adapted = _turned(m, a * columns(factor, 2), b, self.base[site], y, update)
        else:
            adapted = y + update
        # y + 0 is not y for y = -0.0, nor where x A overflows.
        return adapted if mask is None else jnp.where(mask.any(), adapted, y)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputDropout:
    """A LoRA whose update reads its input with some of it set to 0, and the rest divided by what is kept on average.

    The base's own output is not touched (and neither are the columns' lengths of DoRA): with rate p and a mask
    m of independent entries that are 1 with probability 1 - p,

        y + g_i * s * ((m / (1 - p)) * x A_i) B_i

    Srivastava et al., 2014; on LoRA's input as in Hu et al., 2021, arXiv:2106.09685.

    Attributes:
      lora: the adapter.
      keys: a typed random key a layer, `[L]`.
      rate: p, in [0, 1).
    """

    lora: LoRA
    keys: jax.Array
    rate: float = dataclasses.field(metadata={"static": True})

    def __call__(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """As `LoRA`, of one layer. What a site drops depends on its name, not on which others are adapted."""
        if site not in self.lora.params:
            return y
        key = jax.random.fold_in(self.keys, np.uint32(zlib.crc32(site.encode())))
        kept = jax.random.bernoulli(key, 1.0 - self.rate, x.shape)
        return self.lora(site, jnp.where(kept, x / (1.0 - self.rate), jnp.zeros_like(x)), y)


def lengths(kernel: jax.Array) -> jax.Array:
    """|W|, the lengths of the columns of kernels `[..., in, out]`: `[..., out]`."""
    return jnp.sqrt((kernel * kernel).sum(axis=-2))


def deltas(layer: LoRA) -> dict[str, jax.Array]:
    """What the hook of one layer makes of x = I, less y: merged and unmerged cannot differ in meaning."""

    def delta(site: str, a: jax.Array, b: jax.Array) -> jax.Array:
        zero = jnp.zeros((a.shape[0], b.shape[1]), a.dtype)
        y = layer.base[site]["kernel"].astype(a.dtype) if site in layer.base else zero
        return layer(site, jnp.eye(a.shape[0], dtype=a.dtype), y) - y

    return {site: delta(site, leaves["a"], leaves["b"]) for site, leaves in layer.params.items()}


def columns(value: Any, ndim: int) -> Any:
    """A scalar as it is; a vector `[r]` as `[1, ..., r]`, since implicit rank promotion may be forbidden."""
    return value if jnp.ndim(value) == 0 else value.reshape((1,) * (ndim - 1) + value.shape)


def _turned(m, a, b, linear, y, update):
    """`x V m / |V| + b` from y = x W + b and the update x A B, with V = W + A B."""
    ratio = m / lengths(linear["kernel"].astype(a.dtype) + a @ b)
    ratio = columns(ratio.astype(y.dtype), y.ndim)
    plain = y - columns(linear["bias"].astype(y.dtype), y.ndim) if "bias" in linear else y
    return y + (ratio - 1) * plain + ratio * update
