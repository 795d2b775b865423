r"""HiddenKey: dropout for LoRA, its rates and the weight of its KL term learned by differentiating through training.

Inner variable: LoRA. Its loss drops keys from the attention (DropKey, columns) and features from the feed-forward
layers (HiddenCut, elements), and asks two passes with different masks to agree:

.. math:: L = L_{task}(P_1) + \beta \cdot \tfrac12 [KL(P_1 \| P_2) + KL(P_2 \| P_1)].

Outer variable: the logit of the rate at each position, log beta, and the random key of the masks. Rates and beta act in
training alone, so the first-order gradient of the validation loss, taken without dropout, is exactly 0 in them; what is
left is to differentiate through training (or a grid). The key is an outer leaf too: the masks are the same whenever an
outer step is evaluated again, and new ones in the next.

Rates are learned with relaxed masks (`methods.adapters.dropout`) and used with hard ones. As published, only the first
pass is back-propagated: half the backward work; by symmetry its gradient of KL (not of JS) is half of the whole one on
average, so beta counts half of what it does with `backward="both"`.

Wang, Chen, Jiang, Xue, Kong, Wu, "LoRA Meets Dropout under a Unified Framework", Findings of ACL 2024, arXiv
2403.00812. There the rates come from a grid on the validation set: `--grid` runs it beside.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from methods import experiment, inside, report, summary
from methods.adapters.dropout import DropoutConfig, logit
from methods.experiment import Bench, Settings
from methods.held import held
from methods.models.hooks import identity
from methods.ranges import LARGEST_FLOAT, Count, Kept, Positive, Range, one_of
from methods.tasks.loss import DIVERGENCES, cross_entropy

RULES = ("attention_logits column kl", "ffn_hidden element kl")
"""HiddenKey. With "rescale" for "kl" it is the paper's HiddenKey-."""
MOST_POINTS = 1_000
"""Of a grid."""


def start_outer(dropout: DropoutConfig, rates: Mapping[str, Any], beta: float, key: jax.Array) -> dict[str, Any]:
    """The outer variable: `{"rates": {position: logit}, "log_beta", "key"}`, log_beta only where there is a loss term.

    Args:
      dropout: the rules.
      rates: for each position, a rate or one for each layer, `[L]`.
      beta: weight of the loss term.
      key: a typed random key.
    """
    outer = {"rates": {position: logit(rates[position]) for position in dropout.positions}, "key": key}
    if dropout.term:
        outer["log_beta"] = jnp.log(jnp.asarray(beta, jnp.result_type(float)))
    return outer


def problem(
    predict: Callable[..., Any],
    weights: Any,
    start: Callable[[jax.Array], Any],
    init_outer: Callable[[jax.Array], Any],
    num_layers: int,
    dropout: DropoutConfig,
    *,
    active: Any = True,
    backward: Literal["one", "both"] = "one",
) -> bilevel.Problem:
    """HiddenKey's bilevel problem.

    Args:
      predict: `predict(weights, params, adapt, batch) -> Prediction`, `adapt` a hook beside LoRA's.
      weights: the frozen model.
      start: `start(key) -> params`, LoRA and whatever else is trained.
      init_outer: `init_outer(key) -> outer`, as from `start_outer`.
      num_layers: L.
      dropout: the rules, and the temperature of the masks.
      active: bool, a scalar or `[L]`: which layers drop at all.
      backward: how many of the two passes are back-propagated. With "one" there is no gradient field: use
        `Unrolled(mode="reverse")`.
    """

    def inner_loss(weights, params, outer, batch, key):
        del key
        masks = [jax.random.fold_in(outer["key"], i) for i in range(2)]
        hooks = [dropout.bind(mask, outer["rates"], num_layers, active) for mask in masks]
        first = predict(weights, params, hooks[0], batch)
        loss = cross_entropy(first)
        if dropout.term is None:
            return loss
        if backward == "one":
            params = held(params, (outer["rates"], outer["log_beta"]))
        # JS compares with the model as it is used, without dropout.
        second = predict(weights, params, hooks[1] if dropout.term == "kl" else identity, batch)
        return loss + jnp.exp(outer["log_beta"]) * DIVERGENCES[dropout.term](first.logits, second.logits, first.mask)

    def outer_loss(weights, params, outer, batch, key):
        del outer, key
        return cross_entropy(predict(weights, params, identity, batch))

    inner_loss, outer_loss = (jax.tree_util.Partial(loss, weights) for loss in (inner_loss, outer_loss))
    return bilevel.Problem(inner_loss, outer_loss, lambda key, outer: start(key), init_outer)


class Way(NamedTuple):
    """A way to differentiate through the training.

    Attributes:
      make: `make(optimizer, steps, stops) -> hypergradient`; `stops` says that the training hides a part of its
        gradient, and so follows no gradient field.
      told: on the page.
    """

    make: Callable[[Any, int, bool], bilevel.Hypergradient]
    told: str


def _unrolled(inner: Any, steps: int, stops: bool) -> bilevel.Hypergradient:
    return bilevel.Unrolled(inner, steps, mode="reverse" if stops else "mixed", checkpoint="step")


def _implicit(inner: Any, steps: int, stops: bool) -> bilevel.Hypergradient:
    return bilevel.Implicit(inner, steps, linear_solver=bilevel.CG(), damping=1e-2)


HYPERGRADIENTS: dict[str, Way] = {
    "unrolled": Way(_unrolled, "through the unrolled training"),
    "implicit": Way(_implicit, "implicit"),
    "first-order": Way(lambda inner, steps, stops: bilevel.FirstOrder(inner, steps), "first order: 0"),
}
"""By the name that the command line knows."""


@dataclasses.dataclass(frozen=True)
class HiddenKeySettings(Settings):
    """HiddenKey: learn dropout rates and the KL weight through training, train with them, evaluate.

    Attributes:
      rules: three words each: position, pattern, compensation (see `methods.adapters.dropout`).
      hypergradient: "first-order" is the control: its gradient is exactly 0.
      backward: passes that are back-propagated; "implicit" needs both.
      temperature: of the relaxed masks of the search, above 0.
      rate: where each rate starts.
      beta: where the weight of the KL term starts.
      per_layer: one rate for each layer instead of one for all.
      layers: "upper-half" drops only there, as the paper does in decoders.
      inner_steps: K, training steps between two outer steps.
      outer_steps: T, updates of rates and beta.
      inner_lr: learning rate of the search's Adam.
      outer_lr: learning rate of the Adam on logits and log beta.
      inner_start: "cold" starts each outer step's training anew.
      grid: rates of a grid search beside, over all positions; none by default.
      grid_beta: its weights of the KL term.
    """

    rules: tuple[str, ...] = RULES
    hypergradient: Annotated[str, one_of(HYPERGRADIENTS)] = "unrolled"
    backward: Literal["one", "both"] = "one"
    temperature: Positive = 0.3
    rate: Annotated[float, Range(0, 1, above=True, below=True)] = 0.1
    beta: Positive = 1.0
    per_layer: bool = False
    layers: Literal["all", "upper-half"] = "all"
    inner_steps: Kept = 4
    outer_steps: Count = 6
    inner_lr: Positive = 1e-3
    outer_lr: Positive = 0.1
    inner_start: Literal["warm", "cold"] = "warm"
    grid: Annotated[tuple[float, ...], Range(0, 1, below=True, empty=True)] = ()
    grid_beta: Annotated[tuple[float, ...], Range(0, LARGEST_FLOAT, above=True)] = (1.0,)


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "evidence": {"train_rows": 200, "outer_rows": 200, "test_rows": 0, "batch_size": 16, "outer_batch_size": 64}
    | {"length": 96, "inner_steps": 20, "outer_steps": 40, "inner_start": "cold", "finetune_steps": 60}
    | {"grid": (0.05, 0.1, 0.2), "grid_beta": (0.1, 1.0, 5.0)},
}
"""Settings that differ from the defaults, by preset."""


def unused(settings: HiddenKeySettings) -> dict[str, str]:
    """Options without effect, and why."""
    term = "no rule of --rules has a loss term, kl or js"
    without = {} if DropoutConfig(settings.rules).term else dict.fromkeys(("beta", "backward", "grid_beta"), term)
    return without | ({} if settings.grid else {"grid_beta": "there is no --grid"})


def check(settings: HiddenKeySettings) -> None:
    """What is wrong with the settings whatever the model is.

    Raises:
      ValueError: for no rule or an unknown one, a grid that is too large, or an implicit gradient of a training that
        follows no gradient field.
    """
    if not settings.rules:
        raise ValueError("--rules names none: give one or more, each of a position, a pattern and a compensation.")
    dropout = DropoutConfig(settings.rules)
    if settings.hypergradient == "implicit" and _stops(settings):
        raise ValueError("--hypergradient implicit needs --backward both and no stop_gradient_rescale: a Hessian.")
    points = len(settings.grid) ** len(dropout.positions) * len(settings.grid_beta)
    if points > MOST_POINTS:
        raise ValueError(f"--grid has {points:,} points, each of which is a training: at most {MOST_POINTS:,}.")


def _stops(settings: HiddenKeySettings) -> bool:
    """Whether the training hides a part of its gradient."""
    one_pass = DropoutConfig(settings.rules).term and settings.backward == "one"
    return bool(one_pass) or any("stop_gradient" in rule for rule in settings.rules)


def make(settings: HiddenKeySettings, bench: Bench, *, temperature: float = 0.0) -> bilevel.Problem:
    """The problem of these settings; with hard masks unless there is a temperature."""
    dropout = DropoutConfig(settings.rules, temperature, bench.lora.sites(bench.pretrained.config.site_shapes()))
    rate = np.full(bench.num_layers, settings.rate) if settings.per_layer else settings.rate
    active = np.arange(bench.num_layers) >= (bench.num_layers // 2 if settings.layers == "upper-half" else 0)
    return problem(
        inside.predictor(bench),
        bench.pretrained.weights,
        lambda key: experiment.start(bench, key),
        lambda key: start_outer(dropout, dict.fromkeys(dropout.positions, rate), settings.beta, key),
        bench.num_layers,
        dropout,
        active=active,
        backward=settings.backward,
    )


def solver(settings: HiddenKeySettings, bench: Bench) -> bilevel.Nested:
    """The search as a solver.

    Raises:
      ValueError: as `check`.
    """
    check(settings)
    inner = optax.adam(settings.inner_lr)
    estimator = HYPERGRADIENTS[settings.hypergradient].make(inner, settings.inner_steps, _stops(settings))
    relaxed = make(settings, bench, temperature=settings.temperature)
    return bilevel.Nested(relaxed, estimator, optax.adam(settings.outer_lr), inner_start=settings.inner_start)


def found(outer: Any) -> dict[str, jax.Array]:
    """The rates and beta of an outer variable, by name."""
    rates = {f"rate {position}": jax.nn.sigmoid(value) for position, value in outer["rates"].items()}
    return rates | ({"beta": jnp.exp(outer["log_beta"])} if "log_beta" in outer else {})


def grid(settings: HiddenKeySettings, outer: Any) -> list[dict[str, Any]]:
    """The points of the grid, as outer variables like `outer`: every rate at every position, every beta."""
    start, betas = outer["rates"], settings.grid_beta if "log_beta" in outer else (1.0,)
    points = []
    for *rates, beta in itertools.product(*[settings.grid] * len(start), betas):
        at = {p: jnp.full_like(x, logit(rate)) for (p, x), rate in zip(start.items(), rates, strict=True)}
        weight = {"log_beta": jnp.full_like(outer["log_beta"], np.log(beta))} if "log_beta" in outer else {}
        points.append(outer | {"rates": at} | weight)
    return points


def main(settings: HiddenKeySettings) -> None:
    """Search, training with what was found, evaluation, report: all in `settings.out`.

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong.
      FloatingPointError: if training diverges; names step and leaf.
    """
    check(settings)
    bench = experiment.prepare(settings)
    learner, hard = solver(settings, bench), make(settings, bench)
    folder = experiment.open_run(settings, bench)
    result = inside.search(settings, bench, learner, folder, record=lambda state: found(state.outer))
    learned = found(result.outer)
    folder.write("selection", {name: np.asarray(value) for name, value in learned.items()})

    first = hard.start_outer(jax.random.key(settings.seed))
    off = first | {"rates": jax.tree.map(lambda x: jnp.full_like(x, -jnp.inf), first["rates"])}
    arms = {"hiddenkey": result.outer | {"key": first["key"]}, "start-rates": first, "no-dropout": off}

    def trained(name, outer):
        params = inside.train_inner(settings, bench, hard, outer, name, folder)
        bound = inside.bind(bench, params)
        return params, bound, {"validation_loss": experiment.loss_over(bench, bound, bench.outer)}

    def tried(name, outer):
        return {k: float(np.mean(value)) for k, value in found(outer).items()} | trained(name, outer)[-1]

    def tested(name, outer):
        params, bound, row = trained(name, outer)
        if name == "hiddenkey":  # dropout acts in training alone: what is left is LoRA
            experiment.save_bound(folder.path / "adapter", bench, bench.lora, params["lora"], params["head"])
        return report.arm(bench, list(range(bench.num_layers)), experiment.evaluate_with(bench, bound)) | row

    if settings.grid:
        points = grid(settings, first)
        rows = [folder.once(f"grid/{i}", partial(tried, f"grid-{i}", point)) for i, point in enumerate(points)]
        folder.write("grid", rows)
        arms["grid"] = points[int(np.argmin([row["validation_loss"] for row in rows]))]
    for name, outer in arms.items():
        folder.once(f"results/{name}", partial(tested, name, outer))
    told = HYPERGRADIENTS[settings.hypergradient].told
    summary.rates(folder, settings, bench, {name: result.history[name] for name in learned}, list(arms), told)
