"""The planted-layer benchmark: its task is what it says, its measures, and one identity of its searches."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from benchmarks.lora import planted, planted_scores, report
from benchmarks.lora.planted_task import QUICK, divergence, make_task
from benchmarks.record import Record

TINY = dataclasses.replace(QUICK, layers=3, total=2, unrolls=(1,))


@pytest.fixture(scope="module")
def tasks():
    return jax.jit(jax.vmap(partial(make_task, TINY)))(jax.random.split(jax.random.key(0), TINY.seeds))


def test_planted_layers_are_as_many_as_said(tasks):
    assert np.asarray(tasks.planted).sum(axis=1).tolist() == [TINY.planted] * TINY.seeds


def test_target_is_a_distribution_that_the_student_misses_by_the_effect_asked_for(tasks):
    total = np.exp(np.asarray(tasks.train["target"], np.float64)).sum(-1)
    np.testing.assert_allclose(total, 1.0, rtol=1e-4)

    def student(task, key):
        return divergence(TINY, task.weights, TINY.lora.bind(TINY.start_lora(key)), task.val)

    missed = jax.vmap(student)(tasks, jax.random.split(jax.random.key(1), TINY.seeds))
    assert TINY.planted == 1
    np.testing.assert_allclose(missed, TINY.effect, rtol=0.1)  # calibrated on 128 other sequences


def test_measures():
    mask = np.array([True, False, True, False])
    assert planted.auroc(np.array([4.0, 1.0, 3.0, 2.0]), mask) == 1.0
    assert planted.auroc(np.zeros(4), mask) == 0.5
    assert planted.precision(np.array([4.0, 3.0, 2.0, 1.0]), mask) == 0.5
    assert planted.jaccard(np.array([4.0, 3.0, 2.0, 1.0]), mask) == pytest.approx(1 / 3)


@pytest.mark.slow
def test_one_inner_step_from_zero_leaves_nothing_to_unroll(tasks):
    """From B = 0 one SGD step gives twice the first-order gradient: searches by steps of one length coincide."""
    keys = jax.random.split(jax.random.key(2), TINY.seeds)
    unrolled, first_order = (
        planted.search(TINY, planted.Arm(name, 1, "sgd"), tasks, keys) for name in ("unrolled", "first-order")
    )
    np.testing.assert_allclose(unrolled["alpha"], first_order["alpha"], atol=2e-3 * TINY.reach)
    np.testing.assert_allclose(unrolled["cosine"], 1.0, atol=1e-3)
    np.testing.assert_allclose(np.asarray(unrolled["alpha"]).sum(-1), 0.0, atol=1e-4)


def test_every_score_spends_what_it_may_and_is_compared_with_leaving_one_out(tmp_path):
    setup, file = dataclasses.replace(TINY, per="module"), tmp_path / "record.jsonl"
    arms = {arm.label: arm for arm in planted_scores.arms(setup, (2,), 24)}
    scores = ("UD", "halved", "implicit", "first order", "grad-norm", "snip", "synflow", "LoRA-drop")
    assert set(arms) == {f"{s}, K = 2" for s in scores} | {"grad-norm, K = 0"}
    few = ("leave one out", "UD, K = 2", "halved, K = 2", "random")  # compiling all of them takes minutes
    record = Record(file)
    for job, arm in planted_scores.jobs(record, {"modules": setup}, (0, 1), (2,), 24):
        if job["score"] in few:
            record.add([job | row for row in planted_scores.measure(setup, 24, job["seed"], job["score"], arm)])
    left = planted_scores.jobs(Record(file), {"modules": setup}, (0, 1), (2,), 24)
    assert not {job["score"] for job, _ in left} & {*few}
    found = report.measures(Record(file), "modules")
    assert set(found) == {*few, "leave one in"}
    assert all(of["seeds"] == [0, 1] and 0 <= of["auroc"][0] <= 1 for of in found.values())
    assert 0 < max(of["cost"] for name, of in found.items() if "K" in name) <= 24
    assert np.isclose(found["leave one out"]["rank"], 1.0).all()
    none = tmp_path / "none.jsonl"
    figure, page = report.write(tmp_path / "docs", file, none, hidden=none)
    assert figure.stat().st_size > 0
    assert "| UD, K = 2 | 20 |" in page.read_text(encoding="utf-8")


def test_units_are_layers_or_modules():
    setup = dataclasses.replace(TINY, per="module")
    assert (TINY.units, setup.units) == (3, 6)
    spread = setup.spread(np.arange(6.0))
    assert [spread[site].tolist() for site in setup.lora.targets] == [[0, 1, 2], [3, 4, 5]]
    np.testing.assert_array_equal(setup.gather(spread), np.arange(6.0))
    np.testing.assert_array_equal(TINY.gather(spread), [3.0, 5.0, 7.0])
