"""`bilevel baseline NAME`: one of the baselines on a real model and task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro

import bilevel
from methods import lora, side_by_side
from methods.baselines import BASELINES, BESIDES, BEYOND, LEAST_STEPS, WITHOUT_BUDGET, Setting
from methods.baselines.base import Found
from methods.bench import Bench
from methods.driver import Arm, Chosen, Method, Tried
from methods.objective import Bound
from methods.pages import Page, Run, number
from methods.ranges import Listed, Share, one_of
from methods.runfolder import RunFolder
from methods.settings import NO_OUTER, Settings


@dataclasses.dataclass(frozen=True)
class BaselineSettings(Settings):
    """A baseline: spend a budget of parameters in a published way, and evaluate.

    Attributes:
      name: of the baseline.
      share: the budget, as a share of the parameters of LoRA of --rank on all modules.
    """

    name: tyro.conf.Positional[Annotated[str, one_of(BASELINES, metavar="NAME"), Listed(BASELINES)]] = "uniform"
    share: Share = 0.25


def unused(settings: BaselineSettings) -> dict[str, str]:
    """Options without effect, and why."""
    published = ("finetune_optimizer", "warmup", "schedule", "weight_decay", "clip", "lora_dropout")
    fixed = dict.fromkeys(published, "a baseline trains as published, by Adam at a constant rate")
    share = {"share": f"{settings.name} has no budget to share"} if settings.name in WITHOUT_BUDGET else {}
    return NO_OUTER | fixed | share


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


def setting_of(
    settings: BaselineSettings, bench: Bench, callbacks: Callable[[str], Sequence[Any]] = lambda part: ()
) -> Setting:
    """What the baselines are given of a bench.

    Raises:
      ValueError: as `check`.
    """
    check(settings)
    given = bench.given()
    return Setting(
        lambda weights, adapt, head, batch: given.loss(weights, Bound(adapt, head), batch),
        given.weights,
        bench.lora,
        bench.shapes,
        bench.num_layers,
        bench.train,
        bench.outer,
        settings.share,
        settings.finetune_steps,
        settings.batch_size,
        settings.finetune_lr,
        start_head=lambda key: given.start(key)["head"],
        callbacks=callbacks,
        sharding=bench.sharding,
    )


def choose(settings: BaselineSettings, bench: Bench, found: Sequence[bilevel.Result], tried: Tried) -> Chosen:
    """The baseline, which searches and trains by itself."""
    del found, tried

    def train(folder: RunFolder, name: str) -> Found:
        setting = setting_of(settings, bench, lambda part: folder.callbacks(f"{name} {part}".rstrip()))
        return BASELINES[name](setting, jax.random.key(settings.seed + 1))

    def count(found: Found) -> dict[str, Any]:
        on = {site: np.asarray(share, float).tolist() for site, share in found.on.items()}
        return {"on": on, "parameters": lora.parameters(bench, {}) + found.parameters}

    def export(folder: RunFolder, found: Found) -> None:
        if found.scores is not None:
            folder.write("scores", found.scores)
        if found.exported is not None:
            config, params, gate, mask = found.exported
            trained = {"lora": params, "head": found.head}
            lora.export_adapter(folder.path / "adapter", bench, trained, config=config, gate=gate, mask=mask)

    bind = lambda found: Bound(found.adapt, found.head)  # noqa: E731
    return Chosen({}, [Arm(settings.name, train, bind, count, export)])


def page(run: Run) -> Page:
    """Which modules are in use."""
    settings, bench = run.settings, run.bench
    head = lora.parameters(bench, {})
    spent = run.results[settings.name]["parameters"] - head
    real = spent / (lora.parameters(bench, lora.everywhere(bench.given())) - head)
    budget = f"with a budget of {settings.share:.0%} of LoRA of rank {settings.rank}, of which it takes {real:.1%}"
    if settings.name in WITHOUT_BUDGET:
        budget = f"without a budget: it takes {real:.1%} of LoRA of rank {settings.rank}"
    elif real > settings.share:
        why = BEYOND.get(settings.name, "since it spends whole ranks, one a module at least")
        budget += f", more than that, {why}"
    before = BESIDES.get(settings.name, lambda steps: 0)(settings.finetune_steps)
    besides = f", after {number(before, 'step')} of choosing" if before else ""
    made = (
        f"Trained for {number(settings.finetune_steps, 'step')} of Adam at that constant rate{besides}, {budget}. "
        "The docstring of its file in `methods/baselines/` says what is published and what is our choice. The scores "
        "of the modules, if it has any: `scores.json`. If it is a LoRA, it is in `adapter/`, in PEFT's format."
    )
    return Page(settings.name, "", side_by_side.of_run(run.folder, run.results), made)


COMMAND = Method(
    BaselineSettings,
    {"demo": {}},
    choose=choose,
    page=page,
    unused=unused,
    check=check,
    name="baseline",
)
