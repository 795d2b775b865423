"""What `save_peft`, `load_peft` and `load_edit` are given, refused in a sentence where it is something else.

The model that an adapter belongs to comes in three parts, all of a `Pretrained`; each is told from the whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from methods.adapters.lora import LoRAConfig


def check(function: str, **given: Any) -> None:
    """Checks those arguments of `function` that are given, by their names.

    Raises:
      TypeError: names the argument, and says what it must be.
    """
    for name, value in given.items():
        fits, wanted = _RULES[name]
        if not fits(value):
            raise TypeError(f"{function}({name}=...) was given {_shown(value)}: it must be {wanted}.")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, str | int | float):
        return repr(value)[:60]
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(list(map(str, value))[:4]) or 'nothing'}"
    return f"a {type(value).__name__}" if not isinstance(value, type) else f"the class {value.__name__}"


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def _is_names(value: Any) -> bool:
    # By what it has: the adapters do not import the models.
    return all(isinstance(vars(value).get(at), Mapping) for at in ("modules", "head")) if _has_vars(value) else False


def _has_vars(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, type)


def _is_shapes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(site, str) and isinstance(pair, tuple | list) and len(pair) == 2 and all(map(_is_count, pair))
        for site, pair in value.items()
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 1)


def _is_linears(value: Any) -> bool:
    return value is None or (
        isinstance(value, Mapping) and any(isinstance(x, Mapping) and "kernel" in x for x in value.values())
    )


def _is_params(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(site, str)
        and isinstance(leaves, Mapping)
        and all(np.ndim(leaves.get(name, 0)) == 3 for name in ("a", "b"))
        for site, leaves in value.items()
    )


def _is_head(value: Any) -> bool:
    return value is None or (
        isinstance(value, Mapping) and all(isinstance(leaves, Mapping) for leaves in value.values())
    )


_RULES = {
    "folder": (_is_path, "the adapter's folder, a path"),
    "config": (lambda value: isinstance(value, LoRAConfig), "a LoRAConfig(...)"),
    "params": (_is_params, "the adapter's parameters, {site: {'a': [L, in, r], 'b': [L, r, out]}}, as of config.init"),
    "names": (_is_names, "what the base model's modules are called, pretrained.hf_names"),
    "shapes": (_is_shapes, "{site: (in, out)} of the base model, pretrained.config.site_shapes()"),
    "num_layers": (_is_count, "the layers of the base model, pretrained.config.num_layers"),
    "base": (_is_linears, "the base model's linears, pretrained.weights['blocks'], or None"),
    "head": (_is_head, "parameters of the model's Classifier, {module: {leaf: array}}, or None"),
}
