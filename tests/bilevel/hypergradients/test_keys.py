"""No random key is consumed twice: under `jax.debug_key_reuse`, every estimator and solver is silent."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.hypergradients.query import split_keys
from tests.bilevel.estimators import TABLE, tasks
from tests.bilevel.helpers import KEY
from tests.bilevel.solvers.table import each

SGD = optax.sgd(0.1)


def dropped(w, key):
    return jnp.where(jax.random.bernoulli(key, 0.5, w.shape), w, 0.0)


def inner_loss(w, outer, batch, key):
    return jnp.sum((dropped(w, key) - 1.0) ** 2) + outer * jnp.sum(w**2)


def outer_loss(w, outer, batch, key):
    return jnp.sum((dropped(w, key) - 1.0) ** 2)


PROBLEM = bilevel.Problem(
    inner_loss, outer_loss, lambda key, outer: jax.random.uniform(key, (4,)), lambda key: jax.random.uniform(key, ())
)
OUTER = jnp.asarray(0.1)


@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_an_estimate_consumes_each_key_once(row, start):
    hypergradient = row.make(SGD, 4)
    batches = tasks(2) if row.tasks else None
    with jax.debug_key_reuse(True), warnings.catch_warnings():
        warnings.simplefilter("ignore", bilevel.StructuralZeroWarning)
        state = hypergradient.init(PROBLEM, OUTER, jax.random.key(1)) if start == "warm" else None
        hypergradient.estimate(PROBLEM, state, OUTER, batches, None, jax.random.key(2))


@pytest.mark.parametrize("inner_start", ["cold", "warm"])
def test_outer_steps_consume_each_key_once(inner_start):
    solver = bilevel.Nested(PROBLEM, bilevel.Unrolled(SGD, 3), SGD, inner_start=inner_start)
    with jax.debug_key_reuse(True):
        state = solver.init(jax.random.key(3))
        for _ in range(2):
            state, _ = solver.step(state, None, None)


@each()
def test_iterations_of_a_stochastic_solver_consume_each_key_once(row):
    solver = row.make(PROBLEM, 0.1, 0.1, blocks=(2, 2), **row.small)
    data = bilevel.Batches(jnp.ones((8, 1)), 4)

    def batches(count, key):
        return data.take(key, 0, count)

    with jax.debug_key_reuse(True):
        state = solver.init(jax.random.key(3))
        outer = batches(solver.outer_batches_per_step, jax.random.key(5))
        outer = outer.batch(0) if solver.outer_batches_per_step == 1 else outer
        solver.step(state, batches(solver.inner_batches_per_step, jax.random.key(4)), outer)


def test_all_keys_of_an_estimate_differ():
    keys = split_keys(KEY, 5)
    words = [jax.random.key_data(k).reshape(-1, 2) for k in (keys.start, keys.inner, keys.outer, keys.own)]
    assert len({tuple(word) for word in np.concatenate(words).tolist()}) == 8
    split = jax.random.split(KEY, 7)
    np.testing.assert_array_equal(
        np.concatenate(words[:3]), jax.random.key_data(jnp.concatenate([split[:1], split[1:6], split[6:]]))
    )


def test_a_cold_start_has_a_key_of_its_own():
    """The start and the mask of the first step are independent: their keys are the first two of the schedule."""
    seen = {}

    def record(name):
        return lambda key: seen.setdefault(name, []).append(np.asarray(key))

    def loss(w, outer, batch, key):
        jax.debug.callback(record("step"), jax.random.key_data(key))
        return jnp.sum((w - outer) ** 2)

    def start(key, outer):
        jax.debug.callback(record("start"), jax.random.key_data(key))
        return jnp.zeros(2)

    case = bilevel.Problem(loss, lambda w, o, b, k: jnp.sum(w**2), start, lambda key: OUTER)
    bilevel.FirstOrder(SGD, 1).solve(case, None, OUTER, None, KEY)
    jax.effects_barrier()
    split = jax.random.key_data(jax.random.split(KEY, 3))
    np.testing.assert_array_equal(seen["start"][0], split[0])
    np.testing.assert_array_equal(seen["step"][0], split[1])
