"""LoRATRF's folder: an edit behind a filter, the LoRA beside it and a head; PEFT's format has no place for the first.

`loratrf_config.json` holds `FORMAT`, the base model, the filter, the number of layers, q, the edited sites and what is
fixed about the LoRA; `loratrf_model.safetensors` the arrays, as they are, each leading with the layer axis:

    edit.SITE.c, .d             (and .u, .v of the filter "channel")    vectors.SITE    scalars.NAME
    lora.SITE.a, .b             head.MODULE.LEAF

The config says which arrays there are and of which shape; a file with more, fewer or other ones is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from methods.adapters import peft_arguments, peft_folder
from methods.adapters.filters import FILTERS, Edit, init, scalars
from methods.adapters.hook import Params
from methods.adapters.lora import LoRAConfig
from methods.adapters.patterns import shortened

if TYPE_CHECKING:
    from methods.models.loading import HFNames

SETTINGS, WEIGHTS = "loratrf_config.json", "loratrf_model.safetensors"
FORMAT = {"format": "loratrf", "version": 1}
_KEYS = {*FORMAT, "base_model", "filter", "num_layers", "edit_rank", "edit_sites", "lora", "head"}
_LORA = ("rank", "alpha", "targets", "layers", "rslora", "rank_pattern", "alpha_pattern")
_STREAM = "block_hidden"


class Edited(NamedTuple):
    """What `load_edit` found: the hook before LoRA's, LoRA's fixed part and parameters, and a head ({} without)."""

    edit: Edit
    config: LoRAConfig
    params: Params
    head: dict[str, Any]


def save_edit(
    folder: str | os.PathLike[str],
    edit: Edit,
    config: LoRAConfig,
    params: Params,
    names: HFNames,
    head: Mapping[str, Any] | None = None,
) -> Path:
    """Write an edit and the LoRA beside it; the folder appears complete or not at all, in place of one that is there.

    Args:
      folder: to write.
      edit: the hook, with its vectors and scalars.
      config: of the LoRA; no DoRA, which would turn the edit with the weights.
      params: the LoRA's, as from `config.init`.
      names: what the base model is called, `Pretrained.hf_names`.
      head: parameters of a `Classifier`.

    Raises:
      TypeError: for an argument that is something else; names it.
      ValueError: for DoRA.
      FileExistsError: if the folder holds something else.
    """
    peft_arguments.check("save_edit", folder=folder, config=config, params=params, names=names, head=head)
    if config.dora:
        raise ValueError("An edit stands beside LoRA or rsLoRA; DoRA would turn it with the weights.")
    config.bind(params)  # refuses what does not fit
    num_layers, _, rank = next(iter(edit.params.values()))["c"].shape
    settings = FORMAT | {
        "base_model": peft_folder.base_model(names.base_model),
        "filter": edit.kind,
        "num_layers": num_layers,
        "edit_rank": rank,
        "edit_sites": list(edit.params),
        "lora": {name: getattr(config, name) for name in _LORA}
        | {name: dict(getattr(config, name)) for name in ("rank_pattern", "alpha_pattern")},
        "head": {
            module: {leaf: list(np.shape(x)) for leaf, x in leaves.items()} for module, leaves in (head or {}).items()
        },
    }
    arrays = {"edit": edit.params, "vectors": edit.vectors, "scalars": edit.scalars, "lora": params, "head": head or {}}
    tensors = {name: np.asarray(leaf) for name, leaf in _flat(arrays).items()}
    peft_folder.write(Path(folder), settings, tensors, (SETTINGS, WEIGHTS))
    return Path(folder)


def load_edit(folder: str | os.PathLike[str], shapes: Mapping[str, tuple[int, int]], num_layers: int) -> Edited:
    """Read what `save_edit` has written, bit for bit.

    Args:
      folder: with the two files.
      shapes: `{site: (in, out)}` of the model's linears, `Pretrained.config.site_shapes()`.
      num_layers: L.

    Raises:
      TypeError: for an argument that is something else; names it.
      FileNotFoundError: if one of the files is missing.
      ValueError: if one is damaged, or something in it is not understood or does not fit this model; names it.
    """
    peft_arguments.check("load_edit", folder=folder, shapes=shapes, num_layers=num_layers)
    path, file = Path(folder) / SETTINGS, Path(folder) / WEIGHTS
    settings = _understood(
        peft_folder.read_json(path, f"a LoRATRF adapter is a folder with {SETTINGS} and {WEIGHTS}"), path
    )
    if settings["num_layers"] != num_layers:
        raise ValueError(
            f"{path} is of a model with {shortened(settings['num_layers'])} layers; this one has {num_layers}."
        )
    lora = settings["lora"]
    try:
        config = LoRAConfig(**{name: lora[name] for name in _LORA})
        if not isinstance(lora["rslora"], bool):
            raise ValueError(f"rslora is {shortened(lora['rslora'])}")
        sites = config.sites(shapes)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} describes no LoRA of this model: {error}") from None
    tensors = peft_folder.read_tensors(file, as_stored=True)
    wanted = _shapes(settings, config, sites, shapes, path)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(set(wanted) | set(found)):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{file} has {found.get(name, 'no array')} for {shortened(name)}, where {SETTINGS} and this model ask "
                f"for {wanted.get(name, 'none')}: it is incomplete, or of another model."
            )
    tree: dict[str, Any] = {"edit": {}, "vectors": {}, "scalars": {}, "lora": {}, "head": {}}
    for name, tensor in tensors.items():
        at, *keys, last = name.split(".")
        place = tree[at]
        for key in keys:
            place = place.setdefault(key, {})
        place[last] = jnp.asarray(tensor)
    edit = {site: tree["edit"][site] for site in settings["edit_sites"]}
    vectors = {site: tree["vectors"][site] for site in edit if site in tree["vectors"]}
    params = {site: tree["lora"][site] for site in sites}
    return Edited(Edit(edit, vectors, tree["scalars"], settings["filter"]), config, params, tree["head"])


def _understood(settings: Any, path: Path) -> dict[str, Any]:
    """The settings, if they are exactly the fields of this version, each of its kind."""
    if not isinstance(settings, dict) or settings.get("format") != FORMAT["format"]:
        raise ValueError(f"{path} is damaged or of another format than {FORMAT['format']}.")
    if settings.get("version") != FORMAT["version"] or isinstance(settings["version"], bool):
        raise ValueError(
            f"{path} is of version {shortened(settings.get('version'))}; this one reads {FORMAT['version']}: update."
        )
    lora = settings.get("lora")
    fields = set(lora) if isinstance(lora, dict) else set()
    for kind, there, known in (("", set(settings), _KEYS), ("lora.", fields, set(_LORA))):
        for name in sorted(there ^ known):
            what = "lacks" if name in known else "has an unknown"
            raise ValueError(f"{path} {what} field {shortened(kind + name)}: it is damaged or of another version.")
    whole = lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1  # noqa: E731
    texts = lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value)  # noqa: E731
    allowed = {
        "base_model": lambda v: isinstance(v, str),
        "filter": lambda v: isinstance(v, str) and v in FILTERS,
        "num_layers": whole,
        "edit_rank": whole,
        "edit_sites": lambda v: texts(v) and v and len(set(v)) == len(v),
        "head": lambda v: (
            isinstance(v, dict)
            and all(
                isinstance(leaves, dict) and all(isinstance(s, list) and all(map(whole, s)) for s in leaves.values())
                for leaves in v.values()
            )
        ),
    }
    for name, check in allowed.items():
        if not check(settings[name]):
            raise ValueError(f"{path} sets {name} to {shortened(settings[name])}, which is not understood.")
    return settings


def _shapes(
    settings: Mapping[str, Any], config: LoRAConfig, sites: Any, shapes: Mapping[str, tuple[int, int]], path: Path
) -> dict[str, tuple[int, ...]]:
    """The shape of every array there must be; nothing is allocated by what a file says."""
    layers, hidden = settings["num_layers"], next(iter(shapes.values()))[0]
    sizes = {site: out for site, (_, out) in shapes.items()} | {_STREAM: hidden}
    if unknown := [site for site in settings["edit_sites"] if site not in sizes]:
        raise ValueError(
            f"{path} edits {shortened(unknown[0])}, which is no site of this model: {', '.join(sizes)} are."
        )
    edited = {site: sizes[site] for site in settings["edit_sites"]}

    def arrays() -> dict[str, Any]:
        key = jax.random.key(0)
        kind = settings["filter"]
        return {
            "edit": init(key, edited, layers, settings["edit_rank"], kind),
            "vectors": {s: jnp.zeros((layers, d)) for s, d in edited.items()} if FILTERS[kind].vectors else {},
            "scalars": scalars(layers) | {"gate": jnp.ones(layers)},
            "lora": config.init(key, {site: shapes[site] for site in sites}, layers),
        }

    try:
        wanted = {name: tuple(leaf.shape) for name, leaf in _flat(jax.eval_shape(arrays)).items()}
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} describes no LoRA of this model: {error}") from None
    return wanted | {
        f"head.{m}.{leaf}": tuple(s) for m, leaves in settings["head"].items() for leaf, s in leaves.items()
    }


def _flat(tree: Mapping[str, Any], stem: str = "") -> dict[str, Any]:
    """`{"a.b.c": leaf}` of nested tables."""
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{stem}{name}.") if isinstance(value, Mapping) else {stem + name: value}
    return flat
