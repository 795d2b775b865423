"""What every command stands on: the model, the task and the rows that its settings name.

The rows of a task are cut into three: *train*, which the inner loss sees; *outer*, the validation rows of the outer
loss; and *test*, the published validation set, which only the last evaluation sees.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from methods import fingerprint, mesh, processes, ranges, runfolder, tasks
from methods.adapters.lora import LoRAConfig
from methods.causes import reading
from methods.models.loading import HFNames, Pretrained, load, locate
from methods.objective import Given, mean_loss, mean_of_row_means, prediction, room
from methods.ranges import AtMost
from methods.runfolder import RunFolder
from methods.settings import Settings, Training
from methods.tasks.loss import answer_width
from methods.training import Recipe

WRITTEN = 256
"""Most tokens of a written answer."""


class LeftOut(NamedTuple):
    """Training rows that are in no split, by why that is; those on a subject of the test aside (`Splits.dropped`).

    Attributes:
      long: they are longer than T, or share their prompt with one that is.
      torn: other rows on their subject are outer.
      unasked: no more were asked for.
    """

    long: int = 0
    torn: int = 0
    unasked: int = 0

    @property
    def total(self) -> int:
        return self.long + self.torn + self.unasked

    def told(self, length: int) -> str:
        """How many for which reason, in words; "" for none."""
        reasons = {
            f"longer than {length} tokens": self.long,
            "on the subject of an outer row": self.torn,
            "beyond what was asked for": self.unasked,
        }
        return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)


class Bench(NamedTuple):
    """A model, a task and its rows, ready for losses.

    Attributes:
      pretrained: the model.
      lora: the adapter's fixed part.
      source: the task and all its rows, and where they are from.
      splits: the rows that are used.
      train, outer: encoded rows, arrays `[N, T]` (of a `LabelledBatch` where the task is a classification, of a
        `ChoiceBatch`, `[N, C, T]`, where an encoder chooses).
      width: most answer tokens in a row of `train` or `outer`; 0 where rows have a label instead.
      left_out: training rows that are in no split.
      head: the `Classifier` that answers; None where the model's own head does.
      row_means: whether a loss is the mean of the rows' own means, not that over all their answer tokens.
      inputs: what was read, as `RunFolder` compares it.
      files: the folder or file of the model.
      sharding: where things lie on the devices of a mesh; None on one device.
    """

    pretrained: Pretrained
    lora: LoRAConfig
    source: tasks.Source
    splits: tasks.Splits
    train: Any
    outer: Any
    width: int
    left_out: LeftOut
    head: Any = None
    row_means: bool = False
    inputs: Mapping[str, Any] = MappingProxyType({})
    files: Path | None = None
    sharding: bilevel.Sharding | None = None

    @property
    def task(self) -> tasks.Task:
        return self.source.task

    @property
    def num_layers(self) -> int:
        return self.pretrained.config.num_layers

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """`{site: (in, out)}` of the model's linears."""
        return self.pretrained.config.site_shapes()

    @property
    def sites(self) -> tuple[str, ...]:
        """The linears that LoRA adapts."""
        return self.lora.sites(self.shapes)

    @property
    def chooses(self) -> bool:
        """Whether a head scores each choice of a question, as that of an encoder does."""
        return self.head is not None and isinstance(self.task, tasks.MultipleChoice)

    @property
    def peft_task(self) -> str | None:
        """PEFT's name of the kind of model; it has none for multiple choice."""
        return "CAUSAL_LM" if self.head is None else None if self.chooses else "SEQ_CLS"

    @property
    def hf_names(self) -> HFNames:
        """What the modules of the model with its head are called in transformers."""
        names = self.pretrained.hf_names
        return names.multiple_choice() if self.chooses else names

    def given(self) -> Given:
        """What a method's losses are made of."""
        model, head, width = self.pretrained.model, self.head, self.width
        loss = partial(mean_of_row_means if self.row_means else mean_loss, model, head, width)
        # A regression has no classes to predict.
        task: Any = self.head and self.task
        classes = not isinstance(task, tasks.Classification) or bool(task.classes)
        predict = partial(prediction, model, head, width) if classes else None
        return Given(self.pretrained.weights, self.lora, self.pretrained.config, loss, predict, partial(start, self))


SETTLED = ("task", "train_rows", "outer_rows", "test_rows")
"""Settings that are filled in once the rows are read, where they say nothing."""
ROWS = "The text of a row", "look at the rows, and at the model's tokenizer"
Check = Callable[[Any, LoRAConfig], None]
"""`check(config, lora)`: raises ValueError where a model's config does not fit a method's settings."""


def check(settings: Settings, unused: Collection[str] = ()) -> None:
    """All that is wrong with settings whatever the model and the rows are, and a run folder that cannot be written.

    Args:
      settings: of the command.
      unused: options that have no effect in it, and so none that is wrong.

    Raises:
      ValueError: one sentence on what is wrong with which setting.
    """
    ranges.check(settings)
    if settings.task is not None and settings.task not in tasks.FORMATS:
        task = tasks.find(settings.task)
        if isinstance(task, tasks.Generation):
            tasks.check_metrics(task)
    adapter(settings)
    recipe(settings)
    if settings.finetune_steps * settings.accumulate > ranges.LARGEST:
        raise ValueError(
            f"--finetune-steps {settings.finetune_steps} times --accumulate {settings.accumulate} is more than "
            f"the {ranges.LARGEST:,} that a training can have."
        )
    _check_batches(settings, unused)
    if mesh.sharding(settings.mesh) is not None and settings.mesh is not None:
        axes = mesh.sizes(settings.mesh)
        mesh.rows_divide("--batch-size", settings.batch_size, axes)
        if "outer_batch_size" not in unused:
            mesh.rows_divide("--outer-batch-size", settings.outer_batch_size, axes)
    runfolder.check(settings.out, settings, unsettled(settings))


def unsettled(settings: Settings) -> list[str]:
    """The settings whose values only the rows tell."""
    by_epochs = ["finetune_steps"] if settings.finetune_epochs is not None else []
    return [name for name in SETTLED if _is_open(getattr(settings, name))] + by_epochs


def _is_open(value: Any) -> bool:
    """Whether the rows decide a setting: nobody has asked for this value."""
    return value is None or isinstance(value, AtMost)


def _check_batches(settings: Settings, unused: Collection[str]) -> None:
    """Raises ValueError for a batch of more rows than there are, as far as it is known how many there are."""
    for size, rows in (("batch_size", "train_rows"), ("outer_batch_size", "outer_rows")):
        most = getattr(settings, rows)
        if size not in unused and most is not None and getattr(settings, size) > most:
            raise ValueError(
                f"--{size.replace('_', '-')} {getattr(settings, size)} is larger than the data, "
                f"--{rows.replace('_', '-')} {most}: lower it."
            )


def adapter(settings: Settings) -> LoRAConfig:
    """The adapter's fixed part. Raises ValueError."""
    if not settings.targets:
        raise ValueError("--targets names no linear: give names, such as q_proj v_proj, or one regular expression.")
    targets = settings.targets[0] if len(settings.targets) == 1 else settings.targets
    try:
        re.compile(settings.targets[0] if len(settings.targets) == 1 else "")
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"--targets {settings.targets[0]!r} is no regular expression ({error}).") from error
    rslora, dora = settings.adapter == "rslora", settings.adapter == "dora"
    return LoRAConfig(
        settings.rank, settings.lora_alpha, targets, rslora=rslora, dora=dora, dropout=settings.lora_dropout
    )


def check_rank(option: str, rank: int, shapes: Mapping[str, tuple[int, int]], sites: Sequence[str]) -> None:
    """Raises ValueError if no module at `sites` can have that rank: a matrix has at most as many as its smaller side.

    A low-rank product of more is a full matrix with more parameters than it has entries.
    """
    most = max(min(shapes[site]) for site in sites)
    if rank > most:
        raise ValueError(f"{option} {rank} is more than the {most} of a whole matrix at {', '.join(sites)}: lower it.")


def prepare(
    settings: Settings,
    check_model: Check | None = None,
    *,
    end_of_text: bool = False,
    row_means: bool = False,
    unused: Collection[str] = (),
) -> Bench:
    """Everything that `settings` name, loaded and encoded.

    Args:
      settings: of the command.
      check_model: what a method asks of the model beside, before its weights are loaded.
      end_of_text: an answer that is trained on ends with the tokenizer's mark of the end, which belongs to it, and not
        with the text that ends answers of the task.
      row_means: as of `Bench`.
      unused: as of `check`.

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong with which setting.
    """
    # The cheap mistakes first: nobody should wait for a model to load to learn of a misspelt task.
    check(settings, unused)
    lora = adapter(settings)

    def check_config(config: Any, model: Any) -> None:
        if settings.length > (positions := config.max_positions):
            raise ValueError(f"--length {settings.length} is more than the {positions} positions of {settings.model}.")
        shapes = config.site_shapes()
        check_rank("--rank", settings.rank, shapes, lora.sites(shapes))
        if not isinstance(task, (tasks.Classification, tasks.MultipleChoice)) and not hasattr(model, "head"):
            raise ValueError(f"The task {task.name} needs a model that writes text, which {settings.model} does not.")
        if check_model is not None:
            check_model(config, lora)

    with reading("The rows", "look at the files that --data or BILEVEL_DATA names"):
        source = tasks.read_source(
            settings.task,
            settings.data,
            test_data=settings.test_data,
            columns=settings.columns,
            test=settings.test_rows or None,
        )
    task: Any = source.task
    if isinstance(task, tasks.Generation):
        tasks.check_metrics(task)
    with reading(f"The model {settings.model}", "is it whole, and of a family that is known? Fetch it again"):
        dtype = {"dtype": jnp.bfloat16, "accumulate": jnp.float32} if settings.dtype == "bfloat16" else {}
        processes.tell(f"loading {settings.model}")
        files, sharding = locate(settings.model), mesh.sharding(settings.mesh)
        pretrained = load(settings.model, check=check_config, sharding=sharding, **dtype)
    if pretrained.tokenizer is None:
        raise ValueError(f"The model {settings.model} brings no tokenizer, which a language task needs.")
    if not settings.remat:
        model: Any = pretrained.model
        pretrained = dataclasses.replace(pretrained, model=dataclasses.replace(model, remat=False))
    if isinstance(task, tasks.Generation):
        room(pretrained, WRITTEN)  # or an error, before anything is trained
    tokenizer: Any = pretrained.tokenizer
    mark = tokenizer.eos_token_id
    # A model that writes tells how likely each choice is; an encoder gets a head that scores them.
    chooses = isinstance(task, tasks.MultipleChoice) and not hasattr(pretrained.model, "head")
    outputs = 1 if chooses else task.outputs if isinstance(task, tasks.Classification) else 0
    if end_of_text and not outputs and mark is None:
        raise ValueError(f"The tokenizer of {settings.model} has no mark of a text's end, which is to be trained on.")
    end: list[int] = [mark] if end_of_text and not outputs else []
    as_read = _Reading(task, tokenizer, settings.length, end, chooses)
    sizes = _sizes(settings)
    processes.tell(f"encoding {task.name}: {len(source.train):,} rows to train on, {len(source.test):,} to test on")
    rows = source.train
    if isinstance(task, tasks.LanguageModelling):
        with reading(*ROWS):
            rows = tasks.in_pieces(task, rows, tokenizer, settings.length)
    fitting, looked_at = _fitting(as_read, rows, settings, sizes)
    if not fitting:
        raise ValueError(
            f"None of the rows of {task.name} that were looked at fits into --length {settings.length}: raise it."
        )
    splits = _split(task, fitting, looked_at, source.test, settings, sizes)

    with reading("The text of a test row", "look at the rows, and at the model's tokenizer"):
        if outputs:  # what a head reads may be cut, and is counted
            tasks.check_tokens(cast(Any, task), splits.test, tokenizer)
        else:
            tasks.check_test(task, splits.test, tokenizer, pretrained.config.max_positions)
    train, outer = (jax.tree.map(jnp.asarray, as_read.arrays(rows)) for rows in (splits.train, splits.outer))
    width = 0 if outputs else max(answer_width(train), answer_width(outer))
    head = pretrained.classifier(outputs) if outputs else None
    inputs = {
        f"{task.name} training rows": fingerprint.rows(source.train),
        f"{task.name} test rows": fingerprint.rows(source.test),
        **dict(zip(fingerprint.SEEDED, map(fingerprint.arrays, (train, outer)), strict=True)),
    }
    if (file := tasks.file_of(settings.task)) is not None:
        inputs[f"task file {file.name}"] = fingerprint.rows([{"text": file.read_text(encoding="utf-8")}])
    unasked = len(rows) - looked_at + splits.unasked
    left_out = LeftOut(looked_at - len(fitting), splits.torn, unasked)
    if reasons := left_out.told(settings.length):
        pieces = " (texts in pieces)" if len(rows) != len(source.train) else ""
        processes.tell(f"{left_out.total:,} of {len(rows):,} training rows{pieces} are not used: {reasons}")
    untested = len(source.test) - len(splits.test)
    if untested and _is_own(settings):
        processes.tell(f"{untested:,} of {len(source.test):,} rows to test on are not used: no more were asked for")
    for name, rows in (("train", splits.train), ("outer", tasks.units(task, splits.outer))):
        if isinstance(most := getattr(settings, f"{name}_rows"), AtMost) and len(rows) < most:
            processes.tell(f"--{name}-rows is {len(rows):,}, and not {most:,} as in the preset: there are no more rows")
    if splits.cut:
        processes.tell(f"one text is longer than all outer rows: its last {splits.cut:,} pieces are among these")
    if remark := tasks.untaught(task, splits):
        warnings.warn(remark, stacklevel=2)
    bench = Bench(
        pretrained, lora, source, splits, train, outer, width, left_out, head, row_means, inputs, files, sharding
    )
    _check_batches(settled(settings, bench), unused)
    return bench


class Sizes(NamedTuple):
    """How many rows of each split are wanted; None takes what there is, of `outer` a quarter of the training rows."""

    train: int | None
    outer: int | None
    test: int | None


def _is_own(settings: Settings) -> bool:
    return settings.data is not None and tasks.is_own(settings.data)


def _sizes(settings: Settings) -> Sizes:
    """What the settings say, and of a built-in task what is taken where they say nothing."""
    default = Sizes(None, None, None) if _is_own(settings) else Sizes(256, 128, 100)
    train, outer = (
        size if given is None else given
        for size, given in ((default.train, settings.train_rows), (default.outer, settings.outer_rows))
    )
    return Sizes(train, outer, default.test if settings.test_rows is None else settings.test_rows or None)


def settled(settings: Any, bench: Bench) -> Any:
    """The settings of a run, in which the task and the numbers of rows and steps are those that are used.

    Raises:
      ValueError: for so few epochs that they are no training.
    """
    used = {
        "task": bench.task.name,
        "train_rows": len(bench.splits.train),
        "outer_rows": len(tasks.units(bench.task, bench.splits.outer)),
        "test_rows": len(tasks.units(bench.task, bench.splits.test)),
    }
    unsaid = {name: value for name, value in used.items() if _is_open(getattr(settings, name))}
    if settings.finetune_epochs is not None:
        batch = settings.batch_size * settings.accumulate
        steps = math.ceil(settings.finetune_epochs * len(bench.splits.train) / batch)
        if not 2 <= steps * settings.accumulate <= ranges.LARGEST:
            raise ValueError(
                f"--finetune-epochs {settings.finetune_epochs:g} of {len(bench.splits.train)} rows are {steps:,} steps "
                f"of {batch} rows: there must be at least 2, and at most {ranges.LARGEST:,} batches."
            )
        unsaid["finetune_steps"] = steps
    settled = dataclasses.replace(settings, **unsaid)
    recipe(settled)
    return settled


def _split(
    task: Any, fitting: list[Any], looked_at: int, test_rows: list[Any], settings: Settings, sizes: Sizes
) -> tasks.Splits:
    """`tasks.split` by the settings. Raises ValueError, with the options in it that say how many rows are wanted."""
    quarter = max(1, len(tasks.units(task, fitting)) // 4)
    outer = quarter if sizes.outer is None else sizes.outer
    try:
        return tasks.split(
            task,
            fitting,
            test_rows,
            outer=outer,
            train=sizes.train,
            test=sizes.test,
            seed=settings.seed,
            about=sizes.outer is None,
        )
    except tasks.TooFew as error:
        if not error.test and (fewer := _fewer(sizes, quarter)) is not None:
            return _split(task, fitting, looked_at, test_rows, settings, fewer)
        said = re.sub(r"\b(train|outer|test)=(\d+) (rows|prompts)", r"--\1-rows \2", str(error).rstrip("."))
        if error.test:
            raise ValueError(f"{said}.") from error
        lower = " and ".join(
            f"--{name}-rows" for name in ("train", "outer") if getattr(sizes, name) is not None
        )  # a number that was not given cannot be lowered
        remedies = ["raise --length"] * (len(fitting) < looked_at)
        remedies += [f"lower {lower}" if lower else "give rows on more subjects"]
        raise ValueError(
            f"{said}; {len(fitting)} of the {looked_at} training rows that were looked at fit into --length "
            f"{settings.length}: {', or '.join(remedies)}."
        ) from error


def _fewer(sizes: Sizes, quarter: int) -> Sizes | None:
    """What is wanted in place of numbers that nobody asked for, where there are not so many rows; None: the same."""
    if isinstance(sizes.outer, AtMost) and sizes.outer > quarter:
        return sizes._replace(outer=None)
    return sizes._replace(train=None) if isinstance(sizes.train, AtMost) else None


def open_run(settings: Settings, bench: Bench, found: Sequence[str] = ()) -> RunFolder:
    """The run folder of `settings` on what `bench` has read; `found` as of `RunFolder`. Raises ValueError."""
    return RunFolder(settings.out, settings, bench.inputs, bench.files, found)


def recipe(settings: Settings) -> Recipe:
    """The recipe of the final training. Raises ValueError."""
    if settings.patience and not settings.validate_every:
        raise ValueError(
            f"--patience {settings.patience} counts validations, of which there are none: give --validate-every too, "
            "or leave --patience out."
        )
    # A method may leave these open, until `used` has filled them in.
    share, clip = (
        getattr(Training if getattr(settings, name) is None else settings, name) for name in ("warmup", "clip")
    )
    warmup = math.floor(settings.finetune_steps * share + 1e-9)
    return Recipe(
        settings.finetune_steps,
        settings.finetune_lr,
        settings.accumulate,
        settings.validate_every,
        settings.patience,
        warmup=max(warmup, 1 if share else 0),
        clip=clip,
        optimizer_name=settings.finetune_optimizer,
        schedule=settings.schedule,
        weight_decay=settings.weight_decay,
    )


def start(bench: Bench, key: jax.Array) -> dict[str, Any]:
    """What is trained, fresh: A random, B = 0; a head with kernels drawn from N(0, 0.02^2) and biases 0."""
    lora = bench.lora.init(key, bench.shapes, bench.num_layers, base=bench.pretrained.weights["blocks"])
    if bench.head is None:
        return {"lora": lora, "head": {}}
    features = jnp.zeros((1, bench.pretrained.config.hidden_size))
    return {"lora": lora, "head": bench.head.init(jax.random.fold_in(key, 1), features)["params"]}


class _Reading(NamedTuple):
    """How a model reads the rows of a task.

    Attributes:
      task, tokenizer: of the run.
      length: most tokens of a row.
      end: tokens that end an answer in place of the text that the task ends it with.
      chooses: whether it scores each choice with a head.
    """

    task: Any
    tokenizer: Any
    length: int
    end: list[int]
    chooses: bool

    def fits(self, rows: list[Any]) -> list[bool]:
        """Whether each row, with its right answer, has no more tokens than `length`."""
        if isinstance(self.task, tasks.Classification):
            return tasks.fits(self.task, rows, self.tokenizer, self.length)
        if self.chooses:
            return tasks.choices_fit(self.task, rows, self.tokenizer, self.length)
        if isinstance(self.task, tasks.LanguageModelling):
            return [count <= self.length for count in tasks.span_lengths(self.task, rows, self.tokenizer)]
        texts = [pair.prompt + pair.answer for pair in self._pairs(rows)]
        most = self.length - len(self.end)
        return [len(ids) <= most for ids in tasks.tokenized(self.tokenizer, texts)["input_ids"]]

    @reading(*ROWS)
    def arrays(self, rows: list[Any]) -> Any:
        """The rows as a batch."""
        if isinstance(self.task, tasks.Classification):
            return tasks.encode_labelled(self.task, rows, self.tokenizer, self.length)
        if self.chooses:
            return tasks.encode_choices(self.task, rows, self.tokenizer, self.length)
        if isinstance(self.task, tasks.LanguageModelling):
            return tasks.encode_spans(self.task, rows, self.tokenizer, self.length).batch
        return tasks.encode(self._pairs(rows), self.tokenizer, self.length, self.end).batch

    def _pairs(self, rows: list[Any]) -> list[tasks.Pair]:
        return tasks.training_pairs(self.task, rows, stopped=not self.end)


@reading(*ROWS)
def _fitting(as_read: _Reading, rows: list[Any], settings: Settings, sizes: Sizes) -> tuple[list[Any], int]:
    """The units whose texts fit, looked for in a seeded order until enough: a prompt comes with all its references, or
    not at all. And how many rows were looked at."""
    # Of one's own rows all are looked at, however many are asked for: what a run says of itself repeats it. Of a task's
    # many thousands so many are enough, some of which share a subject with the test.
    wanted = None if _is_own(settings) else 4 * ((sizes.train or 0) + (sizes.outer or 0)) + 64
    units = tasks.units(as_read.task, rows)
    units = [units[i] for i in np.random.default_rng(settings.seed).permutation(len(units))[:wanted]]
    chosen = [row for unit in units for row in unit]
    fit = iter(as_read.fits(chosen))
    return [row for unit in units if all([next(fit) for _ in unit]) for row in unit], len(chosen)


