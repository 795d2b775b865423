"""One training beside many: the ways are judged alike, prices are counted, and the record is that of the program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import search
from benchmarks.record import Record

pytestmark = pytest.mark.usefixtures("as_a_command")


@pytest.fixture
def as_a_command():
    """float32 and JAX's own promotion rules, as the benchmark is run."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_a_training_is_that_of_optax_written_out():
    train, validation, test = search.drawn(3)
    decays = jnp.linspace(-6, 2, search.FEATURES)
    w, optimizer = jnp.zeros(search.FEATURES), optax.adam(search.RATE)
    state = optimizer.init(w)
    for _ in range(search.STEPS):
        updates, state = optimizer.update(jax.grad(search.train_loss)(w, decays, train, None), state)
        w = optax.apply_updates(w, updates)
    found = search.judge(train, validation, test)(decays[None])
    wanted = [search.val_loss(w, None, rows, None) for rows in (validation, test)]
    np.testing.assert_allclose([x[0] for x in found], wanted, rtol=1e-4)


def test_the_best_so_far_is_chosen_by_the_validation_loss():
    losses = np.array([3.0, 1.0, 2.0, 0.5]), np.array([9.0, 8.0, 1.0, 7.0])
    assert search.best_so_far(losses, [1, 2, 3, 4]) == ([3.0, 1.0, 1.0, 0.5], [9.0, 8.0, 8.0, 7.0])
    assert search.powers(9) == [1, 2, 4, 8]


def test_the_price_of_an_outer_step_is_that_of_its_gradients_and_products():
    """An inner step takes a gradient and, going back, a product of about two; the outer gradient is on all its rows."""
    train, validation, _ = search.drawn(0)
    gradients = search.STEPS * search.outer_step_price(train, validation)
    outer = search.VALIDATION / search.TRAIN
    assert 2 * search.UNROLL + outer < gradients < 4 * search.UNROLL + 2 * outer


def test_every_way_is_in_the_record_and_makes_its_row_again(monkeypatch):
    record = Record(search.RECORD)
    assert list(search.measured(record, 10)) == []
    monkeypatch.setattr(search, "TPE", 16)
    for way, find in search.FINDERS.items():
        (row,) = record.find(way=way, seed=4)
        again, points = find(4, search.drawn(4)), 5
        assert again["trainings"][:points] == pytest.approx(row["trainings"][:points], rel=1e-5)
        # In single precision trainings agree; which of two guesses of one loss is the better they may say differently.
        assert again["validation"][:points] == pytest.approx(row["validation"][:points], rel=1e-2), way


def test_the_sentence_is_true():
    record = Record(search.RECORD)
    ends = {way: [row["validation"][-1] for row in record.find(way=way)] for way in search.WAYS}
    said = search.sentence(record)
    assert f"{np.median(ends['bilevel']):.2f} by the run" in said
    better = {way: sum(np.array(ends[way]) <= ends["bilevel"]) for way in ("random", "tpe")}
    assert f"by random search in {better['random']} and by TPE in {better['tpe']} of 10 seeds" in said
    rows = {line.split(" | ")[0]: line for line in search.table(record).splitlines()}
    for way, times in better.items():
        row = rows[f"| {search.WAYS[way]}"]
        assert f"| {np.median(ends[way]):.2f} |" in row and row.endswith(f"| {times} of 10 seeds |")
