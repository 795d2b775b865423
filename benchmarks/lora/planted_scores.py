r"""Planted modules: which score finds them, at equal cost? (Task: `planted_task`.)

Every score is the mean over as many repetitions as the budget pays for. A repetition trains LoRA on all modules anew
for K steps of Adam, then scores every module with all of them on. The unit of cost is the gradient of the loss on an
inner batch; a Hessian-vector product counts 2.07, a forward pass a third, an outer batch by its rows:

    UD-K           d L_val / d gate through the K steps             3.07 K + 4
    halved         the same as in `bilevel allocate`: one training of half the budget, from which every repetition
                   begins, with gates of 1/2 in place of 1, through K steps of a tenth of the rate
    implicit       the same at the end of training, GMRES           K + 2.07 K (vectors + 2) + 4
    first order    the same, training held constant                 K + 4
    grad-norm      K = 0 is the published one, of the gradient over all training rows; else K + 4
    snip           after K steps, on validation rows                K + 4
    synflow        after K steps, no data                           K + 1
    LoRA-drop      squared output norms after K steps               K + 4/3
    random

The oracle, leave one out, is outside the budget: a training a module. Its AUROC comes first; below .95 the task would
not be identifiable, and no score could be blamed. `VARIANTS` plants whole layers, or single modules of smaller effect.

Every value goes to the record as soon as it is there, and is not computed again: the command goes on where it was.

    python -m benchmarks.lora.planted_scores                     # all seeds, then docs/allocation-benchmark.md
    python -m benchmarks.lora.planted_scores --seeds 0           # one of them
    python -m benchmarks.lora.planted_scores --minutes 8         # begin nothing after 8 minutes
    python -m benchmarks.lora.planted_scores --quick             # does it run
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import bilevel
from benchmarks.lora import report
from benchmarks.lora.planted import auroc
from benchmarks.lora.planted_task import QUICK, Setup, Task, ablations, divergence, draw, make_task
from benchmarks.record import Record, Row, clock, seconds_left
from bilevel.extend import resolve
from methods import allocate, proxies
from methods.baselines.lora_drop import output_norms
from methods.models.decoder import Decoder

VARIANTS = {"layers": Setup(), "single modules": Setup(per="module", planted=5, effect=0.03, rows=256)}
UNROLLS = (5, 20, 50)
HALVED = 4
"""K of the score at half of a training: as many steps as `bilevel allocate` takes by itself."""
BUDGET = 640
"""Inner gradients a score may spend."""
HVP = 2.07
ESTIMATED = ("UD", "halved", "implicit", "first order")
"""Scores that are hypergradients, and train by themselves."""
KRYLOV = 3
"""Vectors of GMRES: the Hessian is indefinite where training has hardly left the saddle B = 0, which is not for CG."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A score: its name, K, what a repetition costs, and what is trained before all of them."""

    name: str
    steps: int
    cost: float
    first: int = 0

    @property
    def label(self) -> str:
        return f"{self.name}, K = {self.steps}"


def arms(setup: Setup, unrolls: tuple[int, ...], budget: int) -> list[Arm]:
    """All scores."""
    outer = setup.outer_batch / setup.batch
    few = min(HALVED, *unrolls)
    found = [
        Arm("grad-norm", 0, setup.rows / setup.batch),
        Arm("halved", few, (1 + HVP) * few + outer, first=budget // 2),
    ]
    for k in unrolls:
        found += [
            Arm("UD", k, (1 + HVP) * k + outer),
            Arm("implicit", k, k + HVP * k * (KRYLOV + 2) + outer),
            Arm("first order", k, k + outer),
            Arm("grad-norm", k, k + outer),
            Arm("snip", k, k + outer),
            Arm("synflow", k, k + 1),
            Arm("LoRA-drop", k, k + outer / 3),
        ]
    return found


def repeated(arm: Arm, budget: int) -> int:
    """How often the budget pays for an arm; once for the one that sees all rows."""
    return max(1, int((budget - arm.first) / arm.cost)) if arm.steps else 1


def problem(setup: Setup, task: Task) -> bilevel.Problem:
    """The gates `{site: [layers]}` as outer variable, all 1."""

    def loss(weights, params, gates, batch, key):
        return divergence(setup, weights, setup.lora.bind(params, gates), batch)

    loss = jax.tree_util.Partial(loss, task.weights)
    return bilevel.Problem(loss, loss, lambda key, gates: setup.start_lora(key), lambda key: everything_on(setup))


def everything_on(setup: Setup, gate: float = 1.0) -> dict[str, jax.Array]:
    return {site: jnp.full(setup.layers, gate) for site in setup.lora.targets}


def scorer(arm: Arm, setup: Setup, task: Task) -> Any:
    """The arm as a score of `methods.proxies`, called at trained parameters."""
    optimizer = optax.adam(setup.adam)
    slower = optax.adam(allocate.SLOWER * setup.adam)
    if arm.name in ESTIMATED:
        estimator = {
            "UD": lambda: bilevel.Unrolled(optimizer, arm.steps, checkpoint="none"),
            "halved": lambda: bilevel.Unrolled(slower, arm.steps, checkpoint="none"),
            "implicit": lambda: bilevel.Implicit(
                optimizer, arm.steps, linear_solver=bilevel.GMRES(restart=KRYLOV, max_steps=KRYLOV), damping=0.1
            ),
            "first order": lambda: bilevel.FirstOrder(optimizer, arm.steps),
        }[arm.name]()
        return proxies.estimated(estimator)
    if arm.name == "synflow":
        model = Decoder(setup.config, remat=False)
        return proxies.synflow(proxies.decoder_flow(model, task.weights, setup.lora.bind))
    if arm.name == "LoRA-drop":

        def drop(problem, params, gates, inner_batches, outer_batch, key):
            batch = resolve(outer_batch)
            return output_norms(lambda adapt: divergence(setup, task.weights, adapt, batch), setup.lora.bind(params))

        return drop
    return {"grad-norm": proxies.grad_norm, "snip": proxies.snip}[arm.name]


@partial(jax.jit, static_argnums=(0, 1, 2), compiler_options={"xla_backend_optimization_level": 1})
def scores(setup: Setup, arm: Arm, budget: int, task: Task, key: jax.Array) -> jax.Array:
    """`[units]`, the mean over the repetitions that the budget pays for."""
    here, on, score = problem(setup, task), everything_on(setup), scorer(arm, setup, task)
    trainer = bilevel.FirstOrder(optax.adam(setup.adam), arm.first or max(1, arm.steps))
    trained = None
    if arm.first:  # every repetition begins where one training ended, at half of what it learned
        batches = draw(task.train, jax.random.fold_in(key, 1), arm.first, setup.batch)
        trained = trainer.solve(here, None, on, batches, jax.random.fold_in(key, 2)).params
        on = everything_on(setup, allocate.HALF)

    def repeat(key):
        start, inner_key, outer_key = jax.random.split(key, 3)
        inner = draw(task.train, inner_key, max(1, arm.steps), setup.batch)
        outer = draw(task.val, outer_key, setup.outer_batch) if arm.steps else task.train
        params = setup.start_lora(start) if trained is None else trained
        if arm.steps and arm.name not in ESTIMATED:
            params = trainer.solve(here, None, on, inner, start).params
        return setup.gather(score(here, params, on, inner, outer, start))

    return jax.vmap(repeat)(jax.random.split(key, repeated(arm, budget))).mean(0)


@cache
def task_of(setup: Setup, seed: int) -> Task:
    return jax.jit(partial(make_task, setup))(_key(10, seed))


def oracles(setup: Setup, seed: int) -> dict[str, np.ndarray]:
    """`[units]` each: the rise of the validation loss without a unit's LoRA, and the fall with it alone."""
    batched = jax.tree.map(lambda x: x[None], (task_of(setup, seed), _key(11, seed)))
    loss, n = np.asarray(ablations(setup, *batched)["loss"][0], np.float64), setup.units
    return {"leave one out": loss[2 + n :] - loss[1], "leave one in": loss[0] - loss[2 : 2 + n]}


def measure(setup: Setup, budget: int, seed: int, name: str, arm: Arm | None) -> list[Row]:
    """The rows of one job: both oracles, the random score, or an arm.

    Raises:
      FloatingPointError: for a score that is no number.
    """
    begun, cost = time.monotonic(), 0.0
    planted = np.asarray(task_of(setup, seed).planted)
    if name == "leave one out":
        found, cost = oracles(setup, seed), float(setup.units * setup.oracle_steps)
    elif arm is None:
        found = {name: np.random.default_rng(seed).normal(size=setup.units)}
    else:
        found = {name: np.asarray(scores(setup, arm, budget, task_of(setup, seed), _key(12, seed)), np.float64)}
        cost = arm.first + repeated(arm, budget) * arm.cost
    if not all(np.isfinite(values).all() for values in found.values()):
        raise FloatingPointError(f"{name}, seed {seed}, is NaN or infinite: it ranks nothing.")
    seconds = time.monotonic() - begun
    same = {"cost": cost, "planted": np.flatnonzero(planted).tolist(), "seconds": seconds}
    return [{"score": score, "values": values.tolist(), **same} for score, values in found.items()]


def jobs(
    record: Record, variants: dict[str, Setup], seeds: tuple[int, ...], unrolls: tuple[int, ...], budget: int
) -> Iterator[tuple[Row, Arm | None]]:
    """What the record lacks, seed by seed, the oracle first."""
    for seed in seeds:
        for variant, setup in variants.items():
            named = {"leave one out": None, **{arm.label: arm for arm in arms(setup, unrolls, budget)}, "random": None}
            for name, arm in named.items():
                job = {"variant": variant, "seed": seed, "score": name}
                if not record.find(**job):
                    yield job, arm


def main(
    seeds: tuple[int, ...] = tuple(range(10)),
    minutes: float | None = None,
    quick: bool = False,
    record: Path = report.SCORES,
    out: Path = report.DOCS,
) -> None:
    """Computes what the record lacks, then writes the page.

    Args:
      seeds: each draws weights, what is planted, and data anew.
      minutes: begin nothing after so many.
      quick: tiny; its numbers mean nothing, and go to runs/planted_scores.
      record: the rows.
      out: folder of the page.
    """
    variants, unrolls, budget = VARIANTS, UNROLLS, BUDGET
    if quick:
        variants = {"layers": QUICK, "single modules": dataclasses.replace(QUICK, per="module")}
        seeds, unrolls, budget = seeds[:2], (2,), 24
        record, out = Path("runs/planted_scores/record.jsonl"), Path("runs/planted_scores")
    rows, begun = Record(record), time.monotonic()
    todo = list(jobs(rows, variants, seeds, unrolls, budget))
    for number, (job, arm) in enumerate(todo):
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            print("Time is up; the same command goes on from here.")
            break
        found = measure(variants[job["variant"]], budget, job["seed"], job["score"], arm)
        rows.add([job | row for row in found])
        mask = np.isin(np.arange(len(found[0]["values"])), found[0]["planted"])
        left = seconds_left(rows, [job for job, _ in todo[number + 1 :]], "variant", "score")
        print(
            f"{number + 1}/{len(todo)}  {job['variant']}, seed {job['seed']}, {job['score']}: "
            f"AUROC {auroc(np.array(found[0]['values']), mask):.2f}, {found[0]['seconds']:.0f} s; {clock(left)} left",
            flush=True,
        )
    for path in report.write(out, scores=record):
        print(f"wrote {path}")


def _key(stream: int, seed: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(stream), seed)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
