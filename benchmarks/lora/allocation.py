r"""One budget of LoRA parameters on real tasks: spent evenly, at random, by HeteroLoRA, or by Flexora?

MiniLM-L6 with a new head on MRPC and RTE, five seeds; SmolLM2-135M on PIQA, three. The budget is LoRA of rank 2 on q
and v of every layer, or, for those that choose, a third of it at rank 6 and the same scale; what a choice leaves over
is less than a module. A seed draws rows, start values and batches, the same for every method:

    uniform     rank 2 everywhere
    random      modules drawn evenly
    static      HeteroLoRA, GRAD-NORM after one step, then training from scratch
    dynamic     HeteroLoRA, GRAD-NORM again and again during the first half of the training, which goes on from there
    flexora     the layers of the largest alpha, found through the unrolled training, then training from scratch

What is tested was trained for as many steps everywhere; the searches of static and flexora come on top, and their
seconds are in the table. No learning rate was tuned for any method; the outer rows serve Flexora's outer loss alone,
and the test rows, the published validation set, are seen once, at the end.

Said beforehand, and written to the record before the first run: two models that differ on a share d of n questions are
told apart (two-sided 5 %, power 80 %) from a difference of

$$ \delta = (z_{.975} + z_{.8}) \sqrt{d / n} $$

on, which is the paired binomial at a difference of 0. We put d = .2. Over S seeds it is between $\delta$ (the
seeds err on the same questions) and $\delta / \sqrt{S}$.

Every run is a process of its own, and a row of the record; what is there is not run again, and a run that was killed
goes on from its checkpoints in `out`.

    python -m benchmarks.lora.allocation                                  # all, then docs/allocation-benchmark.md
    python -m benchmarks.lora.allocation --tasks mrpc --seeds 0 --minutes 8
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from statistics import NormalDist
from typing import Any, Literal

import tyro

from benchmarks.lora import report
from benchmarks.lora.cases import MINILM, SMOLLM, Case
from benchmarks.record import Record, Row, clock, seconds_left
from methods import tasks as known

CASES = {
    "mrpc": Case("mrpc", *MINILM, 448, 0, 160, 8, 64, 2e-3),
    "rte": Case("rte", *MINILM, 448, 0, 160, 8, 64, 2e-3),
    "piqa": Case("piqa", *SMOLLM, 400, 200, 40, 8, 64, 1e-3),
}
SEEDS = {"mrpc": 5, "rte": 5, "piqa": 3}
METHODS = ("uniform", "random", "static", "dynamic", "flexora")
RANK, SCALE, SHARE = 6, 2.0, 3
"""Rank and alpha / rank of a chosen module; one module in `SHARE` is chosen."""
REALLOCATIONS = 5
DISCORDANCE = 0.2


def detectable(questions: int, seeds: int = 1) -> float:
    """The minimal detectable difference of two accuracies on the same questions; see the module."""
    z = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    return z * (DISCORDANCE / (questions * seeds)) ** 0.5


def plan(task: str) -> Row:
    """What is said before the runs."""
    case, of = CASES[task], known.get(task)
    rows = known.load(of, of.test)
    questions = case.test_rows or len(rows)
    return {
        "plan": task,
        "case": dataclasses.asdict(case),
        "seeds": SEEDS[task],
        "test_rows": questions,
        "majority": max(Counter(row["label"] for row in rows).values()) / len(rows),
        "discordance": DISCORDANCE,
        "detectable": detectable(questions),
        "detectable_at_best": detectable(questions, SEEDS[task]),
    }


def jobs(record: Record, tasks: tuple[str, ...], seeds: tuple[int, ...] | None) -> Iterator[Row]:
    """What the record lacks, seed by seed, so that every task has paired runs early."""
    for seed in seeds if seeds is not None else range(max(SEEDS.values())):
        for task in tasks:
            for method in METHODS if seed < SEEDS[task] else ():
                job = {"task": task, "seed": seed, "method": method}
                if not record.find(**job):
                    yield job


def main(
    tasks: tuple[Literal["mrpc", "rte", "piqa"], ...] = ("mrpc", "rte", "piqa"),
    seeds: tuple[int, ...] | None = None,
    processes: int = 2,
    minutes: float | None = None,
    record: Path = report.REAL,
    out: Path = Path("runs/allocation"),
    docs: Path = report.DOCS,
) -> None:
    """Runs what the record lacks, then writes the page; fails at the end if a run did.

    Args:
      tasks: of mrpc, rte and piqa.
      seeds: all of a task by default.
      processes: runs side by side, each on a core of its own.
      minutes: begin no run after so many.
      record: the rows.
      out: folder of the runs.
      docs: folder of the page.
    """
    rows, begun = Record(record), time.monotonic()
    rows.add([plan(task) for task in tasks if not rows.find(plan=task)])
    todo = list(jobs(rows, tasks, seeds))
    cores: Queue[int] = Queue()
    for core in (sorted(os.sched_getaffinity(0)) * processes)[:processes]:
        cores.put(core)
    finished: list[Row] = []
    failed: list[str] = []
    environment = {"JAX_COMPILATION_CACHE_DIR": str((out / "compiled").resolve())} | os.environ

    def one(job: Row) -> None:
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            return
        core = cores.get()
        folder = out / f"{job['task']}-{job['seed']}-{job['method']}"
        words = [f"--{k}={v}" for k, v in {**job, "core": core, "out": folder}.items()]
        command = [sys.executable, "-m", "benchmarks.lora.allocation", "run", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        cores.put(core)
        if done.returncode:
            failed.append(str(folder))
            print(f"{folder} failed:\n{done.stderr[-2000:]}", flush=True)
            return
        row = job | json.loads((folder / "row.json").read_text(encoding="utf-8"))
        rows.add([row])
        finished.append(job)
        left = seconds_left(rows, [job for job in todo if job not in finished], "task", "method") / processes
        right = row["right"].count("1") / len(row["right"])
        name = f"{job['task']}, seed {job['seed']}, {job['method']}"
        print(
            f"{len(finished)}/{len(todo)}  {name}: {right:.1%}, {row['seconds']:.0f} s; {clock(left)} left", flush=True
        )

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(one, todo))
    if len(finished) + len(failed) < len(todo):
        print("Time is up; the same command goes on from here.")
    for path in report.write(docs, real=record):
        print(f"wrote {path}")
    if failed:
        sys.exit(f"Not in the record, for they failed: {', '.join(failed)}.")


# --- a run --------------------------------------------------------------------------------------------------------


def run(task: str, seed: int, method: str, core: int, out: Path) -> None:
    """One run, in this process, into `out/row.json`."""
    os.sched_setaffinity(0, {core})
    from methods.bench import prepare
    from methods.runfolder import RunFolder

    settings = settings_of(CASES[task], seed, method, out)
    folder = RunFolder(out, settings)
    folder.once("row", lambda: tested(settings, method, prepare(settings), folder))


def settings_of(case: Case, seed: int, method: str, out: Path) -> Any:
    """The settings of a method; dynamic's search is the first half of its training."""
    from methods.bench import Settings
    from methods.flexora import FlexoraSettings
    from methods.heterolora import HeteroLoRASettings

    rank = RANK // SHARE if method == "uniform" else RANK
    common: dict[str, Any] = {"rank": rank, "lora_alpha": SCALE * rank, "outer_batch_size": case.batch_size * 2}
    lr = case.learning_rate
    if method == "flexora":
        return case.settings(FlexoraSettings, seed, out, inner_lr=lr, outer_lr=2.0, outer_steps=20, **common)
    if method not in ("static", "dynamic"):
        return case.settings(Settings, seed, out, **common)
    common |= {"allocation": method, "shortcuts": ("none",), "search_lr": lr, "reallocations": REALLOCATIONS}
    interval = case.steps // (2 * REALLOCATIONS)
    if method == "dynamic":
        common |= {"interval": interval, "finetune_steps": case.steps - REALLOCATIONS * interval}
    else:
        common |= {"interval": 1}
    return case.settings(HeteroLoRASettings, seed, out, **common)


def tested(settings: Any, method: str, bench: Any, folder: Any) -> dict[str, Any]:
    """Allocates, trains, tests."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import bilevel
    from methods import driver, flexora, heterolora
    from methods.search_space import Space

    begun = time.perf_counter()
    model = bench.pretrained.config
    space = Space(bench.lora, None, model.site_shapes(), model.hidden_size, bench.num_layers)
    gates: Any = space.gates()
    start = None
    total = sum(cost.sum() for cost in space.costs()["lora"].values())
    rule = bilevel.allocate(total / SHARE, space.costs(), key=jax.random.key(settings.seed))
    if method == "random":
        updates, _ = rule.update(jax.tree.map(jnp.zeros_like, gates), rule.init(gates), gates)
        gates = optax.apply_updates(gates, updates)
    elif method == "flexora":
        (search,) = flexora.searches(settings, bench)
        alpha = driver.search(search, folder).history["alpha"][-1]
        chosen = np.isin(np.arange(bench.num_layers), flexora.select(alpha, bench.num_layers // SHARE))
        gates = jax.tree.map(lambda gate: jnp.asarray(chosen, gate.dtype), gates)
    elif method != "uniform":
        (search,) = heterolora.searches(settings, bench)
        solver = dataclasses.replace(search.solver, outer_optimizer=rule)
        found = driver.search(search._replace(solver=solver), folder)
        gates, start = found.outer, found.inner.params if method == "dynamic" else None
    searched = time.perf_counter() - begun
    of = heterolora.problem(bench.given(), space)
    row = driver.row(heterolora.allocated(settings, bench, space, of, method, gates, start), bench, folder)
    return {
        "right": "".join("01"[int(r)] for r in row["right"]),
        "metrics": row["metrics"],
        "parameters": row["parameters"],
        "on": row["on"],
        "search_seconds": searched,
        "seconds": time.perf_counter() - begun,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        tyro.cli(run, args=sys.argv[2:])
    else:
        tyro.cli(main, description=__doc__)
