"""Twenty weight decays: one training that learns them, beside searches that train anew for every guess.

    python -m benchmarks.search              # ten seeds, into benchmarks/search.jsonl; repeat it to go on

The problem is the one of the page *First problem*: a regression on twenty features of which three matter, and a
log weight decay for each. Four ways look for decays whose training has a small validation loss:

- bilevel: `Nested` with `Unrolled`, five inner steps before each outer step, one training that goes on throughout;
- a grid of one decay for all features;
- random search, and Optuna's TPE, over a decay for each feature.

What a way has found is judged alike: train from the start with these decays, and take the loss on the validation rows,
and on test rows that no way sees. The price is in *trainings*: operations, counted in the traced programs, over those
of one training and its validation loss. That of bilevel contains the training by which it is judged.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import bilevel
from benchmarks.record import Record, Row
from bilevel.extend import flops

RECORD = Path(__file__).with_suffix(".jsonl")
FIGURE = "search.png"
FEATURES, MATTER, TRAIN, VALIDATION, TEST = 20, 3, 40, 200, 4000
STEPS, RATE = 200, 0.02
"""Of one training: full batches, Adam."""
UNROLL, OUTER_STEPS, OUTER_RATE, START = 5, 100, 0.2, -3.0
LOW, HIGH = -7.0, 3.0
"""The box of log decays in which the others look."""
GRIDS, RANDOM, TPE = (2, 4, 8, 16, 32), 4096, 512
WAYS = {
    "bilevel": "bilevel, a decay for each feature",
    "grid": "grid, one decay for all",
    "random": "random search, a decay for each",
    "tpe": "Optuna's TPE, a decay for each",
}

Judge = Callable[[Any], tuple[np.ndarray, np.ndarray]]
Data = tuple[jax.Array, jax.Array]


def drawn(seed: int) -> tuple[Data, Data, Data]:
    """Training, validation and test rows."""
    data_key, noise_key = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(data_key, (TRAIN + VALIDATION + TEST, FEATURES))
    y = x[:, :MATTER].sum(axis=1) + jax.random.normal(noise_key, (len(x),))
    cuts = (0, TRAIN, TRAIN + VALIDATION, len(x))
    first, second, third = ((x[a:b], y[a:b]) for a, b in itertools.pairwise(cuts))
    return first, second, third


def val_loss(w, log_decay, batch, key):
    """The mean squared error."""
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


def train_loss(w, log_decay, batch, key):
    """The same, and the decays' penalty."""
    return val_loss(w, log_decay, batch, key) + jnp.sum(jnp.exp(log_decay) * w**2)


def problem() -> bilevel.Problem:
    """From w = 0, and every decay at exp(START)."""
    return bilevel.Problem(
        train_loss, val_loss, lambda key, log_decay: jnp.zeros(FEATURES), lambda key: jnp.full(FEATURES, START)
    )


def descent() -> bilevel.Nested:
    """What the first page runs."""
    return bilevel.Nested(problem(), bilevel.Unrolled(optax.adam(RATE), steps=UNROLL), optax.adam(OUTER_RATE))


def trained(log_decay, train: Data) -> Any:
    """w after a training from the start."""
    optimizer = optax.adam(RATE)

    def step(carry, _):
        w, state = carry
        updates, state = optimizer.update(jax.grad(train_loss)(w, log_decay, train, None), state)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.zeros(FEATURES)
    return jax.lax.scan(step, (w, optimizer.init(w)), None, length=STEPS)[0][0]


def judge(train: Data, validation: Data, test: Data) -> Judge:
    """A function from `[n, FEATURES]` log decays to the validation and the test loss of their trainings."""

    @jax.jit
    @jax.vmap
    def losses(log_decay):
        w = trained(log_decay, train)
        return val_loss(w, None, validation, None), val_loss(w, None, test, None)

    def judged(log_decays):
        validation, test = losses(jnp.asarray(log_decays, jnp.float32))
        return np.asarray(validation, np.float64), np.asarray(test, np.float64)

    return judged


def best_so_far(losses: tuple[np.ndarray, np.ndarray], at: list[int]) -> tuple[list[float], list[float]]:
    """The validation loss of the best of the first n trainings, for each n of `at`, and its test loss."""
    best = [int(losses[0][:n].argmin()) for n in at]
    return losses[0][best].tolist(), losses[1][best].tolist()


def powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def by_grid(seed: int, data: tuple[Data, Data, Data]) -> Row:
    """The best of n equally spaced decays, for each n of GRIDS."""
    found = []
    for n in GRIDS:
        guesses = np.linspace(LOW, HIGH, n)[:, None] * np.ones(FEATURES)
        validation, test = best_so_far(judge(*data)(guesses), [n])
        found.append((n, validation[0], test[0]))
    trainings, validation, test = map(list, zip(*found, strict=True))
    return {"trainings": trainings, "validation": validation, "test": test}


def by_random(seed: int, data: tuple[Data, Data, Data]) -> Row:
    """The best of the first n uniform draws from the box."""
    guesses = np.random.default_rng(seed).uniform(LOW, HIGH, (RANDOM, FEATURES))
    at = powers(RANDOM)
    validation, test = best_so_far(judge(*data)(guesses), at)
    return {"trainings": at, "validation": validation, "test": test}


def by_tpe(seed: int, data: tuple[Data, Data, Data]) -> Row:
    """Optuna with its default sampler, which guesses by what it has seen."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study, losses, told = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed)), judge(*data), []
    for _ in range(TPE):
        trial = study.ask()
        guess = [trial.suggest_float(f"feature {i}", LOW, HIGH) for i in range(FEATURES)]
        validation, test = losses(np.array([guess]))
        told.append((validation[0], test[0]))
        study.tell(trial, validation[0])
    at = powers(TPE)
    validation, test = best_so_far((np.array(told)[:, 0], np.array(told)[:, 1]), at)
    return {"trainings": at, "validation": validation, "test": test}


def by_bilevel(seed: int, data: tuple[Data, Data, Data]) -> Row:
    """One run, judged after each twentieth of its outer steps."""
    train, validation, _ = data
    solver = descent()
    outers, at = [np.full(FEATURES, START)], [0]

    def keep(step, state, metrics):
        outers.append(np.asarray(state.outer))
        at.append(step)

    bilevel.run(
        solver,
        inner_data=train,
        outer_data=validation,
        steps=OUTER_STEPS,
        progress=False,
        callbacks=[keep],
        callback_every=max(1, OUTER_STEPS // 20),
    )
    losses = judge(*data)(np.array(outers))
    price = outer_step_price(train, validation)
    return {
        "trainings": [1 + step * price for step in at],
        "outer_steps": at,
        "validation": losses[0].tolist(),
        "test": losses[1].tolist(),
    }


def outer_step_price(train: Data, validation: Data) -> float:
    """Operations of one outer step of bilevel over those of one training and its validation loss."""
    solver = descent()
    batches = bilevel.FullBatch(train), bilevel.FullBatch(validation)
    step = flops(lambda state: solver.step(state, *batches), solver.init(jax.random.key(0)))
    whole = lambda log_decay: val_loss(trained(log_decay, train), None, validation, None)  # noqa: E731
    return step / flops(whole, jnp.zeros(FEATURES))


FINDERS = {"bilevel": by_bilevel, "grid": by_grid, "random": by_random, "tpe": by_tpe}


def measured(record: Record, seeds: int) -> Iterator[Row]:
    """A row for each way and seed that is not in the record."""
    for seed in range(seeds):
        for way, find in FINDERS.items():
            if not record.find(way=way, seed=seed):
                yield {"section": "search", "seed": seed, "way": way} | find(seed, drawn(seed))


# --- what the record says -------------------------------------------------------------------------------------------


def curves(record: Record, way: str, of: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of trainings, and quartiles `[3, points]` of a loss over the seeds."""
    rows = record.find(way=way)
    return np.array(rows[0]["trainings"]), np.quantile([row[of] for row in rows], [0.25, 0.5, 0.75], axis=0)


def reached(record: Record, way: str) -> list[int | None]:
    """For each seed, after how many trainings a way had the validation loss at which bilevel ended; None: never."""
    found = []
    for row in record.find(way=way):
        (own,) = record.find(way="bilevel", seed=row["seed"])
        pairs = zip(row["trainings"], row["validation"], strict=True)
        found.append(next((n for n, loss in pairs if loss <= own["validation"][-1]), None))
    return found


def sentence(record: Record) -> str:
    """The headline: what one run costs and reaches, and what the others reach with all of their trainings."""
    seeds = len(record.find(way="bilevel"))
    price = curves(record, "bilevel", "validation")[0][-1]
    ends = {of: {way: curves(record, way, of)[1][1, -1] for way in WAYS} for of in ("validation", "test")}
    last = {way: f"{curves(record, way, 'validation')[0][-1]:,.0f}" for way in WAYS}

    def told(of: str) -> str:
        end = ends[of]
        return (
            f"{end['bilevel']:.2f} by the run, {end['grid']:.2f} by the best of {last['grid']} values of one decay for "
            f"all, {end['random']:.2f} by the best of {last['random']} random trainings, {end['tpe']:.2f} by Optuna's "
            f"TPE after {last['tpe']}"
        )

    there = {way: sum(each is not None for each in reached(record, way)) for way in ("random", "tpe")}
    return (
        f"The run costs what {price:.1f} trainings cost. Validation loss: {told('validation')}. Test loss: "
        f"{told('test')}. (Medians of {seeds} seeds.) The validation loss at which the run ends is reached by random "
        f"search in {there['random']} and by TPE in {there['tpe']} of {seeds} seeds."
    )


def table(record: Record) -> str:
    """What each way reaches, for all that it spent: the table of the home page."""
    seeds = len(record.find(way="bilevel"))
    head = ("", "price, in trainings", "validation loss", "test loss", "as good as the run")
    lines = [f"| {' | '.join(head)} |", "|---|---:|---:|---:|---:|"]
    for way, name in WAYS.items():
        price, validation = curves(record, way, "validation")
        there = sum(each is not None for each in reached(record, way))
        good = "" if way == "bilevel" else f"{there} of {seeds} seeds"
        losses = f"{validation[1, -1]:.2f} | {curves(record, way, 'test')[1][1, -1]:.2f}"
        price = f"{price[-1]:.1f}" if way == "bilevel" else f"{price[-1]:,.0f}"
        lines.append(f"| {name} | {price} | {losses} | {good} |")
    return "\n".join(lines)


def draw(record: Record, file: Path) -> None:
    """Validation and test loss against the number of trainings."""
    style = {"bilevel": ("#c8553d", "o"), "grid": ("#7a7a7a", "D"), "random": ("#2a6f97", "s"), "tpe": ("#3d8361", "^")}
    with plt.rc_context({"font.size": 10}):
        figure, axes = plt.subplots(1, 2, figsize=(8, 3.7), sharey=True, layout="constrained")
        for axis, (of, title) in zip(axes, {"validation": "validation loss", "test": "test loss"}.items(), strict=True):
            for way, name in WAYS.items():
                colour, marker = style[way]
                trainings, (low, middle, high) = curves(record, way, of)
                axis.plot(trainings, middle, color=colour, marker=marker, ms=3.5, lw=1.6, label=name)
                axis.fill_between(trainings, low, high, color=colour, alpha=0.15, lw=0)
            axis.set(title=title, xscale="log", xlabel="price, in trainings")
            axis.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
            axis.minorticks_off()
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25, lw=0.6)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def write(record: Record, docs: Path) -> list[Path]:
    """The figure, into `docs`."""
    draw(record, docs / "figures" / FIGURE)
    return [docs / "figures" / FIGURE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    record = Record(args.out)
    for row in measured(record, args.seeds):
        record.add([row])
        print(f"seed {row['seed']}, {row['way']}: {row['validation'][-1]:.3f} at {row['trainings'][-1]:.4g} trainings")
    print(sentence(record))


if __name__ == "__main__":
    main()
