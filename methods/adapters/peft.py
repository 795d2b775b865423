"""LoRA adapters in PEFT's folder format, out and in.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. For the module M of a Hugging Face model
the latter has `base_model.model.M.lora_A.weight` `[r, in]` and `...lora_B.weight` `[out, r]`, the transposes
of ours; PEFT adds `lora_alpha / r * B A x` (`/ sqrt(r)` with `use_rslora`). Gates have no place in it: they
are folded into B. Nor have masks: a masked layer has no tensors, a masked rank no row, and `alpha_pattern`
keeps the scale.

Format: https://huggingface.co/docs/peft, read off peft 0.21.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from methods.adapters.lora import LoRAConfig, Params, PerLayer

if TYPE_CHECKING:
    from methods.models.loading import HFNames

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight")
_ENTRIES = {SETTINGS, WEIGHTS, "README.md"}  # what a folder may hold and still be replaced
# What PEFT's config may switch on that our hook does not do, and the value that leaves it off.
_UNSUPPORTED = {"use_dora": False, "bias": "none", "modules_to_save": None, "lora_bias": False}

_Modules = dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]  # (site, layer) -> (a [in, r], b [r, out])


def save_peft(
    folder: str | os.PathLike[str],
    config: LoRAConfig,
    params: Params,
    names: HFNames,
    *,
    gate: PerLayer | None = None,
    mask: PerLayer | None = None,
    task_type: str = "CAUSAL_LM",
) -> Path:
    """Write the adapter `config.bind(params, gate, mask)` as a folder that PEFT loads.

    Layers and ranks that are masked, or whose gate is exactly 0, are absent from it; the function is the same.
    The folder appears complete or not at all; an adapter that is already there is replaced.

    Args:
      folder: to write.
      config: of the adapter; a chosen subset of layers becomes `layers_to_transform`.
      params: as from `config.init`.
      names: what the base model's modules are called, `Pretrained.hf_names`.
      gate: as for `config.bind`.
      mask: as for `config.bind`.
      task_type: PEFT's name of the kind of model.

    Returns:
      The folder's path.

    Raises:
      ValueError: if nothing is left to write, or as `config.bind`.
      FileExistsError: if the folder holds something else than an adapter.
    """
    from safetensors.numpy import save_file

    modules = _modules(config, params, gate, mask)
    if not modules:
        raise ValueError("There is no adapter to export: every layer is masked or has a gate of exactly 0.")
    layers = next(iter(params.values()))["a"].shape[0]
    settings = _settings(config, modules, names, layers) | {"task_type": task_type}
    tensors = {}
    for (site, layer), (a, b) in modules.items():
        stem = f"{_PREFIX}{names.module(site, layer)}.lora_"
        # safetensors writes the buffer as it lies in memory.
        tensors |= {f"{stem}A.weight": np.ascontiguousarray(a.T), f"{stem}B.weight": np.ascontiguousarray(b.T)}
    folder = Path(folder)
    _refuse_strangers(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    stale = fresh.with_name(fresh.name + "-old")
    try:
        fresh.mkdir()
        save_file(tensors, fresh / WEIGHTS, {"format": "pt"})
        (fresh / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if folder.exists():  # a folder with files in it cannot be renamed over
            folder.rename(stale)
        fresh.rename(folder)
    except BaseException:
        if stale.exists() and not folder.exists():
            stale.rename(folder)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)
    return folder


def load_peft(
    folder: str | os.PathLike[str], names: HFNames, shapes: Mapping[str, tuple[int, int]], num_layers: int
) -> tuple[LoRAConfig, Params]:
    """Read a LoRA adapter that PEFT, or `save_peft`, has written.

    Ranks below the largest are filled up with zeros and layers without tensors are all zero: both stay so in
    training, since A = 0 and B = 0 have no gradient. Scales that differ between modules are folded into B.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      names: what the base model's modules are called, `Pretrained.hf_names`.
      shapes: `{site: (in, out)}`, `Pretrained.config.site_shapes()`.
      num_layers: L.

    Returns:
      The config, with the rank of the largest module, and the parameters in the dtype they are stored in.

    Raises:
      FileNotFoundError: if one of the files is missing.
      ValueError: if one is damaged, if it is no plain LoRA, or if a tensor does not fit this model.
    """
    folder = Path(folder)
    settings, modules = _read_settings(folder / SETTINGS), _read_modules(folder / WEIGHTS, names, num_layers)
    rank = max(a.shape[1] for a, _ in modules.values())
    root = math.sqrt if settings.get("use_rslora") else float
    scale = settings["lora_alpha"] / root(settings["r"])
    alpha = settings["lora_alpha"] if rank == settings["r"] else scale * root(rank)
    sites = [site for site in names.modules if any(site == s for s, _ in modules)]
    present = sorted({layer for _, layer in modules})
    dtype = next(iter(modules.values()))[0].dtype
    params = {}
    for site in sites:
        fan_in, fan_out = shapes[site]
        a, b = np.zeros((num_layers, fan_in, rank), dtype), np.zeros((num_layers, rank, fan_out), dtype)
        for layer in present:
            if (site, layer) not in modules:
                continue
            module_a, module_b = modules[site, layer]
            r = module_a.shape[1]
            if module_a.shape != (fan_in, r) or module_b.shape != (r, fan_out):
                raise ValueError(
                    f"{folder / WEIGHTS} has A {module_a.T.shape} and B {module_b.T.shape} for "
                    f"{names.module(site, layer)}, which is {fan_in} to {fan_out} in this model."
                )
            own = _pattern(settings, "alpha_pattern", names.module(site, layer), settings["lora_alpha"]) / root(r)
            # scale * r / r need not give scale back to the last bit.
            factor = 1.0 if math.isclose(own, scale, rel_tol=1e-12) else own / scale
            a[layer, :, :r], b[layer, :r] = module_a, module_b * np.asarray(factor, dtype)
        params[site] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    layers = None if len(present) == num_layers else present
    return LoRAConfig(rank, float(alpha), sites, layers, bool(settings.get("use_rslora"))), params


def _modules(config: LoRAConfig, params: Params, gate: PerLayer | None, mask: PerLayer | None) -> _Modules:
    """The A and B of every module that does something, gates folded in, without masked ranks."""
    hook, found = config.bind(params, gate, mask), {}
    for site, leaves in params.items():
        a, b = np.asarray(leaves["a"]), np.asarray(leaves["b"])
        layers, _, rank = a.shape
        factor = np.ones((layers, rank), b.dtype)
        for table in (hook.gates, hook.masks):
            if site in table:
                value = np.asarray(table[site]).astype(b.dtype)
                factor = factor * (value if value.ndim == 2 else value[:, None])
        for layer in range(layers):
            keep = factor[layer] != 0
            if keep.any():
                found[site, layer] = a[layer][:, keep], (b[layer] * factor[layer][:, None])[keep]
    return found


def _settings(config: LoRAConfig, modules: _Modules, names: HFNames, num_layers: int) -> dict[str, Any]:
    root = math.sqrt if config.rslora else float
    ranks = {key: a.shape[1] for key, (a, _) in modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = {r: _number(config.alpha if r == config.rank else config.scale * root(r)) for r in set(ranks.values())}
    odd = {re.escape(names.module(*key)): r for key, r in ranks.items() if r != rank}
    layers = sorted({layer for _, layer in modules})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": names.base_model,
        "r": rank,
        "lora_alpha": alpha[rank],
        "rank_pattern": odd,
        "alpha_pattern": {name: alpha[r] for name, r in odd.items()},
        "use_rslora": config.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": [names.module(*key) for key in modules],
    }
    endings = _endings({site for site, _ in modules}, names)
    whole = len(modules) == len({site for site, _ in modules}) * len(layers)  # the same layers at every site
    if endings and whole and (config.layers is not None or len(layers) == num_layers):
        settings["target_modules"] = endings
        if len(layers) < num_layers:
            # Written as the path's component in front of the index, the only one PEFT is to count in.
            pattern = names.modules[next(iter(modules))[0]].partition(".{layer}")[0].rpartition(".")[2]
            settings |= {"layers_to_transform": layers, "layers_pattern": pattern}
    return settings


def _endings(sites: set[str], names: HFNames) -> list[str]:
    """The last components of the sites' module names; none if another linear of a block ends alike."""
    last = {site: name.rpartition(".")[2] for site, name in names.modules.items()}
    count = Counter(last.values())
    return [] if any(count[last[site]] > 1 for site in sites) else sorted(last[site] for site in sites)


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _refuse_strangers(folder: Path) -> None:
    if folder.exists():
        strangers = sorted({entry.name for entry in folder.iterdir()} - _ENTRIES) if folder.is_dir() else [folder.name]
        if strangers:
            raise FileExistsError(f"{folder} is not replaced by an adapter, since it holds {strangers[0]}.")


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: a PEFT adapter is a folder with {SETTINGS} and {WEIGHTS}.")
    try:
        settings = json.loads(path.read_bytes())
        kind, r, alpha = settings["peft_type"], settings["r"], settings["lora_alpha"]
        bad = not isinstance(r, int) or r < 1 or not float(alpha) > 0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no adapter config ({type(error).__name__}: {error}).") from error
    if kind != "LORA" or bad:
        raise ValueError(f"{path} is of peft_type {kind} with r={r} and lora_alpha={alpha}, which is no LoRA.")
    for key, off in _UNSUPPORTED.items():
        if settings.get(key) not in (off, None, [], False):
            raise ValueError(f"{path} sets {key}={settings[key]!r}, which a plain LoRA cannot represent.")
    return settings


def _read_modules(path: Path, names: HFNames, num_layers: int) -> _Modules:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: adapters are read from safetensors only, never from pickles.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again.") from error
    places = {names.module(site, layer): (site, layer) for site in names.modules for layer in range(num_layers)}
    halves: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or match[1] not in places or tensor.ndim != 2:
            raise ValueError(f"{path} has a tensor {name} {tensor.shape}, which has no place in this model.")
        halves.setdefault(places[match[1]], {})[match[2]] = tensor.T
    for key, pair in halves.items():
        if len(pair) < 2:
            raise ValueError(f"{path} has only one of A and B for {names.module(*key)}: it is incomplete.")
    if not halves:
        raise ValueError(f"{path} holds no tensor.")
    return {key: (pair["A"], pair["B"]) for key, pair in halves.items()}


def _pattern(settings: Mapping[str, Any], table: str, module: str, default: float) -> float:
    """PEFT's look-up: the first key that, as a regular expression, matches the end of the module's name."""
    for key, value in (settings.get(table) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
