"""The variance of a hypergradient over batches, against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Batches, Problem, Unrolled

RATE, STEPS = 0.3, 3
ROWS = jax.random.normal(jax.random.key(1), (12, 2))
HELD_OUT = jax.random.normal(jax.random.key(2), (12, 2))


def case():
    # w_K = keep w_0 + sum_t pull (1 - RATE)^(K - 1 - t) (batch mean + outer), linear in the batches.
    return Problem(
        lambda w, outer, batch, key: 0.5 * jnp.sum((w - jnp.mean(batch, axis=0) - outer["a"]) ** 2),
        lambda w, outer, batch, key: 0.5 * jnp.sum((w - jnp.mean(batch, axis=0)) ** 2) + jnp.sum(outer["b"] ** 2),
        lambda key, outer: jnp.zeros(2),
        lambda key: {"a": jnp.zeros(2), "b": jnp.ones(3), "n": 2},
    )


def gradients(inner, outer, samples):
    """`samples` hypergradients by `a`, by hand."""
    weights = RATE * (1 - RATE) ** np.arange(STEPS - 1, -1, -1)
    result = []
    for i in range(samples):
        trained = weights @ np.mean(np.asarray(ROWS)[np.asarray(inner[i * STEPS : (i + 1) * STEPS])], axis=1)
        result.append(weights.sum() * (trained - np.mean(np.asarray(HELD_OUT)[np.asarray(outer[i])], axis=0)))
    return np.array(result)


def test_it_is_that_of_the_batches():
    samples = 9
    data, held_out = Batches(ROWS, 4), Batches(HELD_OUT, 3)
    found = bilevel.variance(
        case(), Unrolled(optax.sgd(RATE), STEPS), inner_data=data, outer_data=held_out, samples=samples
    )
    _, _, inner_key, outer_key = jax.random.split(jax.random.key(0), 4)
    expected = gradients(
        data.take(inner_key, 0, samples * STEPS).index, held_out.take(outer_key, 0, samples).index, samples
    )
    np.testing.assert_allclose(found.mean["a"], expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.variance["a"], expected.var(0, ddof=1), rtol=1e-10)
    np.testing.assert_allclose(found.variance["b"], 0.0, atol=1e-30)
    assert found.mean["n"] is None and found.variance["n"] is None
    np.testing.assert_allclose(found.total, expected.var(0, ddof=1).sum(), rtol=1e-10)
    size = np.sum(expected.mean(0) ** 2) + 12.0
    np.testing.assert_allclose(found.relative, found.total / size, rtol=1e-10)


def test_batches_of_all_rows_have_none_and_smaller_batches_have_more():
    def total(data, outer_data=HELD_OUT):
        hypergradient = Unrolled(optax.sgd(RATE), STEPS)
        return bilevel.variance(case(), hypergradient, inner_data=data, outer_data=outer_data, samples=32).total

    assert total(Batches(ROWS, 12)) < 1e-28
    # Without replacement the variance of a mean of s of N rows is proportional to (1 / s - 1 / N).
    ratio = total(Batches(ROWS, 1)) / total(Batches(ROWS, 6))
    assert 4 < ratio < 40  # 11, from 32 samples of each


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="samples=1"):
        bilevel.variance(case(), Unrolled(optax.sgd(RATE), STEPS), inner_data=ROWS, samples=1)


@pytest.mark.parametrize("data", [ROWS, None, bilevel.FullBatch(ROWS)], ids=["arrays", "none", "full batch"])
def test_data_that_do_not_vary_are_refused(data):
    estimator = Unrolled(optax.sgd(RATE), STEPS)
    with pytest.raises(ValueError, match=r"variance: neither inner_data nor outer_data is Batches"):
        bilevel.variance(case(), estimator, inner_data=data, outer_data=HELD_OUT)
    with pytest.raises(ValueError, match=r"compare\(samples=...\): neither inner_data nor outer_data is Batches"):
        bilevel.compare(case(), {"a": estimator}, reference="a", inner_data=data, samples=4)


def test_a_hypergradient_that_is_not_finite_is_told():
    problem = Problem(
        lambda w, outer, batch, key: 0.5 * jnp.sum((w - outer["a"]) ** 2),
        lambda w, outer, batch, key: jnp.sum(jnp.sqrt(batch)) * jnp.sum(w),
        lambda key, outer: jnp.zeros(2),
        lambda key: {"a": jnp.ones(2)},
    )
    data = Batches(jnp.ones((8, 2)).at[3].set(-1.0), 2)
    with pytest.raises(FloatingPointError, match=r"not finite at outer\['a'\] on some of the 8 batches"):
        bilevel.variance(problem, Unrolled(optax.sgd(RATE), 2), outer_data=data, samples=8)


def test_no_unit_of_the_loss_and_no_dtype_changes_the_relative_variance():
    """Squares of a gradient leave the range of its dtype long before the gradient does."""

    def found(dtype, unit):
        problem = Problem(
            lambda w, o, b, k: jnp.mean((b @ w - 1.0) ** 2) + jnp.exp(o).astype(jnp.float32) * jnp.sum(w**2),
            lambda w, o, b, k: unit * jnp.mean((b @ w - 1.0) ** 2),
            lambda key, o: jnp.zeros(2, jnp.float32),
            lambda key: jnp.asarray(-1.0, dtype),
        )
        data = [Batches(rows.astype(jnp.float32), 3) for rows in (ROWS, HELD_OUT)]
        given = {"inner_data": data[0], "outer_data": data[1], "samples": 7}
        return bilevel.variance(problem, Unrolled(optax.sgd(0.1), 5), **given)

    right = found(jnp.float32, 1.0)
    assert right.relative > 0.1
    for unit in (1e-25, 1e22):
        other = found(jnp.float32, unit)
        np.testing.assert_allclose(other.relative, right.relative, rtol=1e-4)
        np.testing.assert_allclose(other.total, right.total * unit**2, rtol=1e-4)
        np.testing.assert_allclose(other.variance, right.variance * unit**2, rtol=1e-4)
        assert other.mean.dtype == jnp.float32
    for unit in (1e-2, 1.0, 1e4):
        np.testing.assert_allclose(found(jnp.float16, unit).relative, right.relative, rtol=0.05)
