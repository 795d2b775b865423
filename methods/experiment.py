"""What every method's experiment stands on: model, data, losses, the final training, evaluation, the run folder.

The rows of a task are cut into three: *train*, which the inner loss sees; *outer*, the validation rows of the outer
loss; and *test*, the published validation set, which only the last evaluation sees.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from methods import tasks
from methods.adapters.lora import LoRAConfig
from methods.models.hooks import Hook
from methods.models.loading import Pretrained, load
from methods.runfolder import RunFolder
from methods.tasks.loss import answer_log_likelihood, answer_loss_at, answer_width


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
      outer_rows: validation rows the outer loss sees.
      test_rows: rows of the last evaluation; 0 takes all.
      rank: LoRA's r.
      lora_alpha: LoRA's alpha; the update is scaled by alpha / r.
      targets: names of the adapted linears, or one regular expression.
      finetune_steps: optimizer steps of the final training.
      finetune_lr: peak learning rate of the final training (AdamW, 10 % warm-up, cosine decay).
      remat: recompute blocks in the backward pass: less memory, one more forward pass.
    """

    model: str
    task: str = "piqa"
    data: str | None = None
    out: Path = Path("runs/latest")
    seed: int = 0
    length: int = 48
    batch_size: int = 4
    outer_batch_size: int = 8
    train_rows: int = 256
    outer_rows: int = 128
    test_rows: int = 100
    rank: int = 8
    lora_alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    finetune_steps: int = 40
    finetune_lr: float = 5e-4
    remat: bool = True


class Bench(NamedTuple):
    """A model, a task and its rows, ready for losses.

    Attributes:
      pretrained: the model.
      lora: the adapter's fixed part.
      task, splits: the task and its rows.
      train, outer: encoded rows, arrays `[N, T]`.
      width: most answer tokens in a row of `train` or `outer`.
      left_out: published training rows that are longer than T.
    """

    pretrained: Pretrained
    lora: LoRAConfig
    task: tasks.Task
    splits: tasks.Splits
    train: tasks.TokenBatch
    outer: tasks.TokenBatch
    width: int
    left_out: int

    @property
    def num_layers(self) -> int:
        return self.pretrained.config.num_layers


def prepare(settings: Settings) -> Bench:
    """Everything that `settings` name, loaded and encoded.

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong with which setting.
    """
    # The cheap mistakes first: nobody should wait for a model to load to learn of a misspelt task.
    task = tasks.get(settings.task)
    targets = settings.targets[0] if len(settings.targets) == 1 else settings.targets
    lora = LoRAConfig(settings.rank, settings.lora_alpha, targets)
    for name in ("batch_size", "outer_batch_size", "finetune_steps", "length", "train_rows", "outer_rows"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(settings, name)} must be at least 1.")
    for size, rows in (("batch_size", "train_rows"), ("outer_batch_size", "outer_rows")):
        if getattr(settings, size) > getattr(settings, rows):
            raise ValueError(
                f"--{size.replace('_', '-')} {getattr(settings, size)} is larger than the data, "
                f"--{rows.replace('_', '-')} {getattr(settings, rows)}: lower it."
            )
    published = tasks.load(task, "train", settings.data), tasks.load(task, task.test, settings.data)
    pretrained = load(settings.model)
    lora.sites(pretrained.config.site_shapes())
    if pretrained.tokenizer is None:
        raise ValueError(f"The model {settings.model} brings no tokenizer, which a language task needs.")
    if not settings.remat:
        model: Any = pretrained.model
        pretrained = dataclasses.replace(pretrained, model=dataclasses.replace(model, remat=False))
    fitting = _fitting(task, published[0], pretrained.tokenizer, settings)
    splits = tasks.split(
        task,
        fitting,
        published[1],
        outer=settings.outer_rows,
        train=settings.train_rows,
        test=settings.test_rows or None,
        seed=settings.seed,
    )

    def encoded(rows):
        batch = tasks.encode(tasks.training_pairs(task, rows), pretrained.tokenizer, settings.length).batch
        return jax.tree.map(jnp.asarray, batch)

    train, outer = encoded(splits.train), encoded(splits.outer)
    width = max(answer_width(train), answer_width(outer))
    return Bench(pretrained, lora, task, splits, train, outer, width, len(published[0]) - len(fitting))


def _fitting(task: tasks.Task, rows: list[Any], tokenizer: Any, settings: Settings) -> list[Any]:
    """The rows whose prompt and right answer fit into `length` tokens, looked for in a seeded order until enough."""
    wanted = 4 * (settings.train_rows + settings.outer_rows) + 64  # some share a subject with the test
    order = np.random.default_rng(settings.seed).permutation(len(rows))[:wanted]
    chosen = [rows[i] for i in order]
    texts = [pair.prompt + pair.answer for pair in tasks.training_pairs(task, chosen)]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    return [row for row, length in zip(chosen, lengths, strict=True) if length <= settings.length]


def answer_loss(bench: Bench) -> Any:
    """`loss(weights, adapt, batch)`: mean negative log-likelihood of the answer tokens, in nats."""
    model, width = bench.pretrained.model, bench.width

    def loss(weights: Any, adapt: Hook, batch: tasks.TokenBatch) -> jax.Array:
        variables = {"params": weights}
        hidden: Any = model.apply(variables, batch.tokens, batch.mask, adapt, method="hidden")
        return answer_loss_at(lambda h: model.apply(variables, h, method="head"), hidden, batch, width)  # pyright: ignore

    return loss


def start_adapter(bench: Bench, key: jax.Array) -> Any:
    """Fresh LoRA parameters: A random, B = 0."""
    return bench.lora.init(key, bench.pretrained.config.site_shapes(), bench.num_layers)


def finetune(settings: Settings, bench: Bench, layers: list[int], name: str, folder: RunFolder) -> Any:
    """Trains LoRA from scratch on `layers` alone: AdamW, linear warm-up over 10 % of the steps, cosine decay.

    Returns the parameters. The layers are a mask, an outer variable that does not move, so that every choice of
    layers is the same compiled program.
    """
    loss = answer_loss(bench)

    def inner_loss(weights, params, mask, batch, key):
        return loss(weights, bench.lora.bind(params, mask=mask), batch)

    steps = settings.finetune_steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.finetune_lr, max(1, steps // 10), steps)
    partial_loss = jax.tree_util.Partial(inner_loss, bench.pretrained.weights)
    problem = bilevel.Problem(
        partial_loss, partial_loss, lambda key, mask: start_adapter(bench, key), lambda key: layer_mask(bench, layers)
    )
    result = bilevel.fit(
        problem,
        layer_mask(bench, layers),
        optimizer=optax.adamw(schedule, weight_decay=0.0),
        data=bilevel.Batches(bench.train, settings.batch_size),
        steps=steps,
        key=jax.random.key(settings.seed + 1),
        callbacks=[folder.log(f"finetune {name}")],
        checkpoint=folder.path / "checkpoints" / f"finetune-{name}",
        title=f"fine-tuning, {name}",
    )
    return result.inner.params


def layer_mask(bench: Bench, layers: list[int]) -> jax.Array:
    """bool `[L]`, True at `layers`."""
    return jnp.isin(jnp.arange(bench.num_layers), jnp.asarray(layers, jnp.int32))


def evaluate(bench: Bench, params: Any, layers: list[int]) -> tasks.Evaluation:
    """Accuracy on the test rows with LoRA `params` on `layers`; no layer is the model as it came."""
    adapt = bench.lora.bind(params, mask=layer_mask(bench, layers))
    score = partial(_score, bench.pretrained.model, bench.pretrained.weights, adapt)
    rows = bench.splits.test
    return tasks.evaluate(score, bench.task, rows, bench.pretrained.tokenizer, batch_size=min(8, 2 * len(rows)))


@partial(jax.jit, static_argnums=0)
def _score(model, weights, adapt, tokens, mask, answer_mask):
    logits = model.apply({"params": weights}, tokens, mask, adapt)
    return answer_log_likelihood(logits, tasks.TokenBatch(tokens, mask, answer_mask))


def trainable_parameters(bench: Bench, layers: list[int]) -> int:
    """LoRA parameters on `layers`: sum over their sites of r (in + out)."""
    shapes = bench.pretrained.config.site_shapes()
    return len(layers) * sum(bench.lora.rank * sum(shapes[site]) for site in bench.lora.sites(shapes))
