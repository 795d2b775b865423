"""Seconds an iteration against benchmark_bilevel's solvers, on the same losses, data and batch size, in one process.

    python benchmarks/solvers/speed.py folder [--data ijcnn1 mnist] [--solvers SOBA SABA] [--repeats 20]

`folder` is a clone of https://github.com/benchopt/benchmark_bilevel. Its solvers run through its own `one_epoch`, ours
through the loop of `bilevel.run`; both are compiled before, and waited for before the clock stops. They take turns of
`--iterations` iterations; the ratio is that of the medians, below 1 where ours is faster. Figures go to
records/speed.json.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_utils.loading import Modules
from rich.console import Console
from rich.table import Table

from bilevel.extend import chunk

HERE = Path(__file__).parent
RECORD = HERE / "records" / "speed.json"
PEERS = {
    "SOBA": {},
    "SABA": {},
    "SRBA": {"period_frac": 0.5},
    "AmIGO": {},
    "StocBiO": {},
    "BSA": {},
    "TTSA": {},
    "FSLA": {},
    "MRBO": {},
    "VRBO": {"period_frac": 0.5},
    "SUSTAIN": {},
    "F2SA": {},
}
"""Solvers that both have, with settings that are not defaults of both."""
SETTINGS = {"ijcnn1": {"step_size": 0.03}, "mnist": {"step_size": 0.01, "outer_ratio": 1e-3}}
"""Small steps: a solver that diverges computes with NaNs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", nargs="+", default=["ijcnn1", "mnist"])
    parser.add_argument("--solvers", nargs="+", default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--iterations", type=int, default=512)
    args = parser.parse_args()
    with Modules(args.folder) as modules:
        peers = {name: modules.load("solvers", name.lower()).Solver for name in args.solvers}
    table = Table("data", "solver", "benchmark_bilevel, us", "bilevel, us", "ratio", title="An iteration")
    record = []
    with Modules(HERE) as modules:
        for name in args.data:
            data = modules.load("datasets", name).Dataset.get_instance().get_data()
            for solver in args.solvers:
                settings = SETTINGS[name] | PEERS[solver]
                theirs = peer(peers[solver], data, settings, args.iterations)
                ours = own(modules.load("solvers", solver.lower()).Solver, data, settings, args.iterations)
                a, b = (1e6 * seconds / args.iterations for seconds in medians([theirs, ours], args.repeats))
                print(f"{name} {solver}: {a:.1f} us, {b:.1f} us, ratio {b / a:.2f}", flush=True)
                record.append({"data": name, "solver": solver, "theirs": a, "ours": b, "ratio": b / a})
                table.add_row(name, solver, f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}")
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text("[\n" + ",\n".join(json.dumps(row) for row in record) + "\n]\n")
    Console().print(table)


def peer(solver_class, data, settings, iterations):
    """A function that runs `iterations` of a solver of benchmark_bilevel."""
    problem, key = data["problem"], jax.random.key(0)
    outer = problem.start_outer(key)
    inner = problem.start_inner(key, outer)
    shape = inner.shape

    def oracle(loss, arrays):
        def function(z, x, start=0, batch_size=1):
            batch = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, batch_size), arrays)
            return loss(z.reshape(shape), x, batch, None)

        return jax.jit(function, static_argnames="batch_size")

    solver = solver_class.get_instance(**settings)
    solver.run_once = lambda *_: None  # its warm-up is that of benchopt's runner; ours follows
    losses = oracle(problem.inner_loss, data["inner"]), oracle(problem.outer_loss, data["outer"])
    rows = (len(jax.tree.leaves(data[side])[0]) for side in ("inner", "outer"))
    solver.set_objective(*losses, *rows, inner.ravel(), outer)
    carry = solver.init()
    done = 0

    def turn():
        nonlocal carry, done
        if solver.name == "SABA":  # its tables are an argument of their own
            memory, rest = carry
            carry = solver.one_epoch(rest, memory, iterations)
        elif solver.name in ("SRBA", "VRBO"):  # these count iterations on the host
            carry = solver.one_epoch(carry, iterations, done)
        else:
            carry = solver.one_epoch(carry, iterations)
        done += iterations
        return carry

    return turn


def own(solver_class, data, settings, iterations):
    """A function that runs `iterations` of our solver, in the loop of `bilevel.run`."""
    solver = solver_class.get_instance(**settings)
    solver.set_objective(data["problem"], data["inner"], data["outer"])
    keys = jax.random.split(jax.random.key(0), 3)
    feeds = [(solver.data[f"{side}_data"], key) for side, key in zip(("inner", "outer"), keys[1:], strict=True)]
    state = solver.solver.init(keys[0])

    def turn():
        nonlocal state
        state, _, _ = chunk(solver.solver, None, iterations, state, feeds, iterations)
        return state

    return turn


def medians(turns, repeats):
    """Median seconds of each, the first turn of each left out."""
    seconds = [[] for _ in turns]
    for repeat in range(repeats + 1):
        for turn, times in zip(turns, seconds, strict=True):
            begun = time.perf_counter()
            state = jax.block_until_ready(turn())
            if repeat:
                times.append(time.perf_counter() - begun)
    finite = [np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    if not all(finite):
        raise FloatingPointError("A solver diverged, and NaNs are not timed: lower the step sizes in SETTINGS.")
    return [float(np.median(times)) for times in seconds]


if __name__ == "__main__":
    main()
