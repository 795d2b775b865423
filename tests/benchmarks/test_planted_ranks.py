"""Planted ranks: the task, what is judged, and that every way runs."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.lora import planted_ranks, report
from benchmarks.lora.planted_ranks import QUICK, SETUP, WAYS, Inputs, Ranks, judged, make_task
from benchmarks.record import Record
from methods.models.hooks import identity

pytestmark = pytest.mark.usefixtures("as_a_command")

SMALL = dataclasses.replace(SETUP, layers=3, width=16, rows=32)


@pytest.fixture
def as_a_command():
    """float32 and JAX's own promotion rules, as the benchmark is run."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_scores_are_judged_against_the_ranks():
    setup = dataclasses.replace(SETUP, layers=2, rank=3)  # q of two layers, then v of two
    true = np.array([2, 0, 0, 1])
    perfect = {"q_proj": np.array([[0.1, 5, 4], [0, 0, 0.1]]), "v_proj": np.array([[0, 0.1, 0], [0.2, 3, 0]])}
    assert judged(setup, perfect, true) == {"auroc": 1.0, "rank correlation": 1.0}
    assert judged(setup, {site: np.ones((2, 3)) for site in perfect}, true)["auroc"] == 0.5
    # A component of a module that needs none, before all others: three of the nine that are not needed beat none.
    wrong = perfect | {"q_proj": np.array([[0.1, 5, 4], [9, 9, 9]])}
    assert np.isclose(judged(setup, wrong, true)["auroc"], 1 - 3 / 9)


def test_the_planted_update_has_the_ranks_that_are_told_and_moves_as_much_as_they_say():
    ranks = Ranks(true=(1, 3), effect=0.05)
    task, true = make_task(SMALL, ranks, jax.random.key(0))
    assert sorted(true[true > 0].tolist()) == [1, 3] and true.shape == (6,)
    student = jax.nn.log_softmax(SMALL.logits(task.weights, identity, task.val["tokens"]))
    moved = float(jnp.mean(jnp.sum(jnp.exp(task.val["target"]) * (task.val["target"] - student), axis=-1)))
    assert 0.5 * 0.05 * 4 < moved < 2 * 0.05 * 4  # both together, each as much as its rank


def test_inputs_are_seen_as_they_are():
    x, w = jax.random.normal(jax.random.key(0), (2, 5, 3)), jax.random.normal(jax.random.key(1), (3, 4))
    total = lambda moment: Inputs({"site": moment})("site", x, x @ w).sum()  # noqa: E731
    rows = np.asarray(x).reshape(-1, 3)
    np.testing.assert_allclose(jax.grad(total)(jnp.zeros((3, 3))), rows.T @ rows, rtol=1e-6)
    np.testing.assert_array_equal(Inputs({"site": jnp.zeros((3, 3))})("site", x, x @ w), x @ w)
    np.testing.assert_array_equal(Inputs({})("site", x, x @ w), x @ w)


def test_every_way_gives_a_score_to_every_component():
    task, true = make_task(SMALL, QUICK, jax.random.key(0))
    shapes = {site: (SMALL.layers, SMALL.rank) for site in SMALL.lora.targets}
    for name, way in WAYS.items():
        scores = way(SMALL, QUICK, task, jax.random.key(1))
        assert {site: score.shape for site, score in scores.items()} == shapes, name
        assert all(np.isfinite(score).all() for score in scores.values()), name
        assert 0 <= judged(SMALL, scores, true)["auroc"] <= 1


def test_all_ways_spend_the_same():
    for name in ("hypergradient", "first order"):
        setting = planted_ranks.settings(SETUP, Ranks(), name)
        one = (3.07 if name == "hypergradient" else 1) * Ranks().unroll + SETUP.outer_batch / SETUP.batch
        assert Ranks().budget - one < Ranks().warmup + setting.outer_steps * one <= Ranks().budget


def test_the_page_shows_the_record():
    page = Path(__file__).parents[2] / "docs" / report.PAGE
    section = "\n".join(report._planted_ranks(Record(report.RANKS)))
    assert section and section in page.read_text(encoding="utf-8")
