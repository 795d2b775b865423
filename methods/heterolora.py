r"""HeteroLoRA: which modules deserve a fixed budget of LoRA parameters, ranked by zero-cost proxies.

Inner variable: A, B of every module, LoRA on linears and LoRA-adapted shortcuts. Outer variable: a gate
$m \in \{0, 1\}$ for each. The published method replaces the outer problem

$$ \min_m L_{val}(\theta^*(m), m) \quad\text{with}\quad \sum_i c_i m_i \le C $$

by a ranking: a score a module, taken with every module on, of which the best that fit the budget stay on. Here a score
is a `bilevel.Hypergradient` (`methods.proxies`: the negative of its gradient), and keeping the best is
`bilevel.allocate`; so the hypergradient itself, unrolled or implicit, is one more score. *Static*: score once, train
what was chosen. *Dynamic*: score again every so many training steps; a module that is off keeps its A and B, and may
return with them.

Zhang, Gao, Mullins, Constantinides, Zhao, "Unlocking the Global Synergies in Low-Rank Adapters", 2024,
arXiv 2406.14956.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel.extend import PyTree
from methods import lora, proxies, side_by_side
from methods.adapters.lora import LoRAConfig
from methods.bench import Bench
from methods.driver import Arm, Chosen, Method, Search, Tried, finetuning, searching
from methods.objective import Bound, Given
from methods.pages import Page, Run, number
from methods.ranges import Count, Kept, Positive, RepeatsOrNone, Share, one_of
from methods.runfolder import RunFolder
from methods.search_space import SHORTCUTS, Gates, Space, allocation, frozen_where_off
from methods.settings import NO_DROPOUT, NO_OUTER, Settings


@dataclasses.dataclass(frozen=True)
class HeteroLoRASettings(Settings):
    """HeteroLoRA: keep the best LoRA modules and shortcuts within a budget.

    Attributes:
      proxy: the score; "unrolled", "implicit" and "first-order" are hypergradients of the gates.
      allocation: "static" scores once and trains what was chosen from scratch; "dynamic" scores again and again during
        training and goes on from there.
      ranking: "combined" ranks all modules together, "separated" LoRA modules and shortcuts each by themselves.
      shortcuts: their sites, any of residual_attention, residual_ffn, block_hidden, ffn_input; "none" for none.
      shortcut_alpha: alpha of the shortcuts' LoRA, whose rank is --rank.
      share: share of the modules that stay on.
      normalised: scores are divided by the mean of their type first.
      score_on: rows that the score looks at, those of training (as published) or the held-out outer ones.
      reallocations: how often modules are scored; "static" does so once.
      interval: training steps before each scoring; the first are with every module on.
      search_lr: learning rate of these steps (Adam).
      random_baselines: random allocations of as many modules, trained and evaluated beside.
    """

    proxy: Annotated[str, one_of(proxies.PROXIES)] = "grad-norm"
    allocation: Literal["static", "dynamic"] = "dynamic"
    ranking: Literal["combined", "separated"] = "combined"
    shortcuts: tuple[str, ...] = SHORTCUTS
    shortcut_alpha: Positive = 4.0
    share: Share = 0.25
    normalised: bool = False
    score_on: Literal["train", "outer"] = "train"
    reallocations: Count = 5
    interval: Kept = 4
    search_lr: Positive = 5e-4
    random_baselines: RepeatsOrNone = 1


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "paper": {
        "task": "rte",
        "length": 128,
        "batch_size": 8,
        "outer_batch_size": 256,
        "train_rows": 2000,
        "outer_rows": 256,
        "test_rows": 0,
        "reallocations": 50,
        "interval": 60,
        "finetune_steps": 2000,
        "finetune_lr": 2e-4,
        "search_lr": 2e-4,
        "random_baselines": 3,
    },
}
"""Settings that differ from the defaults, by preset."""


def unused(settings: HeteroLoRASettings) -> dict[str, str]:
    """Options without effect, and why."""
    static = {"reallocations": "--allocation static scores once"} if settings.allocation == "static" else {}
    without = {"shortcut_alpha": "--shortcuts none has none", "ranking": "--shortcuts none leaves one kind to rank"}
    blind = dict.fromkeys(("score_on", *NO_OUTER), f"--proxy {settings.proxy} looks at no rows")
    return (
        static
        | (without if settings.shortcuts == ("none",) else {})
        | (blind if settings.proxy in proxies.BLIND else {})
        | NO_DROPOUT
    )


def check(settings: HeteroLoRASettings) -> None:
    """What is wrong with the settings whatever the model is.

    Raises:
      ValueError: for an unknown shortcut, and for DoRA.
    """
    if settings.adapter == "dora":
        raise ValueError("--adapter dora: the modules of HeteroLoRA are LoRA or rsLoRA.")
    if not settings.shortcuts:
        raise ValueError(f"--shortcuts names none: choose from {', '.join(SHORTCUTS)}, or say none.")
    if settings.shortcuts != ("none",):
        if unknown := [site for site in settings.shortcuts if site not in SHORTCUTS]:
            raise ValueError(f"--shortcuts {unknown[0]!r} is none: choose from {', '.join(SHORTCUTS)}, or none.")
        if len(set(settings.shortcuts)) < len(settings.shortcuts):
            raise ValueError("--shortcuts names one twice.")


def search_space(settings: HeteroLoRASettings, bench: Bench) -> Space:
    """The modules that `settings` name.

    Raises:
      ValueError: as `check`, and for SYNFLOW on a model that writes no text.
    """
    check(settings)
    if settings.proxy == "synflow" and not hasattr(bench.pretrained.model, "head"):
        raise ValueError("--proxy synflow follows the logits of a model that writes text, which this one does not.")
    return _space(settings, bench.pretrained.config, bench.lora)


def _space(settings: HeteroLoRASettings, config: Any, lora: LoRAConfig) -> Space:
    shortcut = None
    if settings.shortcuts != ("none",):
        shortcut = LoRAConfig(settings.rank, settings.shortcut_alpha, settings.shortcuts)
    return Space(lora, shortcut, config.site_shapes(), config.hidden_size, config.num_layers)


def check_model(settings: HeteroLoRASettings, config: Any, lora: LoRAConfig) -> None:
    """Raises ValueError for a share that is not enough for one module, which the model's shapes tell."""
    _rule(settings, _space(settings, config, lora))


def _rule(settings: HeteroLoRASettings, space: Space) -> tuple[Any, jax.Array]:
    """The outer transformation, and the key of its ties."""
    key, separated = jax.random.key(settings.seed + 2), settings.ranking == "separated"
    return allocation(space, settings.share, key, separated=separated, normalised=settings.normalised), key


def problem(given: Given, space: Space, *, dtype: Any = jnp.float32) -> bilevel.Problem:
    """HeteroLoRA's bilevel problem: one loss on both levels, all gates on at the start.

    The inner variable is the parameters of the space and the head, `{"lora", "shortcut", "head"}`.

    Args:
      given: the model and its loss.
      space: the modules that compete.
      dtype: of their parameters.
    """

    def gated(weights, params, gates, batch, key):
        return given.loss(weights, bind(space, params, gates), batch)

    def start(key, gates):
        return space.init(key, dtype) | {"head": given.start(key)["head"]}

    gated = jax.tree_util.Partial(gated, given.weights)
    return bilevel.Problem(gated, gated, start, lambda key: space.gates())


def bind(space: Space, params: PyTree, gates: Gates) -> Bound:
    """The space's hook, and the head."""
    return Bound(space.bind(params, gates), params["head"])


def solver(settings: HeteroLoRASettings, given: Given, space: Space, model: Any) -> bilevel.Nested:
    """Training, and the allocation by what `settings.proxy` scores."""
    optimizer = optax.adam(settings.search_lr)
    scored = proxies.Given(model, given.weights, space.bind, optimizer, settings.interval)
    score = proxies.PROXIES[settings.proxy](scored)
    proxy = proxies.Proxy(frozen_where_off(optimizer), settings.interval, score=score)
    return bilevel.Nested(problem(given, space), proxy, _rule(settings, space)[0])


def searches(settings: HeteroLoRASettings, bench: Bench) -> list[Search]:
    """Trains and reallocates; the history has the gates after every reallocation, `[T, L]` a site."""
    space = search_space(settings, bench)
    rows = bench.train if settings.score_on == "train" else bench.outer
    blind = settings.proxy in proxies.BLIND  # a row, which it does not look at
    search = searching(
        settings,
        bench,
        solver(settings, bench.given(), space, bench.pretrained.model),
        steps=settings.reallocations if settings.allocation == "dynamic" else 1,
        outer_data=bilevel.Batches(rows, 1 if blind else settings.outer_batch_size),
        record=lambda state: {f"{k}.{s}": gate for k, sites in state.outer.items() for s, gate in sites.items()},
    )
    return [search]


def choose(settings: HeteroLoRASettings, bench: Bench, found: Sequence[bilevel.Result], tried: Tried) -> Chosen:
    """The modules whose gate is 1 in the end, and random choices of as many."""
    del tried
    (result,) = found
    space, given = search_space(settings, bench), bench.given()
    key, of = _rule(settings, space)[1], problem(given, space)
    # Dynamic: the final training goes on from where the search ended.
    start = result.inner.params if settings.allocation == "dynamic" else None
    arms = [*lora.untrained(bench), allocated(settings, bench, space, of, "heterolora", result.outer, start)]
    for i in range(settings.random_baselines):
        separated = settings.ranking == "separated"
        draw = allocation(space, settings.share, jax.random.fold_in(key, i), separated=separated)
        every = space.gates()
        updates, _ = draw.update(optax.tree.zeros_like(every), draw.init(every), every)
        on: Any = optax.apply_updates(every, updates)
        arms.append(allocated(settings, bench, space, of, f"random-{i}", on))
    chosen = {kind: {s: np.asarray(g, int) for s, g in sites.items()} for kind, sites in result.outer.items()}
    return Chosen({"proxy": settings.proxy, "on": chosen, "history": result.history}, arms)


def allocated(
    settings: HeteroLoRASettings,
    bench: Bench,
    space: Space,
    of: bilevel.Problem,
    name: str,
    gates: Gates,
    start: PyTree = None,
) -> Arm:
    """The modules whose gate is 1, trained from `start`, or from scratch without one."""
    if start is not None:
        of = dataclasses.replace(of, init_inner=jax.tree_util.Partial(lambda at, key, gates: at, start))
    bound = lambda params: bind(space, params, gates)  # noqa: E731

    def count(params: PyTree) -> dict[str, Any]:
        del params
        size, on, costs = lora.parameters(bench, {}), {}, space.costs()
        for kind, sites in gates.items():
            for site, gate in sites.items():
                size += int(costs[kind][site][np.asarray(gate) > 0].sum())
                on[site] = np.asarray(gate, int).tolist()
        return {"on": on, "parameters": size}

    def export(folder: RunFolder, params: PyTree) -> None:
        """LoRA in PEFT's format; shortcuts, for which PEFT has no place, in `adapter-shortcuts.safetensors`."""
        if name != "heterolora":
            return
        mask = {site: gate > 0 for site, gate in gates["lora"].items()}
        if any(bool(m.any()) for m in mask.values()):
            lora.export_adapter(folder.path / "adapter", bench, params, mask=mask)
        if "shortcut" in gates:
            keep = lambda gate, below: jax.tree.map(lambda x: x * gate.astype(x.dtype)[:, None, None], below)  # noqa: E731
            folder.write_arrays("adapter-shortcuts", jax.tree.map(keep, gates["shortcut"], params["shortcut"]))

    return Arm(name, finetuning(settings, bench, of, gates, bound), bound, count, export)


def page(run: Run) -> Page:
    """Which modules are on, and how they were scored."""
    settings = run.settings
    shown = side_by_side.of_run(run.folder, run.results)
    chosen = {site: np.flatnonzero(on).tolist() for sites in run.selection["on"].values() for site, on in sites.items()}
    found = [f"- {site}: layers {', '.join(map(str, layers)) or 'none'}" for site, layers in chosen.items()]
    times = settings.reallocations if settings.allocation == "dynamic" else 1
    going = "goes on from there" if settings.allocation == "dynamic" else "starts anew"
    steps = number(settings.interval, "training step")
    seen = f"{settings.outer_batch_size} of the {settings.score_on} rows"
    seen = "no rows" if settings.proxy in proxies.BLIND else seen
    made = (
        f"Scored by {settings.proxy}, {number(times, 'time')}, each after {steps}, on {seen}; "
        f"{settings.share:.0%} of the modules stay on, in "
        f"a {settings.ranking} ranking. The last training of the chosen ones {going}. The random allocations have as "
        "many modules. LoRA is in `adapter/`, in PEFT's format; shortcuts, for which that has no place, in "
        "`adapter-shortcuts.safetensors`."
    )
    return Page("HeteroLoRA", "Modules that are on:\n\n" + "\n".join(found), shown, made, _unlike(settings))


def _unlike(settings: HeteroLoRASettings) -> str:
    """What differs in the training of the models that are compared; "" for nothing."""
    if settings.allocation == "static" or not settings.random_baselines:
        return ""
    more = number(settings.reallocations * settings.interval, "training step")
    return (
        f"heterolora goes on from the search, and so had {more} of Adam at {settings.search_lr:g} before the "
        f"{settings.finetune_steps} that the random allocations had as well, which start from scratch: a difference "
        "from them is that of the choice and of these steps. --allocation static trains all alike."
    )


COMMAND = Method(
    HeteroLoRASettings,
    PRESETS,
    choose=choose,
    page=page,
    searches=searches,
    unused=unused,
    check=check,
    check_model=check_model,
)
