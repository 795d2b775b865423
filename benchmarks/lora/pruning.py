r"""FineGates: what counted removed weights cost in accuracy, and what the sliced model saves in time.

For each number of training rows, seed and target: gates trained as `methods.finegates` does, against gates closed by
the weights' magnitude (smallest norm of what a gate would remove, the same share in every layer and structure) with the
same biases trained, and against LoRA on the dense model at the rank whose parameters are nearest to those of biases and
gates.
Then the forward time of the sliced and the dense model, batch 1 and 32, in one run, alternating.

    python -m benchmarks.lora.pruning --task sst2       # resumable
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.lora import low_data
from methods import driver, finegates
from methods import lora as plain
from methods.adapters import gates, slicing
from methods.bench import Bench
from methods.finegates import FineGatesSettings
from methods.runfolder import RunFolder


@dataclasses.dataclass(frozen=True)
class Setup(low_data.Setup):
    """What is compared, and how.

    Attributes:
      rows: numbers of training rows.
      targets: shares of gates to close.
      outer: the level of `methods.finegates` that is tried.
      repeats: timed calls of each model.
    """

    task: str = "sst2"
    out: Path = Path("runs/pruning")
    seeds: int = 3
    rows: tuple[int, ...] = (100, 1000)
    targets: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6)
    outer: finegates.Outer = "none"
    repeats: int = 20


def magnitude(bench: Bench, structures: dict[str, gates.Structure], share: float) -> dict[str, jax.Array]:
    """Gates, open or closed, by the norm of the weights that each would remove."""
    blocks, config = bench.pretrained.weights["blocks"], bench.pretrained.config
    square = {site: np.asarray(blocks[site]["kernel"]) ** 2 for site in config.site_shapes()}
    rows = {site: values.sum(axis=1) for site, values in square.items()}
    columns = {site: values.sum(axis=2) for site, values in square.items()}

    def summed(name: str, factors: np.ndarray) -> np.ndarray:
        """What the gates of a structure share, added up: the transpose of `Structure.expand`."""
        structure = structures[name]
        zeros = jnp.zeros((factors.shape[0], structure.size))
        _, transpose = jax.vjp(jax.vmap(structure.expand), zeros)
        return np.asarray(transpose(jnp.asarray(factors, zeros.dtype))[0])

    groups, size = config.num_kv_heads, config.head_dim
    pairs = rows["k_proj"].reshape(-1, groups, 2, size // 2).sum(axis=2).reshape(-1, groups * size // 2)
    scores = {
        "ffn": rows["up_proj"] + rows.get("gate_proj", 0) + columns["down_proj"],
        "value": summed("value", columns["o_proj"]) + rows["v_proj"],
    }
    if "query_key" in structures:
        scores["query_key"] = summed("query_key", rows["q_proj"]) + pairs
    closed = {}
    for name, score in scores.items():
        rank = np.argsort(np.argsort(score, axis=1), axis=1)
        closed[name] = jnp.where(rank < round(share * score.shape[1]), -2.0, 2.0)
    return closed


def settings_of(setup: Setup, rows: int, seed: int) -> FineGatesSettings:
    """One run's settings."""
    base = setup.settings(FineGatesSettings, f"{setup.task}-{rows}-{setup.outer}", rows, seed)
    return dataclasses.replace(base, outer=setup.outer, target_sparsity=setup.targets)


def one(setup: Setup, rows: int, seed: int, jobs: low_data.Jobs) -> dict[str, dict[str, Any]]:
    """One number of rows and one seed: a row for each arm and target."""
    settings = settings_of(setup, rows, seed)
    bench = finegates.COMMAND.prepare(settings)
    folder = RunFolder(settings.out, settings)
    structures = finegates.structures(settings, bench)
    found = {}
    for target in setup.targets:

        def gated(target=target):
            only = dataclasses.replace(settings, target_sparsity=(target,))
            searched = [driver.search(each, folder) for each in finegates.searches(only, bench)]
            _, arm = finegates.choose(only, bench, searched, driver.trying(bench, folder)).arms
            return driver.row(arm, bench, folder)

        def by_magnitude(target=target):
            values = magnitude(bench, structures, target)
            frozen = dataclasses.replace(settings, outer="gates")
            of = finegates.of(frozen, bench, target)
            outer = of.start_outer(jax.random.key(seed)) | {"gates": values}
            arm = finegates.gated(frozen, bench, of, outer, target)
            return driver.row(arm._replace(name=f"magnitude-{target:g}"), bench, folder)

        found[f"finegates {target:g}"] = jobs.once(folder, f"results/sparsity-{target:g}", gated)
        found[f"magnitude {target:g}"] = jobs.once(folder, f"results/magnitude-{target:g}", by_magnitude)

    budget = next(iter(found.values()))["parameters"]
    control = plain.control(settings, bench, parameters_of=budget)
    dense = jobs.once(folder, "results/lora", partial(driver.row, control, bench, folder))
    found["lora"] = {"removed": 0.0} | dense
    return {arm: {name: row[name] for name in ("metrics", "removed")} for arm, row in found.items()}


def timing(setup: Setup, bench: Bench) -> list[dict[str, float]]:
    """Median seconds of a forward pass, dense and sliced by magnitude, `repeats` alternating calls each."""
    pretrained, structures = bench.pretrained, gates.tied(bench.pretrained.config)
    rows = []
    for target in setup.targets:
        values = magnitude(bench, structures, target)
        small, weights = slicing.cut(pretrained.model, pretrained.weights, values, structures)
        removed = slicing.removed(values, structures, "stg", pretrained.config)
        for batch in (1, 32):
            tokens = jnp.ones((batch, setup.length), jnp.int32)
            calls = {
                "dense": (
                    jax.jit(lambda w, t: pretrained.model.apply({"params": w}, t, method="features")),
                    pretrained.weights,
                ),
                "sliced": (
                    jax.jit(lambda w, t, small=small: small.apply({"params": w}, t, method="features")),
                    weights,
                ),
            }
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for repeat in range(setup.repeats + 2):
                for name, (call, parameters) in calls.items():
                    begun = time.perf_counter()
                    jax.block_until_ready(call(parameters, tokens))
                    if repeat > 1:  # the first compiles, the second warms up
                        seconds[name].append(time.perf_counter() - begun)
            medians = {name: float(np.median(values)) for name, values in seconds.items()}
            rows.append({"target": target, "removed": removed, "batch": batch, **medians})
    return rows


def main(setup: Setup) -> None:
    """All runs and the timing, then the record and the page."""
    jobs = low_data.Jobs((2 * len(setup.targets) + 1) * len(setup.rows) * setup.seeds)
    runs = [{str(rows): one(setup, rows, seed, jobs) for rows in setup.rows} for seed in range(setup.seeds)]
    times = timing(setup, finegates.COMMAND.prepare(settings_of(setup, setup.rows[0], 0)))
    setup.finish(f"pruning-{setup.outer}-{setup.task}", runs, times=times)


if __name__ == "__main__":
    main(tyro.cli(Setup, description=__doc__))
