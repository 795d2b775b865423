r"""HeteroLoRA: which modules deserve a fixed budget of LoRA parameters, ranked by zero-cost proxies.

Inner variable: A, B of every module, LoRA on linears and LoRA-adapted shortcuts. Outer variable: a gate
:math:`m \in \{0, 1\}` for each. The published method replaces the outer problem

.. math:: \min_m L_{val}(\theta^*(m), m) \quad\text{with}\quad \sum_i c_i m_i \le C

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import optax

import bilevel
from bilevel.extend import PyTree
from methods import experiment, proxies, report, side_by_side
from methods.adapters.lora import LoRAConfig
from methods.experiment import Bench, Settings
from methods.objective import Bound
from methods.ranges import Count, Kept, Positive, RepeatsOrNone, Share, one_of
from methods.runfolder import RunFolder
from methods.search_space import SHORTCUTS, Gates, Space, allocation, frozen_where_off


@dataclasses.dataclass(frozen=True)
class HeteroLoRASettings(Settings):
    """HeteroLoRA: score LoRA modules and shortcuts, keep the best within a budget, train them, evaluate.

    Attributes:
      proxy: the score; "unrolled", "implicit" and "first-order" are hypergradients of the gates.
      allocation: "static" scores once and trains what was chosen from scratch; "dynamic" scores again and again during
        training and goes on from there.
      ranking: "combined" ranks all modules together, "separated" LoRA modules and shortcuts each by themselves.
      shortcuts: their sites, any of residual_attention, residual_ffn, block_hidden, ffn_input; "none" for none.
      shortcut_alpha: alpha of the shortcuts' LoRA, whose rank is `rank`.
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
    blind = {"score_on": f"--proxy {settings.proxy} looks at no rows"}
    return (
        static
        | (without if settings.shortcuts == ("none",) else {})
        | (blind if settings.proxy in proxies.BLIND else {})
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


def _rule(settings: HeteroLoRASettings, space: Space) -> tuple[Any, jax.Array]:
    """The outer transformation, and the key of its ties."""
    key, separated = jax.random.key(settings.seed + 2), settings.ranking == "separated"
    return allocation(space, settings.share, key, separated=separated, normalised=settings.normalised), key


def problem(
    loss: Any,
    weights: Any,
    space: Space,
    *,
    bind: Callable[[PyTree, Gates], Any] | None = None,
    start: Callable[[jax.Array], PyTree] | None = None,
) -> bilevel.Problem:
    """HeteroLoRA's bilevel problem: one loss on both levels, all gates on at the start.

    Args:
      loss: `loss(weights, bind(params, gates), batch) -> scalar`.
      weights: the frozen model.
      space: the modules that compete.
      bind: what the loss is given of the parameters; by default the hook, `space.bind`.
      start: `start(key)`, the parameters, those of the space among them; by default these alone, `space.init`.
    """
    bind, start = bind or space.bind, start or space.init

    def gated(weights, params, gates, batch, key):
        return loss(weights, bind(params, gates), batch)

    gated = jax.tree_util.Partial(gated, weights)
    return bilevel.Problem(gated, gated, lambda key, gates: start(key), lambda key: space.gates())


def make(bench: Bench, space: Space) -> bilevel.Problem:
    """The problem on a bench: what is trained is the space's parameters, and a head where there is one."""

    def start(key):
        return space.init(key) | {"head": experiment.start(bench, key)["head"]}

    bind = partial(bound, space)
    return problem(experiment.loss(bench), bench.pretrained.weights, space, bind=bind, start=start)


def bound(space: Space, params: PyTree, gates: Gates) -> Bound:
    """The space's hook, and the head."""
    return Bound(space.bind(params, gates), params["head"])


def score(settings: HeteroLoRASettings, bench: Bench, space: Space, optimizer: Any) -> Any:
    """The score that `settings.proxy` names."""
    model, weights = bench.pretrained.model, bench.pretrained.weights
    return proxies.PROXIES[settings.proxy](proxies.Given(model, weights, space.bind, optimizer, settings.interval))


def search(settings: HeteroLoRASettings, bench: Bench, space: Space, rule: Any, folder: RunFolder) -> Any:
    """Trains and reallocates; the history has the gates after every reallocation, `[T, L]` a site."""
    optimizer = optax.adam(settings.search_lr)
    proxy = proxies.Proxy(
        frozen_where_off(optimizer), settings.interval, score=score(settings, bench, space, optimizer)
    )
    rows = bench.train if settings.score_on == "train" else bench.outer
    return bilevel.run(
        bilevel.Nested(make(bench, space), proxy, rule),
        inner_data=bilevel.Batches(bench.train, settings.batch_size),
        outer_data=bilevel.Batches(rows, settings.outer_batch_size),
        steps=settings.reallocations if settings.allocation == "dynamic" else 1,
        key=jax.random.key(settings.seed),
        callbacks=[folder.log("search")],
        checkpoint_dir=folder.path / "checkpoints" / "search",
        record=lambda state: {f"{k}.{s}": gate for k, sites in state.outer.items() for s, gate in sites.items()},
        title="search",
    )


def finetune(
    settings: Settings, bench: Bench, space: Space, gates: Gates, name: str, folder: RunFolder, start: PyTree = None
) -> PyTree:
    """The final training of the modules whose gate is 1, from `start`, or from scratch without one."""
    of = make(bench, space)
    if start is not None:
        of = dataclasses.replace(of, init_inner=jax.tree_util.Partial(lambda at, key, gates: at, start))

    def validate(params):
        return experiment.validation_loss(bench, bound(space, params, gates))

    return experiment.finetune_at(settings, bench, of, gates, name, folder, validate)


def row(bench: Bench, space: Space, params: PyTree, gates: Gates) -> dict[str, Any]:
    """A row of the comparison: as `report.arm`, with the modules that are on and what they cost."""
    found = report.arm(bench, [], experiment.evaluate_with(bench, bound(space, params, gates)))
    costs, on = space.costs(), {}
    for kind, sites in gates.items():
        for site, gate in sites.items():
            found["parameters"] += int(costs[kind][site][np.asarray(gate) > 0].sum())
            on[site] = np.asarray(gate, int).tolist()
    return found | {"on": on}


def main(settings: HeteroLoRASettings) -> None:
    """Search, allocation, training, evaluation, report, adapter: all in `settings.out`.

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong.
      FloatingPointError: if training diverges; names step and leaf.
    """
    check(settings)
    # Whether the share is enough for one module is known from the model's shapes.
    bench = experiment.prepare(settings, lambda config, lora: _rule(settings, _space(settings, config, lora)) and None)
    space, separated = search_space(settings, bench), settings.ranking == "separated"
    rule, key = _rule(settings, space)
    folder = experiment.open_run(settings, bench)
    result = search(settings, bench, space, rule, folder)
    arms = {"heterolora": result.outer}
    for i in range(settings.random_baselines):
        draw, on = allocation(space, settings.share, jax.random.fold_in(key, i), separated=separated), space.gates()
        updates, _ = draw.update(optax.tree.zeros_like(on), draw.init(on), on)
        arms[f"random-{i}"] = optax.apply_updates(on, updates)
    chosen = {kind: {s: np.asarray(g, int) for s, g in sites.items()} for kind, sites in result.outer.items()}
    folder.write("selection", {"proxy": settings.proxy, "on": chosen, "history": result.history})
    if bench.head is None:  # a fresh head knows nothing of the task
        off = optax.tree.zeros_like(space.gates())
        fresh = make(bench, space).start_inner(jax.random.key(0), off)
        folder.once("results/pretrained", lambda: row(bench, space, fresh, off))
    for name, gates in arms.items():

        def trained(name=name, gates=gates):
            going_on = name == "heterolora" and settings.allocation == "dynamic"
            start = result.inner.params if going_on else None
            params = finetune(settings, bench, space, gates, name, folder, start)
            if name == "heterolora":
                _save(folder, bench, space, params, gates)
            return row(bench, space, params, gates)

        folder.once(f"results/{name}", trained)
    title = f"HeteroLoRA on {bench.task.name}, {Path(settings.model).name}"
    side_by_side.page(folder.path, (folder.path,), title, _how(settings))


def _save(folder: RunFolder, bench: Bench, space: Space, params: PyTree, gates: Gates) -> None:
    """LoRA in PEFT's format; shortcuts, for which PEFT has no place, in `adapter-shortcuts.safetensors`."""
    mask = {site: gate > 0 for site, gate in gates["lora"].items()}
    if any(bool(m.any()) for m in mask.values()):
        experiment.save_bound(folder.path / "adapter", bench, space.lora, params["lora"], params["head"], mask=mask)
    if "shortcut" in gates:
        keep = lambda gate, below: jax.tree.map(lambda x: x * gate.astype(x.dtype)[:, None, None], below)  # noqa: E731
        folder.write_arrays("adapter-shortcuts", jax.tree.map(keep, gates["shortcut"], params["shortcut"]))


def _how(settings: HeteroLoRASettings) -> str:
    times = settings.reallocations if settings.allocation == "dynamic" else 1
    going = "goes on from there" if settings.allocation == "dynamic" else "starts anew"
    return f"""Scored by {settings.proxy}, {times} times, each after {settings.interval} training steps, on
{settings.outer_batch_size} of the {settings.score_on} rows; {settings.share:.0%} of the modules stay on, in a
{settings.ranking} ranking. The last training of the chosen ones {going}: {settings.finetune_steps} steps, peak learning
rate {settings.finetune_lr:g}. The random allocations have as many modules. LoRA is in `adapter/`, in PEFT's format;
shortcuts, for which that has no place, in `adapter-shortcuts.safetensors`. All settings: `config.json`; every step:
`metrics.jsonl`; the allocation and its history: `selection.json`.
"""
