"""Evolution strategies: z-tests of their means over many seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import EvolutionStrategies, PersistentES
from tests.bilevel.quadratic import KEY, Quadratic, error

Q = Quadratic.random(2)
SGD = optax.sgd(Q.eta)
SEEDS = jax.random.split(jax.random.key(1), 20_000)
OUTER = jnp.asarray(Q.outer)


def z_scores(samples, wanted):
    samples = np.asarray(samples)
    return (samples.mean(0) - wanted) / (samples.std(0) / np.sqrt(len(samples)))


@pytest.mark.parametrize("population", [4, 10])  # with two pairs, a divisor of pairs - 1 does not show
def test_mean_is_the_gradient(population):
    hypergradient, problem = EvolutionStrategies(SGD, 7, population=population, sigma=0.1), Q.problem()
    sample = jax.jit(jax.vmap(lambda key: hypergradient.estimate(problem, None, OUTER, None, None, key)))(SEEDS)
    assert np.abs(z_scores(sample.grad, Q.unrolled(Q.trained(7), 7))).max() < 4
    # the value is that of the unperturbed training, and the reported variance is that of the estimates
    assert error(sample.inner_state.params[0], Q.trained(7)) < 1e-12
    reported = float(sample.aux.info["variance"].mean())
    assert reported == pytest.approx(np.var(np.asarray(sample.grad), axis=0).sum(), rel=0.05)


def test_smoothed_objective():
    # L = lam^3: the gradient of its smoothing is 3 lam^2 + 3 sigma^2
    problem = bilevel.Problem(
        lambda w, lam, batch, key: 0.5 * (w - lam) ** 2,
        lambda w, lam, batch, key: w**3,
        lambda key, lam: jnp.zeros(()),
        lambda key: jnp.array(0.5),
    )
    hypergradient = EvolutionStrategies(optax.sgd(1.0), 1, population=4, sigma=0.5)
    estimate = lambda key: hypergradient.estimate(problem, None, jnp.array(0.5), None, None, key).grad  # noqa: E731
    samples = jax.jit(jax.vmap(estimate))(SEEDS)
    assert abs(z_scores(samples, 3 * 0.5**2 + 3 * 0.5**2)) < 4


@pytest.mark.parametrize("kind", [EvolutionStrategies, PersistentES])
def test_members_stay_inside_the_domain(kind):
    # w is lam after the step, so L = log lam: NaN outside, and linear in the free variable u = log lam
    problem = bilevel.Problem(
        lambda w, lam, batch, key: 0.5 * (w - lam) ** 2,
        lambda w, lam, batch, key: jnp.log(w),
        lambda key, lam: jnp.zeros(()),
        lambda key: jnp.array(0.02),
        domain=bilevel.Positive(),
    )
    hypergradient = kind(optax.sgd(1.0), 1, population=4, sigma=0.5)
    estimate = lambda key: hypergradient.estimate(problem, None, jnp.array(0.02), None, None, key)  # noqa: E731
    samples = jax.jit(jax.vmap(estimate))(SEEDS)
    assert abs(z_scores(samples.grad, 1 / 0.02)) < 4
    # in the units of the gradient
    assert float(samples.aux.info["variance"].mean()) == pytest.approx(float(samples.grad.var()), rel=0.05)


def pieces(hypergradient, count, key):
    """The last of `count` estimates, one after the other from a common start."""
    problem = Q.problem()
    keys = jax.random.split(key, count + 1)
    state = hypergradient.init(problem, OUTER, keys[0])
    for k in keys[1:]:
        estimate = hypergradient.estimate(problem, state, OUTER, None, None, k)
        assert jax.tree.structure(estimate.inner_state) == jax.tree.structure(state)
        state = estimate.inner_state
    return estimate


def test_persistent_is_unbiased_over_all_pieces():
    sample = jax.jit(jax.vmap(lambda key: pieces(PersistentES(SGD, 2, population=10, sigma=0.1), 4, key)))(SEEDS)
    assert np.abs(z_scores(sample.grad, Q.unrolled(Q.trained(8), 8))).max() < 4
    reported = float(sample.aux.info["variance"].mean())
    assert reported == pytest.approx(np.var(np.asarray(sample.grad), axis=0).sum(), rel=0.05)
    assert error(sample.inner_state.params[0], Q.trained(8)) < 1e-12
    # what one piece alone would give is far off
    assert np.abs(z_scores(sample.grad, Q.unrolled(Q.trained(8), 2))).max() > 20


def test_persistent_forgets():
    hypergradient = PersistentES(SGD, 2, population=4, sigma=0.1, memory=2)
    sample = jax.jit(jax.vmap(lambda key: pieces(hypergradient, 4, key)))(SEEDS)
    assert np.abs(z_scores(sample.grad, Q.unrolled(Q.trained(8), 4))).max() < 4


def test_persistent_from_none_is_plain():
    problem = Q.problem()
    found, wanted = (
        jax.jit(h.estimate)(problem, None, OUTER, None, None, KEY).grad
        for h in (PersistentES(SGD, 3, population=6, sigma=0.1), EvolutionStrategies(SGD, 3, population=6, sigma=0.1))
    )
    assert error(found, wanted) < 1e-12


def mixed_problem():
    """Jumps in the loss, a start that depends on outer, and leaves of every kind."""

    def inner_loss(w, outer, batch, key):
        return jnp.mean((batch @ w["a"] - outer["goal"]) ** 2) + jnp.sum(
            jax.random.uniform(outer["key"], (2,)) * w["a"]
        )

    return bilevel.Problem(
        inner_loss,
        lambda w, outer, batch, key: jnp.sum(jnp.round(w["a"], 1)) * outer["scale"],
        lambda key, outer: {"a": outer["goal"] * jnp.ones(2), "n": 3, "key": key},
        lambda key: {"goal": jnp.array(0.5), "scale": jnp.ones(2)[0], "key": jax.random.key(7), "n": 2},
    )


@pytest.mark.parametrize("kind", [EvolutionStrategies, PersistentES])
def test_leaf_kinds_and_runs(kind):
    hypergradient = kind(lambda outer: optax.adam(0.1 * outer["scale"]), 3, population=8, sigma=0.1)
    problem = mixed_problem()
    solver = bilevel.Nested(problem, hypergradient, optax.sgd(1e-3))
    data = bilevel.Batches(jnp.asarray(np.random.default_rng(0).normal(size=(20, 2))), 5)
    result = bilevel.run(solver, inner_data=data, steps=3, progress=False)
    assert np.isfinite(result.history["hypergradient_norm"]).all() and (result.history["hypergradient_norm"] > 0).all()
    assert result.outer["n"] == 2


@pytest.mark.parametrize("kind", [EvolutionStrategies, PersistentES])
def test_float32_and_leaves_without_influence(kind):
    problem = bilevel.Problem(
        lambda w, outer, batch, key: (w - outer["goal"]) ** 2,
        lambda w, outer, batch, key: w**2,
        lambda key, outer: jnp.float32(0.0),
        lambda key: {"goal": jnp.float32(1.0), "unused": jnp.float32(1.0)},
    )
    outer = problem.start_outer(KEY)
    hypergradient = kind(optax.sgd(0.1), 3, population=64, sigma=0.01)
    with pytest.warns(bilevel.StructuralZeroWarning, match=r"leaf \['unused'\]"):
        result = jax.jit(hypergradient.estimate)(problem, None, outer, None, None, KEY)
    assert result.grad["goal"].dtype == jnp.float32
    useless = bilevel.Problem(lambda w, o, b, k: w**2, lambda w, o, b, k: w**2, lambda k, o: 0.0, lambda k: 1.0)
    with pytest.raises(ValueError, match="Neither loss depends on outer"):
        hypergradient.estimate(useless, None, jnp.array(1.0), None, None, KEY)


def test_settings_that_make_no_sense_are_refused():
    for kind in (EvolutionStrategies, PersistentES):
        with pytest.raises(ValueError, match="population"):
            kind(SGD, 3, population=3)
        with pytest.raises(ValueError, match="sigma"):
            kind(SGD, 3, sigma=0.0)
    with pytest.raises(ValueError, match="memory"):
        PersistentES(SGD, 3, memory=0)
    foreign = bilevel.OneStep(SGD, 3).init(Q.problem(), OUTER, KEY)
    with pytest.raises(ValueError, match="its own init"):
        PersistentES(SGD, 3).estimate(Q.problem(), foreign, OUTER, None, None, KEY)
