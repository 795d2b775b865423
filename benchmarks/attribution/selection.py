"""Data selection on MNIST, half of whose labels are drawn anew: have the rows with wrong labels the small weights?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from benchmarks.attribution.cases import cross_entropy, images, network
from benchmarks.lora.planted import auroc
from benchmarks.record import Record, Row
from methods.attribution import WEIGHTS, numbered, problem


class Case(NamedTuple):
    """How weights are found.

    Attributes:
      rows, clean: how many there are to choose from, half of them with labels drawn anew, and to validate on.
      optimizer, steps: the training through which the weights descend.
      outer_rate, outer_steps: of Adam on the weights.
    """

    rows: int
    clean: int
    optimizer: optax.GradientTransformation
    steps: int
    outer_rate: float
    outer_steps: int


SEEDS, BATCH = 3, 100
SELECTIONS = {
    "smooth": Case(2000, 1000, optax.sgd(0.3), 100, 0.3, 150),
    "rough": Case(2000, 1000, optax.sgd(0.5, momentum=0.9), 60, 0.3, 150),
    "5,000 clean rows": Case(5000, 5000, optax.sgd(0.3), 200, 0.02, 400),
    "10,000 clean rows": Case(5000, 10000, optax.sgd(0.3), 200, 0.02, 400),
}
"""The first two differ in their training alone, the last two in the rows that validate."""
FINAL = 300
SOBA_STEPS = 6000


def selected(name: str, seed: int, record: Record) -> Iterator[Row]:
    """Test errors of trainings on all rows, on those of large weight, on the clean ones; AUROC of the weights."""
    if record.find(section="selection", seed=seed, training=name):
        return
    case = SELECTIONS[name]
    (x, y), (x_clean, y_clean) = split("train", seed, case.rows, case.clean)
    test = images("test", 10_000, 0)
    rng = np.random.default_rng(seed)
    drawn = rng.random(case.rows) < 0.5
    labels = np.where(drawn, rng.integers(0, 10, case.rows), y).astype(np.int32)
    wrong = labels != y

    def losses(weights: Any, params: Any, outer: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
        found = cross_entropy(params, *rows)
        return found, jnp.ones_like(found)

    def validation(weights: Any, params: Any, outer: Any, batch: Any) -> jax.Array:
        return cross_entropy(params, *batch).mean()

    of = problem(losses, validation, network, case.rows, domain={WEIGHTS: bilevel.Interval(0.0, 2.0)})
    data = bilevel.Batches(numbered((x, labels)), BATCH)
    estimator = bilevel.Unrolled(case.optimizer, case.steps, checkpoint="step")
    solver = bilevel.Nested(of, estimator, optax.adam(case.outer_rate), inner_start="cold")
    held_out, key = bilevel.FullBatch((x_clean, y_clean)), jax.random.key(seed)
    found = bilevel.run(solver, inner_data=data, outer_data=held_out, steps=case.outer_steps, key=key)
    weights = np.asarray(found.outer[WEIGHTS])

    by_soba = by_single_steps(of, data, (x_clean, y_clean), key)
    error = partial(test_error, test=test, key=key)
    yield {
        "section": "selection",
        "training": name,
        "seed": seed,
        "auroc": auroc(-weights, wrong),
        "soba auroc": auroc(-by_soba, wrong),
        "all rows": error((x, labels)),
        "selected": error((x[weights > 1], labels[weights > 1])),
        "kept": int((weights > 1).sum()),
        "wrong rows kept": int(wrong[weights > 1].sum()),
        "selected by soba": error((x[by_soba > np.median(by_soba)], labels[by_soba > np.median(by_soba)])),
        "clean half": error((x[~wrong], labels[~wrong])),
        "wrong": int(wrong.sum()),
    }


def by_single_steps(
    of: bilevel.Problem, data: bilevel.Batches, clean: tuple[np.ndarray, np.ndarray], key: jax.Array
) -> np.ndarray:
    """The weights by SOBA, one step of each variable at a time; of a grid of steps those best on clean rows."""
    found = []
    for inner_step in (0.1, 0.3):
        for outer_step in (30.0, 300.0, 3000.0):
            soba = bilevel.SOBA(of, inner_step=inner_step, outer_step=outer_step)
            batches = {"inner_data": data, "outer_data": bilevel.Batches(clean, BATCH)}
            try:
                result = bilevel.run(soba, **batches, steps=SOBA_STEPS, key=key, progress=False)
            except FloatingPointError:  # steps that are too long
                continue
            loss = float(cross_entropy(result.inner.params, *clean).mean())
            found.append((loss, np.asarray(result.outer[WEIGHTS])))
    return min(found, key=lambda pair: pair[0])[1]


def split(
    name: str, seed: int, rows: int, clean: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """So many rows to train on, and so many clean ones to validate on."""
    x, y = images(name, rows + clean, 100 + seed)
    return (x[:rows], y[:rows]), (x[rows:], y[rows:])


def test_error(rows: tuple[np.ndarray, np.ndarray], *, test: tuple[np.ndarray, np.ndarray], key: jax.Array) -> float:
    """Of the network trained on these rows, from scratch."""
    of = bilevel.Problem(
        lambda params, outer, batch, key: cross_entropy(params, *batch).mean(),
        None,
        lambda key, outer: network(key),
        lambda key: jnp.zeros(()),
    )
    data = bilevel.Batches(rows, min(BATCH, len(rows[0])))
    rate = optax.cosine_decay_schedule(0.5, FINAL)
    fitted = bilevel.fit(
        of, jnp.zeros(()), optimizer=optax.sgd(rate, momentum=0.9), data=data, steps=FINAL, key=key, progress=False
    )
    params, (x, y) = fitted.inner.params, test
    logits = np.tanh(x @ params["in"] + params["in_bias"]) @ params["out"] + params["out_bias"]
    return float((np.argmax(logits, axis=1) != y).mean())
