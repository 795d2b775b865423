"""The ordinary fine-tuning loop: an optax optimizer, a schedule, validation, the best parameters, early stop, resume.

It is `bilevel.fit`, the inner problem at a fixed outer variable, with a callback that validates. Killed at any moment
and started again it gives what it would have given, bit for bit: batches are a function of the step, and a validation
that is repeated finds what it found.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable
from typing import Any

import jax
import optax

import bilevel
from bilevel.extend import Checkpoints
from methods import mesh, processes
from methods.causes import reading
from methods.runfolder import RunFolder
from methods.tasks import Buckets

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adamw": lambda eps_root: optax.scale_by_adam(eps_root=eps_root),
    "sgd": lambda eps_root: optax.identity(),
    "momentum": lambda eps_root: optax.trace(0.9),
}
"""How a gradient is scaled before the rate, given Adam's `eps_root`."""
SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "cosine": optax.cosine_decay_schedule,
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "constant": lambda peak, steps: optax.constant_schedule(peak),
}
"""The rate after its peak, given the peak and the steps that are left."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
      steps: optimizer steps.
      learning_rate: the peak, after a linear warm-up.
      accumulate: batches whose mean gradient makes one optimizer step.
      validate_every: optimizer steps between two validations; 0: none, and the last parameters are the result.
      patience: validations in a row without a new best after which training stops; 0: never.
      warmup: steps of the warm-up; None: a tenth of all, rounded down, at least 1.
      clip: a gradient of a larger Euclidean norm, taken over all parameters, is shortened to it; 0: never.
      optimizer_name: a name in `OPTIMIZERS`.
      schedule: a name in `SCHEDULES`, of the rate after its peak.
      weight_decay: lambda; a step subtracts rate * lambda * parameters beside what the optimizer says (Loshchilov and
        Hutter, 2019, arXiv:1711.05101).
      eps_root: what Adam adds under its square root, which makes a training smoother.
      by_length: batches hold rows of similar length; else they are drawn at random.

    Raises:
      ValueError: for a count below its least, or patience without validations.
    """

    steps: int
    learning_rate: float
    accumulate: int = 1
    validate_every: int = 0
    patience: int = 0
    warmup: int | None = None
    clip: float = 0.0
    optimizer_name: str = "adamw"
    schedule: str = "cosine"
    weight_decay: float = 0.0
    eps_root: float = 0.0
    by_length: bool = True

    def __post_init__(self):
        for name, known in (("optimizer_name", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"Fine-tuning with {name}={getattr(self, name)!r}: choose from {', '.join(known)}.")
        for name, least in (("steps", 1), ("accumulate", 1), ("validate_every", 0), ("patience", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"Fine-tuning with {name}={getattr(self, name)}: it must be at least {least}.")
        if self.patience and not self.validate_every:
            raise ValueError(f"patience={self.patience} counts validations, of which there are none: validate_every=0.")
        if not 0 <= self.warming < self.steps:
            raise ValueError(
                f"Fine-tuning with steps={self.steps}: {self.warming} of them are its warm-up, of which the first has "
                f"rate 0; it must be at least {self.warming + 1}."
            )
        for name in ("learning_rate", "clip", "weight_decay", "eps_root"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Fine-tuning with {name}={getattr(self, name)}: it must be a number from 0 on.")

    @property
    def warming(self) -> int:
        """Steps of the warm-up."""
        return max(1, self.steps // 10) if self.warmup is None else self.warmup

    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of one batch a step; the same object for the same recipe."""
        return _optimizer(self)


    def rate(self) -> optax.Schedule:
        """The learning rate by optimizer step."""
        rise = optax.linear_schedule(0.0, self.learning_rate, self.warming)
        after = SCHEDULES[self.schedule](self.learning_rate, self.steps - self.warming)
        return optax.join_schedules([rise, after], [self.warming]) if self.warming else after


@functools.cache  # optimizers compare by identity: a new one would have the same training compiled again
def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Clipping, the optimizer's scaling, weight decay apart from it, the rate; over all batches of a step."""
    parts = [optax.clip_by_global_norm(recipe.clip)] if recipe.clip else []
    parts += [OPTIMIZERS[recipe.optimizer_name](recipe.eps_root)]
    parts += [optax.add_decayed_weights(recipe.weight_decay)] if recipe.weight_decay else []
    whole = optax.chain(*parts, optax.scale_by_learning_rate(recipe.rate()))
    return optax.MultiSteps(whole, recipe.accumulate).gradient_transformation() if recipe.accumulate > 1 else whole


def train(
    problem: bilevel.Problem,
    outer: Any,
    batches: Buckets,
    recipe: Recipe,
    folder: RunFolder,
    name: str,
    *,
    key: jax.Array,
    validate: Callable[[Any], float] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    sharding: bilevel.Sharding | None = None,
    progress: bool = True,
) -> Any:
    """The inner variable of `problem` after training at `outer`; with validations the best, else the last.

    Args:
      problem: `inner_loss` is trained on, one batch at a time.
      outer: where the outer variable stays.
      batches: training batches; set to their beginning.
      recipe: how to train.
      folder: metrics go to `metrics.jsonl`, the state to `checkpoints/finetune-<name>`, validations to
        `validation/<name>.json`, the best parameters so far to `validation/<name>.safetensors`.
      name: of the training.
      key: of the start values and of what the loss draws.
      validate: from parameters to the validation loss; smaller is better.
      optimizer: in place of the recipe's.
      sharding, progress: as for `bilevel.fit`.

    Raises:
      ValueError: if the recipe validates and there is no `validate`.
      FloatingPointError: if training diverges, or a validation loss is not finite; names the step.
    """
    if recipe.validate_every and validate is None:
        raise ValueError("A recipe that validates needs a validation loss.")
    callbacks = folder.callbacks(f"finetune {name}")
    checkpoint = folder.path / "checkpoints" / f"finetune-{name}"
    optimizer = recipe.optimizer() if optimizer is None else optimizer

    processes.tell(f"compiling fine-tuning, {name}")

    def fit(steps: int, progress: bool = progress) -> Any:
        batches.set_state(0)
        return bilevel.fit(
            problem,
            outer,
            optimizer=optimizer,
            data=mesh.shared(batches, sharding),
            steps=steps,
            key=key,
            progress=progress,
            callbacks=callbacks,
            checkpoint_dir=checkpoint,
            title=f"fine-tuning, {name}",
            sharding=sharding,
        )

    if validate is None or not recipe.validate_every:
        return fit(recipe.steps * recipe.accumulate).inner.params
    validation = Validation(validate, recipe, folder, name)
    last = Checkpoints(checkpoint).latest()
    if not validation.is_whole(last or 0):  # what has been deleted of it only a training from the beginning finds
        processes.decided(lambda: shutil.rmtree(checkpoint, ignore_errors=True))
        validation.losses, last = {}, None
    if last and last not in validation.losses:
        # Interrupted between the step and its validation, if it has one: `fit` finds it done, and returns its state.
        validation(last, fit(last, progress=False).state, None)
    callbacks.append(validation)
    result = fit(validation.stopped_at() or recipe.steps * recipe.accumulate)
    return validation.best(result.inner.params)


class Validation:
    """A callback of `bilevel.run` that validates, keeps the best parameters and stops when they stay the best too long.

    What it knows is in two files: `validation/<name>.json`, the loss by step, and the best parameters. A run that
    resumes from before some of these validations comes by them again, and takes what it knows.
    """

    def __init__(self, validate: Callable[[Any], float], recipe: Recipe, folder: RunFolder, name: str):
        self._validate, self._recipe, self._folder, self._name = validate, recipe, folder, f"validation/{name}"
        rows = folder.read(self._name) if folder.has(self._name) else []
        with reading(f"{folder.path / self._name}.json", "delete it to have it made again"):
            self.losses: dict[int, float] = {int(row["step"]): float(row["loss"]) for row in rows}

    def is_whole(self, last: int) -> bool:
        """Whether all is known of a training that goes on after step `last`: each loss before it, and the best."""
        best = self._folder.path / f"{self._name}.safetensors"
        before = {step for step in range(1, last) if self._is_due(step)}
        return before <= self.losses.keys() and (not self.losses or processes.decided(best.is_file))

    def _is_due(self, step: int) -> bool:
        number, within = divmod(step, self._recipe.accumulate)
        return not within and (number % self._recipe.validate_every == 0 or number == self._recipe.steps)

    def __call__(self, step: int, state: Any, metrics: Any) -> bool:
        if not self._is_due(step):
            return False
        number = step // self._recipe.accumulate
        if step in self.losses:  # a run that resumes comes by it again
            return (self.stopped_at() or step + 1) <= step
        before = {at: loss for at, loss in self.losses.items() if at < step}
        loss = float(self._validate(state.inner.params))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The validation loss after {number} steps of {self._name.removeprefix('validation/')} is {loss}: no "
                "parameters are the best by it; lower the learning rate."
            )
        if not before or loss < min(before.values()):
            self._folder.write_arrays(self._name, state.inner.params)
        self.losses = before | {step: loss}
        self._folder.write(self._name, [{"step": at, "loss": value} for at, value in self.losses.items()])
        return self.stopped_at() is not None

    def stopped_at(self) -> int | None:
        """The batch after which patience was at its end, if it was."""
        best, waited = float("inf"), 0
        for step, loss in sorted(self.losses.items()):
            best, waited = (loss, 0) if loss < best else (best, waited + 1)
            if self._recipe.patience and waited >= self._recipe.patience:
                return step
        return None

    def best(self, like: Any) -> Any:
        """The parameters of the smallest loss, in the structure of `like`."""
        return self._folder.read_arrays(self._name, like)
