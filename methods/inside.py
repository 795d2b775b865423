"""What the methods that enter a model's blocks share: predictions behind hooks, the search, the training, checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from methods import experiment, objective, report, tasks
from methods.experiment import Bench, Settings
from methods.models.hooks import Chain, Hook, identity
from methods.objective import Bound
from methods.runfolder import RunFolder
from methods.tasks.loss import Prediction, answer_prediction


def bind(
    bench: Bench, params: dict[str, Any], adapt: Hook = identity, before: Hook = identity, **options: Any
) -> Bound:
    """What a loss is given of `{"lora", "head"}`, with hooks before and after the adapter's; "lora" may be {}.

    options: `gate` of the adapter; `base`, the blocks' weights.
    """
    options = {"base": bench.pretrained.weights["blocks"]} | options
    lora = bench.lora.bind(params["lora"], **options) if params["lora"] else identity
    return Bound(Chain((before, lora, adapt)), params["head"])


def predictor(bench: Bench) -> Callable[..., Prediction]:
    """`predict(weights, params, adapt, batch, gate=None, before=identity) -> Prediction`, of what `bind` binds.

    Raises:
      ValueError: for a regression, which has no classes to predict.
    """
    if bench.head is not None and not bench.task.classes:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(f"The task {bench.task.name} is a regression: this method is made for classes and answers.")
    return partial(_predict, bench)


def _predict(bench, weights, params, adapt, batch, gate=None, before=identity):
    bound = bind(bench, params, adapt, before, gate=gate, base=weights["blocks"])
    model, head = bench.pretrained.model, bench.head
    if head is not None:
        outputs = objective.outputs(model, head, weights, bound, batch)
        return Prediction(outputs, batch.labels, jnp.ones_like(batch.labels, bool))
    variables = {"params": weights}
    hidden = model.apply(variables, batch.tokens, batch.mask, bound.adapt, method="hidden")
    return answer_prediction(lambda h: model.apply(variables, h, method="head"), hidden, batch, bench.width)


def encoded(bench: Bench, rows: Any, length: int) -> Any:
    """Rows of a classification as `bench.outer` holds them."""
    task: Any = bench.task
    return tasks.encode_labelled(task, rows, bench.pretrained.tokenizer, length)


def search(
    settings: Any, bench: Bench, solver: bilevel.Nested, folder: RunFolder, *, name: str = "search", record: Any = None
) -> bilevel.Result:
    """`settings.outer_steps` of a solver; kept in the run folder and continued from there."""
    return bilevel.run(
        solver,
        inner_data=bilevel.Batches(bench.train, settings.batch_size),
        outer_data=bilevel.Batches(bench.outer, settings.outer_batch_size),
        steps=settings.outer_steps,
        key=jax.random.key(settings.seed),
        callbacks=[folder.log(name)],
        checkpoint_dir=folder.path / "checkpoints" / name.replace(" ", "-"),
        record=record,
        title=name,
    )


def train_inner(
    settings: Settings, bench: Bench, problem: bilevel.Problem, outer: Any, name: str, folder: RunFolder, **options: Any
) -> Any:
    """The inner variable of `problem`, trained at `outer` as `experiment.finetune` trains LoRA.

    A validation, where the settings ask for some, is the outer loss over all outer rows. options: `optimizer`, in place
    of the recipe's.
    """
    validate = lambda params: float(_outer_value(problem, params, outer, bench.outer))  # noqa: E731
    return experiment.finetune_at(settings, bench, problem, outer, name, folder, validate, **options)


def plain_lora(settings: Settings, bench: Bench, folder: RunFolder, parameters: int | None = None) -> dict[str, Any]:
    """LoRA on all layers, trained as `train_inner` trains; a row of the results, with its "rank".

    Args:
      settings, bench: of the run.
      folder: of the run.
      parameters: how many to train, head included: the rank is that with the nearest number; None for the settings'.
    """
    everything = list(range(bench.num_layers))
    if parameters is not None:
        head = experiment.trainable_parameters(bench, [])
        one_rank = (experiment.trainable_parameters(bench, everything) - head) / bench.lora.rank
        bench = bench._replace(lora=dataclasses.replace(bench.lora, rank=max(1, round((parameters - head) / one_rank))))
    params = experiment.finetune(settings, bench, everything, "lora", folder)
    row = report.arm(bench, everything, experiment.evaluate_with(bench, bind(bench, params)))
    return row | {"rank": bench.lora.rank}


@jax.jit
def _outer_value(problem, params, outer, rows):
    return problem.outer_value(params, outer, rows, jax.random.key(0))[0]


def merged(bench: Bench, params: dict[str, Any]) -> dict[str, Any]:
    """The model's weights with `params["lora"]` merged."""
    weights = bench.pretrained.weights
    if not params["lora"]:
        return weights
    kernels = {site: weights["blocks"][site]["kernel"] for site in bench.pretrained.config.site_shapes()}
    kernels = bench.lora.merge(kernels, params["lora"])
    blocks = {site: weights["blocks"][site] | {"kernel": kernel} for site, kernel in kernels.items()}
    return weights | {"blocks": weights["blocks"] | blocks}


def difference(bench: Bench, bound: Bound, model: Any, weights: Any) -> float:
    """Largest difference between the outputs of the model with a hook and of another without, on eight outer rows."""
    rows = jax.tree.map(lambda leaf: leaf[:8], bench.outer)

    def outputs(model, weights, adapt):
        method = "hidden" if bench.head is None else "features"
        return np.asarray(model.apply({"params": weights}, rows.tokens, rows.mask, adapt, method=method))

    one = outputs(bench.pretrained.model, bench.pretrained.weights, bound.adapt)
    return float(np.abs(one - outputs(model, weights, identity)).max())
