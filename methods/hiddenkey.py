r"""HiddenKey: dropout for LoRA, its rates and the weight of its KL term learned by differentiating through training.

Inner variable: LoRA. Its loss drops keys from the attention (DropKey, columns) and features from the feed-forward
layers (HiddenCut, elements), and asks two passes with different masks to agree:

$$ L = L_{task}(P_1) + \beta \cdot \tfrac12 [KL(P_1 \| P_2) + KL(P_2 \| P_1)]. $$

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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from methods import figures, lora
from methods.adapters.dropout import DropoutConfig, logit
from methods.bench import Bench
from methods.driver import Arm, Chosen, Method, Search, Tried, finetuning, searching
from methods.evaluation import validation_loss
from methods.held import held
from methods.models.hooks import identity
from methods.objective import Given
from methods.pages import Page, Run, number
from methods.ranges import LARGEST_FLOAT, Count, Kept, Positive, Range, one_of
from methods.runfolder import RunFolder
from methods.settings import Settings
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
    given: Given,
    init_outer: Callable[[jax.Array], Any],
    dropout: DropoutConfig,
    *,
    active: Any = True,
    backward: Literal["one", "both"] = "one",
) -> bilevel.Problem:
    """HiddenKey's bilevel problem.

    Args:
      given: the model; two passes are compared by their predictions.
      init_outer: `init_outer(key) -> outer`, as from `start_outer`.
      dropout: the rules, and the temperature of the masks.
      active: bool, a scalar or `[L]`: which layers drop at all.
      backward: how many of the two passes are back-propagated. With "one" there is no gradient field: use
        `Unrolled(mode="reverse")`.

    Raises:
      ValueError: for a regression, which predicts no classes.
    """
    if (predict := given.predict) is None:
        raise ValueError("This task is a regression: HiddenKey compares predictions of classes or of answers.")

    def predicted(weights, params, hook, batch):
        return predict(weights, given.bind(weights, params, after=hook), batch)

    def inner_loss(weights, params, outer, batch, key):
        del key
        masks = [jax.random.fold_in(outer["key"], i) for i in range(2)]
        hooks = [dropout.bind(mask, outer["rates"], given.num_layers, active) for mask in masks]
        first = predicted(weights, params, hooks[0], batch)
        loss = cross_entropy(first)
        if dropout.term is None:
            return loss
        if backward == "one":
            params = held(params, (outer["rates"], outer["log_beta"]))
        # JS compares with the model as it is used, without dropout.
        second = predicted(weights, params, hooks[1] if dropout.term == "kl" else identity, batch)
        return loss + jnp.exp(outer["log_beta"]) * DIVERGENCES[dropout.term](first.logits, second.logits, first.mask)

    def outer_loss(weights, params, outer, batch, key):
        del outer, key
        return cross_entropy(predicted(weights, params, identity, batch))

    inner_loss, outer_loss = (jax.tree_util.Partial(loss, given.weights) for loss in (inner_loss, outer_loss))
    return bilevel.Problem(inner_loss, outer_loss, lambda key, outer: given.start(key), init_outer)


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
    """HiddenKey: learn dropout rates and the KL weight through training.

    Attributes:
      rules: three words each: position, pattern, compensation.
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
    own = {"lora_dropout": "the dropout of this method is what --rules say"}
    return own | without | ({} if settings.grid else {"grid_beta": "there is no --grid"})


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


def of(settings: HiddenKeySettings, bench: Bench, *, temperature: float = 0.0) -> bilevel.Problem:
    """The problem of these settings; with hard masks unless there is a temperature.

    Raises:
      ValueError: as `problem`.
    """
    dropout = DropoutConfig(settings.rules, temperature, bench.sites)
    rate = np.full(bench.num_layers, settings.rate) if settings.per_layer else settings.rate
    active = np.arange(bench.num_layers) >= (bench.num_layers // 2 if settings.layers == "upper-half" else 0)
    start = lambda key: start_outer(dropout, dict.fromkeys(dropout.positions, rate), settings.beta, key)  # noqa: E731
    return problem(bench.given(), start, dropout, active=active, backward=settings.backward)


def solver(settings: HiddenKeySettings, problem: bilevel.Problem) -> bilevel.Nested:
    """The search as a solver.

    Raises:
      ValueError: as `check`.
    """
    check(settings)
    inner = optax.adam(settings.inner_lr)
    estimator = HYPERGRADIENTS[settings.hypergradient].make(inner, settings.inner_steps, _stops(settings))
    return bilevel.Nested(problem, estimator, optax.adam(settings.outer_lr), inner_start=settings.inner_start)


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


def searches(settings: HiddenKeySettings, bench: Bench) -> list[Search]:
    """One for rates and beta, with relaxed masks."""
    relaxed = of(settings, bench, temperature=settings.temperature)
    return [searching(settings, bench, solver(settings, relaxed), record=lambda state: found(state.outer))]


def choose(settings: HiddenKeySettings, bench: Bench, searched: Sequence[bilevel.Result], tried: Tried) -> Chosen:
    """The rates where the search ended, and beside them those where it began, none, and the best of the grid."""
    hard, outer = of(settings, bench), searched[0].outer
    first = hard.start_outer(jax.random.key(settings.seed))
    off = first | {"rates": jax.tree.map(lambda x: jnp.full_like(x, -jnp.inf), first["rates"])}
    at = {"hiddenkey": outer | {"key": first["key"]}, "start-rates": first, "no-dropout": off}
    learned = found(outer)
    selection: dict[str, Any] = {name: np.asarray(value) for name, value in learned.items()}
    selection["history"] = {name: searched[0].history[name] for name in learned}
    if settings.grid:
        points = grid(settings, first)
        means = [{name: float(np.mean(value)) for name, value in found(point).items()} for point in points]
        arms = [trained(settings, bench, hard, f"grid-{i}", point) for i, point in enumerate(points)]
        selection["grid"] = [tried(*each) for each in zip(arms, means, strict=True)]
        at["grid"] = points[int(np.argmin([point["validation_loss"] for point in selection["grid"]]))]
    return Chosen(selection, [trained(settings, bench, hard, name, outer) for name, outer in at.items()])


def trained(settings: HiddenKeySettings, bench: Bench, hard: bilevel.Problem, name: str, outer: Any) -> Arm:
    """LoRA trained at rates and a beta; dropout acts in training alone, so that what is left is LoRA."""
    given = bench.given()
    bind = partial(given.bind, given.weights)

    def count(params: Any) -> dict[str, Any]:
        everywhere = lora.everywhere(given)
        row = {"on": lora.on(everywhere), "parameters": lora.parameters(bench, everywhere)}
        return row | {"validation_loss": validation_loss(bench, bind(params))}

    def export(folder: RunFolder, params: Any) -> None:
        if name == "hiddenkey":
            lora.export_adapter(folder.path / "adapter", bench, params)

    return Arm(name, finetuning(settings, bench, hard, outer, bind), bind, count, export)


def page(run: Run) -> Page:
    """The learned rates, how they came about, and what each choice is worth on the outer rows."""
    settings = run.settings
    file, history = run.figure("rates.png"), run.selection["history"]
    figures.curves(file, history, "outer step", "Learned dropout rates and loss weight")
    lines = [
        f"- {name}: {', '.join(f'{x:.3f}' for x in np.atleast_1d(values[-1]))}" for name, values in history.items()
    ]
    lines += [f"- validation loss, {name}: {row['validation_loss']:.4f}" for name, row in run.results.items()]
    if points := run.selection.get("grid"):
        best = min(points, key=lambda point: point["validation_loss"])
        there = ", ".join(f"{name} {value:g}" for name, value in best.items() if name != "validation_loss")
        lines.append(f"- the best of {len(points)} points of the grid: {there}")
    made = (
        f"Rules: {'; '.join(settings.rules)}. Rates started at {settings.rate:g} and beta at {settings.beta:g}; "
        f"{number(settings.outer_steps, 'outer step')} of {number(settings.inner_steps, 'inner step')}, hypergradient "
        f"{HYPERGRADIENTS[settings.hypergradient].told}, masks of temperature {settings.temperature:g}; hard masks "
        "afterwards."
    )
    return Page("HiddenKey", "\n".join(lines), {file.name: "rates over the search"}, made)


COMMAND = Method(
    HiddenKeySettings,
    PRESETS,
    choose=choose,
    page=page,
    searches=searches,
    unused=unused,
    check=check,
)
