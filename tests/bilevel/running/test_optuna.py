"""Optuna around `run`: what a trial is told, that a pruned run ends between two steps and is saved, importances."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.testing import ridge
from tests.conftest import require

PROBLEM, TRAIN, VAL = ridge()


@pytest.fixture
def study():
    optuna = require("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(pruner=optuna.pruners.NopPruner())


def run(steps, *callbacks, optimizer=None, **settings):
    outer = optax.sgd(1.0) if optimizer is None else optimizer
    solver = bilevel.Nested(PROBLEM, bilevel.Unrolled(optax.sgd(0.5), 3), outer)
    data = {"inner_data": TRAIN, "outer_data": VAL, "progress": False}
    return bilevel.run(solver, steps=steps, callbacks=callbacks, **data, **settings)


def told(study, trial):
    return study.get_trials()[trial.number].intermediate_values


def test_a_trial_is_told_means_at_every_so_many_steps(study):
    trial = study.ask()
    result = run(8, bilevel.OptunaPruning(trial, every=3), callback_every=5)
    losses = result.history["outer_loss"]
    assert told(study, trial) == pytest.approx({3: losses[:3].mean(), 6: losses[3:6].mean()})
    assert study.get_trials()[trial.number].user_attrs["settings"]["hypergradient.steps"] == 3


def pruning(study, after):
    """From that step on the study's pruner ends every trial."""
    study.pruner = SimpleNamespace(prune=lambda study, trial: trial.last_step >= after)


def test_a_pruned_run_ends_between_two_steps_and_is_saved(study, tmp_path):
    optuna = require("optuna")
    pruning(study, 4)
    trial = study.ask()
    with pytest.raises(optuna.TrialPruned, match=r"^outer_loss is .* after step 4\.$"):
        run(9, bilevel.OptunaPruning(trial, every=2), checkpoint_dir=tmp_path)
    assert list(told(study, trial)) == [2, 4] and (tmp_path / "4").is_dir()
    result = run(9, checkpoint_dir=tmp_path)  # and may go on
    np.testing.assert_array_equal(result.history["outer_loss"], run(9).history["outer_loss"])


def test_a_resumed_trial_reports_no_step_twice(study, tmp_path):
    trial = study.ask()
    run(4, bilevel.OptunaPruning(trial, every=2), checkpoint_dir=tmp_path)
    trial.report(7.0, 6)  # a process that was killed had come so far
    result = run(8, bilevel.OptunaPruning(trial, every=2), checkpoint_dir=tmp_path)
    losses = result.history["outer_loss"]
    means = {2: losses[:2].mean(), 4: losses[2:4].mean(), 6: 7.0, 8: losses[6:].mean()}
    assert told(study, trial) == pytest.approx(means)


def test_a_storage_that_fails_ends_no_trial(study, monkeypatch):
    trial = study.ask()

    def locked(*args):
        raise OSError("database is locked")

    monkeypatch.setattr(trial, "report", locked)
    with pytest.warns(RuntimeWarning, match="OptunaPruning failed, and the run goes on without it"):
        assert len(run(3, bilevel.OptunaPruning(trial)).history["outer_loss"]) == 3


def test_a_metric_that_is_not_there_is_an_error(study):
    with pytest.raises(ValueError, match=r"OptunaPruning\(metric='loss'\): the run has no .* it has .*outer_loss"):
        run(3, bilevel.OptunaPruning(study.ask(), "loss"))


def test_what_optuna_does_not_prune_is_refused():
    optuna = require("optuna")
    trial = optuna.create_study(directions=["minimize", "minimize"]).ask()
    with pytest.raises(ValueError, match="its study has several objectives"):
        bilevel.OptunaPruning(trial)
    with pytest.raises(ValueError, match=r"OptunaPruning\(every=0\)"):
        bilevel.OptunaPruning(optuna.trial.FixedTrial({}), every=0)


def test_a_trial_of_fixed_values_is_never_pruned():
    optuna = require("optuna")
    assert len(run(3, bilevel.OptunaPruning(optuna.trial.FixedTrial({}))).history["outer_loss"]) == 3


def test_missing_optuna_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    said = "optuna is not installed, which bilevel.OptunaPruning reports to: pip install 'bilevel[bench]'."
    with pytest.raises(ModuleNotFoundError) as raised:
        bilevel.OptunaPruning(None)
    assert str(raised.value) == said


# --- importances ----------------------------------------------------------------------------------------------------


def linear(scales):
    """A problem whose hypergradient is `scales`, at every step and everywhere."""
    loss = lambda w, outer, batch, key: sum(jnp.sum(scales[n] * outer[n]) for n in scales) + 0.0 * w  # noqa: E731
    start = {name: jnp.zeros_like(scale) for name, scale in scales.items()}
    inner = lambda w, outer, batch, key: (w - outer["a"]) ** 2  # noqa: E731
    begin = lambda key: start | {"key": jax.random.key(1)}  # noqa: E731
    return bilevel.Problem(inner, loss, lambda key, outer: jnp.zeros(()), begin)


@pytest.mark.parametrize("stack", [False, True])
def test_importances_are_shares_of_scaled_gradients(stack):
    problem = linear({"a": jnp.asarray(-1.0), "b": jnp.asarray([2.0, -1.0])})
    optimizer = optax.chain(bilevel.gradient_sizes(), optax.adam(0.1))
    solver = bilevel.Nested(problem, bilevel.Unrolled(optax.sgd(0.1), 2), optimizer)
    key = jax.random.split(jax.random.key(0), 3) if stack else None
    result = bilevel.run(solver, steps=5, progress=False, key=key)
    assert bilevel.importances(result) == bilevel.importances(result.state) == pytest.approx({"a": 0.25, "b": 0.75})
    scale = {"a": 2.0, "b": np.array([0.5, 1.0]), "key": None}
    assert bilevel.importances(result, scale) == pytest.approx({"a": 0.5, "b": 0.5})


def test_importances_go_on_with_a_resumed_run(tmp_path):
    optimizer = optax.chain(bilevel.gradient_sizes(), optax.sgd(1.0))
    run(2, optimizer=optimizer, checkpoint_dir=tmp_path)
    sizes = run(5, optimizer=optimizer, checkpoint_dir=tmp_path).state.opt_state[0]
    assert int(sizes.count) == 5
    np.testing.assert_array_equal(sizes.total, run(5, optimizer=optimizer).state.opt_state[0].total)


def test_the_sizes_change_nothing():
    plain, watched = run(5), run(5, optimizer=optax.chain(bilevel.gradient_sizes(), optax.sgd(1.0)))
    np.testing.assert_array_equal(plain.outer, watched.outer)
    np.testing.assert_allclose(
        watched.state.opt_state[0].total, np.abs(plain.history["hypergradient_norm"]).sum(), rtol=1e-12
    )


def test_gradients_of_a_loop_of_ones_own():
    history = {"a": np.array([1.0, -3.0]), "b": np.array([[0.0, 1.0], [0.0, 3.0]])}
    assert bilevel.importances(history, {"a": 3.0, "b": 1.0}) == {"a": 0.75, "b": 0.25}
    assert bilevel.importances({"a": np.zeros(3), "b": np.zeros(3)}) == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize(
    ("of", "scale", "said"),
    [
        ({}, 1.0, "a mapping must hold gradients"),
        ({"a": 1.0}, 1.0, "a mapping must hold gradients"),
        ({"a": np.ones(2)}, -1.0, "the scale of .* is -1"),
        ({"a": np.ones(2)}, np.nan, "the scale of .* is nan"),
        ({"a": np.ones(2)}, {"b": 1.0}, "must be a number, or a tree like the outer variable"),
        (3, 1.0, r"has 0 bilevel\.gradient_sizes\(\) in its chain, and must have one"),
    ],
)
def test_importances_of_nothing_are_refused(of, scale, said):
    with pytest.raises(ValueError, match=said):
        bilevel.importances(of, scale)
