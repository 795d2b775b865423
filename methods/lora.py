"""Plain LoRA, rsLoRA or DoRA on every layer, at one rank: what every other method has to be better than.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from methods import figures, pages
from methods.adapters.lora import LoRAConfig, PerLayer
from methods.adapters.peft import save_peft
from methods.bench import Bench
from methods.driver import Arm, Chosen, Method, Tried, finetuning
from methods.objective import Bound, Given
from methods.pages import Page, Run
from methods.runfolder import RunFolder
from methods.settings import NO_OUTER, Settings
from methods.training import Recipe

Mask = Mapping[str, Any]
"""Where LoRA is: bool `{site: [L]}`."""


@dataclasses.dataclass(frozen=True)
class LoRASettings(Settings):
    """Plain LoRA on every layer, with a head where the model has none that answers."""


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


def problem(given: Given) -> bilevel.Problem:
    """LoRA on some modules as a problem for `bilevel.fit`: the outer variable is their mask, which stays as it is.

    So every choice of modules is one compiled program. The mask starts with every module on.
    """

    def training(weights, params, mask, batch, key):
        return given.loss(weights, given.bind(weights, params, mask=mask, key=key), batch)

    def validation(weights, params, mask, batch, key):
        return given.loss(weights, given.bind(weights, params, mask=mask), batch)

    inner, outer = (jax.tree_util.Partial(f, given.weights) for f in (training, validation))
    return bilevel.Problem(inner, outer, lambda key, mask: given.start(key), lambda key: everywhere(given))


def everywhere(given: Given) -> dict[str, jax.Array]:
    """The mask of every module."""
    return dict.fromkeys(given.sites, jnp.ones(given.num_layers, bool))


def choose(settings: LoRASettings, bench: Bench, found: Sequence[bilevel.Result], tried: Tried) -> Chosen:
    """Nothing: LoRA on every layer, and the model as it came."""
    del found, tried
    given = bench.given()
    trained = arm(settings, bench, problem(given), settings.adapter, everywhere(given), export=True)
    return Chosen({}, [*untrained(bench), trained])


def arm(
    settings: Settings,
    bench: Bench,
    of: bilevel.Problem,
    name: str,
    mask: Mask,
    *,
    plan: Recipe | None = None,
    export: bool = False,
) -> Arm:
    """LoRA trained from scratch on the modules of a mask, with the head if there is one.

    Args:
      settings, bench: of the run.
      of: as from `problem`.
      name: of the arm.
      mask: which modules.
      plan: in place of the settings' recipe.
      export: whether it is the adapter that the run leaves, in `adapter/`.
    """
    given, blocks = bench.given(), bench.pretrained.weights

    def bind(params: Any) -> Bound:
        return given.bind(blocks, params, mask=mask)

    def count(params: Any) -> dict[str, Any]:
        del params
        return {"on": on(mask), "parameters": parameters(bench, mask)}

    def save_in(folder: RunFolder, params: Any) -> None:
        if export:
            export_adapter(folder.path / "adapter", bench, params, mask=mask)

    return Arm(name, finetuning(settings, bench, of, mask, bind, plan=plan), bind, count, save_in)


def control(settings: Settings, bench: Bench, *, parameters_of: int | None = None) -> Arm:
    """LoRA on every layer, which other methods are compared with; its row has its "rank".

    Args:
      settings, bench: of the run.
      parameters_of: how many to train, head included: the rank is that with the nearest number; None for the settings'.
    """
    mask = everywhere(bench.given())
    if parameters_of is not None:
        head = parameters(bench, {})
        one_rank = (parameters(bench, mask) - head) / bench.lora.rank
        rank = max(1, round((parameters_of - head) / one_rank))
        bench = bench._replace(lora=dataclasses.replace(bench.lora, rank=rank))
    plain = arm(settings, bench, problem(bench.given()), "lora", mask)
    return plain._replace(count=lambda params: plain.count(params) | {"rank": bench.lora.rank})


def untrained(bench: Bench, *, always: bool = False) -> list[Arm]:
    """The model as it came, if its own head answers, or `always`: a fresh head knows nothing of the task."""
    given = bench.given()
    if bench.head is not None and not always:
        return []
    fresh = lambda folder, name: {"lora": {}, "head": given.start(jax.random.key(0))["head"]}  # noqa: E731
    nowhere = dict.fromkeys(given.sites, np.zeros(given.num_layers, bool))
    count = lambda params: {"on": on(nowhere), "parameters": parameters(bench, {})}  # noqa: E731
    return [Arm(pages.UNTRAINED, fresh, partial(given.bind, given.weights), count)]


def on(mask: Mask) -> dict[str, list[int]]:
    """A mask as a row of the results holds it."""
    return {site: np.asarray(each, int).tolist() for site, each in mask.items()}


def parameters(bench: Bench, mask: Mask) -> int:
    """Parameters trained: LoRA's in the modules of the mask, and the head's."""
    head = jax.eval_shape(bench.given().start, jax.random.key(0))["head"]
    size = sum(leaf.size for leaf in jax.tree.leaves(head))
    for site, each in mask.items():
        if layers := np.flatnonzero(each).tolist():
            one = dataclasses.replace(bench.lora, targets=[site], layers=layers)
            size += one.size(bench.shapes, bench.num_layers)
    return size


def export_adapter(
    folder: Path,
    bench: Bench,
    params: Any,
    *,
    config: LoRAConfig | None = None,
    gate: PerLayer | None = None,
    mask: PerLayer | None = None,
) -> None:
    """What was trained, `{"lora", "head"}`, as PEFT's folder; `config` in place of the bench's."""
    config, lora, head = config or bench.lora, params["lora"], params["head"]
    save_peft(folder, config, lora, bench.hf_names, gate=gate, mask=mask, head=head, task_type=bench.peft_task)


def page(run: Run) -> Page:
    """The losses, and how it was trained."""
    settings = run.settings
    file = run.figure("training.png")
    figures.training(file, run.folder, list(run.results))
    every, count = settings.validate_every, settings.accumulate
    chosen = f"the best of the validations, one every {every} steps," if every else "the last, without validation,"
    made = (
        f"{settings.adapter} on all {run.bench.num_layers} layers; {count} batch{'es' * (count != 1)} of "
        f"{settings.batch_size} rows a step of {pages.optimizer(settings)}; {chosen} is what was tested. The adapter "
        "is in `adapter/`, in PEFT's format."
    )
    return Page("LoRA", "", {file.name: "loss"}, made)


COMMAND = Method(LoRASettings, PRESETS, choose=choose, page=page, unused=lambda settings: NO_OUTER)
