"""What holds for every estimator of the table."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import FirstOrder
from bilevel.hypergradients.contract import driven_from_host
from bilevel.testing import quadratic
from tests.bilevel.estimators import EXACT, TABLE
from tests.bilevel.helpers import (
    KEY,
    NETWORK,
    ROWS,
    assert_close,
    assert_equal,
    estimate,
    network_batches,
    solve,
)

Q = quadratic()
FULL = {"tilt": np.array([0.3, -0.2, 0.5]), "rate": np.array(0.5), "start": 0.7 * Q.start}
SGD = optax.sgd(0.5)
SGD_OF_OUTER = lambda outer: optax.sgd(outer["rate"])  # noqa: E731
INJECTED = lambda outer: optax.inject_hyperparams(optax.sgd)(learning_rate=outer["rate"])  # noqa: E731

each = pytest.mark.parametrize("row", EXACT, ids=lambda row: row.name)


def test_every_estimator_has_a_row():
    public = {x for x in vars(bilevel).values() if isinstance(x, type) and hasattr(x, "estimate")}
    assert public - {bilevel.Hypergradient} == {type(row.make(SGD, 3)) for row in TABLE}
    assert len({row.name for row in TABLE}) == len(TABLE)


def named_zeros(caught):
    return sorted({w.message.args[0].split("outer leaf ")[1].split(" is")[0] for w in caught})


@each
@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_quadratic_closed_form(row, steps):
    outer = {"tilt": FULL["tilt"]}
    result = estimate(Q.problem, row.make(SGD, steps), None, outer, None, None, KEY)
    np.testing.assert_allclose(result.value, Q.value(outer, steps, rate=0.5), rtol=1e-12)
    assert_close(result.inner_state.params, Q.trained(outer, steps, rate=0.5), 1e-12)
    assert_close(result.grad, row.closed_form(Q, outer, steps, rate=0.5), row.tolerance)


@each
@pytest.mark.parametrize("optimizer", [SGD_OF_OUTER, INJECTED], ids=["sgd", "inject_hyperparams"])
@pytest.mark.parametrize("start", ["cold", "warm"])
def test_quadratic_rate_and_start(row, optimizer, start):
    hypergradient = row.make(optimizer, 7)
    warm = hypergradient.init(Q.problem, FULL, KEY) if start == "warm" else None
    if warm is not None:
        # Trained elsewhere: nothing of the old learning rate may survive in the optimizer's state.
        elsewhere = FULL | {"rate": np.array(0.1)}
        warm = hypergradient.solve(Q.problem, warm, elsewhere, None, KEY)
    point = None if warm is None else np.asarray(warm.params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = hypergradient.estimate(Q.problem, warm, FULL, None, None, KEY)
    blind = set(row.blind) | ({"start"} if start == "warm" else set())
    assert ", ".join(named_zeros(caught)) == ", ".join(f"['{name}']" for name in sorted(blind))
    np.testing.assert_allclose(result.value, Q.value(FULL, 7, start=point), rtol=1e-12)
    assert_close(result.grad, row.closed_form(Q, FULL, 7, start=point), row.tolerance)


@pytest.mark.parametrize("row", [row for row in TABLE if not row.tasks], ids=lambda row: row.name)
@pytest.mark.parametrize("unit", [2.0**-660, 2.0**530], ids=["1e-199", "1e159"])
def test_the_unit_of_the_outer_loss_does_not_matter(row, unit):
    """Norms and solvers square what they are given, and the square of 1e-199 is 0."""
    outer, hypergradient = {"tilt": FULL["tilt"]}, row.make(SGD, 3)
    with_unit = dataclasses.replace(Q.problem, outer_loss=lambda *args: unit * Q.problem.outer_loss(*args))
    plain, scaled = (estimate(p, hypergradient, None, outer, None, None, KEY) for p in (Q.problem, with_unit))
    assert_close(jax.tree.map(lambda x: x / unit, scaled.grad), plain.grad, 1e-13)
    for name in ("linear_residual", "linear_iterations", "hvps"):
        np.testing.assert_allclose(scaled.aux.info.get(name, 0), plain.aux.info.get(name, 0), rtol=1e-12)


def trained_on(row, batches, problem=NETWORK, steps=3):
    hypergradient = row.make(optax.sgd(0.1), steps)
    outer = NETWORK.start_outer(KEY)
    validation = jax.tree.map(jnp.asarray, ROWS)
    return estimate(problem, hypergradient, hypergradient.init(NETWORK, outer, KEY), outer, batches, validation, KEY)


@each
def test_batches_in_every_form_are_the_same(row):
    indexed = network_batches(3)
    stacked = jax.tree.map(lambda x: x[indexed.index], indexed.arrays)
    a, b = trained_on(row, indexed), trained_on(row, stacked)
    assert_close(b.grad, a.grad, 1e-12)
    assert_close(b.inner_state.params, a.inner_state.params, 1e-12)

    whole = jax.tree.map(jnp.asarray, ROWS)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), whole)
    a, b = trained_on(row, bilevel.FullBatch(whole)), trained_on(row, stacked)
    assert_close(b.grad, a.grad, 1e-12)
    assert_close(b.inner_state.params, a.inner_state.params, 1e-12)


@each
def test_no_batch_is_the_batch_that_the_loss_holds(row):
    whole = jax.tree.map(jnp.asarray, ROWS)
    holding = bilevel.Problem(
        jax.tree_util.Partial(lambda held, w, o, batch, key: NETWORK.inner_loss(w, o, held, key), whole),
        NETWORK.outer_loss,
        NETWORK.init_inner,
        NETWORK.init_outer,
    )
    a, b = trained_on(row, bilevel.FullBatch(whole)), trained_on(row, None, holding)
    assert_close(b.grad, a.grad, 1e-12)


def reporting(inner, outer, batch, key):
    # Integer and boolean arrays and keys in aux must not stand in the way of a derivative.
    folded = outer["key"]
    return jnp.sum((inner["w"] - outer["a"]) ** 2), {
        "key": key,
        "folded": folded,
        "count": batch,
        "even": batch % 2 == 0,
    }


REPORTING = bilevel.Problem(
    reporting,
    reporting,
    lambda key, outer: {"w": jnp.zeros(2), "id": jnp.arange(3), "key": jax.random.key(5)},
    lambda key: {"a": jnp.ones(2), "key": jax.random.split(key, 2), "n": jnp.asarray(3), "flag": jnp.asarray(True)},
    has_aux=True,
)


@each
@pytest.mark.parametrize("start", ["cold", "warm"])
def test_keys_and_leaves_that_do_not_move(row, start):
    hypergradient = row.make(optax.sgd(0.1), 5)
    outer = REPORTING.start_outer(KEY)
    warm = hypergradient.init(REPORTING, outer, KEY) if start == "warm" else None
    result = estimate(REPORTING, hypergradient, warm, outer, jnp.arange(5), jnp.asarray(8), KEY)

    keys = jax.random.split(KEY, 7)
    assert_equal(result.aux.inner["key"], keys[1:6])  # the first is that of a start
    assert_equal(result.aux.outer["key"], keys[6])
    for t in range(5):
        assert_equal(result.aux.inner["folded"][t], jax.vmap(lambda k: jax.random.fold_in(k, t))(outer["key"]))  # noqa: B023
    assert_equal(result.aux.outer["folded"], jax.vmap(lambda k: jax.random.fold_in(k, 5))(outer["key"]))
    np.testing.assert_array_equal(result.aux.inner["count"], np.arange(5))
    assert result.aux.outer["even"]

    assert {name: leaf is None for name, leaf in result.grad.items()} == {
        "a": False,
        "key": True,
        "n": True,
        "flag": True,
    }
    before = hypergradient.init(REPORTING, outer, KEY).params
    for name in ("id", "key"):
        assert_equal(result.inner_state.params[name], before[name])
    assert result.inner_state.step == 5


@functools.cache
def losses_by_hand():
    """The inner losses of three steps of gradient descent on `NETWORK`, each before its step."""
    outer = NETWORK.start_outer(KEY)
    w = FirstOrder(optax.sgd(0.1), 3).init(NETWORK, outer, KEY).params
    descend, found = jax.jit(jax.value_and_grad(NETWORK.inner_loss)), []
    for t, index in enumerate(network_batches(3).index):
        loss, grad = descend(w, outer, jax.tree.map(lambda x: x[index], ROWS), jax.random.split(KEY, 5)[1 + t])  # noqa: B023
        found.append(loss)
        w = jax.tree.map(lambda w, g: w - 0.1 * g, w, grad)
    return np.array(found)


@each
def test_value_and_info_are_those_of_the_training(row):
    result = trained_on(row, network_batches(3))
    hypergradient = row.make(optax.sgd(0.1), 3)
    outer = NETWORK.start_outer(KEY)
    start = hypergradient.init(NETWORK, outer, KEY)
    trained = solve(NETWORK, hypergradient, start, outer, network_batches(3), KEY)
    assert_close(result.inner_state.params, trained.params, 1e-12)
    validation = jax.tree.map(jnp.asarray, ROWS)
    last = jax.random.split(KEY, 5)[4]
    np.testing.assert_allclose(result.value, NETWORK.outer_loss(trained.params, outer, validation, last), rtol=1e-12)
    np.testing.assert_allclose(result.aux.info["inner_loss"], losses_by_hand(), rtol=1e-12)


@each
def test_vmap_over_seeds_is_a_loop_over_seeds(row):
    hypergradient = row.make(optax.adam(0.05), 3)
    outer, batches = NETWORK.start_outer(KEY), network_batches(3)
    validation = jax.tree.map(jnp.asarray, ROWS)
    keys = jax.random.split(KEY, 3)
    function = jax.jit(
        jax.vmap(lambda key: hypergradient.estimate(NETWORK, None, outer, batches, validation, key).grad)
    )
    if driven_from_host(hypergradient):
        with pytest.raises(ValueError, match="runs compiled programs from the host, and cannot be traced"):
            function(keys)
        return
    together = function(keys)
    for i in range(3):
        alone = estimate(NETWORK, hypergradient, None, outer, batches, validation, keys[i])
        assert_close(jax.tree.map(lambda x: x[i], together), alone.grad, 1e-10)  # noqa: B023


@each
def test_value_and_hypergrad_is_the_estimate_as_a_function(row):
    hypergradient = row.make(SGD, 7)
    outer = {"tilt": FULL["tilt"]}
    value, grad = bilevel.value_and_hypergrad(Q.problem, hypergradient)(outer, None, None, None, KEY)
    result = estimate(Q.problem, hypergradient, None, outer, None, None, KEY)
    np.testing.assert_allclose(value, result.value, rtol=1e-12)
    assert_close(grad, result.grad, 1e-12)


@each
@pytest.mark.parametrize("steps", [0, -1, 2.0])
def test_steps_that_are_none_are_refused(row, steps):
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        row.make(SGD, steps)


@each
@pytest.mark.parametrize("count", [1, 2, 4])
def test_batches_of_another_length_are_refused_by_leaf(row, count):
    batches = jax.tree.map(lambda x: jnp.stack([x] * count), ROWS)
    with pytest.raises(ValueError, match=rf"\['row'\] has shape \({count}, 12\), but 3 inner steps"):
        row.make(SGD, 3).estimate(NETWORK, None, NETWORK.start_outer(KEY), batches, ROWS, KEY)
