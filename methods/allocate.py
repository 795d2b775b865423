r"""`bilevel allocate`: a budget of adapter parameters, modules or layers, spent on the units that are worth most.

A unit is a layer, a module (a linear of a layer) or a group of rank-one components of a module. Every unit gets a
score, and the budget goes to those with the largest score for their cost (`bilevel.allocate`), exactly: what is left
of it pays for no other unit. There are two scores.

*hypergradient*. LoRA is first trained on all modules. Outer variable: s, a number a unit, at 0 in the beginning; the
unit's part of LoRA's update is multiplied by 1/2 + s. The inner loss trains LoRA for K more steps, from that same start
in every outer step, and plain gradient descent on the validation loss through these steps moves the scores,

$$ s \leftarrow s - \eta\, \frac{d}{ds} L_{val}(\theta_K(s), s), $$

so that for a small rate eta they are the sum of the hypergradients of all outer steps.

*singular-values*. LoRA is trained on all modules at the largest rank; the score of a component is the squared
singular value of its module's update, what of the update would be lost without it, and that of a module or layer the
sum over its components.

Why half? Where a unit is whole, the training has left nothing to gain by more of it, and the derivative says nothing;
at half of it the derivative is what is lost without it, by the midpoint rule: L(0) - L(1) is minus the integral of
dL/dg over the gate g. A fresh LoRA, B = 0, says less: what a layer is worth after its first steps. The K steps through
which the derivative is taken have a tenth of the rate, since a fresh Adam's first steps are of full length and would
make up for the half that is missing.

Ranks need components that mean something. What a module learns is spread over all of those that it was trained with.
So they are taken in the basis of singular vectors of the update, A = U S^(1/2) and B = S^(1/2) V^T, which is the same
update. What both scores find where the answer is known is in `benchmarks/lora/planted_ranks`, for layers and modules in
`benchmarks/lora/planted_scores` and `benchmarks/lora/hidden_layers`.

The rule that a budget of rank-one parts is spent by their importance is AdaLoRA's (Zhang et al. 2023, arXiv
2303.10512), which measures the importance in the training loss, during the training.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from methods import budget, figures, flexora, lora, processes, trainers
from methods.adapters.lora import LoRAConfig
from methods.adapters.peft import peft_settings
from methods.bench import Bench, check_rank
from methods.driver import BATCH, Arm, Chosen, Later, Method, Tried, larger, over_batches, searching
from methods.objective import Given
from methods.pages import Page, Run, number
from methods.ranges import LARGEST, Count, Kept, Positive, Range, Repeats, RepeatsOrNone, one_of
from methods.runfolder import RunFolder
from methods.settings import DERIVED, NO_OUTER, Settings, Training
from methods.tasks import METRICS, Classification

SCORES = ("hypergradient", "singular-values")
"""What a unit may be ranked by."""
HALF, SLOWER = 0.5, 0.1
"""What a unit is multiplied by where its score is 0, and the share of the rate through which it is scored."""
SEARCHED = "batch_size", "outer_batch_size", "accumulate"
"""Options of the training that the search has too."""
START = "start"
"""How the file of the parameters from which units are scored begins."""


@dataclasses.dataclass(frozen=True)
class AllocateSettings(Settings):
    """Spend a budget of LoRA on what is worth most: parameters, modules or layers.

    Attributes:
      budget_params: trainable parameters of the adapter, such as 200000, 200k or 2M: ranks are searched.
      budget_modules: so many linears: modules are searched, all of --rank.
      top_k: so many layers: layers are searched, all of --rank.
      score: what a unit is worth: the sum of hypergradients, or the singular values of what a training learned.
      max_rank: most that a module can get where ranks are searched; by default twice --rank.
      group: ranks that are given or not together.
      warmup_steps: training steps whose update is taken apart into units.
      inner_steps: K, training steps that the validation loss is differentiated through.
      outer_steps: hypergradients that are summed.
      inner_lr: learning rate of LoRA in the warm-up (Adam); the steps that are differentiated through have a tenth of
        it.
      outer_lr: learning rate of the scores: small, so that they are the sum of the hypergradients.
      searches: the search is repeated with as many seeds; the mean of their scores chooses, and how much they agree is
        reported.
      search_only: write what was chosen, for other trainers, and train nothing.
      random_baselines: random choices for the same budget, trained and evaluated beside.
    """

    budget_params: str | None = None
    budget_modules: Count | None = None
    top_k: Count | None = None
    score: Annotated[str, one_of(SCORES)] = "hypergradient"
    max_rank: Count | None = None
    group: Count = 1
    warmup_steps: Count = 40
    inner_steps: Kept = 4
    outer_steps: Count = 10
    inner_lr: Positive = 1e-3
    outer_lr: Positive = 1e-2
    searches: Repeats = 2
    search_only: bool = False
    random_baselines: RepeatsOrNone = 1


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "evidence": {"batch_size": 8, "outer_batch_size": 16, "inner_steps": 16, "outer_steps": 60, "warmup_steps": 100}
    | {"searches": 3, "random_baselines": 3, "finetune_steps": 400},
}
"""Settings that differ from the defaults, by preset."""


@dataclasses.dataclass(frozen=True)
class Used(AllocateSettings):
    """Settings of which nothing is left open."""

    per: str = dataclasses.field(default="rank", metadata=DERIVED)
    budget: Annotated[int, Range(0, LARGEST)] = dataclasses.field(default=0, metadata=DERIVED)


def used(settings: AllocateSettings) -> Any:
    """The values that a run uses.

    Raises:
      ValueError: unless exactly one budget is given; for ranks that are no whole groups, and for DoRA.
    """
    if isinstance(settings, Used):
        return settings
    budgets = {
        "rank": settings.budget_params and budget.amount(settings.budget_params),
        "module": settings.budget_modules,
        "layer": settings.top_k,
    }
    said = {per: value for per, value in budgets.items() if value is not None}
    if len(said) != 1:
        what = "and not several of them" if said else "such as --budget-params 200k"
        raise ValueError(f"Give one budget, --budget-params, --budget-modules or --top-k, {what}.")
    if settings.adapter == "dora":
        raise ValueError("--adapter dora: a budget is spent on LoRA or rsLoRA, whose parameters are counted by rank.")
    ((per, value),) = said.items()
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(AllocateSettings)}
    given["max_rank"] = 2 * settings.rank if settings.max_rank is None else settings.max_rank
    if per == "rank" and given["max_rank"] % settings.group:
        raise ValueError(f"--max-rank {given['max_rank']} is no multiple of --group {settings.group}.")
    return Used(**given, per=per, budget=value)


def unused(settings: AllocateSettings) -> dict[str, str]:
    """Options without effect, and why."""
    found: dict[str, str] = {}
    by_values = settings.score == "singular-values"
    if settings.budget_params is None:
        found |= dict.fromkeys(("max_rank", "group"), "without --budget-params no ranks are searched")
    if by_values:
        search = ("inner_steps", "outer_steps", "outer_lr", *NO_OUTER)
        found |= dict.fromkeys(search, "--score singular-values takes no hypergradient")
    if settings.search_only:
        trained = [field.name for field in dataclasses.fields(Training) if field.name not in SEARCHED]
        # Where the test is held out, its size says what the search does not see.
        tested = ["test_rows"] if settings.test_data is not None else []
        found |= dict.fromkeys(["random_baselines", *trained, *tested], "--search-only trains nothing")
    return found


def check_model(settings: Any, config: Any, lora_config: LoRAConfig) -> None:
    """Raises ValueError for a rank, or a budget, that this model cannot have, or that leaves nothing to choose."""
    setup, shapes = used(settings), config.site_shapes()
    sites = lora_config.sites(shapes)
    if setup.per == "rank":
        check_rank("--max-rank", setup.max_rank, shapes, sites)
    prices = np.concatenate([np.ravel(c) for c in budget.costs(setup, shapes, sites, config.num_layers).values()])
    option = {"rank": "--budget-params", "module": "--budget-modules", "layer": "--top-k"}[setup.per]
    if setup.budget < prices.min():
        cheapest = int(prices.min())
        raise ValueError(f"{option} {setup.budget:,} pays for no {setup.per}: the cheapest costs {cheapest:,}.")
    every = int(prices[np.isfinite(prices)].sum())
    if setup.budget >= every:
        raise ValueError(
            f"{option} {setup.budget:,} pays for all there are, which cost {every:,}: there is nothing to "
            "choose; lower it, or train with bilevel lora."
        )


def gates(settings: Any, scores: budget.Units) -> Any:
    """LoRA's gates of some scores: `[L]`, `{site: [L]}`, or `{site: [L, r]}`."""
    if settings.per == "layer":
        return HALF + scores[budget.LAYERS]
    if settings.per == "module":
        return {site: HALF + score for site, score in scores.items()}
    return {site: HALF + jnp.repeat(score, settings.group, axis=1) for site, score in scores.items()}


def problem(settings: Any, given: Given, start: Any) -> bilevel.Problem:
    """The bilevel problem whose outer variable are the scores.

    Args:
      settings: as from `used`.
      given: the model and its loss, with LoRA at the rank of the search.
      start: trained parameters, from which every outer step goes on.
    """

    def loss(weights, params, scores, batch, key):
        return given.loss(weights, given.bind(weights, params, gate=gates(settings, scores)), batch)

    prices = budget.costs(settings, given.config.site_shapes(), given.sites, given.num_layers)
    both = jax.tree_util.Partial(loss, given.weights)
    none = lambda key: {name: jnp.zeros(price.shape) for name, price in prices.items()}  # noqa: E731
    return bilevel.Problem(both, both, lambda key, scores: start, none)


def rotated(params: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, dict[str, jax.Array]]:
    """The same updates A B, each in the basis of its singular vectors, the largest singular value first.

    Args:
      params: `{site: {"a": [L, in, r], "b": [L, r, out]}}`.

    Returns:
      The like, A = U S^(1/2) and B = S^(1/2) V^T.
    """

    def turn(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        # A small problem in place of an [in, out] one: A = Qa Ra and B^T = Qb Rb, so that A B = Qa (Ra Rb^T) Qb^T.
        (qa, ra), (qb, rb) = jnp.linalg.qr(a), jnp.linalg.qr(b.T)
        u, s, vt = jnp.linalg.svd(ra @ rb.T, full_matrices=False)
        root, beyond = jnp.sqrt(s), a.shape[1] - len(s)  # a matrix has no more directions than its smaller side
        left, right = (qa @ u) * root[None, :], root[:, None] * (vt @ qb.T)
        return jnp.pad(left, ((0, 0), (0, beyond))), jnp.pad(right, ((0, beyond), (0, 0)))

    found = {}
    for site, leaves in params.items():
        a, b = jax.vmap(turn)(leaves["a"], leaves["b"])
        found[site] = {"a": a, "b": b}
    return found


def solver(settings: Any, given: Given, start: Any) -> bilevel.Nested:
    """The search as a solver."""
    estimator = bilevel.Unrolled(optax.adam(SLOWER * settings.inner_lr), settings.inner_steps, checkpoint="step")
    return bilevel.Nested(problem(settings, given, start), estimator, optax.sgd(settings.outer_lr), inner_start="cold")


class Scored(NamedTuple):
    """What came of a search that takes no outer step: the scores, where a `bilevel.Result` has them."""

    outer: budget.Units


def searches(settings: AllocateSettings, bench: Bench) -> list[Later]:
    """One for each seed; the history has the scores after every outer step."""
    setup = used(settings)
    wide = widened(setup, bench) if setup.per == "rank" else bench

    def later(number: int) -> Later:
        name, key = f"search-{number}" if number else "search", jax.random.fold_in(jax.random.key(setup.seed), number)

        def made(found: Any, folder: RunFolder) -> Any:
            start = _start(setup, wide, folder, name, key)
            if setup.score == "singular-values":
                return Scored(energies(setup, start["lora"]))
            each = solver(setup, wide.given(), start)
            return searching(setup, wide, each, name=name, key=key, record=lambda state: state.outer)

        return made

    return [later(number) for number in range(setup.searches)]


def energies(settings: Any, rotated: Mapping[str, Mapping[str, jax.Array]]) -> budget.Units:
    """The squared singular values of the updates, summed over each unit.

    Args:
      settings: as from `used`.
      rotated: as from `rotated`, so that B has a singular value in each row, its square root.
    """
    values = {site: jnp.sum(leaves["b"] ** 2, axis=2) ** 2 for site, leaves in rotated.items()}
    if settings.per == "layer":
        return {budget.LAYERS: sum(value.sum(axis=1) for value in values.values())}  # pyright: ignore[reportReturnType]
    if settings.per == "module":
        return {site: value.sum(axis=1) for site, value in values.items()}
    return {site: v.reshape(len(v), -1, settings.group).sum(axis=2) for site, v in values.items()}


def widened(settings: Any, bench: Bench) -> Bench:
    """A bench whose LoRA has the largest rank that a module can get, and the scale of the settings' own rank."""
    scale = bench.lora.scale
    alpha = scale * (math.sqrt(settings.max_rank) if bench.lora.rslora else settings.max_rank)
    return bench._replace(lora=dataclasses.replace(bench.lora, rank=settings.max_rank, alpha=alpha))


def _start(settings: Any, bench: Bench, folder: RunFolder, search: str, key: jax.Array) -> Any:
    """Parameters after the first steps of training on all modules, rotated; kept in the run folder until its end."""
    given, name = bench.given(), f"checkpoints/{START}-{search}"
    like = jax.eval_shape(given.start, key)
    if not (folder.path / f"{name}.safetensors").is_file():
        plain = lora.problem(given)
        processes.tell(f"compiling the warm-up of {search}")
        trained = bilevel.fit(
            dataclasses.replace(plain, inner_loss=over_batches(plain.inner_loss, settings, bench)),
            lora.everywhere(given),
            optimizer=optax.adam(settings.inner_lr),
            data=larger(bilevel.Batches(bench.train, settings.batch_size), settings.accumulate, BATCH),
            steps=settings.warmup_steps,
            key=key,
            progress=not settings.quiet,
            callbacks=folder.callbacks(f"warm-up of {search}"),
            checkpoint_dir=folder.path / "checkpoints" / f"warm-up-{search}",
            title=f"warm-up of {search}",
            sharding=bench.sharding,
        ).inner.params
        folder.write_arrays(name, trained | {"lora": rotated(trained["lora"])})
    return folder.read_arrays(name, like)


def choose(settings: AllocateSettings, bench: Bench, found: Sequence[bilevel.Result], tried: Tried) -> Chosen:
    """The units that the budget buys by the mean score, the adapter they make, and arms of the same budget."""
    del tried
    setup, given = used(settings), bench.given()
    scores = [{name: np.asarray(score) for name, score in result.outer.items()} for result in found]
    mean = {name: np.mean([each[name] for each in scores], axis=0) for name in scores[0]}
    prices = budget.costs(setup, bench.shapes, given.sites, given.num_layers)
    chosen = budget.bought(setup, mean, prices)
    alone = [budget.bought(setup, each, prices) for each in scores]
    ranks = budget.ranks_of(setup, chosen, given.sites, given.num_layers)
    selection: dict[str, Any] = {
        "per": setup.per,
        "budget": setup.budget,
        "spent": budget.spent(chosen, prices),
        "ranks": ranks,
        "scores": mean,
        "spread": {name: np.std([each[name] for each in scores], axis=0) for name in mean},
    }
    if len(found) > 1:
        selection["agreement"] = agreement(setup, alone, prices, given.sites, given.num_layers)
    config, mask = budget.adapter(bench.lora, ranks)
    told = peft_settings(config, bench.shapes, bench.hf_names, given.num_layers, mask, bench.peft_task)
    selection["peft"], selection["modules"] = told
    if setup.search_only:
        return Chosen(selection, [])
    rng = np.random.default_rng(setup.seed)
    others = {f"random-{i}": _drawn(rng, prices) for i in range(setup.random_baselines)}
    arms = [trained(setup, bench, "allocate", ranks, export=True)]
    if (even := uniform(setup, bench)) is not None:
        arms.append(trained(setup, bench, "uniform", even))
    for name, drawn in others.items():
        at = budget.ranks_of(setup, budget.bought(setup, drawn, prices), given.sites, given.num_layers)
        arms.append(trained(setup, bench, name, at))
    return Chosen(selection, [*lora.untrained(bench, always=True), *arms])


def _drawn(rng: np.random.Generator, prices: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores by which a budget buys units in a random order, each that it still pays for.

    Units are bought by their score for their cost, which therefore is what has to be random: by scores that are, the
    cheap ones would come first.
    """
    return {
        name: rng.uniform(size=price.shape) * np.where(np.isfinite(price), price, 0.0) for name, price in prices.items()
    }


def uniform(settings: Any, bench: Bench) -> dict[str, list[int]] | None:
    """The same rank in every module for at most the budget's parameters; None where it does not even pay for rank 1."""
    if settings.per != "rank":
        return None
    one = bench.num_layers * sum(sum(bench.shapes[site]) for site in bench.sites)
    rank = settings.budget // one
    return {site: [rank] * bench.num_layers for site in bench.sites} if rank else None


def trained(settings: Any, bench: Bench, name: str, ranks: Mapping[str, Sequence[int]], *, export: bool = False) -> Arm:
    """LoRA of these ranks, trained from scratch."""
    config, mask = budget.adapter(bench.lora, ranks)
    on = bench._replace(lora=config)
    arm = lora.arm(settings, on, lora.problem(on.given()), name, mask, export=export)
    return arm._replace(count=lambda params: arm.count(params) | {"ranks": {s: list(r) for s, r in ranks.items()}})


def agreement(
    settings: Any,
    alone: Sequence[Mapping[str, np.ndarray]],
    prices: Mapping[str, np.ndarray],
    sites: Sequence[str],
    layers: int,
) -> dict[str, Any]:
    """How much searches that differ in their seed agree: the Jaccard index of their units, or the rank correlation.

    Args:
      settings: as from `used`.
      alone: what each search would have bought.
      prices: of the units; those of no finite price are not for sale, in a random choice either.
      sites, layers: of the model.
    """
    flat = [np.concatenate([np.ravel(on) for on in each.values()]) for each in alone]
    for_sale = sum(int(np.isfinite(price).sum()) for price in prices.values())
    found: dict[str, Any] = flexora.stability([np.flatnonzero(each).tolist() for each in flat], for_sale)
    if settings.per == "rank":
        ranks = [np.ravel(list(budget.ranks_of(settings, each, sites, layers).values())) for each in alone]
        pairs = itertools.combinations(ranks, 2)
        found["rank correlation"] = float(np.mean([METRICS["spearman"](a, b) for a, b in pairs]))
    return found


def page(run: Run) -> Page:
    """What was bought, how sure it is, and how other trainers are told."""
    setup, selection = used(run.settings), run.selection
    file = run.figure("ranks.png")
    figures.rank_map(file, selection["ranks"], "rank of each module")
    folder = run.folder.path / "peft"
    config = selection["peft"]
    run.folder.write_text("peft/adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    unit = {"rank": "parameters", "module": "modules", "layer": "layers"}[setup.per]
    lines = [f"- {site}: {_ranks(each)}" for site, each in selection["ranks"].items()]
    rest = "" if selection["spent"] == setup.budget else "; the rest pays for no other"
    paid = f"{selection['spent']:,} of {setup.budget:,} {unit} are spent{rest}."
    if setup.per == "rank" and not setup.search_only and "uniform" not in run.results:
        paid += " One rank in every module costs more, so that no such model stands beside it."
    elif setup.per == "rank" and "uniform" in run.results:
        even, own = (run.results[name]["parameters"] for name in ("uniform", "allocate"))
        paid += (
            f" Uniform LoRA has the largest rank for all modules that fits: {even:,} trainable parameters to {own:,}."
        )
    found = f"{paid}\n\n" + "\n".join(lines)
    steps, learned = (number(count, "training step") for count in (setup.inner_steps, setup.warmup_steps))
    taken = {
        "hypergradient": f"sums of {number(setup.outer_steps, 'hypergradient')} through {steps}, at half of what "
        f"{learned} taught LoRA",
        "singular-values": f"squared singular values of what {learned} taught LoRA",
    }[setup.score]
    times = "those of one search" if setup.searches == 1 else f"the mean of {setup.searches} that differ in their seed"
    trust = f"The scores are {taken}, {times}. {_agreed(setup, selection)}"
    made = "The adapter is in `adapter/`, in PEFT's format; its configuration alone, for other trainers, in `peft/`."
    if setup.search_only:
        made = "Nothing was trained. The configuration of the adapter, for other trainers, is in `peft/`."
    outputs = task.outputs if isinstance(task := run.bench.task, Classification) else 0
    told = trainers.snippets(folder, config, selection["modules"], outputs)
    blocks = "\n\n".join(f"{title}:\n\n```{kind}\n{text}\n```" for title, kind, text in told)
    said = "\n\n".join([_shortly(selection["ranks"]), *(f"{title}:\n\n{text}" for title, _, text in told)])
    adapter = _adapter(run) if setup.per == "rank" else True
    shown = {file.name: "rank of each module"}
    return Page("A budget of LoRA", found, shown, made, trust, adapter, more=blocks, said=said)


def _adapter(run: Run) -> str:
    """What is said of LoRA whose ranks were searched: no module has to have the rank that the settings name."""
    lora = run.bench.lora
    alpha = f"{lora.scale:g} times {'the root of its rank' if lora.rslora else 'its rank'}"
    return f"LoRA on {', '.join(run.bench.sites)}, each module of the rank above and with an alpha of {alpha}"


def _ranks(each: Sequence[int]) -> str:
    """Ranks by layer in words: runs of layers with the same one."""
    parts, at = [], 0
    for rank, run in itertools.groupby(each):
        end = at + len(list(run))
        if rank:
            parts.append(f"{rank} in {f'layers {at} to {end - 1}' if end - at > 1 else f'layer {at}'}")
        at = end
    return ", ".join(parts) or "none"


def _shortly(ranks: Mapping[str, Sequence[int]], width: int = 80, most: int = 8) -> str:
    """Ranks in a few lines: linears with the same ones share a line, and what is too long for it is summed up."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for site, each in ranks.items():
        alike.setdefault(tuple(each), []).append(site)
    lines = []
    for each, sites in alike.items():
        on = [rank for rank in each if rank]
        short = f"{min(on, default=0)} to {max(on, default=0)}, {sum(on)} in all, in {len(on)} of {len(each)} layers"
        names = sites[0] if len(sites) == 1 else f"each of {', '.join(sites)}"
        names = names if len(f"  {names}: {short}") <= width else f"each of {len(sites)} linears, {sites[0]} first"
        whole = f"  {names}: {_ranks(each)}"
        lines.append(whole if len(whole) <= width else f"  {names}: {short}")
    rest = [f"  and other ranks of {len(lines) - most + 1} more: report.md"] if len(lines) > most else []
    return "\n".join(["Ranks:", *(lines[: most - 1] if rest else lines), *rest])


def _agreed(settings: Any, selection: Mapping[str, Any]) -> str:
    if "agreement" not in selection:
        return "One search alone says nothing of how much it would agree with another: --searches 3."
    found = selection["agreement"]
    text = (
        f"By themselves they would choose units with a mean Jaccard index of {found['jaccard']:.2f}; random choices of "
        f"their sizes would have {found['random']:.2f}."
    )
    if settings.per == "rank":
        text += f" The ranks they give have a mean rank correlation of {found['rank correlation']:.2f}."
    return text


COMMAND = Method(
    AllocateSettings,
    PRESETS,
    choose=choose,
    page=page,
    searches=searches,
    used=used,
    unused=unused,
    check_model=check_model,
)
