"""Runs solvers on data sets and keeps what they reached, and when, in records/<data>/<label>.json.

    python benchmarks/solvers/record.py                               # the named subset on quadratic, ijcnn1 and mnist
    python benchmarks/solvers/record.py --data all --labels all       # or data sets and labels of RUNS

A run whose record is there is left alone, so that an interrupted command is continued by repeating it. All seeds of a
run go side by side through one compiled program, but for solvers that keep tables; the clock is that of one seed alone,
after compilation, the device waited for. Every run stops after the same oracle calls, BUDGET of its data set, in
mini-batches of 64 rows, and is measured at POINTS numbers of iterations on a logarithmic scale.
"""

import argparse
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_utils.adapter import result
from benchmark_utils.loading import Modules
from benchmark_utils.runs import BUDGET, DATA, RUNS, SUBSET

from bilevel.extend import CAPACITY, Calls, chunk

HERE = Path(__file__).parent
RECORDS = HERE / "records"
POINTS, TRIALS = 11, 40
COUNTS = {"calls": "oracle_calls", "gradient_calls": "gradient_calls"}
"""Horizontal axis in a record -> its name in a result."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["quadratic", "ijcnn1", "mnist"], choices=["all", *RUNS])
    parser.add_argument("--labels", nargs="+", default=SUBSET, help="labels of RUNS, or all")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--budget", type=float, default=1.0, help="factor of BUDGET")
    args = parser.parse_args()
    with Modules(HERE) as modules:
        for name in RUNS if "all" in args.data else args.data:
            wanted = [label for label in RUNS[name] if args.labels == ["all"] or label in args.labels]
            wanted = [label for label in wanted if not path(args.out, name, label).exists()]
            if not wanted:
                continue
            data_file, parameters = DATA[name]
            data = modules.load("datasets", data_file).Dataset.get_instance(**parameters).get_data()
            for label in wanted:
                file, settings = RUNS[name][label]
                begun = time.perf_counter()
                solver = modules.load("solvers", file).Solver.get_instance(**settings)
                run = run_optuna if file == "optuna" else run_seeds
                found = run(solver, data, args.seeds, BUDGET[name] * args.budget)
                write(path(args.out, name, label), {"settings": settings, "seeds": args.seeds} | found)
                print(f"{name}, {label}: {time.perf_counter() - begun:.0f} s", flush=True)


def path(folder: Path, data: str, label: str) -> Path:
    return folder / data / f"{label.replace(' ', '_').replace('/', '_')}.json"


def run_seeds(solver, data, seeds, budget):
    """The record of a solver that `bilevel.run` takes."""
    solver.set_objective(data["problem"], data["inner"], data["outer"])
    keys = [jax.random.split(jax.random.key(seed), 3) for seed in range(seeds)]  # as `bilevel.run` splits them
    period = getattr(solver.solver, "period", 1)  # full passes come once in so many iterations
    last = max(1, round(budget * period / Group(solver, keys[:1]).advance(period).sum()))
    points = [0, *sorted({round(n) for n in np.geomspace(1, last, POINTS)})]
    apart = solver.name == "SABA"  # many tables at once would be copied at every step
    groups = [keys[i : i + 1] for i in range(seeds)] if apart else [keys]
    curves = [curve for group in groups for curve in measured(solver, data["metrics"], group, points)]
    seconds = clock(Group(solver, keys[:1]), last)
    medians = {name: np.median([[row[name] for row in curve] for curve in curves], 0) for name in COUNTS.values()}
    counts = {short: [round(float(n), 1) for n in medians[name]] for short, name in COUNTS.items()}
    times = {"seconds": [float(f"{seconds * n:.4g}") for n in points]}
    return {"steps": points, **counts, **times, "metrics": quartiles(curves)}


class Group:
    """Seeds that go side by side through one program; one seed alone is compiled as `bilevel.run` compiles it.

    The iteration number has no axis: all share it, so that a branch on it stays a branch.
    """

    def __init__(self, solver, keys):
        self.solver, self.count = solver, len(keys)
        self.sources = solver.data["inner_data"], solver.data["outer_data"]
        first, *self.feeds = (jnp.stack(column) for column in zip(*keys, strict=True))
        if self.count == 1:
            first, *self.feeds = first[0], *(keys[0] for keys in self.feeds)
            self.states = solver.solver.init(first)
        else:
            states = jax.jit(jax.vmap(lambda solver, key: solver.init(key), in_axes=(None, 0)))(solver.solver, first)
            self.states = states._replace(step=jnp.zeros((), jnp.int32))

    def advance(self, steps):
        """Takes `steps` iterations, waits for them, and returns their oracle calls `[seeds, 4]`."""
        program, totals = _alone if self.count == 1 else _together, {}
        for done in range(0, steps, CAPACITY):
            now = min(steps - done, CAPACITY)
            self.states, sums = program(self.solver.solver, self.sources, self.states, self.feeds, now)
            totals = {name: totals.get(name, 0) + np.atleast_1d(np.asarray(n, np.float64)) for name, n in sums.items()}
        jax.block_until_ready(self.states)
        rows = [
            {"outer_loss": np.zeros(steps)} | {n: t[i : i + 1] for n, t in totals.items()} for i in range(self.count)
        ]
        return np.array([self.solver.count(row) * self.solver.weights for row in rows])

    def variables(self):
        """`(inner, outer)` of each seed."""
        pair = self.states.inner.params, self.states.outer
        return [pair] if self.count == 1 else [jax.tree.map(lambda x, i=i: x[i], pair) for i in range(self.count)]


@jax.jit
def _alone(solver, sources, state, keys, count):
    state, rows, _ = chunk(solver, None, CAPACITY, state, list(zip(sources, keys, strict=True)), count)
    live = jnp.arange(CAPACITY) < count
    return state, {n: jnp.sum(jnp.where(live, r, 0)) for n, r in rows.items() if jnp.issubdtype(r.dtype, jnp.integer)}


@jax.jit
def _together(solver, sources, states, keys, count):
    axes = jax.tree.map(lambda _: 0, states)._replace(step=None)
    one = lambda state, keys: _alone(solver, sources, state, keys, count)  # noqa: E731
    return jax.vmap(one, in_axes=(axes, 0), out_axes=(axes, 0))(states, keys)


def measured(solver, metrics, keys, points):
    """For each seed, counts and metrics at each of the points, of which the first is 0."""
    group = Group(solver, keys)
    curves, counts = [[] for _ in keys], np.zeros((len(keys), 4))
    for before, point in zip([0, *points], points, strict=False):
        if point > before:
            counts += group.advance(point - before)
        for curve, calls, (inner, outer) in zip(curves, counts, group.variables(), strict=True):
            finite = all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves((inner, outer)))
            curve.append(result(inner, outer, calls, point)["counts"] | (metrics(inner, outer) if finite else {}))
    return curves


def clock(group, steps):
    """Seconds an iteration, over at most `steps` of them and about a second."""
    group.advance(1)  # compiles
    done, seconds = 0, 0.0
    while done < steps and seconds < 1.0:
        now = min(steps - done, CAPACITY if done else 16)
        begun = time.perf_counter()
        group.advance(now)
        seconds, done = seconds + time.perf_counter() - begun, done + now
    return seconds / done


def run_optuna(solver, data, seeds, budget):
    """The record of Optuna, which has a loop of its own; it stops at the budget, or after TRIALS."""
    curves = []
    for seed in range(seeds):
        solver.seed = seed
        solver.set_objective(data["problem"], data["inner"], data["outer"])
        solver.warm_up()
        curve, gone, begun = [], 0.0, time.perf_counter()

        def callback(curve=curve):
            nonlocal gone, begun
            gone += time.perf_counter() - begun
            found = solver.get_result()
            curve.append(found["counts"] | {"seconds": gone} | data["metrics"](found["inner"], found["outer"]))
            begun = time.perf_counter()
            return found["counts"]["oracle_calls"] < budget and len(curve) <= TRIALS

        solver.run(callback)
        curves.append(curve)
    length = min(map(len, curves))
    curves = [curve[:length] for curve in curves]
    medians = {name: np.median([[row[name] for row in c] for c in curves], 0) for name in [*COUNTS.values(), "seconds"]}
    axes = {
        short: [float(f"{n:.4g}") for n in medians[name]] for short, name in (COUNTS | {"seconds": "seconds"}).items()
    }
    return {"steps": list(range(length)), **axes, "metrics": quartiles(curves)}


def quartiles(curves):
    """`{metric: {"low", "median", "high"}}` over seeds; None where a seed has diverged."""
    counted = {*Calls._fields, *COUNTS.values(), "steps", "seconds"}
    found = {}
    for name in [name for name in curves[0][0] if name not in counted]:
        table = np.array([[row.get(name, np.inf) for row in curve] for curve in curves])
        levels = np.quantile(table, [0.25, 0.5, 0.75], axis=0, method="nearest")
        rounded = [[float(f"{x:.4g}") if np.isfinite(x) else None for x in level] for level in levels]
        found[name] = dict(zip(("low", "median", "high"), rounded, strict=True))
    return found


def write(file: Path, record) -> None:
    """All or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record) + "\n")
    os.replace(unfinished, file)


if __name__ == "__main__":
    main()
