r"""Dropout rates and the KL weight of HiddenKey: learned through training, against a grid.

For each seed, on one split into training, validation and test rows:

1. *grid*: every point of rates x rates x betas is trained, validation chooses one;
2. *unrolled*: one training is begun, its first half with the rates it starts from; rates and beta are learned by
   differentiating through steps that go on from there, where models overfit; then one model is trained with them;
3. *first-order*: the control. Its gradient is 0, so it trains with the rates it started from.

All final trainings have the same length, hard masks, and the same random numbers. Told are the test loss, its excess
over the grid's choice (paired over seeds, with a 95 % interval of the mean) and the inner gradients spent: operations
of training and search, counted (`flops`), over those of one gradient of the training loss. What validation
costs the grid is left out.

    python -m benchmarks.lora.dropout --task rte        # resumable
    python -m benchmarks.lora.dropout --table           # positions x patterns x compensations instead
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro

import bilevel
from benchmarks.lora import low_data
from bilevel.extend import flops, gradient_flops
from methods import driver, evaluation, hiddenkey
from methods.bench import Bench
from methods.hiddenkey import HiddenKeySettings
from methods.runfolder import RunFolder

POSITIONS = ("attention_logits", "attention_weights", "ffn_hidden")
PATTERNS = ("element", "column", "span")
TERMS = ("rescale", "kl", "js")


@dataclasses.dataclass(frozen=True)
class Setup(low_data.Setup):
    """What is compared, and how.

    Attributes:
      rows: training rows, and as many validation rows.
      burn_in: steps of the training that the search goes on from.
      inner_steps: K of the search.
      outer_steps: T of the search.
      outer_lr: of the search's Adam.
      rates: of the grid.
      betas: of the grid.
      table: tell positions, patterns and compensations apart instead, each at the middle rate and beta.
    """

    out: Path = Path("runs/dropout")
    steps: int = 50
    rows: int = 100
    burn_in: int = 25
    inner_steps: int = 5
    outer_steps: int = 3
    outer_lr: float = 0.5
    rates: tuple[float, ...] = (0.05, 0.1, 0.2)
    betas: tuple[float, ...] = (0.1, 1.0, 5.0)
    table: bool = False


def settings_of(setup: Setup, seed: int) -> HiddenKeySettings:
    """One seed's settings."""
    middle = setup.rates[len(setup.rates) // 2], setup.betas[len(setup.betas) // 2]
    base = setup.settings(HiddenKeySettings, f"{setup.task}-{'table' if setup.table else 'grid'}", setup.rows, seed)
    return dataclasses.replace(
        base,
        inner_steps=setup.inner_steps,
        outer_steps=setup.outer_steps,
        inner_lr=setup.learning_rate,
        outer_lr=setup.outer_lr,
        rate=middle[0],
        beta=middle[1],
        grid=setup.rates,
        grid_beta=setup.betas,
        inner_start="warm",
    )


class Trainer:
    """Trains at a given outer variable, each name once, and tells what it is worth."""

    def __init__(self, settings: HiddenKeySettings, jobs: low_data.Jobs):
        self.jobs, self.settings = jobs, settings
        self.bench = hiddenkey.COMMAND.prepare(settings)
        self.folder = RunFolder(settings.out, settings)

    def bound(self, name: str, problem: Any, outer: Any) -> Any:
        """What training at `outer` gives; a training of this name that is done is not done again."""
        bind = partial((given := self.bench.given()).bind, given.weights)
        return bind(driver.finetuning(self.settings, self.bench, problem, outer, bind)(self.folder, name))

    def validated(self, name: str, problem: Any, outer: Any) -> float:
        """The validation loss."""
        found = lambda: evaluation.validation_loss(self.bench, self.bound(name, problem, outer))  # noqa: E731
        return self.jobs.once(self.folder, f"validated/{name}", found)

    def tested(self, name: str, problem: Any, outer: Any) -> dict[str, float]:
        """The test loss and metric."""

        def found():
            answered: Any = evaluation.evaluate(self.bench, self.bound(name, problem, outer))
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(answered.outputs, answered.labels)
            return {"test": float(losses.mean()), "metric": next(iter(answered.metrics.values()))}

        return self.jobs.once(self.folder, f"tested/{name}", found)


def compare(setup: Setup, seed: int, jobs: low_data.Jobs) -> dict[str, dict[str, Any]]:
    """One seed: losses and gradients of the grid's choice, of what was learned, and of the control."""
    trainer = Trainer(settings_of(setup, seed), jobs)
    settings, bench = trainer.settings, trainer.bench
    hard = hiddenkey.of(settings, bench)
    first = hard.start_outer(jax.random.key(seed))
    points = hiddenkey.grid(settings, first)
    best = int(np.argmin([trainer.validated(f"grid-{i}", hard, point) for i, point in enumerate(points)]))
    chosen = {name: float(value) for name, value in hiddenkey.found(points[best]).items()}
    learned = trainer.jobs.once(trainer.folder, "learned", lambda: _learn(trainer, hard, setup.burn_in))
    outer = first | jax.tree.map(
        lambda like, value: np.asarray(value, like.dtype), {k: first[k] for k in learned["outer"]}, learned["outer"]
    )
    search = setup.burn_in + setup.outer_steps * _estimate_cost(settings, bench)
    return {
        "grid": trainer.tested(f"grid-{best}", hard, points[best]) | {"gradients": len(points) * setup.steps} | chosen,
        "unrolled": trainer.tested("unrolled", hard, outer) | {"gradients": search + setup.steps} | learned["found"],
        "first-order": trainer.tested("first-order", hard, first) | {"gradients": setup.steps},
    }


def _estimate_cost(settings: HiddenKeySettings, bench: Bench) -> float:
    """Floating-point operations of one hypergradient, in gradients of the training loss."""
    solver = hiddenkey.searches(settings, bench)[0].solver
    train = jax.tree.map(lambda rows: rows[: settings.batch_size], bench.train)
    val = jax.tree.map(lambda rows: rows[: settings.outer_batch_size], bench.outer)
    key, data = jax.random.key(0), bilevel.FullBatch(train)
    outer = solver.problem.start_outer(key)

    def estimate(outer):
        return solver.hypergradient.estimate(solver.problem, None, outer, data, val, key).grad

    return flops(estimate, outer) / gradient_flops(solver.problem, solver.hypergradient, outer, data, key)


def _learn(trainer: Trainer, hard: Any, burn_in: int) -> dict[str, Any]:
    settings, bench, folder = trainer.settings, trainer.bench, trainer.folder
    first = hard.start_outer(jax.random.key(settings.seed))
    short = dataclasses.replace(settings, finetune_steps=burn_in)
    begun = hiddenkey.trained(short, bench, hard, "burn-in", first).train(folder, "burn-in")
    (search,) = hiddenkey.searches(settings, bench)
    from_there = dataclasses.replace(search.solver.problem, init_inner=lambda key, outer: begun)
    solver = dataclasses.replace(search.solver, problem=from_there)
    outer = driver.search(search._replace(solver=solver), folder).outer
    kept = {name: value for name, value in outer.items() if name != "key"}
    found = {name: float(np.mean(value)) for name, value in hiddenkey.found(outer).items()}
    return {"outer": jax.tree.map(lambda x: np.asarray(x).tolist(), kept), "found": found}


def positions(setup: Setup, seed: int, jobs: low_data.Jobs) -> dict[str, dict[str, Any]]:
    """One seed: every position, pattern and compensation at the middle rate and beta, and no dropout."""
    trainer = Trainer(settings_of(setup, seed), jobs)
    rows = {}
    for position in POSITIONS:
        for pattern in PATTERNS:
            for term in TERMS:
                words = f"{position} {pattern} {term}"
                problem = hiddenkey.of(dataclasses.replace(trainer.settings, rules=(words,)), trainer.bench)
                outer = problem.start_outer(jax.random.key(seed))
                rows[words] = trainer.tested(words.replace(" ", "-"), problem, outer)
                if not rows.get("no dropout"):
                    off = outer | {"rates": {position: np.full_like(outer["rates"][position], -np.inf)}}
                    rows["no dropout"] = trainer.tested("no-dropout", problem, off)
    return rows


def main(setup: Setup) -> None:
    """All seeds, then the record and the page."""
    kind, each, arms = "grid", compare, len(setup.rates) ** 2 * len(setup.betas) + 4
    if setup.table:
        kind, each, arms = "table", positions, len(POSITIONS) * len(PATTERNS) * len(TERMS) + 1
    jobs = low_data.Jobs(arms * setup.seeds)
    setup.finish(f"dropout-{kind}-{setup.task}", [each(setup, seed, jobs) for seed in range(setup.seeds)])


if __name__ == "__main__":
    main(tyro.cli(Setup, description=__doc__))
