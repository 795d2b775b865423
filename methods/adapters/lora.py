"""What is fixed about a low-rank adapter, and the hook it makes of parameters (the formulas: `methods.adapters.hook`).

Parameters are stacked over layers and are all that is trained: `{site: {"a": [L, in, r], "b": [L, r, out]}}`, with
`"m": [L, out]` for DoRA. What is frozen is `LoRAConfig`; its `bind` joins them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from methods.adapters.hook import LoRA, Params, deltas, lengths
from methods.adapters.patterns import compiled, ending, shortened

PerLayer = Any  # gate or mask: an array [L] or [L, r] for every site, or {site: such an array}
Linears = Mapping[str, Mapping[str, jax.Array]]  # {site: {"kernel": [L, in, out], "bias": [L, out]}}, frozen


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    r"""What is fixed about an adapter.

    A module is a site of a layer, called `3.q_proj`. A pattern is a regular expression for the end of that name, as in
    PEFT: `q_proj` means every layer's, `3.q_proj` one, `[0-3]\..*` all of four layers; the first that matches
    counts.

    Args:
      rank: r, at least 1; of all modules that no pattern names.
      alpha: numerator of the scale; any positive number.
      targets: the adapted sites: a list of names, or one regular expression that a whole name must match.
      layers: indices of the adapted layers; None means all. The others are an exact no-op without gradient.
      rslora: s = alpha / sqrt(r) instead of alpha / r.
      dora: DoRA.
      rank_pattern: `{pattern: r}`. Arrays have the largest rank there is; what a module has less is masked.
      alpha_pattern: `{pattern: alpha}`.
      dropout: share of what the adapter reads that is dropped in training, where `bind` is given a key.

    Raises:
      ValueError: for a rank below 1, a dropout outside [0, 1), an alpha that is not positive, a pattern that is no
        regular expression or cannot be matched in bounded time (look-around), no target, or no layer or a negative one.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | Sequence[str] = ("q_proj", "v_proj")
    layers: Sequence[int] | None = None
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] | Sequence[tuple[str, int]] = ()
    alpha_pattern: Mapping[str, float] | Sequence[tuple[str, float]] = ()
    dropout: float = 0.0

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout {self.dropout!r} must be at least 0 and below 1.")
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            pairs = tuple(value.items() if isinstance(value, Mapping) else value)
            object.__setattr__(self, name, pairs)  # hashable
            for pattern, _ in pairs:
                _check(name, pattern, ending(pattern) if isinstance(pattern, str) else pattern)
        for rank in (self.rank, *dict(self.rank_pattern).values()):
            if not isinstance(rank, (int, np.integer)) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"LoRA rank {rank!r} is not a positive integer.")
        object.__setattr__(self, "rank", int(self.rank))
        for alpha in (self.alpha, *dict(self.alpha_pattern).values()):
            if not (isinstance(alpha, (int, float, np.number)) and alpha > 0 and math.isfinite(alpha)):
                raise ValueError(f"LoRA alpha {alpha!r} is not a positive number: it scales the update.")
        if not self.targets:
            raise ValueError("LoRA targets is empty: name the sites to adapt, such as ('q_proj', 'v_proj').")
        if isinstance(self.targets, str):
            _check("targets", self.targets, self.targets)
        else:
            object.__setattr__(self, "targets", tuple(self.targets))
        if self.layers is not None:
            layers = tuple(sorted({int(layer) for layer in self.layers}))
            if not layers or layers[0] < 0:
                raise ValueError(f"LoRA layers {layers} must be one or more indices from 0 up (None: all).")
            object.__setattr__(self, "layers", layers)

    @property
    def width(self) -> int:
        """The r of the arrays: the largest rank."""
        return max(self.rank, *dict(self.rank_pattern).values()) if self.rank_pattern else self.rank

    @property
    def scale(self) -> float:
        """s, the factor of `x A B`, of a module that no pattern names."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def module(self, site: str, layer: int) -> tuple[int, float]:
        """r and alpha of a module."""
        name = f"{layer}.{site}"
        return _first(self.rank_pattern, name, self.rank), _first(self.alpha_pattern, name, self.alpha)

    def module_scale(self, site: str, layer: int) -> float:
        """s of a module."""
        rank, alpha = self.module(site, layer)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def sites(self, known: Sequence[str] | Mapping[str, Any]) -> tuple[str, ...]:
        """The adapted ones of the `known` sites, in their order.

        Raises:
          ValueError: if the pattern matches none of them, or a listed name is not among them.
        """
        if isinstance(self.targets, str):
            found = tuple(site for site in known if compiled(self.targets).fullmatch(site))
            unknown = [] if found else [self.targets]
        else:
            found = tuple(site for site in known if site in self.targets)
            unknown = [target for target in self.targets if target not in known]
        if unknown:
            sites = ", ".join(known)
            raise ValueError(f"LoRA target {unknown[0]!r} matches no site of this model, which has {sites}.")
        return found

    def init(
        self,
        key: jax.Array,
        shapes: Mapping[str, tuple[int, int]],
        num_layers: int,
        dtype: Any = jnp.float32,
        base: Linears | None = None,
    ) -> Params:
        """Fresh parameters: A Kaiming-uniform with a = sqrt(5), i.e. uniform in +-1/sqrt(in), B = 0, m = |W|.

        Args:
          key: PRNG key. What a site draws depends on its place in `shapes`, not on which others are adapted.
          shapes: `{site: (in, out)}` of every site of the model.
          num_layers: L.
          dtype: of all parameters.
          base: the model's linears, `weights["blocks"]`; only DoRA needs them.

        Returns:
          `{site: {"a": [L, in, r], "b": [L, r, out]}}`, and `"m": [L, out]` for DoRA.

        Raises:
          ValueError: if a target matches no site, a pattern no module, a layer index is not below `num_layers`, or
            DoRA is not given `base`.
        """
        self._layer_mask(num_layers)
        adapted, params = self.sites(shapes), {}
        self._check_patterns(adapted, num_layers)
        for index, (site, (fan_in, fan_out)) in enumerate(shapes.items()):
            if site in adapted:
                bound = 1.0 / math.sqrt(fan_in)
                shape = (num_layers, fan_in, self.width)
                a = jax.random.uniform(jax.random.fold_in(key, index), shape, dtype, -bound, bound)
                params[site] = {"a": a, "b": jnp.zeros((num_layers, self.width, fan_out), dtype)}
                if self.dora:
                    params[site]["m"] = lengths(_linear(base, site)["kernel"].astype(dtype))
        return params

    def bind(
        self, params: Params, gate: PerLayer | None = None, mask: PerLayer | None = None, base: Linears | None = None
    ) -> LoRA:
        """The hook `adapt(site, x, y)` for these parameters.

        Args:
          params: as from `init`.
          gate: factors of the update, `[L]` (one a layer) or `[L, r]` (one a rank), for all sites alike or as
            `{site: ...}` (a site left out has none). Exactly 1 is plain LoRA, bit for bit. (At 0 DoRA still sets the
            lengths of the columns; a mask takes the whole module away.)
          mask: in the same forms, False where a layer or a rank is to be absent; joined with `layers` and the ranks.
          base: the model's linears, `weights["blocks"]`; only DoRA needs them.

        Raises:
          ValueError: if the parameters are of other sites or another rank than the config's, a layer is out of
            range, a gate or mask has another shape or an unknown site, or DoRA is not given `base`.
        """
        layers, width = _dimensions(params)
        if (sites := self.sites(params)) != tuple(params):
            raise ValueError(
                f"These LoRA parameters adapt {', '.join(params)}, but the config's targets {self.targets!r} only "
                f"{', '.join(sites)}."
            )
        if width != self.width:
            raise ValueError(f"These LoRA parameters have rank {width}, but the config says {self.width}.")
        if any(("m" in leaves) != self.dora for leaves in params.values()):
            kinds = ("LoRA", "DoRA") if self.dora else ("DoRA", "LoRA")
            raise ValueError(f"These are parameters of {kinds[0]}, but the config is one of {kinds[1]}.")
        self._check_patterns(sites, layers)
        masks = {site: m.astype(bool) for site, m in _per_site("mask", mask, params, layers, width).items()}
        chosen, ranks = self._layer_mask(layers), self._rank_masks(sites, layers)
        for site in params:
            for own in (chosen, ranks.get(site)):
                if own is not None:
                    masks[site] = _join(jnp.asarray(own), masks.get(site))
        linears = {site: dict(_linear(base, site)) for site in params} if self.dora else {}
        return LoRA(
            params,
            _per_site("gate", gate, params, layers, width),
            masks,
            self._scales(sites, layers),
            {site: {k: v for k, v in linear.items() if k in ("kernel", "bias")} for site, linear in linears.items()},
            self.scale,
        )

    def delta(
        self,
        params: Params,
        gate: PerLayer | None = None,
        mask: PerLayer | None = None,
        base: Linears | None = None,
    ) -> dict[str, jax.Array]:
        """`{site: [L, in, out]}`, what the hook adds to the kernels: `g * s * A B`, or with DoRA `V m / |V| - W`."""
        bare = {site: {"kernel": _linear(base, site)["kernel"]} for site in params} if self.dora else None
        return jax.vmap(deltas)(self.bind(params, gate, mask, bare))

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
        return self._shifted(kernels, params, gate, mask, kernels, 1)

    def unmerge(
        self,
        kernels: Mapping[str, jax.Array],
        params: Params,
        gate: PerLayer | None = None,
        mask: PerLayer | None = None,
        base: Mapping[str, jax.Array] | None = None,
    ) -> dict[str, jax.Array]:
        """What `merge` with the same arguments was given, up to the rounding of `kernels`.

        Args:
          kernels: merged ones.
          params, gate, mask: as for `merge`.
          base: the kernels before the merge, for DoRA alone: the lengths of V cannot be told from what was merged.

        Raises:
          ValueError: as `merge`, and for DoRA without `base`.
        """
        return self._shifted(kernels, params, gate, mask, base, -1)

    def size(self, shapes: Mapping[str, tuple[int, int]], num_layers: int) -> int:
        """Trainable parameters: the sum of r (in + out), and out more with DoRA, over the adapted modules."""
        layers = range(num_layers) if self.layers is None else self.layers
        return sum(
            self.module(site, layer)[0] * sum(shapes[site]) + self.dora * shapes[site][1]
            for site in self.sites(shapes)
            for layer in layers
        )

    def _shifted(self, kernels, params, gate, mask, base, sign):
        shifted = dict(kernels)
        for site, leaves in params.items():
            shape = (leaves["a"].shape[0], leaves["a"].shape[1], leaves["b"].shape[2])
            if site not in kernels or kernels[site].shape != shape:
                found = kernels[site].shape if site in kernels else "no kernel"
                raise ValueError(f"LoRA site {site!r} has shape {shape} where the model has {found}.")
        linears = {site: {"kernel": kernel} for site, kernel in base.items()} if base else None
        for site, delta in self.delta(params, gate, mask, linears).items():
            shifted[site] = (kernels[site].astype(delta.dtype) + sign * delta).astype(kernels[site].dtype)
        return shifted

    def _layer_mask(self, num_layers: int) -> np.ndarray | None:
        if self.layers is None:
            return None
        if max(self.layers) >= num_layers:
            last, worst = num_layers - 1, max(self.layers)
            raise ValueError(f"LoRA layer {worst} is out of range: the model has layers 0 to {last}.")
        return np.isin(np.arange(num_layers), self.layers)

    def _rank_masks(self, sites: Sequence[str], num_layers: int) -> dict[str, np.ndarray]:
        """bool `[L, r]` of the sites where some layer has less than the largest rank."""
        ranks = {site: np.array([self.module(site, i)[0] for i in range(num_layers)]) for site in sites}
        return {site: np.arange(self.width)[None] < r[:, None] for site, r in ranks.items() if (r < self.width).any()}

    def _scales(self, sites: Sequence[str], num_layers: int) -> dict[str, jax.Array]:
        """s `[L]` of the sites where it is not the same as everywhere."""
        scales = {site: np.array([self.module_scale(site, i) for i in range(num_layers)]) for site in sites}
        return {site: jnp.asarray(s) for site, s in scales.items() if (s != self.scale).any()}

    def _check_patterns(self, sites: Sequence[str], num_layers: int) -> None:
        names = [f"{layer}.{site}" for site in sites for layer in range(num_layers)]
        for kind in ("rank_pattern", "alpha_pattern"):
            for pattern, _ in getattr(self, kind):
                if not any(_matches(pattern, name) for name in names):
                    raise ValueError(
                        f"LoRA {kind} {pattern!r} matches no adapted module: they are called {names[0]} to "
                        f"{names[-1]}, with the sites {', '.join(sites)}."
                    )


def _linear(base: Linears | None, site: str) -> Mapping[str, jax.Array]:
    if base is None or site not in base:
        raise ValueError(f"DoRA needs the frozen matrix at {site!r}: give base=weights['blocks'] of the model.")
    return base[site]


def _check(name: str, pattern: str, expression: str) -> None:
    try:
        compiled(expression)
    except ValueError as error:
        raise ValueError(f"LoRA {name} {shortened(pattern)} {error}.") from None


def _matches(pattern: str, name: str) -> bool:
    return compiled(ending(pattern)).match(name) is not None


def _first(patterns: Any, name: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if _matches(pattern, name)), default)


def _join(chosen: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return chosen
    wide = lambda m, other: m[:, None] if m.ndim < other.ndim else m  # noqa: E731
    return wide(mask, chosen) & wide(chosen, mask)


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
