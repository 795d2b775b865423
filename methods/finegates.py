r"""FineGates: adaptation by closing gates on the rows and columns of frozen weights, which then are cut out.

Every frozen linear becomes

.. math:: y = \omega_r \odot (W (\omega_c \odot x) + b), \qquad W = W_0 + s B A \text{ with LoRA},

with trained biases b and stochastic gates :math:`\omega \in [0, 1]` (`methods.adapters.gates`), and the loss

.. math:: L_{task} + \lambda_s \,\mathrm{mean}_{layers, structures}\, |\mathrm{mean}_d P_d - \kappa|,

P_d being the probability that gate d is open and kappa the share that should be. What a gate of exactly 0 closes is
taken out of the model: `methods.adapters.slicing`. The penalty can be met without one closed gate (P = 1/2 is a gate at
0), so that only counted weights are reported. Three levels:

    outer "none"       everything is trained on the training rows; as published
    outer "gates"      gates minimise the validation loss and the penalty; biases (and LoRA) are the inner variable
    outer "sparsity"   gates are inner too; log lambda_s, and how the layers share the budget, are outer. Both act in
                       training alone, so a first-order gradient of them is exactly 0; |x| is smoothed

Svirsky, Refael, Lindenbaum, "LLMs Finetuning with (Compression using) Stochastic Gates", arXiv 2412.12951. Penalty,
gate parametrisation and start values are those of the authors' released code; tied gates are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from methods import experiment, inside, report, summary
from methods.adapters import gates, slicing
from methods.adapters.gates import Bias, Structure
from methods.experiment import Bench, Settings
from methods.models.hooks import Chain, Hook
from methods.ranges import Count, Kept, NotNegative, Positive, Range, one_of
from methods.runfolder import RunFolder
from methods.tasks.loss import cross_entropy

Outer = Literal["none", "gates", "sparsity"]
WIDTH = 0.05
"""Of the smoothed penalty where the layers' shares are outer: the gradient of |x| does not depend on the share."""


def hook(params: Any, values: dict[str, jax.Array], structures: dict[str, Structure], family: str, key: Any) -> Hook:
    """What comes after LoRA: biases, then gates; random with a key."""
    return Chain((Bias(params["bias"]), gates.bind(values, structures, family, key)))


def problem(
    predict: Callable[..., Any],
    weights: Any,
    start: Callable[[jax.Array], Any],
    structures: dict[str, Structure],
    config: Any,
    *,
    outer: Outer = "none",
    family: str = "stg",
    target: float = 0.4,
    weight: float = 50.0,
) -> bilevel.Problem:
    """FineGates' problem; with outer="none" one for `bilevel.fit`, whose outer variable stays as it starts.

    The inner variable is `{"adapter", "bias"}`, and `"gates"` unless they are outer; the outer one `{"gates", "key"}`,
    or `{"log_weight", "kappa", "key"}`.

    Args:
      predict: `predict(weights, adapter, adapt, batch) -> Prediction`.
      weights: the frozen model.
      start: `start(key) -> adapter`, LoRA's parameters, or None for none.
      structures: what is gated: `gates.tied(config)` or `gates.untied(config)`.
      config: the model's.
      outer: see the module.
      family: "stg" or "hard-concrete".
      target: share of gates to close.
      weight: lambda_s; where it is outer, its start, and its value in the outer loss.
    """
    layers, shapes = config.num_layers, config.site_shapes()

    def task(weights, params, values, key, batch):
        return cross_entropy(predict(weights, params["adapter"], hook(params, values, structures, family, key), batch))

    def init_inner(key, outer_variable):
        keys = jax.random.split(key)
        params = {"adapter": start(keys[0]), "bias": {s: jnp.zeros((layers, out)) for s, (_, out) in shapes.items()}}
        return params if outer == "gates" else params | {"gates": gates.init(keys[1], family, structures, layers)}

    if outer == "gates":

        def inner_loss(weights, params, hyper, batch, key):
            return task(weights, params, hyper["gates"], hyper["key"], batch)

        def outer_loss(weights, params, hyper, batch, key):
            value = inner_loss(weights, params, hyper, batch, key)
            return value + weight * gates.penalty(hyper["gates"], family, 1 - target)

        def init_outer(key):
            keys = jax.random.split(key)
            return {"gates": gates.init(keys[0], family, structures, layers), "key": keys[1]}

    else:

        def inner_loss(weights, params, hyper, batch, key):
            keep, width = gates.kept_shares(target, hyper["kappa"]), 0.0 if outer == "none" else WIDTH
            loss = task(weights, params, params["gates"], hyper["key"], batch)
            return loss + jnp.exp(hyper["log_weight"]) * gates.penalty(params["gates"], family, keep, width)

        def outer_loss(weights, params, hyper, batch, key):
            # Without noise: the model as it will be used.
            loss = task(weights, params, params["gates"], None, batch)
            return loss + weight * gates.penalty(params["gates"], family, 1 - target)

        def init_outer(key):
            first = jnp.log(jnp.asarray(weight, jnp.result_type(float)))
            return {"log_weight": first, "kappa": jnp.zeros(layers), "key": key}

    losses = [jax.tree_util.Partial(loss, weights) for loss in (inner_loss, outer_loss)]
    return bilevel.Problem(losses[0], losses[1], init_inner, init_outer)


@dataclasses.dataclass(frozen=True)
class FineGatesSettings(Settings):
    """FineGates: close gates on frozen weights in training, cut out what is closed, evaluate, save the smaller model.

    Attributes:
      outer: "none" trains gates and biases together, as published; "gates" and "sparsity" are bilevel.
      target_sparsity: shares of gates to close, one model each.
      gating: "tied" gates can be cut out of the blocks; "untied" are the published rows and columns.
      family: of gates.
      lora: whether LoRA is trained beside.
      weight: lambda_s, of the sparsity penalty.
      gate_lr: learning rate of the gates' Adam, in training or in the search.
      inner_steps: K, training steps between two outer steps.
      outer_steps: T, updates of the outer variable.
      inner_lr: learning rate of the search's Adam on biases (and LoRA).
      outer_lr: learning rate of the Adam on log lambda_s and the layers' shares.
    """

    outer: Outer = "none"
    target_sparsity: Annotated[tuple[float, ...], Range(0, 1, below=True)] = (0.4,)
    gating: Annotated[str, one_of(gates.GATINGS)] = "tied"
    family: Annotated[str, one_of(gates.FAMILIES)] = "stg"
    lora: bool = False
    weight: NotNegative = 50.0
    gate_lr: Positive = 0.1
    inner_steps: Kept = 4
    outer_steps: Count = 6
    inner_lr: Positive = 1e-3
    outer_lr: Positive = 0.1


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "evidence": {"target_sparsity": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6), "gate_lr": 0.02}
    | {"train_rows": 1000, "outer_rows": 400, "test_rows": 0, "batch_size": 16, "outer_batch_size": 64, "length": 96}
    | {"finetune_steps": 400, "finetune_lr": 1e-3, "inner_steps": 10, "outer_steps": 60},
}
"""Settings that differ from the defaults, by preset."""


def unused(settings: FineGatesSettings) -> dict[str, str]:
    """Options without effect, and why."""
    search = ("inner_steps", "outer_steps", "inner_lr", "outer_lr")
    return {
        "none": dict.fromkeys(search, "--outer none searches nothing"),
        "gates": {"outer_lr": "with --outer gates what is outer learns at --gate-lr"},
        "sparsity": {},
    }[settings.outer]


def check(settings: FineGatesSettings) -> None:
    """What is wrong with the settings whatever the model is.

    Raises:
      ValueError: for targets that would be one model, and for a weight of 0 where its logarithm is searched.
    """
    names = [f"{target:g}" for target in settings.target_sparsity]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"--target-sparsity has {twice} twice: each target is a model, which is called by its number.")
    if settings.outer == "sparsity" and not settings.weight:
        raise ValueError("--weight 0 must be above 0 with --outer sparsity, which searches its logarithm.")


def make(settings: FineGatesSettings, bench: Bench, target: float) -> bilevel.Problem:
    """The problem of these settings at one target."""
    return problem(
        inside.predictor(bench),
        bench.pretrained.weights,
        lambda key: experiment.start(bench, key) | ({} if settings.lora else {"lora": {}}),
        structures(settings, bench),
        bench.pretrained.config,
        outer=settings.outer,
        family=settings.family,
        target=target,
        weight=settings.weight,
    )


def structures(settings: FineGatesSettings, bench: Bench) -> dict[str, Structure]:
    """What is gated."""
    return gates.GATINGS[settings.gating](bench.pretrained.config)


def optimizer(rest: optax.GradientTransformation, gate_lr: float) -> optax.GradientTransformation:
    """Adam on what is under "gates", `rest` on everything else."""

    def labels(params):
        return {name: jax.tree.map(lambda _, name=name: name == "gates", value) for name, value in params.items()}

    return optax.partition({True: optax.adam(gate_lr), False: rest}, labels)


def solver(settings: FineGatesSettings, problem: bilevel.Problem) -> bilevel.Nested:
    """The search of a bilevel problem as a solver."""
    gated, rest = settings.outer == "gates", optax.adam(settings.inner_lr)
    inner = rest if gated else optimizer(rest, settings.gate_lr)
    estimator = bilevel.Unrolled(inner, settings.inner_steps, checkpoint="step")
    return bilevel.Nested(problem, estimator, optax.adam(settings.gate_lr if gated else settings.outer_lr))


def pruned(settings: FineGatesSettings, bench: Bench, target: float, folder: RunFolder) -> dict[str, Any]:
    """One target: trained, counted, cut, saved and evaluated; a row of the results."""
    name, what, config = f"sparsity-{target:g}", structures(settings, bench), bench.pretrained.config
    of = make(settings, bench, target)
    outer = of.start_outer(jax.random.key(settings.seed))
    if settings.outer != "none":
        outer = inside.search(settings, bench, solver(settings, of), folder, name=f"search {name}").outer
    rest = experiment.recipe(settings).optimizer()
    together = rest if settings.outer == "gates" else optimizer(rest, settings.gate_lr)
    params = inside.train_inner(settings, bench, of, outer, name, folder, optimizer=together)
    values = outer["gates"] if settings.outer == "gates" else params["gates"]
    adapt = hook(params, values, what, settings.family, None)
    bound = inside.bind(bench, params["adapter"], adapt)
    row = report.arm(bench, list(range(bench.num_layers)), experiment.evaluate_with(bench, bound))
    row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves((params, values if "gates" not in params else ())))
    row["removed"] = slicing.removed(values, what, settings.family, config)
    row["open"] = {s: np.asarray((gates.activation(settings.family, l) > 0).mean(axis=1)) for s, l in values.items()}
    if settings.gating == "tied":
        weights = inside.merged(bench, params["adapter"])
        small = slicing.cut(bench.pretrained.model, weights, values, what, settings.family, params["bias"])
        slicing.save(folder.path / f"sliced-{target:g}", small[0], small[1] | {"classifier": params["adapter"]["head"]})
        row["sliced_differs_by"] = inside.difference(bench, bound, *small)
    return row


def main(settings: FineGatesSettings) -> None:
    """A pruned model for each target, LoRA beside, report: all in `settings.out`.

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong.
      FloatingPointError: if training diverges; names step and leaf.
    """
    check(settings)
    bench = experiment.prepare(settings)
    folder = experiment.open_run(settings, bench)
    folder.once("results/lora", partial(inside.plain_lora, settings, bench, folder))
    arms = [f"sparsity-{target:g}" for target in settings.target_sparsity]
    for name, target in zip(arms, settings.target_sparsity, strict=True):
        folder.once(f"results/{name}", partial(pruned, settings, bench, target, folder))
    summary.pruning(folder, settings, bench, arms)
