"""Optuna joined with hypergradients: the page shows the record, the record its trials, and calls are counted right."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from tests.conftest import require

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "solvers"


@pytest.fixture(scope="module")
def joined():
    require("benchopt"), require("optuna")
    import importlib.util

    def load(name):
        spec = importlib.util.spec_from_file_location(f"joined_{name.replace('/', '_')}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    with load("benchmark_utils/loading").Modules(FOLDER):
        yield load("joined")


def test_the_page_shows_the_record(joined):
    record = json.loads(joined.RECORD.read_text())
    assert joined.table(record) in (ROOT / "docs" / "optuna.md").read_text(encoding="utf-8")


def test_the_record_is_that_of_its_trials(joined):
    record = json.loads(joined.RECORD.read_text())
    alone = json.loads(joined.ALONE.read_text())
    target, calls = alone["metrics"]["value_func"]["median"][-1], alone["gradient_calls"][-1]
    assert record == joined.summary(record["curves"], target, calls)
    assert record["trials"] == joined.TRIALS and all(len(curve) == joined.TRIALS for curve in record["curves"])
    # A tenth of the calls that Optuna alone takes, whichever are counted and whatever the seed.
    assert max(n["most"] for n in record["reached"].values()) <= calls / 10
    assert record["end"]["value_func"] < target


def test_calls_are_counted_by_hand(joined, monkeypatch):
    """Of three trials one is whole, one pruned at its first report, and one diverges before it."""
    rows = {"x": np.ones((128, 2)), "y": np.ones(128)}
    fit = lambda z, x, batch, key: jnp.mean((batch["x"] @ z - batch["y"]) ** 2)  # noqa: E731
    train = lambda z, x, batch, key: fit(z, x, batch, key) + jnp.sum(jnp.exp(x) * z**2)  # noqa: E731
    problem = bilevel.Problem(train, fit, lambda key, x: jnp.zeros(2), lambda key: jnp.zeros(2))
    data = {"problem": problem, "inner": rows, "outer": rows}
    monkeypatch.setattr(joined, "TRIAL_STEPS", 40)
    optuna = require("optuna")
    params = {"inner_steps": 3, "optimizer": "sgd", "inner_rate": 0.1, "batch_size": 16}

    def counted(trial, raises=None, data=data):
        counts = np.zeros(4)
        if raises is None:
            joined.tried(trial, data, jax.random.key(0), counts)
        else:
            with pytest.raises(raises):
                joined.tried(trial, data, jax.random.key(0), counts)
        return counts

    one = np.array([3, 1, 3, 3]) * 16 / 64
    np.testing.assert_allclose(counted(optuna.trial.FixedTrial(params)), 40 * one + [0, 128 / 64, 0, 0])
    pruned = optuna.trial.FixedTrial(params)
    pruned.should_prune = lambda: True
    np.testing.assert_allclose(counted(pruned, optuna.TrialPruned), 20 * one)
    steep = data | {"inner": {"x": 1e6 * rows["x"], "y": rows["y"]}}
    diverged = counted(optuna.trial.FixedTrial(params), FloatingPointError, steep)
    np.testing.assert_allclose(diverged, 20 * one)
