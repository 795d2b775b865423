r"""`bilevel select-data`: which training rows to keep, by gradient descent on their weights through the training.

Inner variable: LoRA's parameters (and a head's), trained anew for K steps in every outer step on rows weighed by
$\lambda \in (0, 2)^N$, at first 1; see `methods.attribution`. Outer variable: these weights, which minimise the
validation loss of what was trained; with `layers` Flexora's layer logits as well, found in the same descent. The rows
with the largest weights are kept, and LoRA is trained from scratch on them, on the chosen layers.

Sources: Ren et al. 2018, arXiv 1803.09050 (weights of rows by the validation loss); Engstrom et al. 2025, arXiv
2503.13751 (data selection by descent through the whole training).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from methods import figures, flexora, lora, pages
from methods.attribution import WEIGHTS, numbered, problem
from methods.bench import Bench
from methods.driver import Chosen, Method, Search, Tried, searching
from methods.objective import row_losses
from methods.pages import Page, Run, number, optimizer
from methods.ranges import Count, Kept, NotNegative, Positive, Range, RepeatsOrNone
from methods.settings import Settings

GATES = "alpha"
"""The entry of the outer variable that holds Flexora's layer logits."""
METHOD = "select-data"
START = 1.0
"""The weight of every row before the search."""


@dataclasses.dataclass(frozen=True)
class SelectDataSettings(Settings):
    """Data selection: learn the weights of rows through training, keep the best.

    Attributes:
      keep: share of the training rows to keep.
      layers: search the layers that deserve LoRA in the same descent, by Flexora's gates.
      inner_steps: K, training steps from scratch in each outer step.
      outer_steps: T, updates of the weights.
      inner_lr: learning rate of the search's Adam.
      eps_root: what that Adam adds under its square root: larger is smoother.
      outer_lr: learning rate of the Adam on the weights, in the logits of weight / 2.
      random_baselines: random choices of as many rows, trained beside the kept ones.
    """

    keep: Annotated[float, Range(0, 1, above=True, below=True)] = 0.5
    layers: bool = False
    inner_steps: Kept = 16
    outer_steps: Count = 10
    inner_lr: Positive = 1e-3
    eps_root: NotNegative = 1e-5
    outer_lr: Positive = 0.3
    random_baselines: RepeatsOrNone = 1


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {"train_rows": 64},
    "evidence": {"train_rows": 512, "outer_rows": 256, "batch_size": 16, "outer_batch_size": 64, "test_rows": 0}
    | {"inner_steps": 64, "outer_steps": 60, "finetune_steps": 200, "random_baselines": 3},
}
"""Settings that differ from the defaults, by preset."""


def kept_rows(settings: SelectDataSettings, rows: int) -> int:
    """How many rows of these are kept.

    Raises:
      ValueError: if they are fewer than a batch has.
    """
    kept = max(1, round(settings.keep * rows))
    if kept < settings.batch_size:
        raise ValueError(
            f"--keep {settings.keep:g} of --train-rows {rows} are {kept} rows, fewer than --batch-size "
            f"{settings.batch_size}: keep more, or lower it."
        )
    return kept


def check(settings: SelectDataSettings) -> None:
    """As `kept_rows`, as far as it is known how many rows there are."""
    if settings.train_rows is not None:
        kept_rows(settings, settings.train_rows)


def of(bench: Bench, *, layers: bool = False) -> bilevel.Problem:
    """The problem of a bench: the outer variable is `{"rows": [N]}`, and `"alpha"`, `[L]`, with `layers`."""
    given, rows = bench.given(), len(jax.tree.leaves(bench.train)[0])
    each = partial(row_losses, bench.pretrained.model, bench.head, bench.width)

    def bound(weights: Any, params: Any, outer: Any) -> Any:
        return given.bind(weights, params, gate=flexora.gate(outer[GATES]) if layers else None)

    def losses(weights: Any, params: Any, outer: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        return each(weights, bound(weights, params, outer), batch)

    def validation(weights: Any, params: Any, outer: Any, batch: Any) -> jax.Array:
        return given.loss(weights, bound(weights, params, outer), batch)

    beside = lambda key: {GATES: jnp.zeros(given.num_layers)} if layers else {}  # noqa: E731
    domain = {WEIGHTS: bilevel.Interval(0.0, 2.0)} | ({GATES: None} if layers else {})
    return problem(losses, validation, given.start, rows, weights=given.weights, beside=beside, domain=domain)


def solver(settings: SelectDataSettings, problem: bilevel.Problem) -> bilevel.Nested:
    """The search as a solver: every outer step trains anew."""
    inner = optax.adam(settings.inner_lr, eps_root=settings.eps_root)
    estimator = bilevel.Unrolled(inner, settings.inner_steps, checkpoint="step")
    return bilevel.Nested(problem, estimator, optax.adam(settings.outer_lr), inner_start="cold")


def searches(settings: SelectDataSettings, bench: Bench) -> list[Search]:
    """One, whose batches are numbered rows."""
    kept_rows(settings, len(bench.splits.train))
    each = solver(settings, of(bench, layers=settings.layers))
    data = bilevel.Batches(numbered(bench.train), settings.batch_size)
    return [searching(settings, bench, each, inner_data=data, record=lambda state: {WEIGHTS: state.outer[WEIGHTS]})]


def largest(weights: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The numbers of so many rows, ascending: those of the largest weights. Equal ones are put in an order by the seed.

    Rows that no batch of the search had all have the weight that they began with; by their order in the file, the
    first of them would be kept.
    """
    order = np.random.default_rng(seed).permutation(len(weights))
    return np.sort(order[np.argsort(-weights[order], kind="stable")[:count]])


def choose(settings: SelectDataSettings, bench: Bench, found: Sequence[bilevel.Result], tried: Tried) -> Chosen:
    """The rows of the largest weights, and the chosen layers; beside them all rows, and random ones of as many."""
    del tried
    (result,), given, count = found, bench.given(), len(bench.splits.train)
    weights, size = np.asarray(result.outer[WEIGHTS]), kept_rows(settings, count)
    chosen = largest(weights, size, settings.seed)
    selection: dict[str, Any] = {"rows": chosen, "weights": weights}
    mask, everywhere = lora.everywhere(given), lora.everywhere(given)
    if settings.layers:
        alpha = np.asarray(result.outer[GATES])
        selection |= {"layers": flexora.select(alpha), "alpha": alpha}
        on = jnp.asarray(np.isin(np.arange(given.num_layers), selection["layers"]))
        mask = dict.fromkeys(given.sites, on)
    selection["history"] = result.history[WEIGHTS]
    choices = {METHOD: (chosen, mask), "all-rows": (np.arange(count), everywhere)}
    for i in range(settings.random_baselines):
        drawn = np.sort(np.random.default_rng((settings.seed, i)).choice(count, size, replace=False))
        choices[f"random-{i}"] = drawn, everywhere
    arms = []
    for name, (rows, modules) in choices.items():
        part = bench._replace(train=jax.tree.map(lambda x, rows=rows: x[rows], bench.train))
        arm = lora.arm(settings, part, lora.problem(given), name, modules, export=name == METHOD)
        arms.append(arm._replace(count=lambda params, arm=arm, rows=rows: arm.count(params) | {"rows": len(rows)}))
    return Chosen(selection, [*lora.untrained(bench, always=True), *arms])


def page(run: Run) -> Page:
    """The weights, and how they came to be."""
    settings, selection = run.settings, run.selection
    history, chosen = np.asarray(selection["history"]), selection["rows"]
    figures.row_weights(run.figure("weights.png"), history, chosen)
    layers = ""
    if settings.layers:
        layers = f" Layers chosen in the same descent: {', '.join(map(str, selection['layers']))}."
    steps = number(settings.inner_steps, "training step")
    weights = np.asarray(selection["weights"])
    unmoved = np.flatnonzero(weights == START)
    idle = ""
    if len(unmoved):
        idle = (
            f" Rows that no batch of the search had, or that had no say in it, have the weight {START:g} still: "
            f"{len(unmoved):,}, of which {len(np.intersect1d(unmoved, chosen)):,} are kept, drawn at random. More "
            "--outer-steps, --inner-steps or --batch-size let them have one."
        )
    found = f"""{len(chosen)} of {len(selection["weights"])} training rows are kept, those of the largest weights, which
are {min(selection["weights"]):.2f} to {max(selection["weights"]):.2f} after
{number(settings.outer_steps, "outer step")} of {steps}.{layers}{idle} Their numbers, and all weights:
`selection.json`."""
    made = (
        f"The weights are learned by Adam through {steps} from scratch; the final training is {optimizer(settings)} "
        "from scratch, the same for every row of the table. The adapter of the kept rows is in `adapter/`, in PEFT's "
        "format."
    )
    said = f"Kept {len(chosen)} of {len(selection['weights'])} training rows, by their weights"
    said += f"; selected {pages.layers(selection['layers'])}." if settings.layers else "."
    return Page("Data selection", found, {"weights.png": "weights of rows"}, made, said=said)


COMMAND = Method(SelectDataSettings, PRESETS, choose=choose, page=page, searches=searches, check=check)
