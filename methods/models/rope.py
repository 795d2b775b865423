r"""Rotary frequencies and the ways to stretch them beyond the positions a model was trained on.

A pair i of a head turns by position * theta^(-2i/head_dim) / factor_i. Read off transformers' `modeling_rope_utils`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from methods.models.keys import (
    COUNT,
    DICT,
    FLAG,
    NUMBERS,
    POSITIVE,
    REAL,
    TEXT,
    Key,
    Sizes,
    Table,
    inert,
    only,
    optional,
    shown,
)


class Rope(NamedTuple):
    """theta; factors, [head_dim / 2], () for none; scale, what q and k are multiplied by; the most positions."""

    theta: float
    factors: tuple[float, ...] = ()
    scale: float = 1.0
    max_positions: int = 0


_ALWAYS: Table = {"rope_type": TEXT, "type": TEXT, "rope_theta": POSITIVE, "partial_rotary_factor": only(1, 1.0)}
_ORIGINAL, _FACTOR = "original_max_position_embeddings", {"factor": POSITIVE}
_SCALE: Table = {"factor": optional(POSITIVE), "attention_factor": optional(POSITIVE), _ORIGINAL: optional(COUNT)}
_BANDS = {"low_freq_factor": POSITIVE, "high_freq_factor": POSITIVE, _ORIGINAL: COUNT}
_YARN = dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), optional(REAL)) | {"truncate": FLAG}
KINDS: Mapping[str, Table] = {
    "default": {},
    "dynamic": _FACTOR,
    "linear": _FACTOR,
    "llama3": _FACTOR | _BANDS,
    "yarn": {**_SCALE, **_YARN, **inert("a note of the authors", "finetuned")},
    "longrope": {**_SCALE, "short_factor": NUMBERS, "long_factor": NUMBERS},
}
"""Each kind of rotary scaling, and the keys that it may have."""
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def _wanted_of_each(value: Any, sizes: Sizes) -> str:
    """What `rope_parameters` should be where there are some for each kind of layer, "" if they are."""
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(value, dict) or not all(name in kinds and isinstance(one, dict) for name, one in value.items()):
        return f"an object with {' and '.join(kinds)}, each with the keys of one"
    return next(filter(None, (_wanted(one, sizes) for one in value.values())), "")


def _wanted(value: Any, sizes: Sizes) -> str:
    """What a config's `rope_scaling` or `rope_parameters` should be, "" if it is."""
    if not isinstance(value, dict):
        return DICT.wanted(value, sizes)
    kind = value.get("rope_type", value.get("type", "default"))
    if not isinstance(kind, str) or kind not in KINDS or value.get("type", kind) != kind:
        return f"a rope_type of {', '.join(KINDS)}"
    table = {**_ALWAYS, **KINDS[kind]}
    for name, one in value.items():
        if name not in table:
            return f"no {shown(name)} in it with rope_type {kind!r}"
        if problem := table[name].wanted(one, sizes):
            return f"{problem} as its {name}"
    missing = next((name for name in _REQUIRED.get(kind, ()) if name not in value), "")
    return missing and f"a {missing} in it with rope_type {kind!r}"


KEY = optional(Key(_wanted))
"""`rope_scaling` and `rope_parameters`, of all layers."""

EACH = optional(Key(_wanted_of_each))
"""`rope_parameters` for each kind of layer."""


def from_hf(rope: Mapping[str, Any], head_dim: int, max_positions: int) -> Rope:
    """What transformers' `rope_parameters` mean. Raises ValueError on a kind that is not known."""
    with np.errstate(all="ignore"):
        found = _from_hf(rope, head_dim, max_positions)
    if not np.isfinite([found.theta, found.scale, *found.factors]).all() or not all(found.factors):
        raise ValueError(f"rotary positions of {shown(dict(rope))} are not finite.")
    return found


def _from_hf(rope: Mapping[str, Any], head_dim: int, max_positions: int) -> Rope:
    kind, theta, scale = rope.get("rope_type", "default"), float(rope["rope_theta"]), rope.get("attention_factor")
    if kind in ("default", "dynamic"):  # dynamic stretches only what is longer than max_positions, which is refused
        return Rope(theta, max_positions=max_positions)
    if kind == "linear":
        return Rope(theta, (float(rope["factor"]),) * (head_dim // 2), 1.0, max_positions)
    if kind == "factors":  # ours: a GGUF file spells them out
        return Rope(theta, tuple(rope["factors"]), scale or 1.0, max_positions)
    original = rope.get(_ORIGINAL) or max_positions
    if kind == "llama3":
        bands = {"low": rope["low_freq_factor"], "high": rope["high_freq_factor"], "original": original}
        if not bands["low"] < bands["high"]:
            raise ValueError(f"low_freq_factor {bands['low']} must be below high_freq_factor {bands['high']}.")
        return Rope(theta, llama3_factors(theta, head_dim, factor=rope["factor"], **bands), 1.0, max_positions)
    factor = rope.get("factor") or max_positions / original
    if kind == "yarn":
        bands = {"fast": rope.get("beta_fast") or 32.0, "slow": rope.get("beta_slow") or 1.0, "original": original}
        factors = yarn_factors(theta, head_dim, factor=factor, truncate=rope.get("truncate", True), **bands)
        return Rope(theta, factors, _yarn_scale(rope, factor), max_positions)
    if kind == "longrope":  # longer texts turn by long_factor, all of their tokens: they are refused
        grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        short = tuple(map(float, rope["short_factor"]))
        return Rope(theta, short, float(grown if scale is None else scale), min(original, max_positions))
    raise ValueError(f"rotary scaling {kind!r} is not supported: {', '.join(KINDS)} are.")


def from_gguf(own: Mapping[str, Any], factors: np.ndarray | None) -> dict[str, Any]:
    """transformers' `rope_parameters` behind the keys of a GGUF file, given without the architecture's name.

    factors: the tensor rope_freqs.weight, None if there is none. attn_factor and yarn_attn_factor are transformers'
    attention_factor, as llama.cpp's converter writes it. Raises ValueError on keys that contradict each other.
    """
    scaling = {name.removeprefix("rope.scaling."): one for name, one in own.items() if name.startswith("rope.scaling.")}
    out: dict[str, Any] = {"rope_theta": own.get("rope.freq_base", 10_000.0)}
    kind = scaling.pop("type", "none")
    scales = {scaling.pop(name) for name in ("attn_factor", "yarn_attn_factor") if name in scaling}
    if kind not in ("none", "linear", "yarn") or len(scales) > 1 or (factors is not None and kind != "none"):
        raise ValueError(
            f"rotary scaling of type {shown(kind)} (rope.scaling.type), with attention factors {sorted(scales)}"
            f"{' and a tensor of factors' if factors is not None else ''}, is not supported: none, linear and yarn "
            "are, or rope_freqs.weight alone."
        )
    if scales and kind == "linear":
        raise ValueError("rope.scaling.attn_factor is not supported for linear rotary scaling.")
    if kind == "none":
        if scaling.pop("factor", 1.0) != 1.0:
            raise ValueError("rope.scaling.factor is given without rope.scaling.type, which says what it means.")
        scaling.pop("original_context_length", None)  # what it was, without being stretched since
        given = np.ones(0) if factors is None else factors
        out |= {"rope_type": "factors", "factors": given.tolist()}
    else:
        out |= {"rope_type": kind, "factor": scaling.pop("factor", 1.0)}
        original = scaling.pop("original_context_length", None)
        if kind == "yarn":
            out |= {_ORIGINAL: original, "beta_fast": scaling.pop("yarn_beta_fast", None)}
            out |= {"beta_slow": scaling.pop("yarn_beta_slow", None)}
    left = [name for name in scaling if name not in ("yarn_ext_factor", "yarn_log_multiplier")]
    if left:
        raise ValueError(f"rope.scaling.{left[0]} is not supported for rotary scaling of type {kind!r}.")
    return out | {"attention_factor": scales.pop() if scales else None}


def llama3_factors(
    theta: float, head_dim: int, *, factor: float, low: float, high: float, original: int
) -> tuple[float, ...]:
    r"""What Llama 3.1 divides each rotary frequency by, so that it reads beyond its `original` number of
    positions.

    A frequency that turns n times within `original` positions is divided by 1 if n >= high, by `factor` if n
    <= low, and by 1 / (s + (1 - s) / factor) with s = (n - low) / (high - low) between. [head_dim / 2].
    Source: arXiv:2407.21783, and `rope_type="llama3"` in transformers.
    """
    turns = original * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return tuple((1 / (share + (1 - share) / factor)).tolist())


def yarn_factors(
    theta: float, head_dim: int, *, factor: float, fast: float, slow: float, original: int, truncate: bool
) -> tuple[float, ...]:
    r"""What YaRN divides each rotary frequency by. [head_dim / 2].

    With c(n) the (real) index of the frequency that turns n times within `original` positions, index i is divided by 1
    up to c(fast), by `factor` from c(slow) on, and by 1 / (s + (1 - s) / factor) between, where s falls linearly in i.
    `truncate` rounds the two ends outwards. Source: arXiv:2309.00071, and `rope_type="yarn"` in transformers.
    """

    def index(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index(fast), index(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    share = 1 - np.clip((np.arange(head_dim // 2) - first) / (last - first or 1e-3), 0.0, 1.0)
    return tuple((1 / (share + (1 - share) / factor)).tolist())


def _yarn_scale(rope: Mapping[str, Any], factor: float) -> float:
    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(rope["mscale"]) / grown(rope["mscale_all_dim"])
    return grown(1.0)
