r"""LoRATRF, reconstructed, on a classification task: task vectors of training or validation rows, equal parameters.

For each seed, on one split: the edit beside LoRA with task vectors that are trained with the rest, with task vectors
chosen on validation rows (unrolled), without a filter, and LoRA alone at the rank with the nearest number of
parameters. Told is the metric on the published validation split.

    python -m benchmarks.lora.edits --model FOLDER --task rte        # resumable; table and json in runs/edits
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.lora import low_data
from methods import experiment, inside, loratrf
from methods.loratrf import LoRATRFSettings
from methods.runfolder import RunFolder

ARMS: dict[str, dict[str, Any]] = {
    "training rows": {"outer": "none"},
    "validation rows": {"outer": "vectors"},
    "no filter": {"outer": "none", "filter": "none"},
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is compared.

    Attributes:
      model: a folder in Hugging Face layout, or a name on the hub.
      task: a classification task.
      data: as for `bilevel loratrf`.
      out: results; the same command continues.
      seeds: splits and start values.
      rows: training rows, and as many validation rows.
      steps: of every final training.
      inner_steps: K of the search.
      outer_steps: T of the search.
    """

    model: str
    task: str = "rte"
    data: str | None = None
    out: Path = Path("runs/edits")
    seeds: int = 3
    rows: int = 400
    steps: int = 200
    inner_steps: int = 10
    outer_steps: int = 20


def one(setup: Setup, seed: int) -> dict[str, dict[str, Any]]:
    """One seed: a row for each arm."""
    found = {}
    for name, changes in ARMS.items():
        settings = LoRATRFSettings(
            **low_data.settings(
                setup, setup.out / f"{setup.task}-{name.replace(' ', '-')}-seed-{seed}", setup.rows, seed
            ),
            inner_steps=setup.inner_steps,
            outer_steps=setup.outer_steps,
            **changes,
        )
        bench, folder = experiment.prepare(settings), RunFolder(settings.out, settings)
        of = loratrf.make(settings, bench)
        found[name] = folder.once("results/loratrf", partial(loratrf.edited, settings, bench, of, folder))
        if name == "training rows":
            matched = partial(inside.plain_lora, settings, bench, folder, found[name]["parameters"])
            found["LoRA"] = folder.once("results/lora", matched)
    return found


def main(setup: Setup) -> None:
    """All seeds; prints a table and writes `<task>.json`."""
    rows = [one(setup, seed) for seed in range(setup.seeds)]
    table = Table("task vectors", "parameters", "metric, mean over seeds", "sd")
    for name in rows[0]:
        metric = np.array([next(iter(row[name]["metrics"].values())) for row in rows])
        spread = metric.std(ddof=1) if len(metric) > 1 else float("nan")
        table.add_row(name, str(rows[0][name]["parameters"]), f"{metric.mean():.3f}", f"{spread:.3f}")
    Console().print(table)
    (setup.out / f"{setup.task}.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Setup, description=__doc__))
