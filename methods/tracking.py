"""`--track`: where metrics go besides `metrics.jsonl`. Each search and each training of a command is a run there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import bilevel
from bilevel.extend import Tracker


class Stage(NamedTuple):
    """A search or a training of a command.

    Attributes:
      out: the run folder.
      name: of the stage, as in `metrics.jsonl`.
      id: of the stage of this run folder and no other, the same when the command goes on.
      settings: the command's options.
    """

    out: Path
    name: str
    id: str
    settings: Mapping[str, Any]

    @property
    def title(self) -> str:
        """How a service calls it."""
        return f"{self.out.name}, {self.name}"


def _tensorboard(stage: Stage) -> Tracker:
    return bilevel.TensorBoard(stage.out / "tensorboard" / _plain(stage.name), settings=stage.settings)


def _wandb(stage: Stage) -> Tracker:
    project = os.environ.get("WANDB_PROJECT") or "bilevel"
    named = {"name": stage.title, "group": stage.out.name, "id": stage.id}
    return bilevel.WandB(project, **named, settings=stage.settings)


def _mlflow(stage: Stage) -> Tracker:
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "bilevel"
    return bilevel.MLflow(experiment, name=stage.title, id=stage.id, settings=stage.settings)


TRACKERS: dict[str, Callable[[Stage], Tracker]] = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
"""By their names on the command line: what makes the tracker of a stage, without opening anything."""


def tracker(name: str, out: Path, stage: str, run: str, settings: Mapping[str, Any]) -> Tracker:
    """The tracker of a stage of the run folder `out`, which is known by `run`."""
    told = {f"option.{option}": value for option, value in settings.items() if value is not None}
    return TRACKERS[name](Stage(out, stage, f"{run}-{_plain(stage)}", told))


def _plain(stage: str) -> str:
    """The name of a stage as a part of a path, or of an id."""
    return re.sub(r"[^\w.-]+", "-", stage)


def check(name: str | None) -> None:
    """Refuses a tracker whose library is not installed, before anything is written.

    Raises:
      ModuleNotFoundError: one sentence with what to install.
    """
    if name is not None:
        TRACKERS[name](Stage(Path("."), "none", "none", {}))
