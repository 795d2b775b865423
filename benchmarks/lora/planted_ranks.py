r"""Planted ranks: which way of giving ranks finds those that the task needs? (Tokens and decoder: `planted_task`.)

A random decoder gets updates of known ranks in a few of its modules (q or v of a layer), each with as many equal
singular values as its rank, and each singular value worth the same: a module of rank r moves the predictions by r times
`effect`. A student learns towards it with LoRA of rank R on all modules, and every way gives each rank-one component of
each module a score. The truth of the j-th best component of a module is whether j is below the module's rank; AUROC
over all components says how well the scores tell those that are needed, and the rank correlation of the ranks that the
budget of the truth would buy with the true ones says how well whole modules come out.

All ways may spend the same number of inner gradients. A Hessian-vector product counts 2.07 of them, a forward pass a
third, an outer batch by its rows:

    hypergradient  `methods.allocate`: a training, its singular vectors, then hypergradients through K steps, 3.07 K + 4
                   each
    first order    the same, with the training held constant, K + 4
    singular values  `methods.allocate --score singular-values`: of what a training learned
    AdaLoRA        its training; the importance of its triplets (Zhang et al. 2023)
    EVA            singular values of each module's inputs, each as a share of their sum (Paischer et al. 2024, arXiv
                   2410.07170): it looks at activations alone
    GRAD-NORM      norm of the gradient of each module over all training rows, the same for all of its components

    python -m benchmarks.lora.planted_ranks                # all seeds; the record goes on where it was
    python -m benchmarks.lora.planted_ranks --quick        # does it run
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import bilevel
from benchmarks.lora.planted import auroc
from benchmarks.lora.planted_task import Setup, Task, base_weights, divergence, draw
from benchmarks.record import Record, Row
from methods import allocate, lora
from methods.baselines.adalora import triplets
from methods.baselines.importance import orthogonality, product, smooth, unsmoothed
from methods.objective import Given, of_hook
from methods.tasks import METRICS

RECORD = Path(__file__).with_name("planted_ranks.jsonl")
HVP = 2.07


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The benchmark's numbers, beside those of `Setup`.

    Attributes:
      true: ranks that are planted, each in another module; all other modules have none.
      effect: KL divergence that a singular value is worth.
      budget: inner gradients of a way.
      warmup: of them, training steps before components are scored.
      unroll: K.
    """

    true: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    effect: float = 0.05
    budget: int = 1280
    warmup: int = 640
    unroll: int = 4
    seeds: int = 10


SETUP = Setup(per="module", rank=4, rows=1024)
QUICK = Ranks(true=(1, 2), budget=60, warmup=10, unroll=2, seeds=1)


def make_task(setup: Setup, ranks: Ranks, key: jax.Array) -> tuple[Task, np.ndarray]:
    """Weights and data of one seed, and the true rank of each module, `[units]`."""
    keys = jax.random.split(key, 6)
    weights = base_weights(setup, keys[0])
    places = jax.random.permutation(keys[1], setup.units)[: len(ranks.true)]
    true = np.zeros(setup.units, int)
    true[np.asarray(places)] = ranks.true
    update, shapes = {}, setup.config.site_shapes()
    for number, site in enumerate(setup.lora.targets):
        fan_in, fan_out = shapes[site]
        ka, kb = jax.random.split(jax.random.fold_in(keys[2], number))
        # Orthonormal on both sides: every component of a module has the same singular value.
        a, _ = jnp.linalg.qr(jax.random.normal(ka, (setup.layers, fan_in, setup.rank)))
        b, _ = jnp.linalg.qr(jax.random.normal(kb, (setup.layers, fan_out, setup.rank)))
        update[site] = {"a": a, "b": b.transpose(0, 2, 1)}
    there = jnp.arange(setup.rank)[None] < jnp.asarray(true)[:, None]
    masks = dict(zip(setup.lora.targets, there.reshape(-1, setup.layers, setup.rank), strict=True))

    def tokens(key: jax.Array) -> jax.Array:
        return jax.random.randint(key, (setup.rows, setup.tokens), 0, setup.vocab, jnp.int32)

    def predict(gate: jax.Array, on: jax.Array, tokens: jax.Array) -> dict[str, jax.Array]:
        here = dict(zip(masks, _spread(setup, on), strict=True))
        mask = {site: there & here[site][:, None] for site, there in masks.items()}
        adapt = setup.lora.bind(update, dict(zip(masks, _spread(setup, gate), strict=True)), mask)
        return {"tokens": tokens, "target": jax.nn.log_softmax(setup.logits(weights, adapt, tokens))}

    probe, planted = tokens(keys[5])[:128], jnp.asarray(np.flatnonzero(true))
    base = setup.lora.bind(update, mask=jnp.zeros(setup.layers, bool))
    wanted = ranks.effect * jnp.asarray(true, jnp.float32)
    each = jax.nn.one_hot(planted, setup.units, dtype=bool)

    def rescale(gate: jax.Array, _: None) -> tuple[jax.Array, None]:
        moved = jax.vmap(lambda on: divergence(setup, weights, base, predict(gate, on, probe)))(each)
        factor = jnp.ones(setup.units).at[planted].set(jnp.sqrt(wanted[planted] / moved))
        return jnp.clip(gate * factor, 0.05, 50.0), None

    gate, _ = jax.lax.scan(rescale, jnp.ones(setup.units, jnp.float32), None, length=6)
    every = jnp.ones(setup.units, bool)
    train, val = (predict(gate, every, tokens(k)) for k in keys[3:5])
    return Task(weights, there, train, val), true


def _spread(setup: Setup, values: jax.Array) -> jax.Array:
    return values.reshape(-1, setup.layers)


def settings(setup: Setup, ranks: Ranks, hypergradient: str) -> Any:
    """Of `methods.allocate`, for this many gradients."""
    one = (1 + HVP if hypergradient == "hypergradient" else 1.0) * ranks.unroll + setup.outer_batch / setup.batch
    return allocate.Used(
        model="",
        per="rank",
        max_rank=setup.rank,
        inner_steps=ranks.unroll,
        outer_steps=max(1, int((ranks.budget - ranks.warmup) / one)),
        inner_lr=setup.adam,
        outer_lr=1e-2,
        batch_size=setup.batch,
        outer_batch_size=setup.outer_batch,
        rank=setup.rank,
    )


def given(setup: Setup, task: Task) -> Given:
    """What a method is given of a task."""
    return of_hook(partial(divergence, setup), task.weights, setup.lora, setup.config)


def trained(setup: Setup, task: Task, steps: int, key: jax.Array) -> Any:
    """LoRA on all modules, `{"lora", "head"}`, after so many steps of Adam."""
    of = given(setup, task)
    data = draw(task.train, jax.random.fold_in(key, 7), steps, setup.batch)
    problem = lora.problem(of)
    trainer = bilevel.FirstOrder(optax.adam(setup.adam), steps)
    return trainer.solve(problem, None, problem.start_outer(key), data, key).params


def by_search(setup: Setup, ranks: Ranks, task: Task, key: jax.Array, name: str) -> dict[str, np.ndarray]:
    """Scores of components by `methods.allocate`, `{site: [L, R]}`; "first order" holds the training constant."""
    setting, of = settings(setup, ranks, name), given(setup, task)
    start = trained(setup, task, ranks.warmup, key)
    start = start | {"lora": allocate.rotated(start["lora"])}
    search = allocate.solver(setting, of, start)
    if name == "first order":
        held = bilevel.FirstOrder(optax.adam(allocate.SLOWER * setup.adam), ranks.unroll)
        search = dataclasses.replace(search, hypergradient=held)
    found = bilevel.run(
        search,
        inner_data=bilevel.Batches(task.train, setup.batch),
        outer_data=bilevel.Batches(task.val, setup.outer_batch),
        steps=setting.outer_steps,
        key=key,
        progress=False,
    )
    return {site: np.asarray(score) for site, score in found.outer.items()}


def by_singular_values(setup: Setup, ranks: Ranks, task: Task, key: jax.Array) -> dict[str, np.ndarray]:
    """Singular values of the updates of a plain training that spends the whole budget."""
    rotated = allocate.rotated(trained(setup, task, ranks.budget, key)["lora"])
    found = allocate.energies(settings(setup, ranks, "first order"), rotated)
    return {site: np.asarray(score) for site, score in found.items()}


def by_adalora(setup: Setup, ranks: Ranks, task: Task, key: jax.Array) -> dict[str, np.ndarray]:
    """The smoothed importance of AdaLoRA's triplets after a training that spends the whole budget."""
    of, keys = given(setup, task), jax.random.split(key, 3)
    factors = jax.tree.map(
        lambda x: jax.random.normal(keys[0], x.shape, x.dtype) / x.shape[1] ** 0.5, of.start(keys[0])["lora"]
    )
    values = {site: jnp.zeros((setup.layers, setup.rank)) for site in setup.lora.targets}
    params, optimizer = {"factors": factors, "values": values}, optax.adam(setup.adam)
    index = jax.random.randint(keys[1], (ranks.budget, setup.batch), 0, setup.rows)

    def loss(params: Any, batch: Any) -> jax.Array:
        bound = of.bind(of.weights, {"lora": params["factors"], "head": {}}, gate=params["values"])
        return of.loss(of.weights, bound, batch) + 0.1 * orthogonality(params["factors"])

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, state, smoothed = carry
        grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[rows], task.train))
        smoothed = smooth(smoothed, params, grads, 0.85)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, smoothed), None

    begin = (params, optimizer.init(params), unsmoothed(params))
    (_, _, smoothed), _ = jax.jit(lambda c, i: jax.lax.scan(step, c, i))(begin, index)
    return {site: np.asarray(score) for site, score in triplets(product(smoothed)).items()}


def by_gradient_norm(setup: Setup, ranks: Ranks, task: Task, key: jax.Array) -> dict[str, np.ndarray]:
    """The norm of the gradient of a fresh LoRA's B over all training rows, the same for each component."""
    del ranks
    of = given(setup, task)
    params = of.start(key)
    grads = jax.grad(lambda p: of.loss(of.weights, of.bind(of.weights, p), task.train))(params)["lora"]
    norms = {site: jnp.sqrt((leaves["b"] ** 2).sum(axis=(1, 2))) for site, leaves in grads.items()}
    return {site: np.asarray(jnp.broadcast_to(n[:, None], (setup.layers, setup.rank))) for site, n in norms.items()}


@jax.custom_vjp
def _looked_at(moment: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """y; the derivative with respect to `moment` is the sum of x x^T, whatever comes after."""
    return y


def _looked_at_forward(moment: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    return y, x


def _looked_at_backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows = x.reshape(-1, x.shape[-1])
    return rows.T @ rows, jnp.zeros_like(x), cotangent


_looked_at.defvjp(_looked_at_forward, _looked_at_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """A hook whose derivative with respect to `moments`, `{site: [L, in, in]}`, is that of each module's inputs."""

    moments: dict[str, jax.Array]

    def __call__(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return _looked_at(self.moments[site], x, y) if site in self.moments else y


def by_eva(setup: Setup, ranks: Ranks, task: Task, key: jax.Array) -> dict[str, np.ndarray]:
    """Squared singular values of the inputs of each module, each as a share of their sum."""
    del ranks, key
    shapes = setup.config.site_shapes()
    probes = {site: jnp.zeros((setup.layers, shapes[site][0], shapes[site][0])) for site in setup.lora.targets}
    total = lambda moments: setup.logits(task.weights, Inputs(moments), task.train["tokens"]).sum()  # noqa: E731
    found = {}
    for site, moment in jax.grad(total)(probes).items():
        values = np.linalg.eigvalsh(np.asarray(moment, float))[:, ::-1]
        found[site] = values[:, : setup.rank] / values.sum(axis=1, keepdims=True)
    return found


def judged(setup: Setup, scores: dict[str, np.ndarray], true: np.ndarray) -> dict[str, float]:
    """AUROC over components, and the rank correlation of the ranks that the budget of the truth buys."""
    table = np.concatenate([np.sort(scores[site], axis=1)[:, ::-1] for site in setup.lora.targets])
    needed = np.arange(setup.rank)[None] < true[:, None]
    # The largest scores, as many as there are components; the price is the same in every module.
    best = np.argsort(-table, axis=None, kind="stable")[: int(true.sum())]
    bought = np.bincount(best // setup.rank, minlength=setup.units)
    return {"auroc": auroc(table.ravel(), needed.ravel()), "rank correlation": METRICS["spearman"](bought, true)}


WAYS = {
    "hypergradient": partial(by_search, name="hypergradient"),
    "first order": partial(by_search, name="first order"),
    "singular values": by_singular_values,
    "AdaLoRA": by_adalora,
    "EVA": by_eva,
    "GRAD-NORM": by_gradient_norm,
}


def measure(setup: Setup, ranks: Ranks, seed: int, record: Record) -> Iterator[Row]:
    """A row for each way that the record lacks."""
    key = jax.random.key(seed)
    missing = [name for name in WAYS if not record.find(seed=seed, way=name)]
    if not missing:
        return
    task, true = make_task(setup, ranks, key)
    for name in missing:
        begun = time.perf_counter()
        scores = WAYS[name](setup, ranks, task, jax.random.fold_in(key, 1))
        row = judged(setup, scores, true)
        yield {"seed": seed, "way": name, **row, "true": true.tolist(), "seconds": time.perf_counter() - begun}


@dataclasses.dataclass(frozen=True)
class Options:
    """Planted ranks: which way of giving ranks finds them?

    Attributes:
      quick: one seed of a small task, which only says whether it runs.
      record: the record.
    """

    quick: bool = False
    record: Path = RECORD


def main(options: Options) -> None:
    """Measures what the record lacks, and prints it."""
    setup, ranks = SETUP, Ranks()
    if options.quick:
        setup, ranks = dataclasses.replace(SETUP, layers=4, width=16, rows=64), QUICK
    record = Record(options.record)
    for seed in range(ranks.seeds):
        for row in measure(setup, ranks, seed, record):
            record.add([row])
            print(f"seed {seed}, {row['way']}: AUROC {row['auroc']:.3f}, {row['seconds']:.0f} s", flush=True)
    for name in WAYS:
        values = [row["auroc"] for row in record.find(way=name)]
        print(f"{name:16} AUROC {np.mean(values):.3f} ± {np.std(values):.3f}")


if __name__ == "__main__":
    main(tyro.cli(Options))
