"""Momentum descent run backwards: the hypergradient of Unrolled, from a trajectory that was not stored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.measuring.planning import temp_bytes

KEY = jax.random.key(0)


def loss(params, outer, batch, key):
    hidden = jnp.tanh(batch @ params["w"]) * jax.random.bernoulli(outer["key"], 0.8, (5, 4)).astype(float)
    return jnp.mean((hidden @ params["v"] - 1) ** 2) + jnp.exp(outer["l2"]) * jnp.sum(params["w"] ** 2)


PROBLEM = bilevel.Problem(
    loss,
    loss,
    lambda key, outer: {"w": jax.random.normal(key, (3, 4)) * outer["scale"], "v": jnp.ones(4), "seen": jnp.int32(1)},
    lambda key: {"l2": -2.0, "rate": -3.0, "scale": 1.0, "key": key},
)
OUTER = PROBLEM.start_outer(KEY)


def rate(outer):
    return jnp.exp(outer["rate"])


def unrolled(steps):
    return bilevel.Unrolled(lambda outer: optax.sgd(rate(outer), 0.9), steps)


@pytest.mark.parametrize("steps", [1, 40, 800])
def test_equals_unrolled(steps):
    batches = jax.random.normal(KEY, (steps, 5, 3))
    run = jax.jit(lambda h, outer: h.estimate(PROBLEM, None, outer, batches, batches[0], KEY))
    found, expected = run(bilevel.Reversible(rate, 0.9, steps, bits=46), OUTER), run(unrolled(steps), OUTER)
    assert found.aux.info["reversed"]
    pairs = (jax.tree.leaves((estimate.grad, estimate.value)) for estimate in (found, expected))
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10 * (10 + steps), atol=1e-9)  # 800 roundings to 2^-46
    assert jax.tree.structure(found.inner_state) == jax.tree.structure(expected.inner_state)


def test_a_number_out_of_range_is_not_silent():
    def diverging(w, outer, batch, key):
        return outer * jnp.sum(w**2)

    problem = bilevel.Problem(diverging, diverging, lambda key, outer: jnp.ones(2), lambda key: jnp.ones(()))
    for steps, fits in ((3, True), (60, False)):
        found = bilevel.Reversible(10.0, 0.9, steps).estimate(problem, None, jnp.ones(()), None, None, KEY)
        assert found.aux.info["reversed"] == fits
        assert np.isnan(found.grad) != fits


def test_memory_is_that_of_a_word_for_hundreds_of_steps():
    size = 20_000
    problem = bilevel.Problem(
        lambda w, outer, batch, key: jnp.sum(jnp.cos(w * outer)),
        lambda w, outer, batch, key: jnp.sum(jnp.sin(w)),
        lambda key, outer: jnp.ones(size),
        lambda key: jnp.ones(()),
    )

    def states(steps):
        estimator = bilevel.Reversible(0.1, 0.9, steps)
        arguments = (estimator, problem, None, jnp.ones(()), None, None, KEY)
        return temp_bytes(lambda h, *rest: h.estimate(*rest), *arguments) / (8 * size)

    assert states(360) - states(10) < 0.5
    assert 1.5 < states(1820) - states(1090) < 2.5  # three words, five words


@pytest.mark.parametrize("momentum", [0.0, 1.0, 0.9 + 1e-6])
def test_momentum_must_be_a_fraction(momentum):
    with pytest.raises(ValueError, match="must be a fraction"):
        bilevel.Reversible(0.1, momentum, 4)


def test_no_derivative_of_it():
    reversible, batch = bilevel.Reversible(rate, 0.9, 2), bilevel.FullBatch(jnp.ones((5, 3)))

    def trained(l2):
        return reversible.solve(PROBLEM, None, OUTER | {"l2": l2}, batch, KEY).params["v"][0]

    def hypergradient(l2):
        outer = OUTER | {"l2": l2}
        return reversible.estimate(PROBLEM, None, outer, batch, jnp.ones((5, 3)), KEY).grad["scale"]

    at = jnp.asarray(1.0)
    for refused in (lambda: jax.jvp(trained, (at,), (at,)), lambda: jax.grad(hypergradient)(at)):
        with pytest.raises(ValueError, match="no forward mode and no third level"):
            refused()
    with pytest.raises(ValueError, match="no third level"):
        jax.grad(
            lambda o: (
                bilevel.Reversible(0.1, 0.9, 2)
                .solve(PROBLEM, None, {**OUTER, "scale": o}, bilevel.FullBatch(jnp.ones((5, 3))), KEY)
                .params["v"][0]
            )
        )(1.0)
