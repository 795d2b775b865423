r"""Rotary frequencies and the ways to stretch them beyond the positions a model was trained on.

A pair i of a head turns by position * theta^(-2i/head_dim) / factor_i. Read off transformers' `modeling_rope_utils`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Rope(NamedTuple):
    """theta; factors, [head_dim / 2], () for none; scale, what q and k are multiplied by."""

    theta: float
    factors: tuple[float, ...] = ()
    scale: float = 1.0


def from_hf(rope: Mapping[str, Any], head_dim: int, max_positions: int) -> Rope:
    """What transformers' `rope_parameters` mean. Raises ValueError on a kind that is not known."""
    kind, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("rotary positions on a part of each head (partial_rotary_factor) are not supported.")
    if kind in ("default", "dynamic"):  # dynamic stretches only what is longer than max_positions, which is refused
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, (float(rope["factor"]),) * (head_dim // 2))
    if kind == "factors":  # ours: a GGUF file spells them out
        return Rope(theta, tuple(rope["factors"]))
    original = rope.get("original_max_position_embeddings") or max_positions
    if kind == "llama3":
        bands = {"low": rope["low_freq_factor"], "high": rope["high_freq_factor"], "original": original}
        return Rope(theta, llama3_factors(theta, head_dim, factor=rope["factor"], **bands))
    if kind == "yarn":
        factor = rope.get("factor") or max_positions / original
        bands = {"fast": rope.get("beta_fast") or 32.0, "slow": rope.get("beta_slow") or 1.0, "original": original}
        factors = yarn_factors(theta, head_dim, factor=factor, truncate=rope.get("truncate", True), **bands)
        return Rope(theta, factors, _yarn_scale(rope, factor))
    raise ValueError(f"rotary scaling {kind!r} is not supported: default, dynamic, linear, llama3 and yarn are.")


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
    share = 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return tuple((1 / (share + (1 - share) / factor)).tolist())


def _yarn_scale(rope: Mapping[str, Any], factor: float) -> float:
    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(rope["mscale"]) / grown(rope["mscale_all_dim"])
    return grown(1.0)
