"""Optuna joined with hypergradients, on ijcnn1: what has no gradient by trials, the regularisation weights by descent.

    python benchmarks/solvers/joined.py              # ten seeds, into records/joined.json

Each trial trains from the benchmark's start: `Nested` with `Unrolled`, of which Optuna's TPE draws the inner steps, the
inner optimizer and its rate, and the batch size; Adam moves the 22 weights, TRIAL_STEPS times. A median pruner ends
trials by `bilevel.OptunaPruning`. The value of a trial is the outer loss on all outer data at its end.

Calls are counted as in the benchmark: those of 64 rows, gradients of both losses as `gradient_calls`, with the products
with second derivatives as `oracle_calls`; the value of a trial is one call on all outer rows; pruned trials and trials
that diverged count too. What is measured is the best trial so far, by the data set's own `value_func`, outside of the
counts; and the record tells at how many calls it came to what Optuna alone had reached (records/ijcnn1/Optuna.json).
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import optax
import optuna
from benchmark_utils.adapter import UNIT, result
from benchmark_utils.loading import Modules
from record import write
from report import joined_table as table  # noqa: F401 (the table of the page)

import bilevel
from bilevel.extend import Calls

HERE = Path(__file__).parent
ALONE, RECORD = HERE / "records" / "ijcnn1" / "Optuna.json", HERE / "records" / "joined.json"
TRIALS, TRIAL_STEPS, EVERY = 12, 200, 20
OUTER_RATE = 0.1
OPTIMIZERS = {"sgd": optax.sgd, "momentum": lambda rate: optax.sgd(rate, momentum=0.9)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with Modules(HERE) as modules:
        data = modules.load("datasets", "ijcnn1").Dataset.get_instance().get_data()
    alone = json.loads(ALONE.read_text())
    target, calls = alone["metrics"]["value_func"]["median"][-1], alone["gradient_calls"][-1]
    curves = []
    for seed in range(args.seeds):
        curves.append(studied(data, seed))
        print(f"seed {seed}: {curves[-1][-1]}", flush=True)
    write(args.out, summary(curves, target, calls))


def studied(data, seed: int) -> list[dict]:
    """One row for each trial: how it ended, the calls so far, and the measured value of the best trial so far."""
    sampler, pruner = optuna.samplers.TPESampler(seed=seed), optuna.pruners.MedianPruner(n_startup_trials=3)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    counts, rows = np.zeros(len(Calls._fields)), []
    best = data["problem"].start_outer(jax.random.key(0))
    for number in range(TRIALS):
        trial = study.ask()
        try:
            value, outer = tried(trial, data, jax.random.key(seed), counts)
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        except FloatingPointError:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)
            if study.best_trial.number == number:
                best = outer
        told = result(None, best, counts, number + 1)["counts"]
        rows.append({
            "state": study.trials[number].state.name.lower(),
            "params": trial.params,
            "gradient_calls": round(told["gradient_calls"], 1),
            "oracle_calls": round(told["oracle_calls"], 1),
            "value_func": float(f"{data['metrics'](np.zeros(22), best)['value_func']:.4g}"),
        })  # fmt: skip
    return rows


def tried(trial, data, key, counts):
    """`(outer loss on all outer data, outer variable)` of a trial, whose calls are added to `counts`."""
    steps = trial.suggest_categorical("inner_steps", [1, 3, 10, 30])
    optimizer = OPTIMIZERS[trial.suggest_categorical("optimizer", list(OPTIMIZERS))]
    rate = trial.suggest_float("inner_rate", 0.01, 1.0, log=True)
    size = trial.suggest_categorical("batch_size", [16, 64, 256])
    # As the benchmark counts UD: the backward pass takes one product with H and one with C an inner step.
    one = np.array(Calls(steps, 1, steps, steps)) * size / UNIT
    done = 0

    def count(step, state, metrics):
        nonlocal done
        done = step

    solver = bilevel.Nested(data["problem"], bilevel.Unrolled(optimizer(rate), steps), optax.adam(OUTER_RATE))
    try:
        found = bilevel.run(
            solver,
            inner_data=bilevel.Batches(data["inner"], size, order="blocks"),
            outer_data=bilevel.Batches(data["outer"], size, order="blocks"),
            steps=TRIAL_STEPS,
            key=key,
            progress=False,
            callbacks=[count, bilevel.OptunaPruning(trial, every=EVERY)],
            callback_every=EVERY,
        )
    except FloatingPointError:
        done = min(done + EVERY, TRIAL_STEPS)  # of the steps that have failed no row is told
        raise
    finally:
        counts += one * done
    outer_rows = len(data["outer"]["y"])
    counts += np.array(Calls(0, 1)) * outer_rows / UNIT
    everything = bilevel.FullBatch(data["outer"])
    value = data["problem"].outer_value(found.inner.params, found.outer, everything, jax.random.key(0))[0]
    return float(value), found.outer


def summary(curves: list[list[dict]], target: float, calls: float) -> dict:
    """The record: medians and worst cases over seeds of the calls at which the target was reached, and all trials."""
    reached = {
        name: [next((row[name] for row in curve if row["value_func"] <= target), None) for curve in curves]
        for name in ("gradient_calls", "oracle_calls")
    }
    last = [curve[-1] for curve in curves]
    return {
        "command": "python benchmarks/solvers/joined.py",
        "seeds": len(curves),
        "trials": TRIALS,
        "alone": {"value_func": target, "gradient_calls": calls},
        "reached": {
            name: {"median": float(np.median(n)), "most": max(n)} if None not in n else None
            for name, n in reached.items()
        },
        "end": {
            name: float(f"{np.median([row[name] for row in last]):.4g}")
            for name in ("value_func", "gradient_calls", "oracle_calls")
        },
        "pruned": sum(row["state"] == "pruned" for curve in curves for row in curve),
        "failed": sum(row["state"] == "fail" for curve in curves for row in curve),
        "curves": curves,
    }


if __name__ == "__main__":
    main()
