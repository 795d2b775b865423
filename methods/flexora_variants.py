"""What Flexora's search computes: as the paper has it, or as the code computes that its authors released.

The released code (2025, on LLaMA-Factory 0.8.2, transformers 4.41, peft 0.11) differs from the paper in the options of
`RELEASED_OPTIONS` and in what `RELEASED` says. Read off its files: gradients are accumulated over batches of one
row, whose loss is a mean over that row's answer, the mark of the end included. They are clipped to norm 1. AdamW's
weight decay is torch's default of 0.01, which a copy of the optimizer's defaults brings back. "warmup_steps: 0.1" is
less than a step, so that the first rate is 0 and all others lie on a cosine. The hypergradient is summed over the
validation rows of a step, which are taken in their order, again and again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax

from methods.bench import recipe
from methods.training import Recipe


@dataclasses.dataclass(frozen=True)
class Variant:
    """What no option says.

    Attributes:
      gate_power: how often a layer's gate multiplies its update.
      selects: layers whose alpha is above the mean, or above zero.
      loss: the mean over all answer tokens of a batch, or the mean over rows of each row's own mean.
      end_of_text: whether an answer ends with the tokenizer's mark of the end, which is trained on.
      schedule: of the search's inner learning rate.
      weight_decay: of the search's inner optimizer.
      clip: largest norm of a training gradient, in the search and in the final training; 0: any.
      outer_data: the order of the validation rows.
      final_warmup: share of the final training's steps, rounded up; None: a tenth, rounded down.
      final_batches: rows of similar length together, or drawn at random.
      left_out: in what this is not the released code.
    """

    gate_power: int = 1
    selects: Literal["mean", "zero"] = "mean"
    loss: Literal["mean over answer tokens", "mean over rows of means"] = "mean over answer tokens"
    end_of_text: bool = False
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.0
    clip: float = 0.0
    outer_data: Literal["shuffled", "cycled"] = "shuffled"
    final_warmup: float | None = None
    final_batches: Literal["by length", "at random"] = "by length"
    left_out: tuple[str, ...] = ()

    @property
    def row_means(self) -> bool:
        return self.loss == "mean over rows of means"


PAPER = Variant()
"""What the paper says."""

RELEASED = Variant(
    gate_power=3,
    selects="zero",
    loss="mean over rows of means",
    end_of_text=True,
    schedule="cosine",
    weight_decay=0.01,
    clip=1.0,
    outer_data="cycled",
    final_warmup=0.1,
    final_batches="at random",
    left_out=(
        "sizes: rows, steps, rank and --finetune-lr are as given; --preset released has the published ones",
        "chat template: prompts and answers are the task's own, without the template's marks and system text",
        "cutting: rows of more than --length tokens are left out; the released code cuts them at 1,024",
        "half precision: everything is computed in the weights' dtype, float32 unless asked otherwise",
        "rows of the final training: those of --train-rows; the released one saw 18,000 in 3 epochs, 6,750 steps of 8",
        "labels: a task that is answered by a head has no text, and so no mark of its end",
    ),
)
"""What the released code computes, beside what `RELEASED_OPTIONS` sets."""

PAPER_OPTIONS: dict[str, Any] = {
    "hypergradient": "unrolled",
    "inner_steps": 4,
    "inner_optimizer": "adam",
    "inner_lr": 1e-3,
    "inner_start": "warm",
    "outer_optimizer": "sgd",
    "outer_lr": 10.0,
    "outer_decay": 0.0,
    "per": "layer",
    "warmup": 0.1,
    "clip": 0.0,
}
"""What an option is that was not given."""

RELEASED_OPTIONS: dict[str, Any] = {
    "hypergradient": "first-order",
    "inner_steps": 1,
    "inner_optimizer": "cleared-adamw",
    "inner_lr": 1e-4,
    "inner_start": "warm",
    "outer_optimizer": "adam",
    "outer_lr": 1e-2,
    "outer_decay": 0.0,
    "per": "layer",
    "warmup": 0.1,
    "clip": 1.0,
}
"""What an option is with `--released`."""


RELEASED_FINAL: dict[str, Any] = {"finetune_optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.0}
"""What the final training of the released code is: these options have a default in every command, which is that."""


def options(settings: Any) -> dict[str, Any]:
    """The options that were not given, filled in.

    Raises:
      ValueError: for one that contradicts `--released`.
    """
    if not settings.released:
        return {name: _or(getattr(settings, name), value) for name, value in PAPER_OPTIONS.items()}
    for name, value in (RELEASED_OPTIONS | RELEASED_FINAL).items():
        if (given := getattr(settings, name)) is not None and given != value:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"--released is {flag} {value}, and {flag} {given} contradicts it: leave one of them out.")
    return RELEASED_OPTIONS


def _or(given: Any, value: Any) -> Any:
    return value if given is None else given


def cleared(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, its state thrown away after every step."""

    def update(updates: Any, state: Any, params: Any = None):
        updates, _ = optimizer.update(updates, optimizer.init(params), params)
        return updates, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def cosine(rate: float, steps: int, warmup: float = 0.1) -> optax.Schedule:
    r"""The released search's learning rate: 0 at step 0, then

    $$ \frac{r}{2} \left(1 + \cos \pi \frac{t - w}{\max(1, T - w)}\right) $$

    with w = 0.1, transformers' cosine schedule for a warm-up of less than one step.
    """

    def at(step: Any) -> Any:
        step = jnp.asarray(step, jnp.result_type(float))
        progress = (step - warmup) / max(1.0, steps - warmup)
        return jnp.where(step < warmup, 0.0, rate * jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * progress))))

    return at


def _cleared_adam() -> optax.GradientTransformation:
    return cleared(optax.scale_by_adam())


INNER_OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "sgd": optax.identity,
    "cleared-adamw": _cleared_adam,
}
"""How LoRA's gradient is scaled in the search, by the name that the command line knows."""


def inner_optimizer(settings: Any, variant: Variant) -> optax.GradientTransformation:
    """The search's optimizer of LoRA."""
    rate: Any = settings.inner_lr
    if variant.schedule == "cosine":
        rate = cosine(rate, settings.outer_steps * settings.inner_steps)
    parts = [optax.clip_by_global_norm(variant.clip)] if variant.clip else []
    parts.append(INNER_OPTIMIZERS[settings.inner_optimizer]())
    if variant.weight_decay:
        parts.append(optax.add_decayed_weights(variant.weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(rate))


def outer_optimizer(settings: Any, variant: Variant) -> optax.GradientTransformation:
    """The search's optimizer of alpha."""
    if settings.outer_optimizer == "sgd":
        return optax.sgd(settings.outer_lr)
    # The released code sums the validation losses of a step where we take their mean; Adam with an eps that is smaller
    # by as much moves alpha alike.
    eps = 1e-8 / settings.outer_batch_size if variant is RELEASED else 1e-8
    return optax.adam(settings.outer_lr, eps=eps)


def final_recipe(settings: Any, variant: Variant) -> Recipe:
    """How the final training trains: by the settings, and in the released code a warm-up that is rounded up."""
    plan = dataclasses.replace(recipe(settings), by_length=variant.final_batches == "by length")
    if variant.final_warmup is None:
        return plan
    warmup = math.ceil(settings.finetune_steps * variant.final_warmup)
    return dataclasses.replace(plan, warmup=warmup)
