r"""Planted modules: which score finds them, at equal cost? (Task: `planted_task`.)

Every score is the mean over as many repetitions as the budget pays for. A repetition trains LoRA on all modules anew
for K steps of Adam, then scores every module with all of them on. The unit of cost is the gradient of the loss on an
inner batch; a Hessian-vector product counts 2.07, a forward pass a third, an outer batch by its rows:

    UD-K           d L_val / d gate through the K steps             3.07 K + 4
    implicit       the same at the end of training, CG              K + 2.07 K (iterations + 1) + 4
    first order    the same, training held constant                 K + 4
    grad-norm      K = 0 is the published one, of the gradient over all training rows; else K + 4
    snip           after K steps, on validation rows                K + 4
    synflow        after K steps, no data                           K + 1
    LoRA-drop      squared output norms after K steps               K + 4/3
    random

The oracle, leave one out, is outside the budget: a training a module. Its AUROC comes first; below .95 the task would
not be identifiable, and no score could be blamed. `EASY` plants layers; `HARD` plants single modules, of smaller
effect, and has fewer rows to find them by.

    python -m benchmarks.lora.planted_scores            # both variants; table, .json and .png in runs/planted_scores
    python -m benchmarks.lora.planted_scores --quick    # does it run
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro

import bilevel
from benchmarks.lora.planted import auroc, mean_sd, precision
from benchmarks.lora.planted_task import QUICK, Setup, Task, ablations, divergence, draw, make_task
from bilevel.data import resolve
from methods import proxies
from methods.baselines.lora_drop import output_norms
from methods.models.decoder import Decoder

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EASY = Setup(seeds=10)
HARD = Setup(seeds=10, per="module", planted=5, effect=0.03, rows=256)
BUDGET = 640
"""Inner gradients a score may spend."""
HVP = 2.07
CG_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Arm:
    """A score: its name, K, and what a repetition costs."""

    name: str
    steps: int
    cost: float

    @property
    def label(self) -> str:
        return f"{self.name}, K = {self.steps}"


def arms(setup: Setup, unrolls: tuple[int, ...]) -> list[Arm]:
    """All scores."""
    outer = setup.outer_batch / setup.batch
    found = [Arm("grad-norm", 0, setup.rows / setup.batch)]
    for k in unrolls:
        found += [
            Arm("UD", k, (1 + HVP) * k + outer),
            Arm("implicit", k, k + HVP * k * (CG_STEPS + 1) + outer),
            Arm("first order", k, k + outer),
            Arm("grad-norm", k, k + outer),
            Arm("snip", k, k + outer),
            Arm("synflow", k, k + 1),
            Arm("LoRA-drop", k, k + outer / 3),
        ]
    return found


def repeated(arm: Arm, budget: int) -> int:
    """How often the budget pays for an arm; once for the one that sees all rows."""
    return max(1, int(budget / arm.cost)) if arm.steps else 1


def problem(setup: Setup, task: Task) -> bilevel.Problem:
    """The gates `{site: [layers]}` as outer variable, all 1."""

    def loss(weights, params, gates, batch, key):
        return divergence(setup, weights, setup.lora.bind(params, gates), batch)

    loss = jax.tree_util.Partial(loss, task.weights)
    return bilevel.Problem(loss, loss, lambda key, gates: setup.start_lora(key), lambda key: everything_on(setup))


def everything_on(setup: Setup) -> dict[str, jax.Array]:
    return {site: jnp.ones(setup.layers) for site in setup.lora.targets}


def scorer(arm: Arm, setup: Setup, task: Task) -> Any:
    """The arm as a score of `methods.heterolora`, called at trained parameters."""
    optimizer = optax.adam(setup.adam)
    if arm.name in ("UD", "implicit", "first order"):
        estimator = {
            "UD": lambda: bilevel.Unrolled(optimizer, arm.steps, checkpoint="none"),
            "implicit": lambda: bilevel.Implicit(
                optimizer, arm.steps, linear_solver=bilevel.CG(max_steps=CG_STEPS), damping=0.1
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
def scores(setup: Setup, arm: Arm, budget: int, tasks: Task, keys: jax.Array) -> jax.Array:
    """`[seeds, units]`, the mean over the repetitions that the budget pays for."""
    repetitions = repeated(arm, budget)

    def one(task, key):
        here, on, score = problem(setup, task), everything_on(setup), scorer(arm, setup, task)
        trainer = bilevel.FirstOrder(optax.adam(setup.adam), max(1, arm.steps))

        def repeat(key):
            start, inner_key, outer_key = jax.random.split(key, 3)
            inner = draw(task.train, inner_key, max(1, arm.steps), setup.batch)
            outer = draw(task.val, outer_key, setup.outer_batch) if arm.steps else task.train
            params = setup.start_lora(start)
            if arm.steps and arm.name not in ("UD", "implicit", "first order"):
                params = trainer.solve(here, None, on, inner, start).params
            return setup.gather(score(here, params, on, inner, outer, start))

        return jax.lax.map(repeat, jax.random.split(key, repetitions)).mean(0)

    return jax.vmap(one)(tasks, keys)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation, the order of ties by place."""
    ranks = [np.argsort(np.argsort(x, kind="stable")) for x in (one, other)]
    return float(np.corrcoef(ranks)[0, 1])


def row(label: str, cost: float, found: Any, planted: np.ndarray, oracle: np.ndarray) -> dict[str, Any]:
    """A line of the table: one value a seed of each measure."""
    found = np.asarray(found, np.float64)
    pairs = list(zip(found, planted, strict=True))
    return {
        "score": label,
        "cost": cost,
        "auroc": [auroc(s, p) for s, p in pairs],
        "precision": [precision(s, p) for s, p in pairs],
        "oracle": [spearman(s, o) for s, o in zip(found, oracle, strict=True)],
    }


def measure(setup: Setup, budget: int, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """The rows of one variant: oracles first, then `arms`, then random."""
    task_keys, oracle_keys, score_keys = (jax.random.split(jax.random.key(i), setup.seeds) for i in (10, 11, 12))
    tasks = jax.jit(jax.vmap(partial(make_task, setup)))(task_keys)
    planted, n = np.asarray(tasks.planted), setup.units
    loss = np.asarray(ablations(setup, tasks, oracle_keys)["loss"], np.float64)
    left_out, left_in = loss[:, 2 + n :] - loss[:, 1:2], loss[:, :1] - loss[:, 2 : 2 + n]
    trainings = float(n * setup.oracle_steps)
    rows = [
        row("leave one out", trainings, left_out, planted, left_out),
        row("leave one in", trainings, left_in, planted, left_out),
    ]
    for arm in arms:
        begun = time.monotonic()
        found = scores(setup, arm, budget, tasks, score_keys)
        rows.append(row(arm.label, repeated(arm, budget) * arm.cost, found, planted, left_out))
        print(f"{arm.label}: AUROC {mean_sd(rows[-1]['auroc'])}, {time.monotonic() - begun:.0f} s", flush=True)
    rng = np.random.default_rng(0)
    rows.append(row("random", 0.0, rng.normal(size=planted.shape), planted, left_out))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    lines = [
        "| score | cost | AUROC | precision@k | rank correlation with leave one out |",
        "|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        measures = " | ".join(mean_sd(r[m]) for m in ("auroc", "precision", "oracle"))
        lines.append(f"| {r['score']} | {r['cost']:.0f} | {measures} |")
    return "\n".join(lines)


def figure(path: Path, variants: dict[str, list[dict[str, Any]]]) -> None:
    """AUROC of every score and seed, a panel a variant."""
    fig, axes = plt.subplots(1, len(variants), figsize=(4.6 * len(variants), 5.6), sharey=True, layout="constrained")
    for ax, (name, rows) in zip(np.atleast_1d(axes), variants.items(), strict=True):
        for place, r in enumerate(rows[::-1]):
            jitter = np.linspace(-0.18, 0.18, len(r["auroc"]))
            ax.plot(r["auroc"], place + jitter, ".", color="#9fb8c8", ms=5)
            ax.plot(np.mean(r["auroc"]), place, "|", color="#2a6f97", ms=14, mew=2.4)
        ax.axvline(0.5, color="0.6", lw=0.8, ls=":")
        ax.set(title=name, xlabel="AUROC of the planted units (bar: mean of the seeds)", xlim=(-0.03, 1.03))
        ax.set_yticks(range(len(rows)), [r["score"] for r in rows[::-1]])
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(quick: bool = False, budget: int = BUDGET, out: Path = Path("runs/planted_scores")) -> None:
    """Runs both variants.

    Args:
      quick: tiny; its numbers mean nothing.
      budget: inner gradients a score may spend.
      out: folder of the results.
    """
    setups = {"layers": EASY, "single modules": HARD}
    unrolls: tuple[int, ...] = (5, 20, 50)
    if quick:
        setups, budget, unrolls = {"layers": QUICK, "modules": dataclasses.replace(QUICK, per="module")}, 20, (2,)
    out.mkdir(parents=True, exist_ok=True)
    variants = {}
    for name, setup in setups.items():
        print(f"{name}: {setup.planted} of {setup.units} planted, {setup.seeds} seeds", flush=True)
        variants[name] = measure(setup, budget, arms(setup, unrolls))
        print(table(variants[name]), flush=True)
        everything = {"budget": budget, "setup": dataclasses.asdict(setup), "rows": variants[name]}
        (out / f"{name.replace(' ', '-')}.json").write_text(json.dumps(everything, indent=1))
    figure(out / "planted_scores.png", variants)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
