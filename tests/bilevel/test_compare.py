"""Comparing estimators on one problem."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest

import bilevel

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


def test_estimators_that_agree_and_one_that_does_not(comparison):
    assert [row.name for row in comparison.rows] == ["reverse", "mixed", "implicit", "one step"]
    assert comparison["mixed"].relative_error < 1e-12 and comparison["mixed"].cosine > 1 - 1e-12
    assert comparison["implicit"].relative_error < 1e-6
    assert comparison["one step"].relative_error > 0.1
    np.testing.assert_allclose(comparison["mixed"].value, comparison["reverse"].value, rtol=1e-12)


def test_costs_are_counted(comparison):
    assert comparison["mixed"].gradients > comparison["one step"].gradients > 40
    assert comparison["mixed"].temporary > 0 and comparison["mixed"].seconds > 0


def test_table_and_figure(comparison, tmp_path):
    text = str(comparison)
    assert "one step" in text and "cosine" in text
    axes = comparison.plot()
    axes[0].figure.savefig(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 1000


def test_names_that_are_not_there(comparison):
    with pytest.raises(KeyError, match="was not compared"):
        comparison["nope"]
    with pytest.raises(ValueError, match="not among the hypergradients"):
        bilevel.compare(None, {}, reference="nope")  # type: ignore[arg-type]
