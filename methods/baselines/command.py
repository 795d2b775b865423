"""`bilevel baseline NAME`: one of the baselines on a real model and task."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from methods import experiment, report, side_by_side
from methods.baselines import BASELINES, LEAST_STEPS, WITHOUT_BUDGET, Setting
from methods.baselines.base import Found
from methods.experiment import Bench, Settings
from methods.objective import Bound
from methods.ranges import Share, one_of


@dataclasses.dataclass(frozen=True)
class BaselineSettings(Settings):
    """A baseline: spend a budget of adapter parameters in a published way, and evaluate.

    Attributes:
      name: of the baseline.
      share: the budget, as a share of the parameters of LoRA of `rank` on all modules.
    """

    name: tyro.conf.Positional[Annotated[str, one_of(BASELINES)]] = "uniform"
    share: Share = 0.25


PRESETS: dict[str, dict[str, Any]] = {"demo": {}}


def unused(settings: BaselineSettings) -> dict[str, str]:
    """Options without effect, and why."""
    return {"share": f"{settings.name} has no budget to share"} if settings.name in WITHOUT_BUDGET else {}


def check(settings: BaselineSettings) -> None:
    """What is wrong with the settings whatever the model is.

    Raises:
      ValueError: for DoRA, whose lengths no baseline has, for what their training does not do, and for fewer steps than
        the baseline has parts.
    """
    if settings.adapter == "dora":
        raise ValueError("--adapter dora: the baselines are made for LoRA and rsLoRA.")
    if settings.accumulate > 1 or settings.validate_every or settings.patience:
        raise ValueError(
            "--accumulate, --validate-every and --patience: a baseline trains as published, by Adam at a constant rate."
        )
    if settings.finetune_steps < (least := LEAST_STEPS.get(settings.name, 1)):
        raise ValueError(
            f"--finetune-steps {settings.finetune_steps} must be at least {least}: {settings.name} trains in {least} "
            "parts."
        )


def setting_of(settings: BaselineSettings, bench: Bench, callbacks: Any = ()) -> Setting:
    """What the baselines are given of a bench.

    Raises:
      ValueError: as `check`.
    """
    check(settings)
    loss = experiment.loss(bench)
    return Setting(
        lambda weights, adapt, head, batch: loss(weights, Bound(adapt, head), batch),
        bench.pretrained.weights,
        bench.lora,
        bench.pretrained.config.site_shapes(),
        bench.num_layers,
        bench.train,
        bench.outer,
        settings.share,
        settings.finetune_steps,
        settings.batch_size,
        settings.finetune_lr,
        start_head=lambda key: experiment.start(bench, key)["head"],
        callbacks=callbacks,
    )


def main(settings: BaselineSettings) -> None:
    """Training, evaluation, report, adapter: all in `settings.out`.

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong.
      FloatingPointError: if training diverges; names step and leaf.
    """
    check(settings)
    bench = experiment.prepare(settings)
    folder = experiment.open_run(settings, bench)

    def trained() -> dict[str, Any]:
        setting = setting_of(settings, bench, [folder.log(settings.name)])
        found = BASELINES[settings.name](setting, jax.random.key(settings.seed + 1))
        folder.write("selection", {"on": found.on, "scores": found.scores})
        if found.exported is not None:
            config, params, gate, mask = found.exported
            experiment.save_bound(folder.path / "adapter", bench, config, params, found.head, gate, mask)
        return _row(bench, found)

    folder.once(f"results/{settings.name}", trained)
    title = f"{settings.name} on {bench.task.name}, {Path(settings.model).name}"
    side_by_side.page(folder.path, (folder.path,), title, _how(settings))


def _row(bench: Bench, found: Found) -> dict[str, Any]:
    row = report.arm(bench, [], experiment.evaluate_with(bench, Bound(found.adapt, found.head)))
    on = {site: np.asarray(share, float).tolist() for site, share in found.on.items()}
    return row | {"on": on, "parameters": row["parameters"] + found.parameters}


def _how(settings: BaselineSettings) -> str:
    return f"""Trained for {settings.finetune_steps} steps of Adam, learning rate {settings.finetune_lr:g}, with a
budget of {settings.share:.0%} of LoRA of rank {settings.rank}. The docstring of its file in `methods/baselines/` says
what is published and what is our choice. All settings: `config.json`; the steps of its last training: `metrics.jsonl`;
which modules are in use, and their scores: `selection.json`. If it is a LoRA, it is in `adapter/`, in PEFT's format.
"""
