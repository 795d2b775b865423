"""Outer transformations: budgets are never exceeded, sets are the best there are, projections stay feasible."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel


def chosen(scores, budget, costs=1, key=0):
    """The set that `allocate` moves to, from all gates on."""
    transform = bilevel.allocate(budget, costs, key=jax.random.key(key))
    gates = jax.tree.map(jnp.ones_like, scores)
    updates, _ = transform.update(jax.tree.map(jnp.negative, scores), transform.init(gates), gates)
    return optax.apply_updates(gates, updates)


def best(scores, costs, budget):
    """By trying all sets."""
    sets = np.array(list(itertools.product([0, 1], repeat=len(scores))))
    return max(sets[sets @ costs <= budget] @ scores)


@pytest.mark.parametrize(("kind", "draws"), [("whole", 1000), ("real", 300), ("equal", 100)])
def test_budget_is_never_exceeded_and_the_set_is_nearly_the_best(kind, draws):
    rng, modules, exact = np.random.default_rng(0), 8, 0
    for draw in range(draws):
        scores = rng.gamma(0.5, size=modules)
        costs = {"whole": rng.integers(1, 10**6, modules), "real": rng.gamma(1, size=modules), "equal": np.ones(8)}[
            kind
        ]
        budget = float(rng.uniform(costs.min(), costs.sum()))
        on = np.asarray(chosen(jnp.asarray(scores), budget, costs, draw))
        assert set(on) <= {0.0, 1.0}
        assert on @ costs <= budget
        room = budget - on @ costs
        assert not (costs[on == 0] < room * (1 - 1e-6)).any()  # nothing more fits
        optimum = best(scores, costs, budget)
        assert on @ scores >= optimum / 2
        exact += on @ scores >= optimum * (1 - 1e-12)
    assert exact == draws if kind == "equal" else exact > 0.7 * draws


def test_ratio_rule_alone_would_lose_what_one_big_module_is_worth():
    scores, costs = jnp.asarray([2.0, 100.0]), np.array([1, 100])
    np.testing.assert_array_equal(chosen(scores, 100, costs), [0.0, 1.0])


def test_ties_are_broken_by_the_key_and_drawn_anew():
    gates = {"a": jnp.ones(4), "b": jnp.ones((2, 3))}
    transform = bilevel.allocate(3, key=jax.random.key(0))
    state, sets = transform.init(gates), []
    for _ in range(40):
        updates, state = transform.update(jax.tree.map(jnp.zeros_like, gates), state, gates)
        sets.append(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(optax.apply_updates(gates, updates))]))
    assert all(on.sum() == 3 for on in sets)
    assert np.min(np.sum(sets, axis=0)) > 0  # every module has had its turn
    first = transform.update(gates, transform.init(gates), gates)[0]
    again = transform.update(gates, transform.init(gates), gates)[0]
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_a_budget_for_each_group_and_modules_that_may_never_be_on():
    scores = {"a": jnp.asarray([3.0, 2.0, 1.0]), "b": jnp.asarray([9.0, 8.0, 7.0])}
    on = chosen(scores, 2, {"a": np.array([1, 1, 1]), "b": np.array([np.inf, 1, np.inf])})
    np.testing.assert_array_equal(on["a"], [1, 0, 0])
    np.testing.assert_array_equal(on["b"], [0, 1, 0])
    groups = {"a": bilevel.allocate(2, key=jax.random.key(0)), "b": bilevel.allocate(5, 3, key=jax.random.key(1))}
    transform = optax.partition(groups, {"a": "a", "b": "b"})
    updates, _ = transform.update(jax.tree.map(jnp.negative, scores), transform.init(scores), scores)
    on = optax.apply_updates(scores, updates)
    np.testing.assert_array_equal(on["a"], [1, 1, 0])
    np.testing.assert_array_equal(on["b"], [1, 0, 0])


def test_negative_scores_come_last_and_costs_count():
    np.testing.assert_array_equal(chosen(jnp.asarray([-1.0, 0.5, -3.0]), 2), [1, 1, 0])
    np.testing.assert_array_equal(chosen(jnp.asarray([3.0, 2.0, 2.0]), 2, np.array([2, 1, 1])), [0, 1, 1])


@pytest.mark.parametrize(
    ("budget", "costs", "message"),
    [
        (2, np.array([1.0, 0.0, 1.0]), r"a module of cost 0: costs must be positive"),
        (2, np.array([1.0, np.nan, 1.0]), r"a module of cost nan"),
        (2, np.array([3, 4, 5]), r"The budget 2 is less than the cheapest module, which costs 3\."),
        (2, np.ones(4), r"The costs of allocate do not fit its gates"),
        (2, {"a": 1}, r"The costs of allocate do not fit its gates"),
    ],
)
def test_bad_budgets_and_costs_are_one_sentence(budget, costs, message):
    with pytest.raises(ValueError, match=message):
        bilevel.allocate(budget, costs, key=jax.random.key(0)).init(jnp.ones(3))


def test_gates_are_needed():
    for transform in (bilevel.allocate(1, key=jax.random.key(0)), bilevel.project("simplex")):
        with pytest.raises(ValueError, match=r"call update\(updates, state, params\)"):
            transform.update(jnp.ones(3), transform.init(jnp.ones(3)))
    with pytest.raises(ValueError, match=r"project\('cube'\): there is no such projection; optax has box, h"):
        bilevel.project("cube")


FEASIBLE = {
    "simplex": ({"scale": 2.0}, lambda x: abs(x.sum() - 2.0) < 1e-12 and x.min() >= 0),
    "box": ({"lower": -0.1, "upper": 0.2}, lambda x: x.min() >= -0.1 - 1e-15 and x.max() <= 0.2 + 1e-15),
    "l1_ball": ({"scale": 0.5}, lambda x: abs(x).sum() <= 0.5 + 1e-12),
    "l2_ball": ({}, lambda x: (x**2).sum() <= 1 + 1e-12),
    "non_negative": ({}, lambda x: x.min() >= -1e-15),
}


@pytest.mark.parametrize("name", FEASIBLE)
def test_projected_descent_stays_feasible_and_finds_the_constrained_minimum(name):
    options, feasible = FEASIBLE[name]
    target = jnp.asarray([0.7, -0.4, 1.5, 0.1])
    transform = optax.chain(optax.sgd(0.3), bilevel.project(name, **options))
    x, state = jnp.zeros(4), transform.init(jnp.zeros(4))
    for _ in range(60):
        updates, state = transform.update(2.0 * (x - target), state, x)
        x = optax.apply_updates(x, updates)
        assert feasible(x)
    # The projection of the target is the constrained minimum of the distance to it.
    with jax.numpy_dtype_promotion("standard"):  # optax's own rules, here and below
        wanted = getattr(optax.projections, f"projection_{name}")(target, **options)
    np.testing.assert_allclose(x, wanted, atol=1e-9)


def test_center_keeps_the_sum_under_adam():
    transform = optax.chain(optax.adam(0.1), bilevel.center())
    x = jnp.asarray([0.3, -0.3, 0.0])
    state = transform.init(x)
    for step in range(5):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transform.update(jnp.asarray([1.0, -0.2 * step, 3.0]), state, x)
        x = optax.apply_updates(x, updates)
    assert abs(x.sum()) < 1e-14 < jnp.abs(x).max()


def test_center_takes_one_mean_off_each_leaf():
    tree = {"layers": jnp.arange(6.0).reshape(2, 3) ** 2, "one": jnp.array([3.0])}
    moved, _ = bilevel.center().update(tree, optax.EmptyState())
    np.testing.assert_allclose(moved["layers"], tree["layers"] - 55 / 6, rtol=1e-14)
    np.testing.assert_array_equal(moved["one"], [0.0])


def test_allocation_inside_a_solver():
    """Four on/off features, two of which the target needs: the unrolled hypergradient finds them."""
    features = jax.random.normal(jax.random.key(0), (50, 4))
    target = features @ jnp.asarray([0.0, 2.0, 0.0, -1.0])

    def loss(w, gates, batch, key):
        return jnp.mean((features @ (gates * w) - target) ** 2)

    problem = bilevel.Problem(loss, loss, lambda key, gates: jnp.zeros(4), lambda key: jnp.ones(4))
    budget = optax.chain(bilevel.allocate(2, key=jax.random.key(1)))
    solver = bilevel.Nested(problem, bilevel.Unrolled(optax.sgd(0.1), 5), budget, inner_start="cold")
    state = solver.init(jax.random.key(2))
    state, _ = jax.jit(solver.step)(state, None, None)
    np.testing.assert_array_equal(state.outer, [0, 1, 0, 1])


@pytest.mark.parametrize("threshold", [0.0, 0.5, np.float64(1.5)])
def test_soft_threshold_is_the_minimiser_of_its_definition(threshold):
    w = np.array([3.0, -2.0, 1.0, -0.25, 0.0])
    found = bilevel.soft_threshold({"w": jnp.asarray(w)}, threshold)["w"]
    grid = np.linspace(-4.0, 4.0, 8001)
    best = grid[np.argmin(0.5 * (grid - w[:, None]) ** 2 + threshold * np.abs(grid), axis=1)]
    np.testing.assert_allclose(found, best, atol=1e-3)
