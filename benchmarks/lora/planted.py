r"""Planted layers: does a layer-selection score find the layers that the task needs? (Task: `planted_task`.)

1. Is the task identifiable? Oracle: LoRA is trained on one layer alone (leave one in; the score is the fall of the
   validation loss), and on all but one (leave one out; the rise).
2. Is inner training stable? $\eta \lambda_{\max}$ of the inner loss where SGD starts and stops (below 2), and the
   inner losses of the searches.
3. At equal inner training, how well does alpha rank S* when it follows `Unrolled`, `FirstOrder`, or GRAD-NORM (K = 1
   with validation = training)? Each outer step trains LoRA anew for K steps; N/K outer steps, N inner steps in all.
   `FirstOrder` and `Unrolled` see the same starts and batches.

Every outer step of gradient descent moves alpha by the same length, against the hypergradient: at K = 1 the unrolled
gradient is twice the first-order one, and nobody should win by the length of a step. The sum of alpha stays 0.

    python -m benchmarks.lora.planted            # minutes; table, .json, .csv and .png in runs/planted
    python -m benchmarks.lora.planted --quick    # does it run
"""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

import bilevel
from benchmarks.lora.planted_task import QUICK, Setup, Task, ablations, draw, gated, make_task, sharpness
from bilevel.extend import resolve

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to search: an estimator, K, and the inner optimizer."""

    name: str
    steps: int
    inner: str

    def hypergradient(self, setup: Setup) -> Any:
        optimizer = optax.sgd(setup.sgd) if self.inner == "sgd" else optax.adam(setup.adam)
        if self.name == "first-order":
            return bilevel.FirstOrder(optimizer, self.steps)
        return bilevel.Unrolled(optimizer, self.steps, checkpoint="none")


def arms(setup: Setup) -> list[Arm]:
    names = "unrolled", "first-order"
    return [Arm(n, k, inner) for inner in ("sgd", "adam") for k in setup.unrolls for n in names] + [
        Arm("grad-norm", 1, "sgd")
    ]


# Compiling is most of the time here; level 1 takes a quarter off it, and what it makes is no slower.
@partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 1})
def search(setup: Setup, arm: Arm, tasks: Task, keys: jax.Array) -> dict[str, jax.Array]:
    """`alpha[seeds, T, n]`, the losses, and the cosine of the gradient followed with the first-order one there."""
    outer_steps = setup.total // arm.steps
    length = setup.reach / outer_steps
    descent = optax.chain(optax.normalize_by_update_norm(eps=1e-12), optax.sgd(length))

    def one(task, key):
        problem = gated(setup, task)
        solver = bilevel.Nested(problem, arm.hypergradient(setup), descent, inner_start=setup.start)

        def step(state, key):
            inner_key, outer_key = jax.random.split(key)
            inner = draw(task.train, inner_key, arm.steps, setup.batch)
            outer = draw(task.val, outer_key, setup.outer_batch)
            if arm.name == "grad-norm":
                outer = bilevel.Indexed(task.train, inner.index[0])
            new, metrics = solver.step(state, inner, outer)
            record = {"alpha": new.outer, "inner_loss": metrics["inner_loss"], "outer_loss": metrics["outer_loss"]}
            if arm.name == "unrolled":
                direct = jax.grad(problem.outer_loss, argnums=1)(new.inner.params, state.outer, resolve(outer), None)
                # A step is -length times the unit hypergradient.
                record["cosine"] = jnp.vdot(state.outer - new.outer, direct) / (length * jnp.linalg.norm(direct))
            return new, record

        start, batches = jax.random.split(key)
        return jax.lax.scan(step, solver.init(start), jax.random.split(batches, outer_steps))[1]

    return jax.vmap(one)(tasks, keys)


def auroc(score: np.ndarray, planted: np.ndarray) -> float:
    """Probability that a planted layer scores above another one, ties counting half."""
    difference = score[planted][:, None] - score[~planted][None]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def precision(score: np.ndarray, planted: np.ndarray) -> float:
    """Share of planted layers among the |S*| best."""
    return float(np.mean(planted[np.argsort(-score, kind="stable")[: planted.sum()]]))


def jaccard(score: np.ndarray, planted: np.ndarray) -> float:
    """Overlap of S* with Flexora's selection, the layers above the mean: |both| / |either|."""
    chosen = score > score.mean()
    return float((chosen & planted).sum() / (chosen | planted).sum())


def row(name: str, scores: Any, planted: np.ndarray, **rest: Any) -> dict[str, Any]:
    """A line of the table: each measure, one value a seed. `scores` is `[seeds, layers]`, larger being better."""
    scores = np.asarray(scores, np.float64)
    measures = {"auroc": auroc, "precision": precision, "jaccard": jaccard}
    values = {n: [f(s, p) for s, p in zip(scores, planted, strict=True)] for n, f in measures.items()}
    return {
        "name": name,
        "K": None,
        "inner": "",
        **values,
        "inner_gradients": 0,
        "hvps": 0,
        "outer_gradients": 0,
    } | rest


def references(setup: Setup, found: dict[str, Any], planted: np.ndarray) -> list[dict[str, Any]]:
    """Oracles and scores that need no hypergradient."""
    loss, n, steps = np.asarray(found["loss"]), setup.layers, setup.oracle_steps
    rng = np.random.default_rng(0)
    chance = [row("", rng.normal(size=planted.shape), planted) for _ in range(200)]
    measures = ("auroc", "precision", "jaccard")
    return [
        row("leave one in", loss[:, :1] - loss[:, 2 : 2 + n], planted, inner_gradients=n * steps, inner="adam"),
        row("leave one out", loss[:, 2 + n :] - loss[:, 1:2], planted, inner_gradients=n * steps, inner="adam"),
        row("size of the trained update", found["update"][:, 1], planted, inner_gradients=steps, inner="adam"),
        {**chance[0], "name": "random"} | {m: [v for c in chance for v in c[m]] for m in measures},
    ]


def searched(setup: Setup, arm: Arm, tasks: Task, keys: jax.Array) -> dict[str, Any]:
    """Runs a search and scores its last alpha."""
    begun = time.monotonic()
    record = {name: np.asarray(value, np.float64) for name, value in search(setup, arm, tasks, keys).items()}
    planted, outer_steps = np.asarray(tasks.planted), setup.total // arm.steps
    result = row(
        arm.name,
        record["alpha"][:, -1],
        planted,
        K=arm.steps,
        inner=arm.inner,
        inner_gradients=setup.total,
        hvps=0 if arm.name == "first-order" else setup.total,
        outer_gradients=outer_steps,
    )
    # alpha starts at 0: after one step it is minus the first hypergradient, up to length.
    result["first_auroc"] = [auroc(a, p) for a, p in zip(record["alpha"][:, 0], planted, strict=True)]
    for name in ("inner_loss", "outer_loss", "cosine"):
        if name in record:
            result[name] = record[name].mean(0).tolist()
    print(f"{arm.name}, K = {arm.steps}, {arm.inner}: {time.monotonic() - begun:.0f} s", flush=True)
    return result


def mean_sd(values: Any) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


COLUMNS = {
    "score": lambda r: r["name"],
    "inner": lambda r: r["inner"],
    "K": lambda r: r["K"] or "",
    "AUROC": lambda r: mean_sd(r["auroc"]),
    "precision@|S*|": lambda r: mean_sd(r["precision"]),
    "Jaccard": lambda r: mean_sd(r["jaccard"]),
    "AUROC, first step": lambda r: mean_sd(r["first_auroc"]) if "first_auroc" in r else "",
    "cosine with first-order": lambda r: f"{r['cosine'][0]:.2f}, {np.mean(r['cosine']):.2f}" if "cosine" in r else "",
    "inner loss": lambda r: f"{r['inner_loss'][-1]:.3f}" if "inner_loss" in r else "",
    "inner grads": lambda r: r["inner_gradients"],
    "HVPs": lambda r: r["hvps"],
    "outer grads": lambda r: r["outer_gradients"],
}
"""Measures are mean ± standard deviation over seeds; the cosine is at the first outer step, and the search's mean."""


def paired(rows: list[dict[str, Any]]) -> list[str]:
    """AUROC, unrolled minus first-order, seed by seed: mean ± standard error, of the last and the first alpha."""
    lines = []
    for ours in (r for r in rows if r["name"] == "unrolled"):
        theirs = next(r for r in rows if (r["name"], r["K"], r["inner"]) == ("first-order", ours["K"], ours["inner"]))
        line = f"unrolled - first-order, {ours['inner']}, K = {ours['K']}:"
        for measure, label in (("auroc", "last alpha"), ("first_auroc", "first step")):
            difference = np.subtract(ours[measure], theirs[measure])
            error = difference.std(ddof=1) / len(difference) ** 0.5
            line += f"  {label} {difference.mean():+.3f} ± {error:.3f}"
        lines.append(line)
    return lines


def report(folder: Path, setup: Setup, rows: list[dict[str, Any]], stability: np.ndarray) -> None:
    """Prints the table; writes planted.json (everything), planted.csv (the table), planted.png."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{name: str(cell(r)) for name, cell in COLUMNS.items()} for r in rows]
    table = Table(*COLUMNS, title=f"|S*| = {setup.planted} of {setup.layers} layers, {setup.seeds} seeds")
    for line in lines:
        table.add_row(*line.values())
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table)
    start, end = stability.mean(0)
    console.print(
        f"SGD: step size × sharpness {start:.2f} at the start, {end:.2f} (at most {stability.max():.2f}) after."
    )
    for line in paired(rows):
        console.print(line)
    everything = {"setup": dataclasses.asdict(setup), "step_times_sharpness": stability.tolist(), "rows": rows}
    (folder / "planted.json").write_text(json.dumps(everything, indent=1))
    with open(folder / "planted.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    figure(folder / "planted.png", setup, rows)
    console.print(f"Written to {folder}.")


def figure(path: Path, setup: Setup, rows: list[dict[str, Any]]) -> None:
    """AUROC and cosine against K, one column an inner optimizer."""
    fig, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, sharey="row", layout="constrained")
    position = {k: i for i, k in enumerate(setup.unrolls)}
    for column, inner in enumerate(("sgd", "adam")):
        top, bottom = axes[:, column]
        for shift, name in ((-0.06, "unrolled"), (0.06, "first-order")):
            of = [r for r in rows if r["name"] == name and r["inner"] == inner]
            x = np.array([position[r["K"]] for r in of])
            values = np.array([r["auroc"] for r in of])
            line = top.errorbar(x + shift, values.mean(1), values.std(1, ddof=1), marker="o", capsize=3, label=name)
            top.plot(np.repeat(x + shift, values.shape[1]), values.ravel(), ".", color=line[0].get_color(), alpha=0.35)
            if name == "unrolled":
                bottom.plot(x, [r["cosine"][0] for r in of], "o-", color="k", label="first outer step")
                bottom.plot(x, [np.mean(r["cosine"]) for r in of], "s--", color="0.5", label="mean over the search")
        for name, style in (("leave one in", ":"), ("grad-norm", "-."), ("random", "--")):
            value = np.mean(next(r["auroc"] for r in rows if r["name"] == name))
            top.axhline(value, ls=style, color="0.4", lw=1, label=name)
        top.set(title=f"inner {inner}", ylim=(-0.05, 1.05))
        bottom.set(xlabel="K, inner steps unrolled", ylim=(-1.05, 1.05), xticks=list(position.values()))
        bottom.set_xticklabels([str(k) for k in position])
    axes[0, 0].set_ylabel("AUROC of the final alpha")
    axes[1, 0].set_ylabel("cosine, unrolled with first-order")
    axes[0, 1].legend(fontsize=8, loc="lower right")
    axes[1, 0].legend(fontsize=8, loc="lower left")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(quick: bool = False, seeds: int | None = None, start: str = "cold", out: Path = Path("runs/planted")) -> None:
    """Runs everything.

    Args:
      quick: a tiny version; its numbers mean nothing.
      seeds: how many; 5 by default.
      start: "cold" trains LoRA anew for each outer step; "warm" goes on training it.
      out: folder of the results.
    """
    setup = dataclasses.replace(QUICK if quick else Setup(), start=start)
    setup = dataclasses.replace(setup, seeds=seeds or setup.seeds)
    task_keys, oracle_keys, search_keys = (jax.random.split(jax.random.key(i), setup.seeds) for i in range(3))
    tasks = jax.jit(jax.vmap(partial(make_task, setup)))(task_keys)
    planted = np.asarray(tasks.planted)
    # Compiling is half of the time and one core's work: two searches at a time.
    with ThreadPoolExecutor(2) as pool:
        found = pool.submit(ablations, setup, tasks, oracle_keys)
        stability = pool.submit(sharpness, setup, tasks, search_keys)
        rows = list(pool.map(lambda arm: searched(setup, arm, tasks, search_keys), arms(setup)))
    report(out, setup, references(setup, found.result(), planted) + rows, np.asarray(stability.result()))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
