"""Several questions about one training: rows are the hypergradients of the questions, and training is shared."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.hypergradients import replay_pass
from bilevel.hypergradients.contract import driven_from_host
from bilevel.measuring.flops import flops
from tests.bilevel.estimators import TABLE
from tests.bilevel.helpers import KEY, NETWORK, ROWS, assert_close, estimate, network_batches
from tests.bilevel.hypergradients.replayed import OPTIMIZERS, PROBLEM, STEPS, X, Y, batch
from tests.bilevel.hypergradients.replayed import estimate as replayed

QUESTIONS = jax.tree.map(lambda x: jnp.asarray(x[:9]).reshape(3, 3, *np.shape(x)[1:]), ROWS)
ASKED = [row for row in TABLE if not (row.tasks or row.setting)]


@pytest.mark.parametrize("row", ASKED, ids=lambda row: row.name)
def test_each_row_is_the_hypergradient_of_its_question(row):
    hypergradient = row.make(optax.sgd(0.1), 3)
    outer, batches = NETWORK.start_outer(KEY), network_batches(hypergradient.steps)
    function = bilevel.value_and_hyperjacobian(NETWORK, hypergradient)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = function if driven_from_host(hypergradient) else jax.jit(function)
        values, jacobian = compiled(outer, None, batches, QUESTIONS, KEY)
        last = jax.tree.map(lambda x: x[2], QUESTIONS)
        one = estimate(NETWORK, hypergradient, None, outer, batches, last, KEY)
    assert values.shape == (3,)
    assert_close(jax.tree.map(lambda x: x[2], (values, jacobian)), (one.value, one.grad), 1e-10)


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_training_is_computed_once_for_all_questions(mode):
    function = bilevel.value_and_hyperjacobian(NETWORK, bilevel.Unrolled(optax.sgd(0.1), 8, mode=mode))
    outer, batches = NETWORK.start_outer(KEY), network_batches(8)

    def counted(questions):
        asked = jax.tree.map(lambda x: jnp.asarray(x)[None].repeat(questions, axis=0), ROWS)
        return flops(lambda outer: function(outer, None, batches, asked, KEY), outer)

    one, two, nine = map(counted, (1, 2, 9))
    assert nine - two == pytest.approx(7 * (two - one), rel=1e-6)
    assert two - one < 0.7 * one


def test_replay_keeps_several_adjoints():
    made = bilevel.Replay(OPTIMIZERS["momentum of a learned rate"], STEPS, segment=4, keep="sqrt", store="host")
    outer, asked = PROBLEM.start_outer(KEY), (X[:3], Y[:3])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=bilevel.StructuralZeroWarning)
        found = made.estimates(PROBLEM, None, outer, batch, asked, KEY)
    assert found.aux.outer["rows"].shape == (3, 2) and found.aux.inner["fit"].shape == (STEPS,)
    one = replayed(made, batch)  # of the first question
    first = jax.tree.map(lambda x: x[0], (found.value, found.grad))
    assert_close(first, (one.value, one.grad), 1e-12)
    assert_close(found.inner_state.params["a"], one.inner_state.params["a"], 1e-15)


def test_several_questions_go_on_where_they_were_killed(tmp_path):
    class Killed(Exception):
        pass

    made = bilevel.Replay(OPTIMIZERS["adam"], STEPS, segment=2, store=str(tmp_path / "kept"))
    outer, asked, left = PROBLEM.start_outer(KEY), (X[:3], Y[:3]), [10**9]

    def dying(step):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return batch(step)

    ask = lambda made=made: made.estimates(PROBLEM, None, outer, dying, asked, KEY)  # noqa: E731
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=bilevel.StructuralZeroWarning)
        whole = ask()
        # Forward, and in the middle of the backward pass.
        for number in (STEPS // 2, STEPS + 6):
            left[0] = number
            with pytest.raises(Killed):
                ask()
            left[0] = 10**9
            again = ask()
            assert 10**9 - left[0] < 2 * STEPS
            for ours, theirs in zip(jax.tree.leaves(again.grad), jax.tree.leaves(whole.grad), strict=True):
                np.testing.assert_array_equal(ours, theirs)
        left[0] = STEPS // 2
        with pytest.raises(Killed):
            ask()
        left[0] = 10**9
        # One question is another computation.
        with pytest.raises(ValueError, match="settings or versions"):
            replayed(made, batch)


def test_room_is_asked_for_the_adjoint_of_each_question(tmp_path, monkeypatch):
    asked, outer = [], PROBLEM.start_outer(KEY)
    monkeypatch.setattr(replay_pass, "refuse_without_room", lambda folder, size: asked.append(size))
    (tmp_path / "kept").mkdir()
    made = bilevel.Replay(OPTIMIZERS["adam"], STEPS, segment=4, store=str(tmp_path / "kept"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=bilevel.StructuralZeroWarning)
        for count in (1, 5):
            made.estimates(PROBLEM, None, outer, batch, (X[:count], Y[:count]), KEY)
    one, five = asked
    assert one == made.kept_bytes(PROBLEM, None, outer, KEY)
    starts = 3  # of segments, beside the state at hand, that at the end, and the adjoint
    assert five - one == 4 * one // (starts + 3)


@pytest.mark.parametrize("wrong", [None, jnp.zeros(()), (X[:3], Y[:2]), ()], ids=str)
@pytest.mark.parametrize("kind", [bilevel.Unrolled, bilevel.Replay])
def test_questions_lead_with_one_axis(kind, wrong):
    function = bilevel.value_and_hyperjacobian(PROBLEM, kind(optax.sgd(0.1), STEPS))
    with pytest.raises(ValueError, match=r"^The outer batches of several questions are arrays that lead with an axis"):
        function(PROBLEM.start_outer(KEY), None, (X, Y), wrong, KEY)
