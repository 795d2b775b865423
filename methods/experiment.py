"""What every method's experiment stands on: model, data, losses, the final training, evaluation, the run folder.

The rows of a task are cut into three: *train*, which the inner loss sees; *outer*, the validation rows of the outer
loss; and *test*, the published validation set, which only the last evaluation sees.

What is trained is `{"lora": adapter, "head": head}`: the head is a `Classifier`'s parameters where texts are labelled,
and {} where the model's own head answers.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from methods import fingerprint, ranges, runfolder, tasks
from methods.adapters.lora import LoRAConfig, PerLayer
from methods.adapters.peft import save_peft
from methods.causes import reading
from methods.models.loading import Pretrained, load, locate
from methods.objective import (
    Bound,
    Trainable,
    jitted_outputs,
    jitted_row_losses,
    mean_loss,
    mean_of_row_means,
    room,
    write,
)
from methods.ranges import Count, CountOrNone, Positive, Range, Seed
from methods.runfolder import RunFolder
from methods.tasks.batches import POOL, by_length, cut
from methods.tasks.loss import answer_width
from methods.training import Recipe, train

WRITTEN = 256
"""Most tokens of a written answer."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options that every command has.

    Attributes:
      model: a folder in Hugging Face layout, a .gguf file, or a name on the hub.
      task: name of a task; an unknown name lists those there are.
      data: folder that holds <task>/train.jsonl and the like; by default $BILEVEL_DATA, then assets/data, then the hub.
      out: run folder; the same command continues what is in it.
      seed: of the data split, the start values and the batches.
      length: tokens a training sequence; rows that need more are left out.
      batch_size: rows an inner or fine-tuning step.
      outer_batch_size: rows an outer loss.
      train_rows: rows the inner loss sees.
      outer_rows: validation rows the outer loss sees; where texts are written, prompts, each with all its references.
      test_rows: rows of the last evaluation, or prompts with all their references; 0 takes all.
      rank: LoRA's r.
      lora_alpha: LoRA's alpha; the update is scaled by alpha / r.
      adapter: "rslora" scales by alpha / sqrt(r), "dora" trains the lengths of the adapted columns beside LoRA.
      targets: names of the adapted linears, or one regular expression.
      finetune_steps: optimizer steps of the final training.
      finetune_lr: peak learning rate of the final training (AdamW, 10 % warm-up, cosine decay).
      accumulate: batches whose mean gradient makes one step of the final training.
      validate_every: steps between two validations on the outer rows, the best of which is kept; 0: none.
      patience: validations without a new best that stop the final training; 0: never.
      remat: recompute blocks in the backward pass: less memory, one more forward pass.
    """

    model: str
    task: str = "piqa"
    data: str | None = None
    out: Path = Path("runs/latest")
    seed: Seed = 0
    length: Annotated[int, Range(2, ranges.LARGEST)] = 48
    batch_size: Count = 4
    outer_batch_size: Count = 8
    train_rows: Count = 256
    outer_rows: Count = 128
    test_rows: CountOrNone = 100
    rank: Count = 8
    lora_alpha: Positive = 16.0
    adapter: Literal["lora", "rslora", "dora"] = "lora"
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    finetune_steps: Annotated[int, Range(2, ranges.LARGEST)] = 40  # a warm-up and a decay: one step each at least
    finetune_lr: Positive = 5e-4
    accumulate: Count = 1
    validate_every: CountOrNone = 0
    patience: CountOrNone = 0
    remat: bool = True


class Bench(NamedTuple):
    """A model, a task and its rows, ready for losses.

    Attributes:
      pretrained: the model.
      lora: the adapter's fixed part.
      task, splits: the task and its rows.
      train, outer: encoded rows, arrays `[N, T]` (of a `LabelledBatch` where the task is a classification).
      width: most answer tokens in a row of `train` or `outer`; 0 where rows have a label instead.
      left_out: published training rows that are longer than T.
      head: the `Classifier` that answers; None where the model's own head does.
      row_means: whether a loss is the mean of the rows' own means, not that over all their answer tokens.
      inputs: what was read, as `RunFolder` compares it.
      files: the folder or file of the model.
    """

    pretrained: Pretrained
    lora: LoRAConfig
    task: tasks.Task
    splits: tasks.Splits
    train: Any
    outer: Any
    width: int
    left_out: int
    head: Any = None
    row_means: bool = False
    inputs: Mapping[str, Any] = MappingProxyType({})
    files: Path | None = None

    @property
    def num_layers(self) -> int:
        return self.pretrained.config.num_layers

    @property
    def trainable(self) -> Trainable:
        return Trainable(self.lora)


Where = list[int] | Mapping[str, Any]
"""Where LoRA is: indices of layers, or modules as a mask `{site: [L]}`."""


ROWS = "The text of a row", "look at the rows, and at the model's tokenizer"
Check = Callable[[Any, LoRAConfig], None]
"""`check(config, lora)`: raises ValueError where a model's config does not fit a method's settings."""


def check(settings: Settings) -> None:
    """All that is wrong with settings whatever the model and the rows are, and a run folder that cannot be written.

    Raises:
      ValueError: one sentence on what is wrong with which setting.
    """
    ranges.check(settings)
    task: Any = tasks.get(settings.task)
    adapter(settings)
    recipe(settings)
    if settings.finetune_steps * settings.accumulate > ranges.LARGEST:
        raise ValueError(
            f"--finetune-steps {settings.finetune_steps} times --accumulate {settings.accumulate} is more than "
            f"the {ranges.LARGEST:,} that a training can have."
        )
    for size, rows in (("batch_size", "train_rows"), ("outer_batch_size", "outer_rows")):
        if getattr(settings, size) > getattr(settings, rows):
            raise ValueError(
                f"--{size.replace('_', '-')} {getattr(settings, size)} is larger than the data, "
                f"--{rows.replace('_', '-')} {getattr(settings, rows)}: lower it."
            )
    if isinstance(task, tasks.Generation):
        tasks.check_metrics(task)
    runfolder.check(settings.out, settings)


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
    return LoRAConfig(settings.rank, settings.lora_alpha, targets, rslora=rslora, dora=dora)


def check_rank(option: str, rank: int, shapes: Mapping[str, tuple[int, int]], sites: Sequence[str]) -> None:
    """Raises ValueError if no module at `sites` can have that rank: a matrix has at most as many as its smaller side.

    A low-rank product of more is a full matrix with more parameters than it has entries.
    """
    most = max(min(shapes[site]) for site in sites)
    if rank > most:
        raise ValueError(f"{option} {rank} is more than the {most} of a whole matrix at {', '.join(sites)}: lower it.")


def prepare(
    settings: Settings, check_model: Check | None = None, *, end_of_text: bool = False, row_means: bool = False
) -> Bench:
    """Everything that `settings` name, loaded and encoded.

    Args:
      settings: of the command.
      check_model: what a method asks of the model beside, before its weights are loaded.
      end_of_text: an answer that is trained on ends with the tokenizer's mark of the end, which belongs to it, and not
        with the text that ends answers of the task.
      row_means: as of `Bench`.

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong with which setting.
    """
    # The cheap mistakes first: nobody should wait for a model to load to learn of a misspelt task.
    check(settings)
    task: Any = tasks.get(settings.task)
    lora, labelled = adapter(settings), isinstance(task, tasks.Classification)

    def check_config(config: Any, model: Any) -> None:
        if settings.length > (positions := config.max_positions):
            raise ValueError(f"--length {settings.length} is more than the {positions} positions of {settings.model}.")
        shapes = config.site_shapes()
        check_rank("--rank", settings.rank, shapes, lora.sites(shapes))
        if not labelled and not hasattr(model, "head"):
            raise ValueError(f"The task {task.name} needs a model that writes text, which {settings.model} does not.")
        if check_model is not None:
            check_model(config, lora)

    with reading(f"The rows of {task.name}", "look at the files that --data or BILEVEL_DATA names"):
        published = tasks.load(task, "train", settings.data), tasks.load(task, task.test, settings.data)
    with reading(f"The model {settings.model}", "is it whole, and of a family that is known? Fetch it again"):
        files, pretrained = locate(settings.model), load(settings.model, check=check_config)
    if pretrained.tokenizer is None:
        raise ValueError(f"The model {settings.model} brings no tokenizer, which a language task needs.")
    if not settings.remat:
        model: Any = pretrained.model
        pretrained = dataclasses.replace(pretrained, model=dataclasses.replace(model, remat=False))
    if isinstance(task, tasks.Generation):
        room(pretrained, WRITTEN)  # or an error, before anything is trained
    tokenizer: Any = pretrained.tokenizer
    mark = tokenizer.eos_token_id
    if end_of_text and not labelled and mark is None:
        raise ValueError(f"The tokenizer of {settings.model} has no mark of a text's end, which is to be trained on.")
    end: list[int] = [mark] if end_of_text and not labelled else []
    fitting, looked_at = _fitting(task, published[0], pretrained.tokenizer, settings, end)
    if not fitting:
        raise ValueError(
            f"None of the rows of {task.name} that were looked at fits into --length {settings.length}: raise it."
        )
    splits = _split(task, fitting, looked_at, published[1], settings)

    @reading(*ROWS)
    def encoded(rows):
        if isinstance(task, tasks.Classification):
            batch = tasks.encode_labelled(task, rows, pretrained.tokenizer, settings.length)
        else:
            pairs = tasks.training_pairs(task, rows, stopped=not end)
            batch = tasks.encode(pairs, pretrained.tokenizer, settings.length, end).batch
        return jax.tree.map(jnp.asarray, batch)

    train, outer = encoded(splits.train), encoded(splits.outer)
    width = 0 if labelled else max(answer_width(train), answer_width(outer))
    head = pretrained.classifier(task.outputs) if isinstance(task, tasks.Classification) else None
    inputs = {
        f"published {task.name} training rows": fingerprint.rows(published[0]),
        f"published {task.name} {task.test} rows": fingerprint.rows(published[1]),
        "encoded training rows": fingerprint.arrays(train),
        "encoded outer rows": fingerprint.arrays(outer),
    }
    left_out = len(published[0]) - len(fitting)
    return Bench(
        pretrained, lora, task, splits, train, outer, width, left_out, head, row_means, inputs=inputs, files=files
    )


def _split(task: Any, fitting: list[Any], looked_at: int, test_rows: list[Any], settings: Settings) -> tasks.Splits:
    """`tasks.split` by the settings. Raises ValueError, with the options in it that say how many rows are wanted."""
    sizes = {"outer": settings.outer_rows, "train": settings.train_rows, "test": settings.test_rows or None}
    try:
        return tasks.split(task, fitting, test_rows, **sizes, seed=settings.seed)
    except tasks.TooFew as error:
        said = re.sub(r"\b(train|outer|test)=(\d+) (rows|prompts)", r"--\1-rows \2", str(error).rstrip("."))
        if error.test:
            raise ValueError(f"{said}.") from error
        raise ValueError(
            f"{said}; {len(fitting)} of the {looked_at} training rows that were looked at fit into --length "
            f"{settings.length}: raise --length, or lower --train-rows and --outer-rows."
        ) from error


def open_run(settings: Settings, bench: Bench) -> RunFolder:
    """The run folder of `settings` on what `bench` has read. Raises ValueError."""
    return RunFolder(settings.out, settings, bench.inputs, bench.files)


@reading(*ROWS)
def _fitting(
    task: Any, rows: list[Any], tokenizer: Any, settings: Settings, end: list[int]
) -> tuple[list[Any], int]:
    """The units whose texts, with the right answers and `end`, fit into `length` tokens, looked for in a seeded order
    until enough: a prompt comes with all its references, or not at all. And how many rows were looked at."""
    wanted = 4 * (settings.train_rows + settings.outer_rows) + 64  # some share a subject with the test
    units = tasks.units(task, rows)
    units = [units[i] for i in np.random.default_rng(settings.seed).permutation(len(units))[:wanted]]
    chosen = [row for unit in units for row in unit]
    if isinstance(task, tasks.Classification):
        kept = tasks.fits(task, chosen, tokenizer, settings.length)
    else:
        texts = [pair.prompt + pair.answer for pair in tasks.training_pairs(task, chosen, stopped=not end)]
        most = settings.length - len(end)
        kept = [len(ids) <= most for ids in tasks.tokenized(tokenizer, texts)["input_ids"]]
    fit = iter(kept)
    return [row for unit in units if all([next(fit) for _ in unit]) for row in unit], len(chosen)


def loss(bench: Bench) -> Any:
    """`loss(weights, bound, batch)`: `objective.mean_loss`, or `mean_of_row_means`, of this model and head."""
    return partial(mean_of_row_means if bench.row_means else mean_loss, bench.pretrained.model, bench.head, bench.width)


def answer_loss(bench: Bench) -> Any:
    """`loss(weights, adapt, batch)`: mean negative log-likelihood of the answer tokens, in nats, of a hook alone."""
    mean = loss(bench)
    return lambda weights, adapt, batch: mean(weights, Bound(adapt, {}), batch)


def start(bench: Bench, key: jax.Array) -> dict[str, Any]:
    """What is trained, fresh: A random, B = 0; a head with kernels drawn from N(0, 0.02^2) and biases 0."""
    if bench.head is None:
        return {"lora": start_adapter(bench, key), "head": {}}
    features = jnp.zeros((1, bench.pretrained.config.hidden_size))
    head = bench.head.init(jax.random.fold_in(key, 1), features)["params"]
    return {"lora": start_adapter(bench, key), "head": head}


def start_adapter(bench: Bench, key: jax.Array) -> Any:
    """Fresh LoRA parameters: A random, B = 0."""
    shapes = bench.pretrained.config.site_shapes()
    return bench.lora.init(key, shapes, bench.num_layers, base=bench.pretrained.weights["blocks"])


def recipe(settings: Settings) -> Recipe:
    """The recipe of the final training. Raises ValueError."""
    counts = settings.accumulate, settings.validate_every, settings.patience
    return Recipe(settings.finetune_steps, settings.finetune_lr, *counts)


def finetune(
    settings: Settings, bench: Bench, where: Where, name: str, folder: RunFolder, plan: Recipe | None = None
) -> dict[str, Any]:
    """Trains LoRA from scratch on `where` alone, and the head if there is one; returns what is trained.

    By `plan`, or else by the settings' recipe. The modules are a mask, an outer variable that does not move, so that
    every choice is the same compiled program.
    """
    mean, trainable = loss(bench), bench.trainable

    def inner_loss(weights, params, mask, batch, key):
        return mean(weights, trainable.bind(params, mask=mask, base=weights["blocks"]), batch)

    inner_loss = jax.tree_util.Partial(inner_loss, bench.pretrained.weights)
    mask = modules(bench, where)
    problem = bilevel.Problem(inner_loss, inner_loss, lambda key, mask: start(bench, key), lambda key: mask)
    validate = lambda params: validation_loss(bench, masked(bench, params, where))  # noqa: E731
    return finetune_at(settings, bench, problem, mask, name, folder, validate, plan=plan)


def finetune_at(
    settings: Settings,
    bench: Bench,
    problem: bilevel.Problem,
    outer: Any,
    name: str,
    folder: RunFolder,
    validate: Callable[[Any], float],
    optimizer: optax.GradientTransformation | None = None,
    plan: Recipe | None = None,
) -> Any:
    """Trains `problem` at a constant `outer` by `plan`, or else by the settings' recipe.

    The rest as in `methods.training.train`.
    """
    plan = recipe(settings) if plan is None else plan
    return train(
        problem,
        outer,
        tasks.Buckets(bench.train, settings.batch_size, seed=settings.seed, pool=POOL if plan.by_length else 1),
        plan,
        folder,
        name,
        key=jax.random.key(settings.seed + 1),
        validate=validate,
        optimizer=optimizer,
    )


def modules(bench: Bench, where: Where) -> dict[str, jax.Array]:
    """bool `{site: [L]}`, True at the modules that `where` means."""
    sites = bench.lora.sites(bench.pretrained.config.site_shapes())
    if isinstance(where, Mapping):
        return {site: jnp.asarray(where[site], bool) for site in sites}
    return dict.fromkeys(sites, jnp.isin(jnp.arange(bench.num_layers), jnp.asarray(where, jnp.int32)))


def masked(bench: Bench, params: dict[str, Any], where: Where) -> Bound:
    """What is trained, on `where` alone; nowhere is the model as it came."""
    return bench.trainable.bind(params, mask=modules(bench, where), base=bench.pretrained.weights["blocks"])


def validation_loss(bench: Bench, bound: Bound) -> float:
    """The loss over all outer rows."""
    return loss_over(bench, bound, bench.outer)


def loss_over(bench: Bench, bound: Bound, rows: Any, batch_size: int = 16) -> float:
    """The loss over all of `rows`, encoded as `bench.outer` is.

    Raises:
      FloatingPointError: if it is not finite.
    """
    weights, rows = bench.pretrained.weights, jax.tree.map(np.asarray, rows)
    total, count = 0.0, 0
    for index, length in by_length(rows.mask.sum(axis=1), batch_size, 32, rows.mask.shape[1]):
        batch = cut(rows, np.resize(index, batch_size), length)
        losses, counts = jitted_row_losses(bench.pretrained.model, bench.head, bench.width, weights, bound, batch)
        losses, counts = np.asarray(losses)[: len(index)], np.asarray(counts)[: len(index)]
        if bench.row_means:
            losses, counts = losses / counts, np.ones_like(counts)
        total, count = total + float(losses.sum()), count + int(counts.sum())
    if not np.isfinite(total):
        raise FloatingPointError(f"The loss over the {len(rows.mask)} validation rows of {bench.task.name} is {total}.")
    return total / count


def evaluate(bench: Bench, params: dict[str, Any], where: Where) -> tasks.Evaluation | tasks.Classified | tasks.Written:
    """The task's metrics on the test rows, of what is trained on `where`; nowhere is the model as it came."""
    return evaluate_with(bench, masked(bench, params, where))


def evaluate_with(bench: Bench, bound: Bound) -> tasks.Evaluation | tasks.Classified | tasks.Written:
    """The task's metrics on the test rows, of a hook and a head."""
    weights, rows, tokenizer = bench.pretrained.weights, bench.splits.test, bench.pretrained.tokenizer
    task: Any = bench.task
    longest = bench.pretrained.config.max_positions
    if bench.head is not None:
        answer = partial(jitted_outputs, bench.pretrained.model, bench.head, weights, bound)
        found: Any = tasks.evaluate_labelled(answer, task, rows, tokenizer, max_length=longest)
    elif isinstance(task, tasks.Generation):
        cut = 0

        def written(prompts):
            nonlocal cut
            texts, cut = write(bench.pretrained, bound.adapt, prompts, tokens=WRITTEN)
            return texts

        found = tasks.evaluate_written(written, task, rows)
        found = dataclasses.replace(found, cut=cut)
        longest -= WRITTEN
    else:
        score = partial(_score, bench.pretrained.model, weights, bound.adapt)
        size = min(8, 2 * len(rows))
        found = tasks.evaluate(score, task, rows, tokenizer, batch_size=size, max_length=longest)
    if found.cut:
        warnings.warn(cut_sentence(task.name, found.cut, longest), stacklevel=2)
    return found


def cut_sentence(task: str, cut: int, longest: int) -> str:
    """What is said of test texts that did not fit into the model."""
    return (
        f"{cut} texts of {task}'s test have more than the {longest} tokens that the model leaves for them, and were "
        "cut: prompts at their beginning, texts to classify at their end."
    )


def _score(model, weights, adapt, tokens, mask, answer_mask):
    width = -(-int(answer_mask.sum(axis=1).max()) // 32) * 32  # few widths, so few compilations
    bound, batch = Bound(adapt, {}), tasks.TokenBatch(tokens, mask, answer_mask)
    losses, _ = jitted_row_losses(model, None, width, weights, bound, batch)
    return -losses


def trainable_parameters(bench: Bench, where: Where) -> int:
    """Parameters trained: LoRA's on `where`, and the head's."""
    head = jax.eval_shape(lambda: start(bench, jax.random.key(0)))["head"]
    shapes, size = bench.pretrained.config.site_shapes(), sum(leaf.size for leaf in jax.tree.leaves(head))
    for site, mask in modules(bench, where).items():
        if layers := np.flatnonzero(mask).tolist():
            size += dataclasses.replace(bench.lora, targets=[site], layers=layers).size(shapes, bench.num_layers)
    return size


def save_adapter(folder: str | os.PathLike[str], bench: Bench, params: dict[str, Any], where: Where) -> Path:
    """What was trained on `where`, as PEFT's folder."""
    if isinstance(where, Mapping):
        return save_bound(folder, bench, bench.lora, params["lora"], params["head"], mask=modules(bench, where))
    config = dataclasses.replace(bench.lora, layers=None if len(where) == bench.num_layers else where)
    return save_bound(folder, bench, config, params["lora"], params["head"])


def save_bound(
    folder: str | os.PathLike[str],
    bench: Bench,
    config: LoRAConfig,
    params: Any,
    head: Any,
    gate: PerLayer | None = None,
    mask: PerLayer | None = None,
) -> Path:
    """`config.bind(params, gate, mask)` and a head, as PEFT's folder."""
    task_type = "CAUSAL_LM" if bench.head is None else "SEQ_CLS"
    names = bench.pretrained.hf_names
    return save_peft(folder, config, params, names, gate=gate, mask=mask, head=head, task_type=task_type)
