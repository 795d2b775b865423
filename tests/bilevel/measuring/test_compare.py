"""Comparing estimators on one problem."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest

import bilevel
from bilevel.extend import register
from bilevel.measuring.flops import gradient_flops, hvp_flops
from bilevel.testing import ridge

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def comparison():
    hessian, coupling = jnp.diag(jnp.linspace(0.5, 1.0, 6)), jax.random.normal(jax.random.key(0), (6, 3))

    def inner(w, outer, batch, key):
        return 0.5 * w @ hessian @ w - (coupling @ outer + batch.mean(axis=0)) @ w

    def outer(w, outer, batch, key):
        return 0.5 * jnp.sum((w - 1.0) ** 2) + 0.05 * jnp.sum(outer**2)

    problem = bilevel.Problem(inner, outer, lambda key, outer: jnp.zeros(6), lambda key: jnp.ones(3))
    return bilevel.compare(
        problem,
        {
            "mixed": bilevel.Unrolled(optax.sgd(1.0), 40),
            "reverse": bilevel.Unrolled(optax.sgd(1.0), 40, mode="reverse", checkpoint="none"),
            "implicit": bilevel.Implicit(optax.sgd(1.0), 40),
            "one step": bilevel.OneStep(optax.sgd(1.0), 40),
        },
        reference="reverse",
        inner_data=bilevel.Batches(jnp.zeros((8, 6)), 2),
        repeats=1,
    )


def test_variance_is_a_column_where_it_is_asked_for(comparison):
    assert comparison["mixed"].variance is None and "variance" not in str(comparison)
    problem = bilevel.Problem(
        lambda w, outer, batch, key: 0.5 * jnp.sum((w - outer - batch.mean(axis=0)) ** 2),
        lambda w, outer, batch, key: 0.5 * jnp.sum((w - 1.0) ** 2),
        lambda key, outer: jnp.zeros(3),
        lambda key: jnp.ones(3),
    )
    few, many = bilevel.Unrolled(optax.sgd(0.5), 1), bilevel.Unrolled(optax.sgd(0.5), 8)
    data = bilevel.Batches(jax.random.normal(jax.random.key(1), (16, 3)), 2)
    found = bilevel.compare(
        problem, {"few": few, "many": many}, reference="many", inner_data=data, repeats=1, samples=8
    )
    outer = problem.start_outer(jax.random.key(0))
    for row, estimator in (("few", few), ("many", many)):
        expected = bilevel.variance(problem, estimator, inner_data=data, outer=outer, samples=8).relative
        assert expected > 0
        np.testing.assert_allclose(found[row].variance, expected, rtol=1e-12)
    assert f"{found['few'].variance:.2e}" in str(found) and "variance" in str(found)
    with pytest.raises(ValueError, match="samples=1"):
        bilevel.compare(problem, {"few": few}, reference="few", inner_data=data, repeats=1, samples=1)


def test_estimators_that_agree_and_one_that_does_not(comparison):
    assert [row.name for row in comparison.rows] == ["reverse", "mixed", "implicit", "one step"]
    assert comparison["mixed"].relative_error < 1e-12 and comparison["mixed"].cosine > 1 - 1e-12
    assert comparison["implicit"].relative_error < 1e-6
    row, a, b = comparison["one step"], comparison["one step"].grad, comparison["reverse"].grad
    np.testing.assert_allclose(row.relative_error, np.linalg.norm(a - b) / np.linalg.norm(b), rtol=1e-12)
    np.testing.assert_allclose(row.cosine, a @ b / np.linalg.norm(a) / np.linalg.norm(b), rtol=1e-12)
    np.testing.assert_allclose(row.norm, np.linalg.norm(a), rtol=1e-12)
    assert row.relative_error > 0.1 and row.cosine < 0.999 and abs(np.linalg.norm(a) / np.linalg.norm(b) - 1) > 0.1
    np.testing.assert_allclose(comparison["mixed"].value, comparison["reverse"].value, rtol=1e-12)


def test_costs_are_counted(comparison):
    assert comparison["mixed"].gradients > comparison["one step"].gradients > 40
    assert comparison["mixed"].temporary > 0 and comparison["mixed"].seconds > 0


def test_hessian_vector_products_are_counted(comparison):
    assert (comparison["mixed"].hvps, comparison["reverse"].hvps, comparison["one step"].hvps) == (40, 40, 1)
    assert comparison["implicit"].hvps % 40 == 0 and comparison["implicit"].hvps >= 3 * 40  # the mean of 40 batches


def solved_by(linear_solver):
    def inner(w, outer, batch, key):
        return jnp.sum(jnp.cosh(w - outer)) + 0.5 * jnp.sum(jnp.tanh(w @ jnp.ones((6, 6)) * 0.1) ** 2)

    problem = bilevel.Problem(
        inner,
        lambda w, outer, b, k: jnp.sum((w - 1.0) ** 2),
        lambda key, outer: jnp.zeros(6),
        lambda key: jnp.linspace(0.2, 2.0, 6),
    )
    way = bilevel.Implicit(optax.sgd(0.2), 5, linear_solver=linear_solver)
    return problem, way, bilevel.compare(problem, {"way": way}, reference="way", repeats=1)["way"]


def test_iterations_of_a_linear_solver_are_counted_by_what_it_reports():
    problem, way, few = solved_by(bilevel.CG(max_steps=1))
    _, _, many = solved_by(bilevel.CG())
    assert many.hvps > few.hvps + 2 and not many.at_least
    outer, key = jnp.linspace(0.2, 2.0, 6), jax.random.key(0)
    product = hvp_flops(problem, way, outer, None, key) / gradient_flops(problem, way, outer, None, key)
    assert 1 < product < 4
    np.testing.assert_allclose(many.gradients - few.gradients, (many.hvps - few.hvps) * product, rtol=1e-12)


@pytest.mark.parametrize("linear_solver", [bilevel.CG(max_steps=3), bilevel.Dense(), bilevel.Neumann(4, 0.1)], ids=repr)
def test_costs_are_counted_in_gradients(linear_solver):
    """A gradient of least squares is two matrix products, and so is a Hessian-vector product: all else is small."""
    features = jax.random.normal(jax.random.key(0), (600, 40)) / 25

    def inner(w, outer, batch, key):
        return 0.5 * jnp.sum((features @ w - outer) ** 2)

    problem = bilevel.Problem(
        inner, lambda w, outer, b, k: jnp.sum((w - 1.0) ** 2), lambda key, outer: jnp.zeros(40), lambda key: 1.0
    )
    way = bilevel.Implicit(optax.sgd(0.2), 5, linear_solver=linear_solver)
    row = bilevel.compare(problem, {"way": way}, reference="way", repeats=1)["way"]
    np.testing.assert_allclose(row.gradients, 5 + row.hvps, rtol=0.03)


def test_a_loop_of_unknown_length_is_marked():
    problem, _, _ = solved_by(bilevel.Dense())

    def minimise(problem, outer, batch, key):
        going = lambda w: jnp.sum(jax.grad(problem.inner_loss)(w, outer, batch, key) ** 2) > 1e-12  # noqa: E731
        step = lambda w: w - 0.3 * jax.grad(problem.inner_loss)(w, outer, batch, key)  # noqa: E731
        return jax.lax.while_loop(going, step, jnp.zeros(6))

    found = bilevel.compare(problem, {"own": bilevel.ImplicitSolve(minimise)}, reference="own", repeats=1)
    assert found["own"].at_least and ">= " in str(found)


def test_table_and_figure(comparison, tmp_path):
    text = str(comparison)
    assert "one step" in text and "cosine" in text
    axes = comparison.plot()
    axes[0].figure.savefig(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    for axis, costs in zip(
        axes,
        ([row.gradients for row in comparison.rows], [row.temporary / 1e6 for row in comparison.rows]),
        strict=True,
    ):
        points = [points.get_offsets()[0] for points in axis.collections]
        errors = [max(row.relative_error, 1e-16) for row in comparison.rows]
        np.testing.assert_allclose(points, list(zip(costs, errors, strict=True)), rtol=1e-12)
        assert [text.get_text() for text in axis.texts] == [row.name for row in comparison.rows]


def test_names_that_are_not_there(comparison):
    with pytest.raises(KeyError, match="was not compared"):
        comparison["nope"]
    with pytest.raises(ValueError, match="not among the hypergradients"):
        bilevel.compare(None, {}, reference="nope")  # type: ignore[arg-type]


def test_a_training_that_is_not_finite_says_nothing_of_smoothness():
    problem, train, val = ridge()
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), train)
    ways = {"unrolled": bilevel.Unrolled(optax.sgd(0.5), 20)}
    found = bilevel.compare(problem, ways, reference="unrolled", inner_data=broken, outer_data=val, repeats=1)
    assert "Smoothness unknown at steps of 0.01: a training, or its hypergradient, is not finite" in str(found)
    assert "lower the inner learning rate, raise eps" not in str(found)


def test_an_estimators_own_numbers_change_no_cost():
    """Names that estimators of bilevel's use among theirs, in an estimator that is none of them."""

    @register
    class Told(bilevel.OneStep):
        def differentiate(self, query):
            answer = super().differentiate(query)
            return answer._replace(info=answer.info | {"linear_iterations": jnp.asarray(20), "hvps": jnp.asarray(3)})

    problem, train, val = ridge()
    ways = {"own": bilevel.OneStep(optax.sgd(0.5), 20), "told": Told(optax.sgd(0.5), 20)}
    given = {"inner_data": train, "outer_data": val, "repeats": 1, "step": None}
    found = bilevel.compare(problem, ways, reference="own", **given)
    assert found["told"].gradients == found["own"].gradients
    assert found["told"].hvps == 3 != found["own"].hvps
