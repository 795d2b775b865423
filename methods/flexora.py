r"""Flexora: which layers deserve LoRA, found by differentiating through LoRA's training.

Inner variable: LoRA's A, B on every layer. Outer variable: one logit a layer, $\alpha \in R^n$, whose gate

$$ g(\alpha) = n\,\mathrm{softmax}(\alpha) $$

multiplies that layer's LoRA update once. Stage 1 minimises the validation loss of the trained adapter over
$\alpha$; stage 2 keeps the layers above the mean; stage 3 trains LoRA from scratch on these alone.

At $\alpha = 0$ every gate is exactly 1: the search starts at plain LoRA. Softmax does not see a common shift, so
$\sum_i \partial L / \partial \alpha_i = 0$ and plain gradient descent keeps $\sum_i \alpha_i = 0$;
then "above the mean" is "positive", as the paper selects. Adam does not keep the sum, hence the mean.

Wei, Shu, He, Yu, "Flexora: Flexible Low-Rank Adaptation for Large Language Models", ACL 2025, arXiv 2408.10774.
`released=True` computes what the authors' released code does instead of the paper: gradients at fixed LoRA weights
(first order), a gate that acts three times (on the inputs of dropout, A and B), an AdamW whose state is cleared after
every step, Adam on alpha, selection of alpha > 0, and all that `methods.flexora_variants` tells.
"""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from methods import figures, lora, ranges
from methods.adapters.lora import LoRAConfig
from methods.bench import Bench
from methods.driver import Chosen, Method, Search, Tried, searching
from methods.flexora_variants import (
    INNER_OPTIMIZERS,
    PAPER,
    RELEASED,
    Variant,
    final_recipe,
    inner_optimizer,
    options,
    outer_optimizer,
)
from methods.histories import by_chance
from methods.objective import Given
from methods.pages import Page, Run, layers, number, optimizer
from methods.ranges import Count, CountOrNone, Kept, NotNegative, Positive, Range, Repeats, RepeatsOrNone, one_of
from methods.settings import DERIVED, Settings
from methods.tasks import METRICS, Cycled


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


def stability(selections: Sequence[Sequence[int]], count: int) -> dict[str, float]:
    """Mean Jaccard index of all pairs of selections out of `count`, and what random ones of their sizes would have.

    Args:
      selections: what each chose.
      count: how many there are to choose from, those that no selection can hold left out.

    Raises:
      ValueError: for fewer than two selections.
    """
    pairs = [(set(a), set(b)) for a, b in itertools.combinations(selections, 2)]
    if not pairs:
        raise ValueError("Stability compares two or more selections.")
    return {
        "jaccard": float(np.mean([len(a & b) / len(a | b) for a, b in pairs])),
        "random": float(np.mean([by_chance(len(a), len(b), count) for a, b in pairs])),
    }


def problem(given: Given, *, power: int = 1, sites: Sequence[str] | None = None, decay: float = 0.0) -> bilevel.Problem:
    """Flexora's bilevel problem.

    Args:
      given: the model and its loss, for both levels.
      power: how often the gate multiplies the update; 1, or 3 for the released code.
      sites: the adapted sites, for a logit a module, alpha `[sites, n]` under one softmax; None for one a layer.
      decay: of the outer level: the validation loss gets decay / 2 times the squared distance of alpha from its mean.
        Unrolled differentiation can overfit the validation rows (Bao et al. 2021, arXiv 2106.04188).
    """

    def gated(weights, params, alpha, batch, key):
        gates: Any = gate(alpha) ** power
        gates = gates if sites is None else dict(zip(sites, gates, strict=True))
        return given.loss(weights, given.bind(weights, params, gate=gates, key=key), batch)

    def validated(weights, params, alpha, batch, key):
        value = gated(weights, params, alpha, batch, None)
        if not decay:
            return value
        return value + (decay / 2 * jnp.sum((alpha - alpha.mean()) ** 2)).astype(value.dtype)

    training, validation = (jax.tree_util.Partial(f, given.weights) for f in (gated, validated))
    shape = (given.num_layers,) if sites is None else (len(sites), given.num_layers)
    return bilevel.Problem(training, validation, lambda key, alpha: given.start(key), lambda key: jnp.zeros(shape))


@dataclasses.dataclass(frozen=True)
class FlexoraSettings(Settings):
    """Flexora: select layers by differentiating through training, train LoRA on them.

    What was not given (None) is what the paper's variant, or with `released` what the released code has; "by default"
    below is the paper's.

    Attributes:
      hypergradient: "unrolled" differentiates through the inner steps; "first-order" holds LoRA's weights fixed; by
        default unrolled.
      released: compute what the authors' released code does, in place of the defaults of the options that are not
        given; one that is given and contradicts it is an error. Sizes and step counts stay as they are.
      inner_steps: K, training steps between two outer steps; by default 4.
      outer_steps: T, updates of alpha.
      inner_optimizer: of LoRA in the search; "sgd" is the paper's inner loop, "adam" what is used by default,
        "cleared-adamw" forgets its moments after every step.
      inner_lr: learning rate of the search's inner optimizer; by default 1e-3.
      outer_lr: learning rate of alpha; by default 10.
      outer_optimizer: "sgd" is the paper's gradient descent, and the default.
      inner_start: "warm" goes on training LoRA across outer steps, the default; "cold" starts anew for each.
      per: "layer" gates all of a layer's modules together, the default; "module" each by itself.
      outer_decay: of the outer loss, towards equal gates; by default 0.
      search_rows: training rows that the search sees; 0 for all of them.
      searches: the search is repeated with as many seeds, the first of which selects; how much they agree is reported.
      top_k: select this many layers (or modules) instead of those above the threshold.
      random_baselines: random choices of as many layers, trained and evaluated beside the selected ones.
      warmup: share of the steps of the final training in which its rate rises to its peak; by default 0.1.
      clip: a gradient of the final training that is longer than this is shortened to it; 0: never, the default.
    """

    hypergradient: Literal["unrolled", "first-order"] | None = None
    released: bool = False
    inner_steps: Kept | None = None
    outer_steps: Count = 10
    inner_optimizer: Annotated[str | None, one_of(INNER_OPTIMIZERS, optional=True)] = None
    inner_lr: Positive | None = None
    outer_lr: Positive | None = None
    outer_optimizer: Literal["sgd", "adam"] | None = None
    inner_start: Literal["warm", "cold"] | None = None
    per: Literal["layer", "module"] | None = None
    outer_decay: NotNegative | None = None
    search_rows: CountOrNone = 0
    searches: Repeats = 1
    top_k: Count | None = None
    random_baselines: RepeatsOrNone = 1
    warmup: Annotated[float | None, Range(0, 1, below=True)] = None
    clip: NotNegative | None = None


@dataclasses.dataclass(frozen=True)
class Used(FlexoraSettings):
    """Settings of which nothing is left open: what `config.json` holds."""

    variant: Variant = dataclasses.field(default=PAPER, metadata=DERIVED)


def used(settings: FlexoraSettings) -> Any:
    """The values that a run uses.

    Raises:
      ValueError: for an option that contradicts `--released`, or is out of range.
    """
    if isinstance(settings, Used):
        return settings
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(FlexoraSettings)}
    variant = RELEASED if settings.released else PAPER
    found: Any = Used(**given | options(settings), variant=variant)
    ranges.check(found)
    rows, batch, most = found.search_rows, found.batch_size, found.train_rows
    if rows and most is None and rows < batch:
        raise ValueError(f"--search-rows {rows} must be at least --batch-size {batch}, or 0 for all training rows.")
    if rows and most is not None and not batch <= rows <= most:
        raise ValueError(
            f"--search-rows {rows} must be between --batch-size {batch} and --train-rows {most}, or 0 for all of these."
        )
    final_recipe(found, found.variant)
    return found


def check_model(settings: FlexoraSettings, config: Any, lora: LoRAConfig) -> None:
    """Raises ValueError for a `top_k` that is more than there is to choose from."""
    if settings.top_k is not None:
        sites = lora.sites(config.site_shapes()) if settings.per == "module" else (None,)
        select(np.zeros(config.num_layers * len(sites)), settings.top_k)


def reads(settings: Any) -> dict[str, bool]:
    """How the settings' variant encodes an answer, and takes the mean of its losses."""
    return {"end_of_text": settings.variant.end_of_text, "row_means": settings.variant.row_means}


_RELEASED_SIZES: dict[str, Any] = {
    "length": 96,
    "batch_size": 8,
    "outer_batch_size": 8,
    "train_rows": 4800,
    "outer_rows": 200,
    "test_rows": 0,
    "finetune_lr": 1e-4,
    "random_baselines": 3,
}
"""Those of the released code, but for the length, which is 1024 there."""

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
    # The paper: through the training, LoRA anew for each outer step. Its K and T are not known, nor its rates: plain
    # gradient descent on LoRA as the paper writes it is --inner-optimizer sgd.
    "paper": {
        **_RELEASED_SIZES,
        "inner_steps": 10,
        "inner_start": "cold",
        "outer_steps": 200,
        "outer_lr": 2.0,
        "finetune_steps": 1800,
    },
    # What the authors released: 6,750 steps are 3 epochs of the 18,000 rows that its final training saw.
    "released": {**_RELEASED_SIZES, "released": True, "outer_steps": 600, "finetune_steps": 6750},
}
"""Settings that differ from the defaults, by preset."""


def solver(settings: FlexoraSettings, given: Given) -> bilevel.Nested:
    """The search as a solver. Raises ValueError for settings out of range."""
    setup = used(settings)
    sites = given.sites if setup.per == "module" else None
    gated = problem(given, power=setup.variant.gate_power, sites=sites, decay=setup.outer_decay)
    inner = inner_optimizer(setup, setup.variant)
    if setup.hypergradient == "first-order":
        estimator: Any = bilevel.FirstOrder(inner, setup.inner_steps)
    else:
        estimator = bilevel.Unrolled(inner, setup.inner_steps, checkpoint="step")
    return bilevel.Nested(gated, estimator, outer_optimizer(setup, setup.variant), inner_start=setup.inner_start)


def searches(settings: FlexoraSettings, bench: Bench) -> list[Search]:
    """Stage 1, as often as asked for, each with a key of its own; the history has alpha after every outer step.

    Raises:
      ValueError: for a bench that was not prepared for these settings, or has fewer rows than the search is to see.
    """
    setup, there = used(settings), len(jax.tree.leaves(bench.train)[0])
    if setup.search_rows > there:
        raise ValueError(
            f"--search-rows {setup.search_rows} are more than the {there} training rows that there are: lower it, or "
            "give 0 for all of them."
        )
    if bench.row_means != setup.variant.row_means:
        raise ValueError("The rows were prepared for another variant of the search: COMMAND.prepare(settings).")
    cycled, key = setup.variant.outer_data == "cycled", jax.random.key(setup.seed)
    rows, each = jax.tree.map(lambda x: x[: setup.search_rows or None], bench.train), solver(setup, bench.given())
    return [
        searching(
            setup,
            bench,
            each,
            name=f"search-{number}" if number else "search",
            inner_data=bilevel.Batches(rows, setup.batch_size),
            outer_data=(Cycled if cycled else bilevel.Batches)(bench.outer, setup.outer_batch_size),
            key=jax.random.fold_in(key, number) if number else key,
            record=lambda state: {"alpha": state.outer},
        )
        for number in range(setup.searches)
    ]


def choose(settings: FlexoraSettings, bench: Bench, found: Sequence[bilevel.Result], tried: Tried) -> Chosen:
    """Stage 2: the layers, or modules, that the first search selects; beside them all, and random ones of as many."""
    del tried
    setup, given = used(settings), bench.given()
    threshold = 0.0 if setup.variant.selects == "zero" else None
    history = [result.history["alpha"].reshape(len(result.history["alpha"]), -1) for result in found]
    every = [select(alpha[-1], setup.top_k, threshold=threshold) for alpha in history]
    alpha, chosen, count = history[0][-1], every[0], history[0].shape[1]
    rule = f"top {setup.top_k}" if setup.top_k else "alpha > 0" if threshold is not None else "alpha > mean(alpha)"
    selection = {"rule": rule, setup.per + "s": chosen, "alpha": alpha, "gate": np.asarray(gate(alpha))}
    if setup.per == "module":  # what each entry of alpha is
        places = itertools.product(given.sites, range(given.num_layers))
        selection["names"] = [bench.hf_names.module(site, layer) for site, layer in places]
    if len(found) > 1:
        selection |= {"searches": every, "stability": stability(every, count)}

    units: dict[str, list[int]] = {"flexora": chosen, "all-layers": list(range(count))}
    for i in range(setup.random_baselines):
        rng = np.random.default_rng((setup.seed, i))
        units[f"random-{i}"] = sorted(int(j) for j in rng.choice(count, len(chosen), replace=False))
    of, plan = lora.problem(given), final_recipe(setup, setup.variant)
    arms = [
        lora.arm(setup, bench, of, name, _mask(at, given, setup.per), plan=plan, export=name == "flexora")
        for name, at in units.items()
    ]
    return Chosen(selection | {"history": history[0]}, [*lora.untrained(bench, always=True), *arms])


def _mask(units: list[int], given: Given, per: str) -> lora.Mask:
    """Indices into alpha as a mask of modules."""
    on = np.isin(np.arange(given.num_layers * (len(given.sites) if per == "module" else 1)), units)
    each = np.broadcast_to(on.reshape(-1, given.num_layers), (len(given.sites), given.num_layers))
    return dict(zip(given.sites, jnp.asarray(each), strict=True))


def page(run: Run) -> Page:
    """The selection, the way of the logits to it, and how far to trust it."""
    setup: Any = used(run.settings)
    alpha, chosen, rule = np.asarray(run.selection["history"]), run.selection[setup.per + "s"], run.selection["rule"]
    figures.layer_logits(run.figure("alpha.png"), alpha, chosen, setup.per)
    figures.selected_layers(run.figure("selection.png"), alpha[-1], chosen, rule, setup.per)
    if setup.released:
        kind = "as the released code computes it (first order, cubed gate)"
    else:
        kind = {"unrolled": "through the unrolled training", "first-order": "first order"}[setup.hypergradient]
    steps, count = alpha.shape
    which = ", ".join(map(str, chosen)) if setup.per == "layer" else _named(chosen, run.bench, setup.per)
    took = f"{number(steps, 'outer step')} of {number(setup.inner_steps, 'inner step')}{' each' * (steps > 1)}"
    trust = f"""The search took {took}, batches of
{setup.batch_size} training and {setup.outer_batch_size} validation rows, the hypergradient taken {kind}.
{_halves(alpha)}{_repetitions(run.selection)}{_warning(steps, count)}"""
    return Page(
        "Flexora",
        f"{len(chosen)} of {count} {setup.per}s, by the rule {rule}: {which}.",
        {"alpha.png": "layer logits over time", "selection.png": "selection"},
        f"The final training is {optimizer(setup)} from scratch, the same for every row of the table. The adapter of "
        f"the selected {setup.per}s is in `adapter/`, in PEFT's format.",
        trust,
        said=textwrap.fill(f"Selected, by the rule {rule}: {_named(chosen, run.bench, setup.per)}.", 80),
    )


def _named(chosen: Sequence[int], bench: Bench, per: str) -> str:
    """Layers by their numbers; modules by their linears and their layers."""
    if per == "layer":
        return layers(chosen)
    count = bench.num_layers
    of = {site: [i % count for i in chosen if i // count == at] for at, site in enumerate(bench.sites)}
    return "; ".join(f"{site} in {layers(each)}" for site, each in of.items() if each)


def _halves(alpha: np.ndarray) -> str:
    steps = len(alpha)
    if steps < 4:
        return "Too few steps to compare one half of the search with the other."
    first, second = alpha[steps // 2 - 1], alpha[-1] - alpha[steps // 2 - 1]
    return (
        f"What the first and the second half of the search did to the logits has rank correlation "
        f"{METRICS['spearman'](first, second):+.2f} (1: the same order, 0: unrelated)."
    )


def _repetitions(selection: Mapping[str, Any]) -> str:
    if "stability" not in selection:
        return ""
    index = selection["stability"]
    return (
        f" Over {len(selection['searches'])} searches that differ in their seed alone the selections have a mean "
        f"Jaccard index of {index['jaccard']:.2f}; random ones of their sizes would have {index['random']:.2f}."
    )


def _warning(steps: int, count: int) -> str:
    if steps >= 3 * count:
        return ""
    return (
        f"\n\n**So short a search cannot rank {count} logits.** {steps} noisy steps move them by less than the "
        "batches' own noise; this run demonstrates the machinery. `--preset evidence` is the long one."
    )


COMMAND = Method(
    FlexoraSettings,
    PRESETS,
    choose=choose,
    page=page,
    searches=searches,
    used=used,
    check_model=check_model,
    reads=reads,
)
