r"""Flexora: which layers deserve LoRA, found by differentiating through LoRA's training.

Inner variable: LoRA's A, B on every layer. Outer variable: one logit a layer, :math:`\alpha \in R^n`, whose gate

.. math:: g(\alpha) = n\,\mathrm{softmax}(\alpha)

multiplies that layer's LoRA update once. Stage 1 minimises the validation loss of the trained adapter over
:math:`\alpha`; stage 2 keeps the layers above the mean; stage 3 trains LoRA from scratch on these alone.

At :math:`\alpha = 0` every gate is exactly 1: the search starts at plain LoRA. Softmax does not see a common shift, so
:math:`\sum_i \partial L / \partial \alpha_i = 0` and plain gradient descent keeps :math:`\sum_i \alpha_i = 0`;
then "above the mean" is "positive", as the paper selects. Adam does not keep the sum, hence the mean.

Wei, Shu, He, Yu, "Flexora: Flexible Low-Rank Adaptation for Large Language Models", ACL 2025, arXiv 2408.10774.
`released=True` reproduces what the authors' released code computes instead of the paper: gradients at fixed LoRA
weights (first order), a gate that acts three times (on the inputs of dropout, A and B), an AdamW whose state is cleared
after every step, Adam on alpha, selection of alpha > 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from methods import experiment, report
from methods.adapters.lora import LoRAConfig
from methods.experiment import Bench, Settings
from methods.objective import Trainable
from methods.runfolder import RunFolder


def gate(alpha: jax.Array) -> jax.Array:
    r"""`n softmax(alpha)`: exactly 1 at alpha = 0.

    Args:
      alpha: layer logits `[n]`.

    Returns:
      Gates `[n]`, positive, with sum n.
    """
    shifted = jnp.exp(alpha - jax.lax.stop_gradient(alpha.max()))
    # The mean, written so that it is exactly 1 at alpha = 0 whatever a compiler does with a division by n: both
    # exp(alpha - logsumexp(alpha) + log n) and n * softmax(alpha) are an ulp off there for some n.
    return shifted / (1.0 + (shifted - 1.0).mean())


def select(alpha: Any, top_k: int | None = None, *, threshold: float | None = None) -> list[int]:
    """Indices of the chosen layers, ascending: those above `threshold` (None: the mean), or the `top_k` largest.

    Raises:
      ValueError: if `top_k` is not between 1 and the number of layers, or if no layer is above the threshold.
    """
    alpha = np.asarray(alpha)
    if top_k is not None:
        if not 1 <= top_k <= len(alpha):
            raise ValueError(f"--top-k {top_k} must be between 1 and the model's {len(alpha)} layers.")
        return sorted(int(i) for i in np.argsort(-alpha, kind="stable")[:top_k])
    chosen = [int(i) for i in np.flatnonzero(alpha > (alpha.mean() if threshold is None else threshold))]
    if not chosen:
        raise ValueError("No layer is above the threshold: the search has not moved alpha; raise --outer-lr or steps.")
    return chosen


def cleared(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, its state thrown away after every step."""

    def update(updates: Any, state: Any, params: Any = None):
        updates, _ = optimizer.update(updates, optimizer.init(params), params)
        return updates, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def problem(
    loss: Any, weights: Any, lora: LoRAConfig | Trainable, start: Any, num_layers: int, *, power: int = 1
) -> Any:
    """Flexora's bilevel problem.

    Args:
      loss: `loss(weights, adapt, batch) -> scalar`, for both levels.
      weights: the frozen model.
      lora: the adapter, `LoRAConfig` or `objective.Trainable`: what has its `bind`.
      start: `start(key)`, the parameters that `lora` binds.
      num_layers: n.
      power: how often the gate multiplies the update; 1, or 3 for the released code.
    """

    def gated(weights, params, alpha, batch, key):
        return loss(weights, lora.bind(params, gate(alpha) ** power, base=weights["blocks"]), batch)

    gated = jax.tree_util.Partial(gated, weights)
    return bilevel.Problem(gated, gated, lambda key, alpha: start(key), lambda key: jnp.zeros(num_layers))


@dataclasses.dataclass(frozen=True)
class FlexoraSettings(Settings):
    """Flexora: search by differentiating through training, select layers, train LoRA on them, evaluate.

    Attributes:
      hypergradient: "unrolled" differentiates through the inner steps; "first-order" holds LoRA's weights fixed.
      released: reproduce the authors' released code (see `methods.flexora`); sets everything but the step counts.
      inner_steps: K, training steps between two outer steps.
      outer_steps: T, updates of alpha.
      inner_lr: learning rate of the search's Adam on LoRA.
      outer_lr: learning rate of alpha.
      outer_optimizer: "sgd" is the paper's gradient descent.
      inner_start: "warm" goes on training LoRA across outer steps; "cold" starts anew for each.
      top_k: select this many layers instead of those above the mean.
      random_baselines: random choices of as many layers, trained and evaluated beside the selected ones.
    """

    hypergradient: Literal["unrolled", "first-order"] = "unrolled"
    released: bool = False
    inner_steps: int = 4
    outer_steps: int = 10
    inner_lr: float = 1e-3
    outer_lr: float = 10.0
    outer_optimizer: Literal["sgd", "adam"] = "sgd"
    inner_start: Literal["warm", "cold"] = "warm"
    top_k: int | None = None
    random_baselines: int = 1


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "evidence": {
        "length": 96,
        "batch_size": 8,
        "outer_batch_size": 16,
        "train_rows": 4000,
        "outer_rows": 512,
        "test_rows": 0,
        "inner_steps": 8,
        "outer_steps": 100,
        "outer_lr": 2.0,
        "finetune_steps": 500,
        "finetune_lr": 2e-4,
        "random_baselines": 3,
    },
}
"""Settings that differ from the defaults, by preset."""


def solver(settings: FlexoraSettings, bench: Bench) -> bilevel.Nested:
    """The search as a solver.

    Raises:
      ValueError: for settings out of range.
    """
    steps = 1 if settings.released else settings.inner_steps
    inner = optax.adam(settings.inner_lr)
    outer = {"sgd": optax.sgd, "adam": optax.adam}[settings.outer_optimizer](settings.outer_lr)
    if settings.released:
        inner, outer = cleared(optax.adamw(1e-4, weight_decay=0.0)), optax.adam(1e-2)
    first_order = settings.released or settings.hypergradient == "first-order"
    estimator = bilevel.FirstOrder(inner, steps) if first_order else bilevel.Unrolled(inner, steps, checkpoint="step")
    layers = problem(
        experiment.loss(bench),
        bench.pretrained.weights,
        bench.trainable,
        lambda key: experiment.start(bench, key),
        bench.num_layers,
        power=3 if settings.released else 1,
    )
    return bilevel.Nested(layers, estimator, outer, inner_start=settings.inner_start)


def search(settings: FlexoraSettings, bench: Bench, folder: RunFolder) -> np.ndarray:
    """Stage 1: alpha after every outer step, `[T, n]`; kept in the run folder and continued from there."""
    result = bilevel.run(
        solver(settings, bench),
        inner_data=bilevel.Batches(bench.train, settings.batch_size),
        outer_data=bilevel.Batches(bench.outer, settings.outer_batch_size),
        steps=settings.outer_steps,
        key=jax.random.key(settings.seed),
        callbacks=[folder.log("search")],
        checkpoint=folder.path / "checkpoints" / "search",
        record=_alpha,
        title="search",
    )
    return result.history["alpha"]


def _alpha(state: Any) -> dict[str, jax.Array]:
    return {"alpha": state.outer}


def main(settings: FlexoraSettings) -> None:
    """Search, selection, training, evaluation, report, adapter: all in `settings.out`.

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong.
      FloatingPointError: if training diverges; names step and leaf.
    """
    if settings.inner_steps < 1 or settings.outer_steps < 1:
        raise ValueError("--inner-steps and --outer-steps must be at least 1: the search needs training to look at.")
    bench = experiment.prepare(settings)
    if settings.top_k is not None:
        select(np.zeros(bench.num_layers), settings.top_k)
    folder = RunFolder(settings.out, settings)
    alpha = search(settings, bench, folder)
    threshold = 0.0 if settings.released else None
    chosen = select(alpha[-1], settings.top_k, threshold=threshold)
    rule = f"top {settings.top_k}" if settings.top_k else "alpha > 0" if settings.released else "alpha > mean(alpha)"
    folder.write("selection", {"rule": rule, "layers": chosen, "alpha": alpha[-1], "gate": np.asarray(gate(alpha[-1]))})

    everything = list(range(bench.num_layers))
    arms: dict[str, list[int]] = {"flexora": chosen, "all-layers": everything}
    for i in range(settings.random_baselines):
        rng = np.random.default_rng((settings.seed, i))
        arms[f"random-{i}"] = sorted(int(j) for j in rng.choice(bench.num_layers, len(chosen), replace=False))
    fresh = experiment.start(bench, jax.random.key(0))
    folder.once("results/pretrained", lambda: report.arm(bench, [], experiment.evaluate(bench, fresh, [])))
    for name, layers in arms.items():

        def trained(name=name, layers=layers):
            params = experiment.finetune(settings, bench, layers, name, folder)
            if name == "flexora":
                experiment.save_adapter(folder.path / "adapter", bench, params, layers)
            return report.arm(bench, layers, experiment.evaluate(bench, params, layers))

        folder.once(f"results/{name}", trained)
    report.layer_selection(folder, settings, bench, alpha, chosen, rule, ["pretrained", *arms])
