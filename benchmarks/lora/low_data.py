"""What the benchmarks on few rows of a classification task have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def settings(setup: Any, out: Path, rows: int, seed: int) -> dict[str, Any]:
    """Settings of one run of `setup`, whose "model", "task", "data" and "steps" they take; as many validation rows."""
    return {
        "model": setup.model,
        "task": setup.task,
        "data": setup.data,
        "out": out,
        "seed": seed,
        "length": 96,
        "batch_size": 16,
        "outer_batch_size": min(64, rows),
        "train_rows": rows,
        "outer_rows": rows,
        "test_rows": 0,
        "finetune_steps": setup.steps,
        "finetune_lr": 1e-3,
    }
