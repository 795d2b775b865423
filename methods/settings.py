"""The options that every command has, in the groups in which its help shows them: a group is a class."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from methods import ranges
from methods.ranges import Count, CountOrNone, Listed, NotNegative, Positive, Range, Seed, one_of
from methods.tasks import FORMATS, TASKS
from methods.tracking import TRACKERS
from methods.training import OPTIMIZERS, SCHEDULES


@dataclasses.dataclass(frozen=True)
class Model:
    """The model, and the adapter that is trained on it.

    Attributes:
      model: a folder in Hugging Face layout, a .gguf file, or a name on the hub.
      dtype: of the frozen weights and of what products are of; "bfloat16" halves their memory. Sums, what is trained,
        its optimizer's state and hypergradients are float32 all the same.
      adapter: "rslora" scales by alpha / sqrt(r), "dora" trains the lengths of the adapted columns beside LoRA.
      targets: names of the adapted linears, or one regular expression.
      rank: LoRA's r.
      lora_alpha: LoRA's alpha; the update is scaled by alpha / r.
      lora_dropout: share of what LoRA reads that is set to 0 in a training step, at random.
      remat: recompute blocks in the backward pass: less memory, one more forward pass.
    """

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    adapter: Literal["lora", "rslora", "dora"] = "lora"
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rank: Count = 8
    lora_alpha: Positive = 16.0
    lora_dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    remat: bool = True


@dataclasses.dataclass(frozen=True)
class Data:
    """The rows that are trained on, those that the outer loss and every validation see, and those of the last test.

    Attributes:
      task: what is asked of the rows, or FILE.py:NAME for a task of your own; by default what the columns of --data
        say, or piqa.
      data: rows of your own, a file (.jsonl, .json, .csv, .tsv, .parquet), a folder with train.jsonl or OWNER/NAME on
        the hub (OWNER/NAME:CONFIGURATION@SPLIT); or a folder that holds <task>/train.jsonl and the like: by default
        $BILEVEL_DATA, assets/data, the hub.
      test_data: rows of your own to test on; by default test.jsonl or validation.jsonl beside train.jsonl, the splits
        of these names on the hub, or else a part of --data that nothing else sees.
      columns: what the columns of your own rows are, such as prompt=question,answer=response.
      length: tokens a training sequence; rows that need more are left out, and plain texts are cut into pieces.
      train_rows: rows the inner loss sees; by default 256 of a task, and of your own rows all that are left.
      outer_rows: validation rows the outer loss sees; where texts are written, prompts, each with all its references;
        by default 128 of a task, and about a quarter of your own training rows.
      test_rows: rows of the last evaluation, or prompts with all their references; 0 takes all; by default 100 of a
        task, all of your own test rows, or a fifth of --data.
    """

    task: Annotated[str | None, Listed(TASKS, FORMATS)] = None
    data: str | None = None
    test_data: str | None = None
    columns: str | None = None
    length: Annotated[int, Range(2, ranges.LARGEST)] = 48
    train_rows: Count | None = None
    outer_rows: Count | None = None
    test_rows: CountOrNone | None = None


@dataclasses.dataclass(frozen=True)
class Training:
    """The batches, and the final training.

    Attributes:
      batch_size: rows an inner or fine-tuning step.
      outer_batch_size: rows an outer loss.
      accumulate: batches whose mean gradient makes one step, in the memory of one: of the search, inner and outer, and
        of the final training.
      finetune_steps: optimizer steps of the final training.
      finetune_epochs: passes over the training rows, in place of --finetune-steps.
      finetune_optimizer: of the final training; "sgd" is plain gradient descent, "momentum" the same with 0.9 of the
        last step.
      finetune_lr: peak learning rate of the final training.
      warmup: share of the steps in which the rate rises to its peak.
      schedule: of the rate after its peak, down to 0, or constant.
      weight_decay: share of the rate by which every step shortens the parameters, apart from the gradient.
      clip: a gradient longer than this is shortened to it; 0: never.
      validate_every: steps between two validations on the outer rows, the best of which is kept; 0: none.
      patience: validations without a new best that stop the final training; 0: never.
    """

    batch_size: Count = 4
    outer_batch_size: Count = 8
    accumulate: Count = 1
    finetune_steps: Annotated[int, Range(2, ranges.LARGEST)] = 40  # a warm-up and a decay: one step each at least
    finetune_epochs: Positive | None = None
    finetune_optimizer: Annotated[str, one_of(OPTIMIZERS)] = "adamw"
    finetune_lr: Positive = 5e-4
    warmup: Annotated[float, Range(0, 1, below=True)] = 0.1
    schedule: Annotated[str, one_of(SCHEDULES)] = "cosine"
    weight_decay: NotNegative = 0.0
    clip: NotNegative = 0.0
    validate_every: CountOrNone = 0
    patience: CountOrNone = 0


@dataclasses.dataclass(frozen=True)
class Running:
    """The run: its folder, and the devices it is computed on.

    Attributes:
      out: run folder; the same command continues what is in it.
      seed: of which rows are outer and which are trained on, of the start values and of the batches. The test rows do
        not depend on it.
      keep_checkpoints: leave the states of searches and trainings in the folder; else they go once the page is written.
      quiet: show no progress; what is wrong, and where the page is, is said all the same.
      track: where metrics go besides metrics.jsonl: to the folder tensorboard in --out, or to the project or experiment
        "bilevel" of a service (`WANDB_PROJECT`, `MLFLOW_EXPERIMENT_NAME`). A service that fails ends no training.
      mesh: devices to compute on, such as data=8, fsdp=8 or data=4,fsdp=2: rows are split over all of them, frozen
        weights over those of fsdp. The numbers are those of one device, to rounding, and a run goes on with another.
      coordinator: HOST:PORT of the first of several processes that compute together, the same in all of them; "auto"
        where SLURM, GKE or MPI started them and knows it. Every process is given the same command, and --mesh.
      processes: how many there are, beside HOST:PORT.
      process: which one this is, from 0; the first alone writes and speaks. All have to see the run folder.
    """

    out: Path = Path("runs/latest")
    seed: Seed = 0
    keep_checkpoints: bool = False
    quiet: bool = False
    track: Annotated[str | None, one_of(TRACKERS, optional=True)] = None
    mesh: str | None = None
    coordinator: str | None = None
    processes: Annotated[int, Range(1, ranges.LARGEST)] | None = None
    process: Annotated[int, Range(0, ranges.LARGEST)] | None = None


@dataclasses.dataclass(frozen=True)
class Settings(Running, Training, Data, Model):
    """Options that every command has; a command adds its own in a subclass."""


GROUPS: dict[str, type] = {"model": Model, "data": Data, "training": Training, "run": Running}
"""By the names under which a help shows them; what a command adds is a group of its own, after the data."""


def unused(settings: object) -> dict[str, str]:
    """Options without effect in any command, and why."""
    by_epochs = getattr(settings, "finetune_epochs", None) is not None
    return {"finetune_steps": "--finetune-epochs says how many there are"} if by_epochs else {}


NO_OUTER = {"outer_batch_size": "no outer loss is taken"}
"""For the `unused` of a command that searches nothing, or not by the rows that are outer."""
DERIVED = {"derived": True}
"""Metadata of a field that is no option, but follows from options: a sentence names these."""
NO_DROPOUT = {"lora_dropout": "no training of this command drops what LoRA reads"}
"""For the `unused` of such a command."""
