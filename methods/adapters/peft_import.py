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
from methods.adapters.lora import Linears, LoRAConfig
from methods.adapters.patterns import shortened
from methods.adapters.peft_arguments import check
from methods.adapters.peft_fields import CONVERT, MERGE, Fields
from methods.adapters.peft_folder import PREFIX, SETTINGS, WEIGHTS, Module
from methods.adapters.peft_start import subtracted

if TYPE_CHECKING:
    from methods.models.loading import HFNames

# "default" is the name that PEFT gives an adapter it loads, so that it takes tensors with it as well as without.
_TENSOR = re.compile(r"(.+)\.lora_(?:([AB])(?:\.default)?\.weight|(m)agnitude_vector(?:(?:\.default)?\.weight)?)")
_ALIEN = re.compile(r"(^|\.)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|modules_to_save)\.")


class Adapter(NamedTuple):
    """What `load_peft` found.

    Attributes:
      config: fixed part, the rank and alpha of modules that differ in its patterns.
      params: `{site: {"a", "b"}}`, with `"m"` for DoRA; float32, or float64 if all of them are stored so.
      head: parameters of a `Classifier`; {} if none is stored.
    """

    config: LoRAConfig
    params: Params
    head: dict[str, Any]


def load_peft(
    folder: str | os.PathLike[str],
    names: HFNames,
    shapes: Mapping[str, tuple[int, int]],
    num_layers: int,
    *,
    base: Linears | None = None,
) -> Adapter:
    """Read a LoRA, rsLoRA or DoRA adapter that PEFT, or `save_peft`, has written.

    It computes what PEFT computes after loading it, or it is refused: every field of the config is understood
    (`methods.adapters.peft_fields`), and every tensor is used. Where some sites of a layer have tensors and others
    none, the latter are all zero and stay so in training, since A = 0 and B = 0 have no gradient.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      names: what the base model's modules are called, `Pretrained.hf_names`.
      shapes: `{site: (in, out)}`, `Pretrained.config.site_shapes()`.
      num_layers: L.
      base: the model's linears, `weights["blocks"]`; only what was started by PiSSA or OLoRA needs them, and becomes a
        LoRA of twice the rank (`methods.adapters.peft_start`).

    Raises:
      TypeError: for an argument that is something else; names it.
      FileNotFoundError: if one of the files is missing.
      ValueError: if one is damaged, or something in it is not understood or does not fit this model; names it.
    """
    check("load_peft", folder=folder, names=names, shapes=shapes, num_layers=num_layers, base=base)
    if missing := sorted(set(names.modules) - set(shapes)):
        raise ValueError(
            f"load_peft(shapes=...) has no {missing[0]}, a linear of the model that names is of: give names and shapes "
            "of one model, pretrained.hf_names and pretrained.config.site_shapes()."
        )
    folder = Path(folder)
    settings, tensors = peft_folder.read_settings(folder / SETTINGS), peft_folder.read_tensors(folder / WEIGHTS)
    modules, head = _read_modules(folder / WEIGHTS, settings, tensors, names, shapes, num_layers, base)
    sites = [site for site in names.modules if any(site == s for s, _ in modules)]
    present = sorted({layer for _, layer in modules})
    config = LoRAConfig(
        *_most(settings, modules),
        sites,
        None if len(present) == num_layers else present,
        settings.rslora,
        settings.dora,
    )
    config = _with_patterns(config, modules, present)
    dtype = np.result_type(*(module.a.dtype for module in modules.values()))
    params = {}
    for site in sites:
        fan_in, fan_out = shapes[site]
        leaves: dict[str, np.ndarray] = {"a": np.zeros((num_layers, fan_in, config.width), dtype)}
        leaves["b"] = np.zeros((num_layers, config.width, fan_out), dtype)
        if settings.dora:
            leaves["m"] = np.ones((num_layers, fan_out), dtype)
        for layer in present:
            module = modules.get((site, layer))
            if module is None and settings.dora:
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
    return Adapter(config, params, head)


def _read_modules(
    path: Path,
    settings: Fields,
    tensors: Mapping[str, np.ndarray],
    names: HFNames,
    shapes: Mapping[str, tuple[int, int]],
    num_layers: int,
    base: Linears | None,
) -> tuple[dict[tuple[str, int], Module], dict[str, Any]]:
    """The adapters and the head, with every tensor used and every module that PEFT adapts found."""
    places: dict[str, list[tuple[str, int]]] = {}
    for layer in range(num_layers):
        for site in names.modules:
            places.setdefault(names.module(site, layer), []).append((site, layer))
    if settings.task in (None, "FEATURE_EXTRACTION") and not _about(tensors, places):
        bare = {name.partition(".")[2]: place for name, place in places.items()}
        places = bare if _about(tensors, bare) else places  # of a model without head, as AutoModel makes it
    found: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name.removeprefix(PREFIX))
        if not name.startswith(PREFIX) or _ALIEN.search(name):
            raise ValueError(_spelling(path, name))
        if match is not None and match[1] in places and tensor.ndim == (2 if match[2] else 1):
            parts, part = found.setdefault(match[1], {}), match[2] or match[3]
            if part in parts:
                raise ValueError(f"{path} has {shortened(name)} twice, with and without an adapter's name: drop one.")
            parts[part] = tensor.T
        elif name.removeprefix(PREFIX) in names.head.values():
            whole[name.removeprefix(PREFIX)] = tensor
        else:
            if match is not None and (layer := _layer(match[1], names)) is not None and layer >= num_layers:
                raise ValueError(
                    f"{path} has an adapter of layer {layer}, {match[1]}, but num_layers={num_layers} has the layers 0 "
                    f"to {num_layers - 1}: give {_LAYERS}, or this adapter is of a deeper model."
                )
            raise ValueError(_stranger(path, settings, name, tensor, names))
    head = _head(path, settings, whole, names)
    modules = {}
    deepest = max((layer for name in found for _, layer in places[name]), default=num_layers)
    for name, sites in places.items():
        if (name in found) != settings.adapts(name):
            if name not in found and sites[0][1] > deepest:
                raise ValueError(
                    f"{path} has adapters up to layer {deepest}, but {SETTINGS} adapts every layer, and "
                    f"num_layers={num_layers} has layers up to {num_layers - 1}: give {_LAYERS}, or this adapter is of "
                    "a model of fewer layers."
                )
            what = "no adapter for" if name not in found else "an adapter for"
            how = "name" if name not in found else "do not name"
            raise ValueError(
                f"{path} holds {what} {name}, which target_modules, exclude_modules and layers_to_transform of "
                f"{SETTINGS} {how}: config and weights are of different adapters."
            )
        if name in found:
            size = shapes[sites[0][0]][0], sum(shapes[site][1] for site, _ in sites)
            module = _module(path, settings, name, found[name], size)
            if settings.start:
                kernels = [_kernel(path, settings, base, site, layer) for site, layer in sites]
                if names.conv1d and settings.start == "olora":
                    raise ValueError(
                        f"{path} has an OLoRA of {name}, a Conv1D, which PEFT starts transposed: {CONVERT}."
                    )
                module = subtracted(module, np.concatenate(kernels, axis=1), settings.start, settings.rslora, name)
            count = len(sites)
            # The columns of a joint linear are adapted, and with DoRA turned, each by itself.
            ms = [None] * count if module.m is None else np.split(module.m, count)
            for place, b, m in zip(sites, np.split(module.b, count, axis=1), ms, strict=True):
                modules[place] = Module(module.a, b, m, module.alpha)
    if not modules:
        raise ValueError(f"{path} holds no adapter, only a head.")
    return modules, head


_LAYERS = "the layers that the base model has, pretrained.config.num_layers"


def _layer(name: str, names: HFNames) -> int | None:
    """The layer of the module that a Hugging Face name means, in whatever depth; None if it is none of the model's."""
    for module in names.modules.values():
        head, _, tail = module.partition("{layer}")
        middle = name.removeprefix(head).removesuffix(tail)
        if name == f"{head}{middle}{tail}" and middle.isdecimal() and len(middle) < 10:
            return int(middle)
    return None


def _about(tensors: Mapping[str, np.ndarray], places: Mapping[str, Any]) -> bool:
    """Whether one of the tensors is of one of these modules."""
    return any(name.removeprefix(PREFIX).rpartition(".lora_")[0] in places for name in tensors)


def _module(path: Path, settings: Fields, name: str, parts: Mapping[str, np.ndarray], size: tuple[int, int]) -> Module:
    """One module's tensors, of the shapes that the model and the config ask for."""
    wanted = {"A", "B", "m"} if settings.dora else {"A", "B"}
    if set(parts) != wanted:
        leaf = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}
        there, needed = (", ".join(leaf[part] for part in sorted(some)) for some in (parts, wanted))
        raise ValueError(f"{path} has only {there} for {name}, where use_dora={settings.dora} asks for {needed}.")
    a, b, (fan_in, fan_out), r = parts["A"], parts["B"], size, settings.rank_of(name)
    if a.shape != (fan_in, r) or b.shape != (r, fan_out) or ("m" in wanted and parts["m"].shape != (fan_out,)):
        m = f", magnitudes {parts['m'].shape}" if "m" in wanted else ""
        raise ValueError(
            f"{path} has A {a.T.shape} and B {b.T.shape}{m} for {name}, which is {fan_in} to {fan_out} in this model "
            f"and of rank {shortened(r)} in {SETTINGS}."
        )
    return Module(a, b, parts.get("m"), settings.alpha_of(name))


def _kernel(path: Path, settings: Fields, base: Linears | None, site: str, layer: int) -> np.ndarray:
    if base is None:
        raise ValueError(
            f"{path} was started by init_lora_weights='{settings.start}', for which PEFT takes a part out of the base "
            f"model when it loads the adapter: give base=weights['blocks'] of the model, or {CONVERT}."
        )
    return np.asarray(base[site]["kernel"][layer], np.float32)


def _head(path: Path, settings: Fields, whole: Mapping[str, np.ndarray], names: HFNames) -> dict[str, Any]:
    """The parameters of a `Classifier`; {} if none is stored and none is to be."""
    for saved in settings.saved:
        # PEFT lists both names of a classifier, whichever the model has.
        if not any(_saves(saved, name) for name in whole) and not (saved in ("classifier", "score") and whole):
            raise ValueError(
                f"{path} has no tensor of {shortened(saved)}, which by {SETTINGS} is saved whole (modules_to_save, and "
                "the head where task_type is SEQ_CLS): it is incomplete."
            )
    if not whole:
        return {}
    if missing := sorted(set(names.head.values()) - set(whole)):
        raise ValueError(f"{path} has a part of the head, but not {missing[0]}: save the whole head (modules_to_save).")
    tree: dict[str, Any] = {}
    for (module, leaf), name in names.head.items():
        value = whole[name]
        tree.setdefault(module, {})[leaf] = jnp.asarray(value.T if value.ndim == 2 else value)
    sizes = {module: leaves["kernel"].shape for module, leaves in tree.items()}
    fits = all(
        len(sizes[module]) == 2 and leaves.get("bias", leaves["kernel"][0]).shape == sizes[module][1:]
        for module, leaves in tree.items()
    )
    if not fits or ("dense" in sizes and sizes["dense"] != (sizes["out"][0],) * 2):
        shapes = ", ".join(f"{name} {value.shape}" for name, value in sorted(whole.items()))
        raise ValueError(f"{path} has a head whose tensors do not fit together: {shapes}.")
    return tree


def _saves(saved: str, tensor: str) -> bool:
    """Whether an entry of modules_to_save is, to PEFT, of a module that holds this tensor."""
    return any(tensor[:dot].endswith(saved) for dot in range(len(tensor)) if tensor[dot] == ".")


def _spelling(path: Path, name: str) -> str:
    """On a name that PEFT itself would pass over, with no more than a warning."""
    plain = _ALIEN.sub(r"\1", name.removeprefix(PREFIX))
    return (
        f"{path} has a tensor {shortened(name)}, a name that PEFT reads nothing from, since it writes "
        f"{shortened(PREFIX + plain.removeprefix(PREFIX))}: rename the tensors (wrappers such as torch.compile's and "
        "DDP's put a word in), or save the unwrapped model."
    )


def _stranger(path: Path, settings: Fields, name: str, tensor: np.ndarray, names: HFNames) -> str:
    """Why a tensor has no use."""
    inside, shown = name.removeprefix(PREFIX), shortened(name)
    if ".lora_" not in inside:
        saved = next((saved for saved in settings.saved if _saves(saved, inside)), None)
        why = f"which modules_to_save replaces whole ({saved})" if saved else "a tensor of the base model itself"
        return (
            f"{path} has {shown} {tensor.shape}, {why}: beside the adapter only a classification head is read, so "
            f"{MERGE}."
        )
    module, _, leaf = inside.rpartition(".lora_")
    if "embedding_" in leaf:
        return f"{path} has {shown} {tensor.shape}, an adapter of an embedding, which ours has not: {MERGE}."
    if leaf in ("A.bias", "B.bias"):
        return f"{path} has {shown} {tensor.shape}, a bias beside A and B, which ours have not: {MERGE}."
    if leaf.count(".") > 1 and leaf[0] in "ABm":
        plain = f"{PREFIX}{module}.lora_{leaf.partition('.')[0]}.weight"
        return f"{path} has {shown}, with an adapter's name in it, where PEFT reads {shortened(plain)}: rename it."
    known = ", ".join(dict.fromkeys(names.modules.values()))
    return (
        f"{path} has a tensor {shown} {tensor.shape}, which has no place in this model, whose linears are {known}: the "
        "adapter is of another architecture or kind."
    )


def _most(settings: Fields, modules: Mapping[tuple[str, int], Module]) -> tuple[int, float]:
    """The rank and alpha to be those without a pattern: the file's, unless no module has them."""
    kinds = Counter((module.a.shape[1], module.alpha) for module in modules.values())
    stated = (settings.rank, settings.alpha)
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
