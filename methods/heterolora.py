r"""HeteroLoRA: which modules deserve a fixed budget of LoRA parameters, ranked by zero-cost proxies.

Inner variable: A, B of every module, LoRA on linears and LoRA-adapted shortcuts. Outer variable: a gate
:math:`m \in \{0, 1\}` for each. The published method replaces the outer problem

.. math:: \min_m L_{val}(\theta^*(m), m) \quad\text{with}\quad \sum_i c_i m_i \le C

by a ranking: a score a module, taken with every module on, of which the best that fit the budget stay on. Here a score
is a `bilevel.Hypergradient` (`methods.proxies`: the negative of its gradient), and keeping the best is
`bilevel.allocate`; so the hypergradient itself, unrolled or implicit, is one more score. *Static*: score once, train
what was chosen. *Dynamic*: score again every so many training steps; a module that is off keeps its A and B, and may
return with them.

Shortcuts, D x D, on the residual stream of block l, x being its input, u what its feed-forward branch starts from:

    residual_attention   u <- x + s x A B + attention          the attention residual (residual_1)
    residual_ffn         y <- u + s u A B + feed-forward       the feed-forward residual (residual_2)
    block_hidden         y <- y + s x A B                      across the block (shortcut_sa)
    ffn_input            u <- u + s u' A B, u' of block l - 1  across to the next block (shortcut_ffn); none in block 0

With B = 0 all of them leave the model's function as it is. The authors' code normalises once more after the last two,
which changes the pretrained model even where they are off; ours add before a norm that is there anyway.

Zhang, Gao, Mullins, Constantinides, Zhao, "Unlocking the Global Synergies in Low-Rank Adapters", 2024,
arXiv 2406.14956.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel.trees import PyTree
from methods import experiment, proxies, report, side_by_side
from methods.adapters.lora import LoRAConfig
from methods.experiment import Bench, Settings
from methods.models.hooks import Chain
from methods.objective import Bound
from methods.runfolder import RunFolder

SHORTCUTS = ("residual_attention", "residual_ffn", "block_hidden", "ffn_input")
"""The sites of the four kinds of shortcuts."""

Gates = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Space:
    """The modules that can be on or off.

    Attributes:
      lora: LoRA on linears.
      shortcut: LoRA on shortcuts, its targets among `SHORTCUTS`; None for none. Published: rank as `lora`, alpha 4.
      shapes: `{site: (in, out)}` of the model's linears.
      width: D.
      num_layers: L.
    """

    lora: LoRAConfig
    shortcut: LoRAConfig | None
    shapes: Mapping[str, tuple[int, int]]
    width: int
    num_layers: int

    def _kinds(self) -> dict[str, tuple[LoRAConfig, Mapping[str, tuple[int, int]]]]:
        kinds = {"lora": (self.lora, self.shapes)}
        if self.shortcut is not None:
            kinds["shortcut"] = self.shortcut, {site: (self.width, self.width) for site in SHORTCUTS}
        return kinds

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> PyTree:
        """Fresh parameters, `{"lora": ..., "shortcut": ...}`, each as from `LoRAConfig.init`."""
        kinds = zip(self._kinds().items(), jax.random.split(key), strict=False)
        return {kind: config.init(k, shapes, self.num_layers, dtype) for (kind, (config, shapes)), k in kinds}

    def bind(self, params: PyTree, gates: Gates) -> Chain:
        """The hook: a module multiplied by its gate; at 0 an exact no-op, without gradient."""
        return Chain(
            tuple(
                config.bind(params[kind], gates[kind], {site: gate > 0 for site, gate in gates[kind].items()})
                for kind, (config, _) in self._kinds().items()
            )
        )

    def gates(self) -> Gates:
        """Every module on: ones `[L]` for each site."""
        return jax.tree.map(lambda cost: jnp.ones(len(cost)), self.costs())

    def costs(self, *, each: bool = False) -> Gates:
        """Trainable parameters of a module, r (in + out), `[L]` for each site; 1 with `each`, which counts modules.

        `inf` for the shortcut into block 0, which nothing leads to.
        """

        def cost(config: LoRAConfig, site: str, shape: tuple[int, int]) -> np.ndarray:
            costs = np.full(self.num_layers, 1.0 if each else float(config.rank * sum(shape)))
            costs[: 1 if site == "ffn_input" else 0] = np.inf
            return costs

        return {
            kind: {site: cost(config, site, shapes[site]) for site in config.sites(shapes)}
            for kind, (config, shapes) in self._kinds().items()
        }


def problem(loss: Any, weights: Any, space: Space, dtype: Any = jnp.float32) -> bilevel.Problem:
    """The bilevel problem: `loss(weights, adapt, batch)` on both levels, all gates on at the start.

    `dtype` is that of A and B.
    """

    def gated(weights, params, gates, batch, key):
        return loss(weights, space.bind(params, gates), batch)

    gated = jax.tree_util.Partial(gated, weights)
    return bilevel.Problem(gated, gated, lambda key, gates: space.init(key, dtype), lambda key: space.gates())


def frozen_where_off(optimizer: optax.GradientTransformation) -> Callable[[Gates], optax.GradientTransformation]:
    """`gates -> optimizer` that leaves modules alone whose gate is 0; Adam's momentum would still move them."""

    def at(gates: Gates) -> optax.GradientTransformation:
        def stop(gate, updates):
            return jax.tree.map(lambda u: jnp.where(_leading(gate > 0, u.ndim), u, jnp.zeros_like(u)), updates)

        def only_on(updates, params):
            return updates | jax.tree.map(stop, gates, proxies.gated(gates, updates))

        return optax.chain(optimizer, optax.stateless(only_on))

    return at


def by_type() -> optax.GradientTransformation:
    """Divides every leaf (the modules of one site) by its mean absolute value: modules compete within their type.

    Raw proxies mostly tell types apart, v from q above all.
    """

    def scale(u: jax.Array) -> jax.Array:
        mean = jnp.mean(jnp.abs(u))
        return jnp.where(mean > 0, u / jnp.where(mean > 0, mean, 1), u)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates))


def allocation(space: Space, share: float, key: jax.Array, *, separated: bool = False, normalised: bool = False) -> Any:
    """The outer transformation: the `share` of modules with the best scores, counted as published.

    Args:
      share: p; p of all modules stay on, rounded down.
      separated: p of the LoRA modules and p of the shortcuts (rounded), instead of one ranking ("combined").
      normalised: scores are divided by their type's mean first (`by_type`).
      key: of the ties.

    Raises:
      ValueError: for a share outside (0, 1], or too small for a single module.
    """
    if not 0 < share <= 1:
        raise ValueError(f"The share {share:g} of modules that stay on must be above 0 and at most 1.")
    costs = space.costs(each=True)
    counts = {k: sum(int(np.isfinite(c).sum()) for c in sites.values()) for k, sites in costs.items()}
    budgets = {"all": int(share * sum(counts.values()))}
    if separated:
        budgets = {kind: (int if kind == "lora" else round)(share * count) for kind, count in counts.items()}
    if min(budgets.values()) < 1:
        raise ValueError(f"The share {share:g} of {counts} modules is less than one: raise it.")
    if separated:
        groups: dict[Any, Any] = {
            kind: bilevel.allocate(budgets[kind], {**dict.fromkeys(costs, 1), kind: costs[kind]}, key=k)
            for kind, k in zip(costs, jax.random.split(key, len(costs)), strict=True)
        }
        allocate = optax.partition(groups, {kind: kind for kind in costs})
    else:
        allocate = bilevel.allocate(budgets["all"], costs, key=key)
    return optax.chain(by_type(), allocate) if normalised else allocate


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

    proxy: Literal["grad-norm", "constant", "snip", "synflow", "alpha-test", "unrolled", "implicit", "first-order"] = (
        "grad-norm"
    )
    allocation: Literal["static", "dynamic"] = "dynamic"
    ranking: Literal["combined", "separated"] = "combined"
    shortcuts: tuple[str, ...] = SHORTCUTS
    shortcut_alpha: float = 4.0
    share: float = 0.25
    normalised: bool = False
    score_on: Literal["train", "outer"] = "train"
    reallocations: int = 5
    interval: int = 4
    search_lr: float = 5e-4
    random_baselines: int = 1


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


def search_space(settings: HeteroLoRASettings, bench: Bench) -> Space:
    """The modules that `settings` name.

    Raises:
      ValueError: for an unknown shortcut, for DoRA, and for SYNFLOW on a model that writes no text.
    """
    config = bench.pretrained.config
    if settings.adapter == "dora":
        raise ValueError("--adapter dora: the modules of HeteroLoRA are LoRA or rsLoRA.")
    if settings.proxy == "synflow" and not hasattr(bench.pretrained.model, "head"):
        raise ValueError("--proxy synflow follows the logits of a model that writes text, which this one does not.")
    shortcut = None
    if settings.shortcuts != ("none",):
        if unknown := [site for site in settings.shortcuts if site not in SHORTCUTS]:
            raise ValueError(f"--shortcuts {unknown[0]!r} is none: choose from {', '.join(SHORTCUTS)}, or none.")
        shortcut = LoRAConfig(settings.rank, settings.shortcut_alpha, settings.shortcuts)
    return Space(bench.lora, shortcut, config.site_shapes(), config.hidden_size, bench.num_layers)


def gated_problem(bench: Bench, space: Space) -> bilevel.Problem:
    """`problem` on a bench: what is trained is the space's parameters, and a head where there is one."""
    loss = experiment.loss(bench)

    def gated(weights, params, gates, batch, key):
        return loss(weights, Bound(space.bind(params, gates), params["head"]), batch)

    def start(key, gates):
        return space.init(key) | {"head": experiment.start(bench, key)["head"]}

    gated = jax.tree_util.Partial(gated, bench.pretrained.weights)
    return bilevel.Problem(gated, gated, start, lambda key: space.gates())


def score(settings: HeteroLoRASettings, bench: Bench, space: Space, optimizer: Any) -> Any:
    """The score that `settings.proxy` names."""
    steps = settings.interval
    makers = {
        "constant": lambda: proxies.constant,
        "grad-norm": lambda: proxies.grad_norm,
        "snip": lambda: proxies.snip,
        "synflow": lambda: proxies.synflow(
            proxies.decoder_flow(bench.pretrained.model, bench.pretrained.weights, space.bind)
        ),
        "alpha-test": proxies.alpha_test,
        "unrolled": lambda: proxies.estimated(bilevel.Unrolled(optimizer, steps, checkpoint="step")),
        "implicit": lambda: proxies.estimated(
            bilevel.Implicit(optimizer, steps, linear_solver=bilevel.CG(max_steps=10), damping=0.1)
        ),
        "first-order": lambda: proxies.estimated(bilevel.FirstOrder(optimizer, steps)),
    }
    return makers[settings.proxy]()


def search(settings: HeteroLoRASettings, bench: Bench, space: Space, rule: Any, folder: RunFolder) -> Any:
    """Trains and reallocates; the history has the gates after every reallocation, `[T, L]` a site."""
    optimizer = optax.adam(settings.search_lr)
    proxy = proxies.Proxy(
        frozen_where_off(optimizer), settings.interval, score=score(settings, bench, space, optimizer)
    )
    rows = bench.train if settings.score_on == "train" else bench.outer
    return bilevel.run(
        bilevel.Nested(gated_problem(bench, space), proxy, rule),
        inner_data=bilevel.Batches(bench.train, settings.batch_size),
        outer_data=bilevel.Batches(rows, settings.outer_batch_size),
        steps=settings.reallocations if settings.allocation == "dynamic" else 1,
        key=jax.random.key(settings.seed),
        callbacks=[folder.log("search")],
        checkpoint=folder.path / "checkpoints" / "search",
        record=lambda state: {f"{k}.{s}": gate for k, sites in state.outer.items() for s, gate in sites.items()},
        title="search",
    )


def main(settings: HeteroLoRASettings) -> None:
    """Search, allocation, training, evaluation, report, adapter: all in `settings.out`.

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong.
      FloatingPointError: if training diverges; names step and leaf.
    """
    if settings.interval < 1 or settings.reallocations < 1:
        raise ValueError("--interval and --reallocations must be at least 1: a score needs training to look at.")
    bench = experiment.prepare(settings)
    space, separated = search_space(settings, bench), settings.ranking == "separated"
    key = jax.random.key(settings.seed + 2)
    rule = allocation(space, settings.share, key, separated=separated, normalised=settings.normalised)
    folder = RunFolder(settings.out, settings)
    result = search(settings, bench, space, rule, folder)
    arms = {"heterolora": result.outer}
    for i in range(settings.random_baselines):
        draw, on = allocation(space, settings.share, jax.random.fold_in(key, i), separated=separated), space.gates()
        updates, _ = draw.update(jax.tree.map(jnp.zeros_like, on), draw.init(on), on)
        arms[f"random-{i}"] = optax.apply_updates(on, updates)
    chosen = {kind: {s: np.asarray(g, int) for s, g in sites.items()} for kind, sites in result.outer.items()}
    folder.write("selection", {"proxy": settings.proxy, "on": chosen, "history": result.history})
    problem = gated_problem(bench, space)
    if bench.head is None:  # a fresh head knows nothing of the task
        off = jax.tree.map(jnp.zeros_like, space.gates())
        fresh = problem.start_inner(jax.random.key(0), off)
        folder.once("results/pretrained", lambda: _row(bench, space, fresh, off))
    for name, gates in arms.items():

        def trained(name=name, gates=gates):
            start = problem
            if name == "heterolora" and settings.allocation == "dynamic":
                going_on = jax.tree_util.Partial(lambda params, key, gates: params, result.inner.params)
                start = dataclasses.replace(problem, init_inner=going_on)
            bind = lambda params: Bound(space.bind(params, gates), params["head"])  # noqa: E731
            params = experiment.finetune_at(settings, bench, start, gates, name, folder, bind)
            if name == "heterolora":
                _save(folder, bench, space, params, gates)
            return _row(bench, space, params, gates)

        folder.once(f"results/{name}", trained)
    title = f"HeteroLoRA on {bench.task.name}, {Path(settings.model).name}"
    side_by_side.page(folder.path, (folder.path,), title, _how(settings))


def _row(bench: Bench, space: Space, params: PyTree, gates: Gates) -> dict[str, Any]:
    """A row of the comparison: as `report.arm`, with the modules that are on and what they cost."""
    bound = Bound(space.bind(params, gates), params["head"])
    row = report.arm(bench, [], experiment.evaluate_with(bench, bound))
    costs, on = space.costs(), {}
    for kind, sites in gates.items():
        for site, gate in sites.items():
            row["parameters"] += int(costs[kind][site][np.asarray(gate) > 0].sum())
            on[site] = np.asarray(gate, int).tolist()
    return row | {"on": on}


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


def _leading(mask: jax.Array, ndim: int) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))
