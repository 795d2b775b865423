"""Low-rank adapters as a pytree that a model calls after each linear.

At a site of layer i the model has `y = x W + b` and calls `adapt(site, x, y)`, which returns

    y + g_i * s * (x A_i) B_i,        s = alpha / r   (alpha / sqrt(r) with rslora)

with A_i `[in, r]`, B_i `[r, out]` and a gate g_i. Parameters are stacked over layers and are all that is
trained: `{site: {"a": [L, in, r], "b": [L, r, out]}}`. What is frozen is `LoRAConfig`; its `bind` joins them.

Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. arXiv:2106.09685.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, dict[str, jax.Array]]
PerLayer = Any  # gate or mask: an array [L] or [L, r] for every site, or {site: such an array}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA:
    """The hook that a model calls; made by `LoRAConfig.bind`. Every leaf leads with the layer axis.

    Attributes:
      params: `{site: {"a": [L, in, r], "b": [L, r, out]}}`.
      gates: `{site: [L] or [L, r]}`, factors of the update; a site that is not in it has no gate.
      masks: `{site: bool [L] or [L, r]}`, False where a layer, or a rank of it, is not there at all.
      scale: s.
    """

    params: Params
    gates: dict[str, jax.Array]
    masks: dict[str, jax.Array]
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
            a = jnp.where(_columns(mask, 2), a, jnp.zeros_like(a))
            b = jnp.where(mask if mask.ndim == 0 else mask[:, None], b, jnp.zeros_like(b))
        hidden = x.astype(a.dtype) @ a
        # The factor meets the r columns of x A, fewer than the outputs; 1 * s is s, so a gate of 1 is exact.
        factor = self.scale if gate is None else _columns(gate.astype(a.dtype) * self.scale, hidden.ndim)
        adapted = y + ((hidden * factor) @ b).astype(y.dtype)
        # y + 0 is not y for y = -0.0, nor where x A overflows.
        return adapted if mask is None else jnp.where(mask.any(), adapted, y)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """What is fixed about an adapter.

    Args:
      rank: r, at least 1; the same at every site (a smaller rank is a mask).
      alpha: numerator of the scale; any positive number.
      targets: the adapted sites: a list of names, or one regular expression that a whole name must match.
      layers: indices of the adapted layers; None means all. The others are an exact no-op without gradient.
      rslora: s = alpha / sqrt(r) instead of alpha / r (Kalajdzievski, 2023, arXiv:2312.03732).

    Raises:
      ValueError: for a rank below 1, an alpha that is not positive, no target, or no layer or a negative one.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | Sequence[str] = ("q_proj", "v_proj")
    layers: Sequence[int] | None = None
    rslora: bool = False

    def __post_init__(self):
        if not isinstance(self.rank, (int, np.integer)) or self.rank < 1:
            raise ValueError(f"LoRA rank {self.rank!r} is not a positive integer.")
        object.__setattr__(self, "rank", int(self.rank))
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"LoRA alpha {self.alpha!r} is not a positive number: it scales the update.")
        if not self.targets:
            raise ValueError("LoRA targets is empty: name the sites to adapt, such as ('q_proj', 'v_proj').")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        if self.layers is not None:
            layers = tuple(sorted({int(layer) for layer in self.layers}))
            if not layers or layers[0] < 0:
                raise ValueError(f"LoRA layers {layers} must be one or more indices from 0 up (None: all).")
            object.__setattr__(self, "layers", layers)

    @property
    def scale(self) -> float:
        """s, the factor of `x A B`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def sites(self, known: Sequence[str] | Mapping[str, Any]) -> tuple[str, ...]:
        """The adapted ones of the `known` sites, in their order.

        Raises:
          ValueError: if the pattern matches none of them, or a listed name is not among them.
        """
        if isinstance(self.targets, str):
            found = tuple(site for site in known if re.fullmatch(self.targets, site))
            unknown = [] if found else [self.targets]
        else:
            found = tuple(site for site in known if site in self.targets)
            unknown = [target for target in self.targets if target not in known]
        if unknown:
            sites = ", ".join(known)
            raise ValueError(f"LoRA target {unknown[0]!r} matches no site of this model, which has {sites}.")
        return found

    def init(
        self, key: jax.Array, shapes: Mapping[str, tuple[int, int]], num_layers: int, dtype: Any = jnp.float32
    ) -> Params:
        """Fresh parameters: A Kaiming-uniform with a = sqrt(5), i.e. uniform in +-1/sqrt(in), and B = 0.

        Args:
          key: PRNG key. What a site draws depends on its place in `shapes`, not on which others are adapted.
          shapes: `{site: (in, out)}` of every site of the model.
          num_layers: L.
          dtype: of both matrices.

        Returns:
          `{site: {"a": [L, in, r], "b": [L, r, out]}}`.

        Raises:
          ValueError: if a target matches no site or a layer index is not below `num_layers`.
        """
        self._layer_mask(num_layers)
        adapted, params = self.sites(shapes), {}
        for index, (site, (fan_in, fan_out)) in enumerate(shapes.items()):
            if site in adapted:
                bound = 1.0 / math.sqrt(fan_in)
                shape = (num_layers, fan_in, self.rank)
                a = jax.random.uniform(jax.random.fold_in(key, index), shape, dtype, -bound, bound)
                params[site] = {"a": a, "b": jnp.zeros((num_layers, self.rank, fan_out), dtype)}
        return params

    def bind(self, params: Params, gate: PerLayer | None = None, mask: PerLayer | None = None) -> LoRA:
        """The hook `adapt(site, x, y)` for these parameters.

        Args:
          params: as from `init`.
          gate: factors of the update, `[L]` (one a layer) or `[L, r]` (one a rank), for all sites alike or as
            `{site: ...}` (a site left out has none). Exactly 1 is plain LoRA, bit for bit.
          mask: in the same forms, False where a layer or a rank is to be absent; joined with `layers`.

        Raises:
          ValueError: if the parameters are of other sites or another rank than the config's, a layer is out of
            range, or a gate or mask has another shape or an unknown site.
        """
        layers, rank = _dimensions(params)
        if (sites := self.sites(params)) != tuple(params):
            raise ValueError(
                f"These LoRA parameters adapt {', '.join(params)}, but the config's targets {self.targets!r} only "
                f"{', '.join(sites)}."
            )
        if rank != self.rank:
            raise ValueError(f"These LoRA parameters have rank {rank}, but the config says {self.rank}.")
        masks = {site: m.astype(bool) for site, m in _per_site("mask", mask, params, layers, rank).items()}
        chosen = self._layer_mask(layers)
        if chosen is not None:
            masks = {site: _join(jnp.asarray(chosen), masks.get(site)) for site in params}
        return LoRA(params, _per_site("gate", gate, params, layers, rank), masks, self.scale)

    def delta(self, params: Params, gate: PerLayer | None = None, mask: PerLayer | None = None) -> dict[str, jax.Array]:
        """`{site: [L, in, out]}`, the matrices `g * s * A B` that the hook adds to the kernels."""
        return jax.vmap(_deltas)(self.bind(params, gate, mask))

    def merge(
        self,
        kernels: Mapping[str, jax.Array],
        params: Params,
        gate: PerLayer | None = None,
        mask: PerLayer | None = None,
    ) -> dict[str, jax.Array]:
        """`kernels` `{site: [L, in, out]}` plus `delta`, in their own dtypes: the same model without a hook.

        Raises:
          ValueError: if the adapter has a site that is not among the kernels, or of another shape.
        """
        merged = dict(kernels)
        for site, delta in self.delta(params, gate, mask).items():
            if site not in merged or merged[site].shape != delta.shape:
                found = merged[site].shape if site in merged else "no kernel"
                raise ValueError(f"LoRA site {site!r} has shape {delta.shape} where the model has {found}.")
            merged[site] = (merged[site].astype(delta.dtype) + delta).astype(merged[site].dtype)
        return merged

    def _layer_mask(self, num_layers: int) -> np.ndarray | None:
        if self.layers is None:
            return None
        if max(self.layers) >= num_layers:
            last, worst = num_layers - 1, max(self.layers)
            raise ValueError(f"LoRA layer {worst} is out of range: the model has layers 0 to {last}.")
        return np.isin(np.arange(num_layers), self.layers)


def _columns(value: jax.Array, ndim: int) -> jax.Array:
    """A scalar as it is; a vector `[r]` as `[1, ..., r]`, since implicit rank promotion may be forbidden."""
    return value if value.ndim == 0 else value.reshape((1,) * (ndim - 1) + value.shape)


def _join(chosen: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return chosen
    return mask & (chosen if mask.ndim == 1 else chosen[:, None])


def _dimensions(params: Params) -> tuple[int, int]:
    """L and r."""
    for leaves in params.values():
        layers, _, rank = leaves["a"].shape
        return layers, rank
    raise ValueError("These LoRA parameters are empty: they adapt no site.")


def _per_site(kind: str, value: PerLayer | None, params: Params, layers: int, rank: int) -> dict[str, jax.Array]:
    if value is None:
        return {}
    table: Mapping[str, Any] = value if isinstance(value, Mapping) else {site: value for site in params}
    for site, entry in table.items():
        if site not in params:
            adapted = ", ".join(params)
            raise ValueError(f"LoRA {kind} names site {site!r}, which is not adapted; adapted are {adapted}.")
        if jnp.shape(entry) not in ((layers,), (layers, rank)):
            raise ValueError(
                f"LoRA {kind} of site {site!r} has shape {jnp.shape(entry)}: it must be ({layers},), one a "
                f"layer, or ({layers}, {rank}), one a rank."
            )
    return {site: jnp.asarray(entry) for site, entry in table.items()}


def _deltas(layer: LoRA) -> dict[str, jax.Array]:
    """What the hook of one layer answers to x = I and y = 0: merged and unmerged cannot differ in meaning."""

    def delta(site: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return layer(site, jnp.eye(a.shape[0], dtype=a.dtype), jnp.zeros((a.shape[0], b.shape[1]), a.dtype))

    return {site: delta(site, **leaves) for site, leaves in layer.params.items()}
