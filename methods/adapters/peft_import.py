"""Adapters in PEFT's folder format, in: what `methods.adapters.peft` says of it, read back."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from methods.adapters import peft_folder
from methods.adapters.hook import Params
from methods.adapters.lora import LoRAConfig
from methods.adapters.peft_folder import PREFIX, SETTINGS, WEIGHTS, Module

if TYPE_CHECKING:
    from methods.models.loading import HFNames

_TENSOR = re.compile(r"(.+)\.lora_(?:([AB])\.weight|(m)agnitude_vector)")


class Adapter(NamedTuple):
    """What `load_peft` found.

    Attributes:
      config: fixed part, the rank and alpha of modules that differ in its patterns.
      params: `{site: {"a", "b"}}`, with `"m"` for DoRA, in the dtype they are stored in.
      head: parameters of a `Classifier`; {} if none is stored.
    """

    config: LoRAConfig
    params: Params
    head: dict[str, Any]


def load_peft(
    folder: str | os.PathLike[str], names: HFNames, shapes: Mapping[str, tuple[int, int]], num_layers: int
) -> Adapter:
    """Read a LoRA, rsLoRA or DoRA adapter that PEFT, or `save_peft`, has written.

    Where some sites of a layer have tensors and others none, the latter are all zero and stay so in training, since
    A = 0 and B = 0 have no gradient.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      names: what the base model's modules are called, `Pretrained.hf_names`.
      shapes: `{site: (in, out)}`, `Pretrained.config.site_shapes()`.
      num_layers: L.

    Raises:
      FileNotFoundError: if one of the files is missing.
      ValueError: if one is damaged, if it is of another kind, or if a tensor does not fit this model.
    """
    folder = Path(folder)
    settings, tensors = peft_folder.read_settings(folder / SETTINGS), peft_folder.read_tensors(folder / WEIGHTS)
    head = {path: tensors.pop(name) for path, name in names.head.items() if name in tensors}
    modules = _read_modules(folder / WEIGHTS, settings, tensors, names, shapes, num_layers)
    dora = bool(settings.get("use_dora"))
    sites = [site for site in names.modules if any(site == s for s, _ in modules)]
    present = sorted({layer for _, layer in modules})
    config = LoRAConfig(
        *_most(settings, modules),
        sites,
        None if len(present) == num_layers else present,
        bool(settings.get("use_rslora")),
        dora,
    )
    config = _with_patterns(config, modules, present)
    dtype = next(iter(modules.values())).a.dtype
    params = {}
    for site in sites:
        fan_in, fan_out = shapes[site]
        leaves: dict[str, np.ndarray] = {"a": np.zeros((num_layers, fan_in, config.width), dtype)}
        leaves["b"] = np.zeros((num_layers, config.width, fan_out), dtype)
        if dora:
            leaves["m"] = np.ones((num_layers, fan_out), dtype)
        for layer in present:
            module = modules.get((site, layer))
            if module is None and dora:
                raise ValueError(
                    f"{folder / WEIGHTS} adapts {names.module(site, layer)} not at all, but others of its layer by "
                    "DoRA: our DoRA adapts the same sites in every layer that it adapts."
                )
            if module is not None:
                r = module.a.shape[1]
                leaves["a"][layer, :, :r], leaves["b"][layer, :r] = module.a, module.b
                if module.m is not None:
                    leaves["m"][layer] = module.m
        params[site] = {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
    return Adapter(config, params, _nested(head))


def _read_modules(
    path: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    names: HFNames,
    shapes: Mapping[str, tuple[int, int]],
    num_layers: int,
) -> dict[tuple[str, int], Module]:
    places: dict[str, list[tuple[str, int]]] = {}
    for layer in range(num_layers):
        for site in names.modules:
            places.setdefault(names.module(site, layer), []).append((site, layer))
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or match[1] not in places or tensor.ndim != (2 if match[2] else 1):
            known = ", ".join(dict.fromkeys(names.modules.values()))
            raise ValueError(
                f"{path} has a tensor {PREFIX}{name} {tensor.shape}, which has no place in this model, whose linears "
                f"are {known}: the adapter is of another architecture or kind."
            )
        found.setdefault(match[1], {})[match[2] or match[3]] = tensor.T
    modules = {}
    for name, parts in found.items():
        wanted = {"A", "B", "m"} if settings.get("use_dora") else {"A", "B"}
        if set(parts) != wanted:
            what = "only one of A and B" if "m" not in wanted | set(parts) else f"only {', '.join(sorted(parts))}"
            raise ValueError(f"{path} has {what} for {name}: it is incomplete.")
        a, b, sites = parts["A"], parts["B"], places[name]
        (fan_in, _), fan_out = shapes[sites[0][0]], sum(shapes[site][1] for site, _ in sites)
        r = int(peft_folder.pattern(settings, "rank_pattern", name, settings["r"]))
        if a.shape != (fan_in, r) or b.shape != (r, fan_out) or ("m" in wanted and parts["m"].shape != (fan_out,)):
            raise ValueError(
                f"{path} has A {a.T.shape} and B {b.T.shape} for {name}, which is {fan_in} to {fan_out} in this model "
                f"and of rank {r} in {SETTINGS}."
            )
        alpha = peft_folder.pattern(settings, "alpha_pattern", name, settings["lora_alpha"])
        for place, block in zip(sites, np.split(b, len(sites), axis=1), strict=True):
            modules[place] = Module(a, block, parts.get("m"), alpha)
    if not modules:
        raise ValueError(f"{path} holds no adapter, only a head.")
    return modules


def _most(settings: Mapping[str, Any], modules: Mapping[tuple[str, int], Module]) -> tuple[int, float]:
    """The rank and alpha to be those without a pattern: the file's, unless no module has them."""
    kinds = Counter((module.a.shape[1], module.alpha) for module in modules.values())
    stated = (settings["r"], settings["lora_alpha"])
    return stated if stated in kinds else kinds.most_common(1)[0][0]


def _with_patterns(config: LoRAConfig, modules: Mapping[tuple[str, int], Module], present: list[int]) -> LoRAConfig:
    """`config` with a pattern for each site, or each module, whose rank or alpha is another."""
    ranks = {place: module.a.shape[1] for place, module in modules.items()}
    alphas = {place: module.alpha for place, module in modules.items()}

    def patterns(values: Mapping[tuple[str, int], Any], default: Any) -> tuple[tuple[str, Any], ...]:
        found = {}
        for site in dict.fromkeys(site for site, _ in values):
            own = {layer: values[site, layer] for layer in present if (site, layer) in values}
            if len(own) == len(present) and len(set(own.values())) == 1:
                value = own[present[0]]
                found |= {site: value} if value != default else {}
            else:
                found |= {rf"{layer}\.{site}": value for layer, value in own.items() if value != default}
        return tuple(found.items())

    return dataclasses.replace(
        config, rank_pattern=patterns(ranks, config.rank), alpha_pattern=patterns(alphas, config.alpha)
    )


def _nested(head: Mapping[tuple[str, ...], np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (module, leaf), value in head.items():
        tree.setdefault(module, {})[leaf] = jnp.asarray(value.T if value.ndim == 2 else value)
    return tree
