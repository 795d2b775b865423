"""The part of the page *Which hypergradient* that tells of `benchmarks.lora.planted`, from its record.

The record, planted.json, holds of the run's own planted.json the setup, and of the searches AUROC and cosine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lora.report import table as in_markdown

RECORD = Path(__file__).with_name("planted.json")
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam"}


def section(record: dict[str, Any]) -> str:
    """Mean AUROC of the searches, how far the two gradients part, and the largest difference that makes."""
    lengths, seeds = record["setup"]["unrolls"], record["setup"]["seeds"]
    rows = {(row["name"], row["inner"], row["K"]): row for row in record["rows"]}
    body = [
        (f"{name.replace('-', ' ')}, {title}", *(f"{np.mean(rows[name, inner, k]['auroc']):.3f}" for k in lengths))
        for inner, title in OPTIMIZERS.items()
        for name in ("unrolled", "first-order")
    ]
    cosines = [
        f"{np.mean(rows['unrolled', inner, lengths[-1]]['cosine']):.2f} ({title})"
        for inner, title in OPTIMIZERS.items()
    ]
    gaps = {
        (title, k): np.subtract(rows["unrolled", inner, k]["auroc"], rows["first-order", inner, k]["auroc"])
        for inner, title in OPTIMIZERS.items()
        for k in lengths
    }
    (title, k), gap = max(gaps.items(), key=lambda item: abs(item[1].mean()))
    return (
        f"{in_markdown((f'AUROC, {seeds} seeds', *(f'K = {k}' for k in lengths)), body)}\n"
        f"At K = {lengths[-1]} the mean cosine of the two gradients over the search is {' and '.join(cosines)}. The "
        f"largest paired difference ({title}, K = {k}: {gap.mean():.3f} ± {gap.std(ddof=1) / len(gap) ** 0.5:.3f}) is "
        f"the largest of {len(gaps)} comparisons.\n"
    )
