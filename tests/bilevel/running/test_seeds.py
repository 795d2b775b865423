"""A run over a stack of keys: each of its runs is that of its key alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Batches, Nested, Unrolled
from bilevel.testing import ridge
from tests.bilevel.estimators import TABLE
from tests.bilevel.helpers import KEY, NETWORK, ROWS, assert_close, assert_equal, without_keys
from tests.bilevel.solvers.finite_sum import SMALL
from tests.bilevel.solvers.table import TABLE as SOLVERS
from tests.bilevel.trainings import DATA, PROBLEM, TEST, Counter, Killed, killer, run

KEYS = jax.random.split(KEY, 3)


def number(tree, i):
    return without_keys(jax.tree.map(lambda x: x[i], tree))


def assert_each_alone(solver, steps, tolerance=1e-10, **data):
    many = run(solver, steps, **data, key=KEYS)
    for i, key in enumerate(KEYS):
        one = run(solver, steps, **data, key=key)
        assert_close(number(many.state, i), without_keys(one.state), tolerance)
        assert many.history.keys() == one.history.keys()
        for name, rows in one.history.items():
            assert many.history[name].shape == (steps, len(KEYS), *rows.shape[1:])
            np.testing.assert_allclose(many.history[name][:, i], rows, rtol=tolerance, atol=1e-12)


# One that differentiates, one with a schedule, one that solves, one without second derivatives, one that draws.
KINDS = ("mixed", "rematerialised", "implicit", "first order", "reversible", "evolution")


@pytest.mark.filterwarnings("ignore::bilevel.InexactHypergradientWarning")
@pytest.mark.parametrize("row", [row for row in TABLE if row.name in KINDS], ids=lambda row: row.name)
def test_an_estimator(row):
    solver = Nested(NETWORK, row.make(optax.sgd(0.1), 3), optax.adam(0.05))
    assert_each_alone(solver, 2, inner_data=Batches(ROWS, 5), outer_data=ROWS)


def test_each_of_them_solves_its_system_to_its_own_end():
    problem, train, val = ridge()
    solver = Nested(problem, bilevel.Implicit(optax.sgd(0.5), 20), optax.sgd(0.5))
    assert_each_alone(solver, 2, inner_data=Batches(train, 4), outer_data=val)


@pytest.mark.parametrize("row", [r for r in SOLVERS if r.name in ("SOBA", "SRBA", "BSA", "VRBO")], ids=lambda r: r.name)
def test_a_stochastic_solver(row):
    inner, outer = SMALL
    assert_each_alone(row.make(data=SMALL), 7, inner_data=inner, outer_data=outer)


def test_the_final_training_and_other_forms_of_keys_and_data():
    solver = Nested(PROBLEM, Unrolled(optax.adam(0.1), 3), optax.adam(0.05))
    words = jax.vmap(jax.random.key_data)(KEYS)
    assert_equal(run(solver, 2, **DATA, key=words).history, run(solver, 2, **DATA, key=KEYS).history)
    # An iterator gives all of them the same batches.
    many = run(solver, 2, inner_data=Counter(), outer_data=TEST, key=KEYS)
    one = run(solver, 2, inner_data=Counter(), outer_data=TEST, key=KEYS[1])
    np.testing.assert_allclose(many.history["outer_loss"][:, 1], one.history["outer_loss"], rtol=1e-12)
    outer = jax.tree.map(jnp.asarray, PROBLEM.init_outer(KEY))
    fitted = {"optimizer": optax.adam(0.1), "data": DATA["inner_data"], "steps": 3, "progress": False}
    many, one = (bilevel.fit(PROBLEM, outer, key=key, **fitted) for key in (KEYS, KEYS[2]))
    np.testing.assert_allclose(many.inner.params[2], one.inner.params, rtol=1e-12)
    assert many.outer["a"].shape == (3, 11)


def test_what_is_recorded_and_what_callbacks_see(capsys):
    shapes = []
    see = lambda step, state, rows: shapes.append((step, state.outer["a"].shape, rows["a"].shape))  # noqa: E731
    result = bilevel.run(
        Nested(PROBLEM, Unrolled(optax.adam(0.1), 3), optax.adam(0.05)),
        **DATA,
        steps=3,
        key=KEYS,
        record=lambda state: {"a": state.outer["a"], "n": state.step},
        callbacks=[see],
        callback_every=2,
    )
    assert shapes == [(2, (3, 11), (2, 3, 11)), (3, (3, 11), (1, 3, 11))]
    np.testing.assert_array_equal(result.history["a"][-1], result.outer["a"])
    np.testing.assert_array_equal(result.history["n"], [[1] * 3, [2] * 3, [3] * 3])
    assert f"outer_loss {result.history['outer_loss'][-1].mean():.4g}" in capsys.readouterr().err


def test_killed_and_resumed(tmp_path):
    whole = run(steps=6, **DATA, key=KEYS)
    with pytest.raises(Killed):
        run(steps=6, **DATA, key=KEYS, checkpoint_dir=tmp_path, callbacks=[killer(3)], callback_every=3)
    again = run(steps=6, **DATA, key=KEYS, checkpoint_dir=tmp_path)
    assert_equal(again.state, whole.state)
    assert_equal(again.history, whole.history)
    with pytest.raises(ValueError, match="holds another run, which differs in key"):
        run(steps=6, **DATA, key=KEYS[:2], checkpoint_dir=tmp_path)


def test_the_run_that_fails_is_named():
    losses = lambda w, o, b, k: 0.5 * (w - o) ** 2, lambda w, o, b, k: w**2

    def outcome(init_outer):
        problem = bilevel.Problem(*losses, lambda key, outer: jnp.zeros(()), init_outer)
        return run(Nested(problem, Unrolled(optax.sgd(0.5), 2), optax.sgd(0.0)), 1, inner_data=None, key=KEYS)

    drawn = outcome(jax.random.uniform).outer
    worst = int(jnp.argmax(drawn))
    begin = lambda key: jnp.where(jax.random.uniform(key) == drawn[worst], 1e200, 1.0)  # noqa: E731
    with pytest.raises(FloatingPointError, match=rf"^The run of key\[{worst}\]: Outer step 0: inner_loss is inf"):
        outcome(begin)


def test_warnings_say_of_which_run_they_are():
    zeros = bilevel.Problem(
        lambda w, o, b, k: jnp.sum((w - o) ** 2), lambda w, o, b, k: jnp.sum((w - 1.0) ** 2),
        lambda key, outer: jnp.zeros(2), lambda key: jnp.array([0.0, 0.5]),
    )  # fmt: skip
    with pytest.warns(bilevel.SteepUpdateWarning, match=r"^The run of key\[0\]: The hypergradient has norm") as caught:
        run(Nested(zeros, Unrolled(optax.adam(0.1), 3), optax.sgd(0.0)), 1, inner_data=None, key=KEYS)
    assert len(caught) == 1
    implicit = Nested(NETWORK, bilevel.Implicit(optax.sgd(0.1), 1), optax.sgd(0.1))
    with pytest.warns(bilevel.InexactHypergradientWarning) as caught:
        run(implicit, 1, inner_data=Batches(ROWS, 5), outer_data=ROWS, key=KEYS)
    assert [str(w.message)[:18] for w in caught] == [f"The run of key[{i}]:" for i in range(3)]


def test_what_cannot_be_run_side_by_side():
    replay = Nested(NETWORK, bilevel.Replay(optax.sgd(0.1), 3), optax.sgd(0.1))
    data = {"inner_data": Batches(ROWS, 5), "outer_data": ROWS}
    with pytest.raises(ValueError, match=r"run\(key=...\): was given 3 keys, but Replay is driven from the host"):
        run(replay, 1, **data, key=KEYS)
    for wrong in (KEYS[:0], KEYS[None], jnp.zeros((1, 2, 2), jnp.uint32), np.arange(3)):
        with pytest.raises(ValueError, match=r"run\(key=.*must be a random key, as .*, or a stack of some"):
            run(steps=1, **DATA, key=wrong)
    turns = iter(range(3))
    uneven = bilevel.Problem(
        lambda w, o, b, k: jnp.sum(w[0] ** 2), lambda w, o, b, k: jnp.sum(w[0] ** 2) * o,
        lambda key, outer: (jnp.ones(1),) * (1 + next(turns)), lambda key: jnp.ones(()),
    )  # fmt: skip
    solver = bilevel.SOBA(uneven, inner_step=0.1, outer_step=0.1)
    with pytest.raises(ValueError, match=r"give key\[1\] another kind of start .* state.inner.params\[1\] is"):
        run(solver, 1, inner_data=None, key=KEYS)
    sizes = iter((1, 2, 2))
    ragged = bilevel.Problem(
        lambda w, o, b, k: jnp.sum(w**2), lambda w, o, b, k: jnp.sum(w**2) * o,
        lambda key, outer: jnp.ones(next(sizes)), lambda key: jnp.ones(()),
    )  # fmt: skip
    solver = bilevel.SOBA(ragged, inner_step=0.1, outer_step=0.1)
    with pytest.raises(ValueError, match=r"state.inner.params is float64\[2\], and was float64\[1\]. Runs"):
        run(solver, 1, inner_data=None, key=KEYS)


def line(loss):
    return bilevel.Problem(loss, lambda w, o, b, k: jnp.sum(w**2) * o, lambda key, o: jnp.ones(2), lambda key: 1.0)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_that_draw_other_numbers_in_company_are_refused(impl):
    """Whether a run is given them, holds them in its outer variable, or makes them inside a loss."""
    problem, train, val = ridge()
    solver = bilevel.SOBA(problem, inner_step=0.2, outer_step=0.1)
    data = {"inner_data": Batches(train, 2), "outer_data": val}
    with pytest.raises(ValueError, match=r"under which a key<\w*rbg> draws other numbers than alone"):
        run(solver, 1, **data, key=jax.random.split(jax.random.key(1, impl=impl), 2))
    within = bilevel.Problem(
        problem.inner_loss, lambda w, o, b, k: problem.outer_loss(w, o["l"], b, k),
        lambda key, o: problem.init_inner(key, o["l"]), lambda key: {"l": 0.0, "k": jax.random.key(3, impl=impl)},
    )  # fmt: skip
    held = bilevel.Problem(
        lambda w, o, b, k: problem.inner_loss(w, o["l"], b, k), *(
            getattr(within, name) for name in ("outer_loss", "init_inner", "init_outer")
        )
    )
    with pytest.raises(ValueError, match=r"under which a key<\w*rbg> draws"):
        run(bilevel.SOBA(held, inner_step=0.2, outer_step=0.1), 1, **data, key=KEYS)

    def noisy(w, outer, batch, key):
        made = jax.random.key(jax.random.bits(key) % 7, impl=impl)
        return jnp.sum((w - outer - jax.random.normal(made)) ** 2)

    with pytest.raises(ValueError, match=r"a key<\w*rbg> inside inner_loss draws"):
        run(bilevel.SOBA(line(noisy), inner_step=0.2, outer_step=0.1), 1, inner_data=None, key=KEYS)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_batches_are_those_of_their_number_whatever_the_kind_of_key(impl):
    data, key = Batches(np.arange(9), 2), jax.random.key(1, impl=impl)  # four batches an epoch
    whole = data.take(key, 0, 12).index
    parts = [data.take(key, first, 4).index for first in (0, 4, 8)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert len(np.unique(whole[:4])) == 8 and not np.array_equal(whole[:4], whole[4:8])
    other = jax.random.split(key)[1]
    assert not np.array_equal(data.take(other, 0, 12).index, whole)


def test_what_cannot_be_mapped_is_told():
    def asks(w, outer, batch, key):
        still = jax.lax.stop_gradient(outer)
        seen = jax.pure_callback(lambda x: np.asarray(x), jax.ShapeDtypeStruct((), float), still)
        return jnp.sum((w - seen) ** 2) + jnp.sum(w * outer)

    solver = bilevel.SOBA(line(asks), inner_step=0.2, outer_step=0.1)
    run(solver, 1, inner_data=None, key=KEYS[0])
    with pytest.raises(ValueError, match=r"mapped by jax.vmap, which something that the losses .* for each key"):
        run(solver, 1, inner_data=None, key=KEYS)
