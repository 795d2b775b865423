"""Adapters in PEFT's folder format, out: LoRA, rsLoRA and DoRA, and a head trained beside them.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. For the module M of a Hugging Face model
the latter has `base_model.model.M.lora_A.weight` `[r, in]` and `...lora_B.weight` `[out, r]`, the transposes
of ours, and with DoRA `...lora_magnitude_vector` `[out]`; PEFT adds `lora_alpha / r * B A x` (`/ sqrt(r)` with
`use_rslora`). Gates have no place in it: they are folded into B. Nor have masks: a masked layer has no tensors, a
masked rank no row; `rank_pattern` and `alpha_pattern` say what differs between modules. A head is stored whole, under
its own names, and listed in `modules_to_save`. Sites whose linears are one module there (GPT-2's q, k and v) are one
adapter: their As side by side, their Bs in the blocks of the joint output.

Format: https://huggingface.co/docs/peft, read off peft 0.21.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from methods.adapters import peft_folder
from methods.adapters.hook import Params
from methods.adapters.lora import LoRAConfig, PerLayer
from methods.adapters.peft_arguments import check
from methods.adapters.peft_folder import PREFIX, Module

if TYPE_CHECKING:
    from methods.models.loading import HFNames


def save_peft(
    folder: str | os.PathLike[str],
    config: LoRAConfig,
    params: Params,
    names: HFNames,
    *,
    gate: PerLayer | None = None,
    mask: PerLayer | None = None,
    head: Mapping[str, Any] | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> Path:
    """Write the adapter `config.bind(params, gate, mask)` as a folder that PEFT loads.

    Layers and ranks that are masked, or (but for DoRA, which sets lengths also then) whose gate is exactly 0, are
    absent from it; the function is the same. The folder appears complete or not at all; an adapter that is already
    there is replaced.

    Args:
      folder: to write.
      config: of the adapter; a chosen subset of layers becomes `layers_to_transform`.
      params: as from `config.init`.
      names: what the base model's modules are called, `Pretrained.hf_names`.
      gate: as for `config.bind`.
      mask: as for `config.bind`.
      head: parameters of the model's `Classifier`, trained with the adapter.
      task_type: PEFT's name of the kind of model; "SEQ_CLS" with a head for labels, None with one for choices (and
        `names.multiple_choice()`).

    Returns:
      The folder's path.

    Raises:
      TypeError: for an argument that is something else; names it.
      ValueError: if nothing is left to write, the head is not of this model, or as `config.bind`.
      FileExistsError: if the folder holds something else than an adapter.
    """
    check("save_peft", folder=folder, config=config, params=params, names=names, head=head)
    modules = _modules(config, params, gate, mask)
    if not modules:
        raise ValueError("There is no adapter to export: every layer is masked or has a gate of exactly 0.")
    layers = next(iter(params.values()))["a"].shape[0]
    named = _joined(modules, names, config.rslora)
    tensors: dict[str, np.ndarray] = {}
    for name, module in named.items():
        stem = f"{PREFIX}{name}.lora_"
        tensors |= {f"{stem}A.weight": module.a.T, f"{stem}B.weight": module.b.T}
        if module.m is not None:
            tensors[f"{stem}magnitude_vector"] = module.m
    saved = _head_tensors(head, names)
    tensors |= {PREFIX + name: tensor for name, tensor in saved.items()}
    settings = _settings(config, modules, named, names, layers) | {"task_type": task_type}
    settings["modules_to_save"] = sorted({_saved_module(name, names) for name in saved}) or None
    peft_folder.write(Path(folder), settings, tensors)
    return Path(folder)


def peft_settings(
    config: LoRAConfig,
    shapes: Mapping[str, tuple[int, int]],
    names: HFNames,
    num_layers: int,
    mask: PerLayer | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> tuple[dict[str, Any], list[str]]:
    """What `adapter_config.json` says of an adapter that is yet to be trained, and the full names of its modules.

    Args:
      config: of the adapter.
      shapes: `{site: (in, out)}` of the model's linears.
      names: what the base model's modules are called, `Pretrained.hf_names`.
      num_layers: L.
      mask: where the adapter is, as for `config.bind`.
      task_type: PEFT's name of the kind of model; None where it has none.

    Raises:
      ValueError: if the adapter is nowhere.
    """
    fresh = jax.eval_shape(lambda: config.init(jax.random.key(0), shapes, num_layers))
    modules = _modules(config, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), fresh), None, mask)
    if not modules:
        raise ValueError("There is no adapter to describe: every layer is masked.")
    named = _joined(modules, names, config.rslora)
    settings = _settings(config, modules, named, names, num_layers)
    return settings | {"task_type": task_type, "inference_mode": False}, list(named)


def _modules(
    config: LoRAConfig, params: Params, gate: PerLayer | None, mask: PerLayer | None
) -> dict[tuple[str, int], Module]:
    """The module at each (site, layer) that does something, gates folded in, without masked ranks."""
    bare = {site: {"kernel": jnp.zeros(())} for site in params} if config.dora else None  # bind asks for some
    hook, found = config.bind(params, gate, mask, bare), {}
    for site, leaves in params.items():
        a, b = np.asarray(leaves["a"]), np.asarray(leaves["b"])
        layers, _, width = a.shape
        wide = {}
        for name, table in (("gate", hook.gates), ("mask", hook.masks)):
            value = np.asarray(table[site]).astype(b.dtype) if site in table else np.ones(layers, b.dtype)
            wide[name] = np.broadcast_to(value if value.ndim == 2 else value[:, None], (layers, width))
        for layer in range(layers):
            there, factor = wide["mask"][layer] != 0, wide["gate"][layer]
            keep = there & (factor != 0)
            if config.dora and there.any() and not keep.any():
                keep = there & (np.arange(width) == np.argmax(there))  # the lengths need a module to belong to
            if keep.any():
                (rank, alpha), r = config.module(site, layer), int(keep.sum())
                root = math.sqrt if config.rslora else float
                alpha = alpha if r == rank else config.module_scale(site, layer) * root(r)
                m = np.asarray(leaves["m"][layer]) if config.dora else None
                found[site, layer] = Module(a[layer][:, keep], (b[layer] * factor[:, None])[keep], m, alpha)
    return found


def _joined(modules: Mapping[tuple[str, int], Module], names: HFNames, rslora: bool) -> dict[str, Module]:
    """By Hugging Face's name, sites that are one module there put into one."""
    named = {}
    for site, layer in modules:
        name = names.module(site, layer)
        sites = [s for s, module in names.modules.items() if module == names.modules[site]]
        if len(sites) == 1:
            named[name] = modules[site, layer]
        elif name not in named:
            named[name] = _join([modules.get((s, layer)) for s in sites], name, rslora)
    return named


def _join(parts: Sequence[Module | None], name: str, rslora: bool) -> Module:
    there = {i: part for i, part in enumerate(parts) if part is not None}
    if any(part.m is not None for part in there.values()) and len(there) < len(parts):
        raise ValueError(f"DoRA at a part of {name} has no place in PEFT's format: adapt all parts, or use LoRA there.")
    root = math.sqrt if rslora else float
    scales = {i: part.alpha / root(part.a.shape[1]) for i, part in there.items()}
    first = next(iter(there))
    out, rank = there[first].b.shape[1], sum(part.a.shape[1] for part in there.values())
    b, at = np.zeros((rank, out * len(parts)), there[first].b.dtype), 0
    for i, part in there.items():
        r = part.a.shape[1]
        # One scale for all of them, that of the first, so the share of each goes into its B.
        b[at : at + r, i * out : (i + 1) * out] = part.b * np.asarray(scales[i] / scales[first], part.b.dtype)
        at += r
    ms = [part.m for part in there.values() if part.m is not None]
    a = np.concatenate([part.a for part in there.values()], axis=1)
    return Module(a, b, np.concatenate(ms) if ms else None, scales[first] * root(rank))


def _head_tensors(head: Mapping[str, Any] | None, names: HFNames) -> dict[str, np.ndarray]:
    """Hugging Face's tensors of a `Classifier`'s parameters; kernels are stored transposed."""
    tensors = {}
    for module, leaves in (head or {}).items():
        for leaf, value in leaves.items():
            if (module, leaf) not in names.head:
                known = ", ".join("/".join(path) for path in names.head) or "none"
                raise ValueError(f"The head has a parameter {module}/{leaf}, unlike this model's, which has {known}.")
            value = np.asarray(value)
            tensors[names.head[module, leaf]] = value.T if value.ndim == 2 else value
    return tensors


def _saved_module(tensor: str, names: HFNames) -> str:
    """The module that PEFT is to save whole: a head's first component, or a linear that sits in the base model."""
    top = tensor.partition(".")[0]
    inside = any(module.startswith(f"{top}.") for module in names.modules.values())
    return tensor.rpartition(".")[0] if inside else top


def _settings(
    config: LoRAConfig,
    modules: Mapping[tuple[str, int], Module],
    named: Mapping[str, Module],
    names: HFNames,
    num_layers: int,
) -> dict[str, Any]:
    rank = Counter(module.a.shape[1] for module in named.values()).most_common(1)[0][0]
    alpha = Counter(module.alpha for module in named.values() if module.a.shape[1] == rank).most_common(1)[0][0]
    layers = sorted({layer for _, layer in modules})
    sites = {site for site, _ in modules}
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": peft_folder.base_model(names.base_model),
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {re.escape(name): m.a.shape[1] for name, m in named.items() if m.a.shape[1] != rank},
        "alpha_pattern": {re.escape(name): _number(m.alpha) for name, m in named.items() if m.alpha != alpha},
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": names.conv1d,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": list(named),
    }
    endings = _endings(sites, names)
    whole = len(modules) == len(sites) * len(layers)  # the same layers at every site
    if endings and whole:
        settings["target_modules"] = endings
        if len(layers) < num_layers:
            # Written as the path's component in front of the index, the only one PEFT is to count in.
            pattern = names.modules[next(iter(modules))[0]].partition(".{layer}")[0].rpartition(".")[2]
            settings |= {"layers_to_transform": layers, "layers_pattern": pattern}
    return settings


def _endings(sites: set[str], names: HFNames) -> list[str]:
    """The last components of the sites' module names; none if another linear of a block ends alike."""
    last = {module: module.rpartition(".")[2] for module in names.modules.values()}
    count = Counter(last.values())
    found = {last[names.modules[site]] for site in sites}
    return [] if any(count[ending] > 1 for ending in found) else sorted(found)


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
