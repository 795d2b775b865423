import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import FirstOrder, Nested, Unrolled
from bilevel.testing import quadratic
from tests.bilevel.helpers import KEY, LINE, LINE_SOLVER, NETWORK, assert_close, assert_equal, network_batches, step

Q = quadratic()


@pytest.mark.parametrize("start", ["warm", "cold"])
def test_two_steps_by_hand(start):
    hypergradient = Unrolled(optax.sgd(0.5), 7)
    solver = Nested(Q.problem, hypergradient, optax.sgd(0.1), inner_start=start)
    state = solver.init(KEY)
    tilt, begin = np.zeros(3), Q.start
    for t in range(2):
        outer = {"tilt": tilt}
        warm = begin if start == "warm" else None
        expected = Q.unrolled(outer, 7, rate=0.5, start=warm)["tilt"]
        end = Q.trained(outer, 7, rate=0.5, start=warm)
        state, metrics = step(solver, state, None, None)
        assert_close(state.inner.params, end, 1e-12)
        np.testing.assert_allclose(metrics["outer_loss"], Q.value(outer, 7, rate=0.5, start=warm), rtol=1e-12)
        np.testing.assert_allclose(metrics["hypergradient_norm"], np.linalg.norm(expected), rtol=1e-10)
        last = Q.trained(outer, 6, rate=0.5, start=warm)  # where the last inner step took its gradient
        np.testing.assert_allclose(metrics["inner_loss"], last @ (Q.H @ last / 2 - Q.b - Q.C @ tilt), rtol=1e-10)
        tilt = tilt - 0.1 * expected
        begin = end
        assert_close(state.outer, {"tilt": tilt}, 1e-10)
        assert state.step == t + 1
        assert state.inner.step == (7 * (t + 1) if start == "warm" else 7)


def test_cold_differentiates_the_start_and_warm_does_not():
    problem = bilevel.Problem(
        LINE.inner_loss, LINE.outer_loss, lambda key, outer: 2.0 * outer, lambda key: jnp.full(2, 0.3)
    )
    # Inner descent on (w - outer)^2 with rate .1 keeps .8 of the distance a step.
    slope = {"cold": 1 + 0.8**3, "warm": 1 - 0.8**3}
    for start, expected in slope.items():
        solver = Nested(problem, Unrolled(optax.sgd(0.1), 3), optax.sgd(1.0), inner_start=start)
        state, _ = solver.step(solver.init(KEY), None, None)
        end = 0.3 * (1 + 0.8**3)
        np.testing.assert_allclose(state.outer, 0.3 - 2 * (end - 1.0) * expected, rtol=1e-12)


def test_warm_start_learns_a_learning_rate_of_an_injected_optimizer():
    optimizer = lambda outer: optax.inject_hyperparams(optax.sgd)(learning_rate=outer["rate"])  # noqa: E731
    problem = bilevel.Problem(
        Q.problem.inner_loss, Q.problem.outer_loss, Q.problem.init_inner, lambda k: {"tilt": jnp.ones(3), "rate": 0.5}
    )
    solver = Nested(problem, Unrolled(optimizer, 5), optax.sgd(0.01))
    state = solver.init(KEY)
    for _ in range(3):
        outer = jax.tree.map(np.asarray, state.outer)
        expected = Q.unrolled(outer, 5, start=np.asarray(state.inner.params))
        state, _ = step(solver, state, None, None)
        assert_close(state.outer, {name: outer[name] - 0.01 * expected[name] for name in outer}, 1e-10)


MIXED = bilevel.Problem(
    lambda w, outer, batch, key: jnp.sum((w["w"] - outer["a"]) ** 2),
    lambda w, outer, batch, key: jnp.sum((w["w"] - 1.0) ** 2),
    lambda key, outer: {"w": jnp.zeros(2), "n": jnp.arange(3)},
    lambda key: {
        "a": jnp.full(2, 0.3),
        "on": jnp.asarray([True, False]),
        "n": jnp.asarray(4),
        "key": jax.random.split(key, 2),
    },
)


def test_leaves_that_do_not_move_are_masked_from_the_outer_optimizer():
    seen = []

    def update(updates, state, params=None):
        seen.append((updates, params))
        return updates, state

    spy = optax.GradientTransformation(lambda params: seen.append(params) or optax.EmptyState(), update)
    solver = Nested(MIXED, Unrolled(optax.sgd(0.1), 2), optax.chain(spy, optax.adamw(0.1)))
    state = solver.init(KEY)
    state, metrics = solver.step(state, None, None)
    for tree in (seen[0], *seen[1]):
        assert {name: leaf is None for name, leaf in tree.items()} == {"a": False, "on": True, "n": True, "key": True}
    before = solver.init(KEY)
    for name in ("on", "n"):
        assert_equal(state.outer[name], before.outer[name])
    assert_equal(state.inner.params["n"], before.inner.params["n"])
    assert set(metrics) >= {"outer_loss", "inner_loss", "hypergradient_norm"}


def test_keys_advance_to_keys_that_no_loss_has_seen():
    solver = Nested(MIXED, Unrolled(optax.sgd(0.1), 3), optax.sgd(0.1))
    state, seen = solver.init(KEY), set()
    for _ in range(4):
        keys = state.outer["key"]
        used = [jax.vmap(lambda k: jax.random.fold_in(k, t))(keys) for t in range(4)]  # noqa: B023
        words = {tuple(map(int, row)) for k in (keys, *used) for row in jax.random.key_data(k)}
        assert len(words) == 10 and not words & seen
        seen |= words
        state, _ = step(solver, state, None, None)


def test_the_key_of_the_state_advances():
    state = LINE_SOLVER.init(KEY)
    after, _ = step(LINE_SOLVER, state, None, None)
    assert not np.array_equal(jax.random.key_data(after.key), jax.random.key_data(state.key))


def test_projection_comes_after_the_update():
    problem = bilevel.Problem(
        LINE.inner_loss,
        LINE.outer_loss,
        LINE.init_inner,
        LINE.init_outer,
        project=lambda outer: jnp.clip(outer, 0.25, 0.31),
    )
    state, _ = Nested(problem, Unrolled(optax.sgd(0.1), 3), optax.sgd(10.0)).step(LINE_SOLVER.init(KEY), None, None)
    np.testing.assert_array_equal(state.outer, 0.31)


def test_outer_leaves_of_several_precisions():
    problem = bilevel.Problem(
        lambda w, outer, batch, key: jnp.sum((w - outer["a"].astype(w.dtype) - outer["b"]) ** 2),
        LINE.outer_loss,
        lambda key, outer: jnp.zeros(2),
        lambda key: {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)},
    )
    solver = Nested(problem, Unrolled(optax.sgd(0.1), 3), optax.adam(0.1))
    state, metrics = solver.step(solver.init(KEY), None, None)
    assert state.outer["a"].dtype == jnp.bfloat16 and state.outer["b"].dtype == jnp.float64
    assert np.isfinite(metrics["hypergradient_norm"])


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.01, 4)),
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.lbfgs(0.1, linesearch=None),
        optax.polyak_sgd(0.1),
        optax.optimistic_gradient_descent(0.1),
    ],
    ids=["injected schedule", "MultiSteps", "l-bfgs", "polyak", "optimistic"],
)
def test_any_outer_optimizer_runs_in_the_loop(optimizer):
    solver = Nested(LINE, Unrolled(optax.sgd(0.1), 3), optimizer)
    result = bilevel.run(solver, steps=6, progress=False)
    assert result.history["outer_loss"][-1] < result.history["outer_loss"][0]


@pytest.mark.parametrize("optimizer", [optax.lbfgs(), optax.contrib.schedule_free_adamw(0.1)], ids=["search", "free"])
def test_outer_optimizers_that_evaluate_elsewhere_are_refused(optimizer):
    solver = Nested(LINE, Unrolled(optax.sgd(0.1), 3), optimizer)
    with pytest.raises(ValueError, match="use "):
        solver.step(solver.init(KEY), None, None)


def test_seeds_in_parallel_are_seeds_one_by_one():
    solver = Nested(NETWORK, Unrolled(optax.adam(0.05), 2), optax.adam(0.1))
    batches = network_batches(2)
    validation = jax.tree.map(lambda x: x[:5], batches.arrays)
    keys = jax.random.split(KEY, 2)
    states = jax.vmap(solver.init)(keys)
    together, _ = jax.jit(jax.vmap(lambda s: solver.step(s, batches, validation)))(states)
    for i in range(2):
        alone, _ = step(solver, solver.init(keys[i]), batches, validation)
        assert_close(jax.tree.map(lambda x: x[i], together.outer), alone.outer, 1e-10)  # noqa: B023


def test_a_user_may_compile_the_step_in_either_way():
    state = LINE_SOLVER.init(KEY)
    expected, _ = LINE_SOLVER.step(state, None, None)
    bound, _ = jax.jit(LINE_SOLVER.step)(state, None, None)
    passed, _ = jax.jit(Nested.step)(LINE_SOLVER, state, None, None)
    assert_close(bound.outer, expected.outer, 1e-14)
    assert_close(passed.outer, expected.outer, 1e-14)


def test_first_order_moves_along_the_direct_term():
    solver = Nested(Q.problem, FirstOrder(optax.sgd(0.5), 3), optax.sgd(0.1))
    state = solver.init(KEY)._replace(outer={"tilt": jnp.ones(3)})
    state, _ = solver.step(state, None, None)
    np.testing.assert_allclose(state.outer["tilt"], 0.9, rtol=1e-14)


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="inner_start='hot'"):
        Nested(LINE, Unrolled(optax.sgd(0.1), 3), optax.sgd(0.1), inner_start="hot")
