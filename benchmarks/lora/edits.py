r"""LoRATRF, reconstructed, on a classification task: task vectors of training or validation rows, equal parameters.

For each seed, on one split: the edit beside LoRA with task vectors that are trained with the rest, with task vectors
chosen on validation rows (unrolled), without a filter, and LoRA alone at the rank with the nearest number of
parameters. Told is the metric on the published validation split.

    python -m benchmarks.lora.edits --task rte        # resumable
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from benchmarks.lora import low_data
from methods import driver, lora, loratrf
from methods.bench import Bench
from methods.loratrf import LoRATRFSettings
from methods.runfolder import RunFolder

ARMS: dict[str, dict[str, Any]] = {
    "training rows": {"outer": "none"},
    "validation rows": {"outer": "vectors"},
    "no filter": {"outer": "none", "filter": "none"},
}


@dataclasses.dataclass(frozen=True)
class Setup(low_data.Setup):
    """What is compared, and how.

    Attributes:
      rows: training rows, and as many validation rows.
      inner_steps: K of the search.
      outer_steps: T of the search.
    """

    out: Path = Path("runs/edits")
    seeds: int = 3
    rows: int = 400
    inner_steps: int = 10
    outer_steps: int = 10


def one(setup: Setup, seed: int, jobs: low_data.Jobs) -> dict[str, dict[str, Any]]:
    """One seed: a row for each arm."""
    found = {}
    for name, changes in ARMS.items():
        base = setup.settings(LoRATRFSettings, f"{setup.task}-{name.replace(' ', '-')}", setup.rows, seed)
        steps = {"inner_steps": setup.inner_steps, "outer_steps": setup.outer_steps}
        settings = dataclasses.replace(base, **steps, **changes)
        bench, folder = loratrf.COMMAND.prepare(settings), RunFolder(settings.out, settings)
        found[name] = jobs.once(folder, "results/loratrf", partial(edited, settings, bench, folder))
        if name == "training rows":
            control = lora.control(settings, bench, parameters_of=found[name]["parameters"])
            found["LoRA"] = jobs.once(folder, "results/lora", partial(driver.row, control, bench, folder))
    return {arm: {name: row[name] for name in ("metrics", "parameters")} for arm, row in found.items()}


def edited(settings: LoRATRFSettings, bench: Bench, folder: RunFolder) -> dict[str, Any]:
    """Searches what is outer, and trains and tests the edit."""
    searched = [driver.search(each, folder) for each in loratrf.searches(settings, bench)]
    arm, _ = loratrf.choose(settings, bench, searched, driver.trying(bench, folder)).arms
    return driver.row(arm, bench, folder)


def main(setup: Setup) -> None:
    """All seeds, then the record and the page."""
    jobs = low_data.Jobs((len(ARMS) + 1) * setup.seeds)
    setup.finish(f"edits-{setup.task}", [one(setup, seed, jobs) for seed in range(setup.seeds)])


if __name__ == "__main__":
    main(tyro.cli(Setup, description=__doc__))
