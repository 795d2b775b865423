"""Plain LoRA, rsLoRA or DoRA on every layer, at one rank: what every other method has to be better than.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from methods import experiment, report
from methods.experiment import Settings


@dataclasses.dataclass(frozen=True)
class LoRASettings(Settings):
    """Plain LoRA: train it on every layer, with a head where texts are labelled, and evaluate."""


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "glue": {
        "task": "rte",
        "length": 128,
        "batch_size": 16,
        "train_rows": 2000,
        "outer_rows": 256,
        "test_rows": 0,
        "finetune_steps": 600,
        "finetune_lr": 2e-3,
        "validate_every": 100,
        "remat": False,
    },
}
"""Settings that differ from the defaults, by preset."""


def main(settings: LoRASettings) -> None:
    """Training, evaluation, report, adapter: all in `settings.out`.

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong.
      FloatingPointError: if training diverges; names step and leaf.
    """
    bench = experiment.prepare(settings)
    folder = experiment.open_run(settings, bench)
    layers = list(range(bench.num_layers))
    arms = [settings.adapter]
    if bench.head is None:  # a fresh head knows nothing of the task
        arms.insert(0, "pretrained")
        fresh = experiment.start(bench, jax.random.key(0))
        folder.once("results/pretrained", lambda: report.arm(bench, [], experiment.evaluate(bench, fresh, [])))

    def trained() -> dict[str, Any]:
        params = experiment.finetune(settings, bench, layers, settings.adapter, folder)
        experiment.save_adapter(folder.path / "adapter", bench, params, layers)
        return report.arm(bench, layers, experiment.evaluate(bench, params, layers))

    folder.once(f"results/{settings.adapter}", trained)
    report.training(folder, settings, bench, arms)
