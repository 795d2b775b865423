"""Batches of tasks: one outer variable, an inner problem for each task."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevel
from bilevel import Batches, Implicit, Nested, PerTask, Problem, Unrolled
from bilevel.differentiation.influence import EXACTNESS
from tests.bilevel.helpers import KEY, assert_close, assert_equal, estimate

# MAML on quadratics: w_K = a + .75^K (start - a) for the support a; the query asks for another point.
LINES = Problem(
    lambda w, outer, batch, key: 0.5 * jnp.sum((w - batch) ** 2),
    lambda w, outer, batch, key: 0.5 * jnp.sum((w - batch) ** 2),
    lambda key, outer: outer,
    lambda key: jnp.array([0.2, 0.1]),
)
SUPPORT = jax.random.normal(jax.random.key(1), (10, 2))
QUERY = SUPPORT + 0.3
MAML = PerTask(Unrolled(optax.sgd(0.25), 3))


def closed_form(start, support, query):
    start = np.asarray(start)
    keep = 0.75**3
    return np.mean(keep * (support + keep * (start - support) - query), axis=0)


def test_maml_has_its_closed_form():
    start = jnp.array([0.2, 0.1])
    for rows in ([0, 1, 2], [4]):
        tasks = SUPPORT[None, np.array(rows)], QUERY[None, np.array(rows)]
        result = estimate(LINES, MAML, None, start, tasks, None, KEY)
        expected = closed_form(start, np.asarray(tasks[0][0]), np.asarray(tasks[1][0]))
        np.testing.assert_allclose(result.grad, expected, rtol=1e-12)
        away = np.asarray(start) - np.asarray(tasks[0][0])
        losses = [0.5 * np.mean(np.sum((0.75**t * away) ** 2, axis=1)) for t in range(3)]
        np.testing.assert_allclose(result.aux.info["inner_loss"], losses, rtol=1e-12)


def test_a_run_draws_tasks_and_finds_the_start_that_adapts_best(tmp_path):
    solver = Nested(LINES, MAML, optax.sgd(0.5))
    settings = {"inner_data": Batches((SUPPORT, QUERY), 4), "progress": False, "key": KEY}
    one = bilevel.run(solver, steps=1, **settings)
    inner_key = jax.random.split(KEY, 3)[1]
    rows = np.asarray(settings["inner_data"].take(inner_key, 0, 1).index[0])
    start = np.array([0.2, 0.1])
    expected = start - 0.5 * closed_form(start, np.asarray(SUPPORT)[rows], np.asarray(QUERY)[rows])
    np.testing.assert_allclose(one.outer, expected, rtol=1e-12)
    bilevel.run(solver, steps=2, **settings, checkpoint_dir=tmp_path)
    assert_equal(
        bilevel.run(solver, steps=4, **settings, checkpoint_dir=tmp_path).state,
        bilevel.run(solver, steps=4, **settings).state,
    )
    # all tasks at once: the mean adapted point is that of the queries
    whole = bilevel.run(solver, inner_data=(SUPPORT, QUERY), steps=300, progress=False).outer
    best = (np.mean(QUERY, 0) - (1 - 0.75**3) * np.mean(SUPPORT, 0)) / 0.75**3
    np.testing.assert_allclose(whole, best, rtol=1e-10)


def noisy(w, outer, batch, key):
    x, y = batch
    miss = jnp.tanh(x @ w["w"]) + w["b"] - y
    return jnp.mean(miss**2 * (1 + 0.1 * jax.random.normal(key, y.shape))) + jnp.exp(outer["l2"]) * jnp.sum(w["w"] ** 2)


REGRESSIONS = Problem(
    noisy,
    lambda w, outer, batch, key: jnp.mean((jnp.tanh(batch[0] @ w["w"]) + w["b"] - batch[1]) ** 2),
    lambda key, outer: {"w": outer["start"], "b": 0.1 * jax.random.normal(key, ())},
    lambda key: {"start": jnp.array([0.3, -0.2, 0.1]), "l2": jnp.asarray(-2.0)},
)


def regressions(count):
    keys = jax.random.split(jax.random.key(4), 4)
    x, z = (jax.random.normal(k, (count, 5, 3)) for k in keys[:2])
    return (x, jax.random.normal(keys[2], (count, 5))), (z, jax.random.normal(keys[3], (count, 5)))


def test_the_mean_of_the_tasks_equals_central_differences():
    hypergradient = PerTask(Unrolled(optax.adam(0.1), 3))
    tasks = jax.tree.map(lambda x: x[None], regressions(4))
    outer = REGRESSIONS.start_outer(KEY)
    flat, unravel = ravel_pytree(outer)

    @jax.jit
    def value(moved):
        states = hypergradient.solve(REGRESSIONS, None, unravel(moved), tasks, KEY)
        query = jax.tree.map(lambda x: x[0], tasks[1])
        loss = lambda w, batch: REGRESSIONS.outer_loss(w, unravel(moved), batch, None)  # noqa: E731
        return jnp.mean(jax.vmap(loss)(states.params, query))

    h = 1e-4
    found = estimate(REGRESSIONS, hypergradient, None, outer, tasks, None, KEY)
    np.testing.assert_allclose(found.value, value(flat), rtol=1e-12)
    for i, e in enumerate(np.eye(4) * h):
        slope = (8 * (value(flat + e) - value(flat - e)) - (value(flat + 2 * e) - value(flat - 2 * e))) / (12 * h)
        np.testing.assert_allclose(ravel_pytree(found.grad)[0][i], slope, rtol=1e-7)


@pytest.mark.filterwarnings("ignore::bilevel.StructuralZeroWarning")
@pytest.mark.parametrize(
    "hypergradient",
    [
        Implicit(optax.sgd(0.1), 3, linear_solver=bilevel.CG(max_steps=2)),
        bilevel.FirstOrder(optax.sgd(0.1), 3),
        bilevel.EvolutionStrategies(optax.sgd(0.1), 3, population=4),
        bilevel.PersistentES(optax.sgd(0.1), 3, population=4),
    ],
    ids=lambda h: type(h).__name__,
)
def test_tasks_together_are_tasks_one_by_one(hypergradient):
    support, query = regressions(3)
    outer = REGRESSIONS.start_outer(KEY)
    tasks = jax.tree.map(lambda x: x[None], (support, query))
    together = estimate(REGRESSIONS, PerTask(hypergradient), None, outer, tasks, None, KEY)
    keys = jax.random.split(KEY, 3)
    alone = []
    for i in range(3):
        data, held_out = jax.tree.map(lambda x: x[i], (support, query))  # noqa: B023
        alone.append(estimate(REGRESSIONS, hypergradient, None, outer, bilevel.FullBatch(data), held_out, keys[i]))
    assert_close(together.grad, jax.tree.map(lambda *g: sum(g) / 3, *(one.grad for one in alone)), 1e-9)
    for name in EXACTNESS:  # the largest of the tasks
        found = [one.aux.info[name] for one in alone if name in one.aux.info]
        assert (name in together.aux.info) == bool(found)
        if found:
            assert min(found) < 0.9 * max(found), "the mean would do as well"
            np.testing.assert_allclose(together.aux.info[name], max(found), rtol=1e-9)
    np.testing.assert_allclose(together.value, np.mean([one.value for one in alone]), rtol=1e-12)
    losses = np.mean([one.aux.info["inner_loss"] for one in alone], axis=0)
    np.testing.assert_allclose(together.aux.info["inner_loss"], losses, rtol=1e-12)
    state = PerTask(hypergradient).init(REGRESSIONS, outer, KEY)
    assert_equal(estimate(REGRESSIONS, PerTask(hypergradient), state, outer, tasks, None, KEY).inner_state, state)


def test_what_is_no_batch_of_tasks_is_refused():
    outer = REGRESSIONS.start_outer(KEY)
    support, query = regressions(3)
    one = lambda tree: jax.tree.map(lambda x: x[None], tree)  # noqa: E731
    hypergradient = PerTask(Unrolled(optax.sgd(0.1), 2))
    with pytest.raises(ValueError, match=r"is a dict, but must be a pair \(support, query\)"):
        hypergradient.estimate(REGRESSIONS, None, outer, {"x": jnp.ones((1, 3))}, None, KEY)
    with pytest.raises(ValueError, match=r"different numbers of tasks, \[2, 3\]"):
        hypergradient.estimate(
            REGRESSIONS, None, outer, one((support, jax.tree.map(lambda x: x[:2], query))), None, KEY
        )
    with pytest.raises(ValueError, match="give no outer data"):
        hypergradient.estimate(REGRESSIONS, None, outer, one((support, query)), query, KEY)
