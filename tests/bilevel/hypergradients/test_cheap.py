"""OneStep, FiniteDifference and SAMA against their own closed forms, and what they cannot see."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import SAMA, FiniteDifference, OneStep
from tests.bilevel.quadratic import KEY, Quadratic, error

Q = Quadratic.random(1)
SGD = optax.sgd(Q.eta)
CHEAP = [OneStep, FiniteDifference, SAMA]


@jax.jit
def estimate(hypergradient, problem, state, outer, batches=None, outer_batch=None, key=KEY):
    return hypergradient.estimate(problem, state, outer, batches, outer_batch, key)


@pytest.mark.parametrize("kind", CHEAP)
@pytest.mark.parametrize("steps", [1, 6])
def test_closed_form(kind, steps):
    result = estimate(kind(SGD, steps), Q.problem(), None, jnp.asarray(Q.outer))
    w = Q.trained(steps)
    assert error(result.grad, Q.unrolled(w, 1)) < 1e-10
    assert error(result.inner_state.params, w) < 1e-12
    losses = [w @ (Q.H @ w / 2 - Q.b - Q.C @ Q.outer) for w in map(Q.trained, range(steps))]
    np.testing.assert_allclose(result.aux.info["inner_loss"], losses, rtol=1e-12)
    assert result.value == pytest.approx(float(Q.problem().outer_loss(jnp.asarray(w), jnp.asarray(Q.outer), None, KEY)))


def test_the_derivative_of_one_step_through_solve():
    problem, outer = Q.problem(), jnp.asarray(Q.outer)
    loss = lambda lam: problem.outer_loss(OneStep(SGD, 6).solve(problem, None, lam, None, KEY).params, lam, None, KEY)  # noqa: E731
    assert error(jax.jit(jax.grad(loss))(outer), Q.unrolled(Q.trained(6), 1)) < 1e-10


def batched_problem():
    """Not quadratic, with batches, keys and leaves of every kind."""

    def inner_loss(w, outer, batch, key):
        noise = jax.random.uniform(key, (3,)) + jax.random.uniform(outer["key"], (3,))
        return jnp.mean(jnp.tanh(batch @ (w["a"] * noise) - outer["goal"]) ** 2) + jnp.exp(outer["decay"]) * w["b"] ** 2

    return bilevel.Problem(
        inner_loss,
        lambda w, outer, batch, key: jnp.sum((w["a"] - 1) ** 2) + w["b"] ** 3,
        lambda key, outer: {"a": jnp.full(3, 0.1), "b": jnp.array(0.5), "n": 3},
        lambda key: {"goal": jnp.array(0.5), "decay": jnp.array(-1.0), "key": jax.random.key(7), "n": 2},
    )


@pytest.mark.parametrize("optimizer, steps", [(optax.sgd(0.1, momentum=0.9), 4), (optax.adam(0.1), 1)])
def test_differences_approximate_one_step(optimizer, steps):
    problem = batched_problem()
    outer, state = problem.start_outer(KEY), problem_state(problem, optimizer)
    batches = jnp.asarray(np.random.default_rng(0).normal(size=(steps, 6, 3)))
    wanted = estimate(OneStep(optimizer, steps), problem, state, outer, batches)
    kinds = FiniteDifference(optimizer, steps, radius=1e-2), FiniteDifference(optimizer, steps, radius=1e-4)
    coarse, fine = (estimate(kind, problem, state, outer, batches) for kind in kinds)
    errors = [
        error([f.grad["goal"], f.grad["decay"]], [wanted.grad["goal"], wanted.grad["decay"]]) for f in (coarse, fine)
    ]
    assert errors[1] < 1e-6 and errors[1] < 1e-3 * errors[0] + 1e-9
    assert fine.grad["key"] is None and fine.grad["n"] is None
    assert error(fine.inner_state.params["a"], wanted.inner_state.params["a"]) < 1e-12


def problem_state(problem, optimizer):
    return OneStep(optimizer, 1).init(problem, problem.start_outer(KEY), KEY)


def test_sama_is_one_step_taken_from_the_trained_point():
    problem, optimizer, steps = batched_problem(), optax.adam(0.1), 4
    outer = problem.start_outer(KEY)
    data = jnp.asarray(np.random.default_rng(0).normal(size=(steps, 6, 3)))
    result = estimate(SAMA(optimizer, steps, radius=1e-4), problem, None, outer, data)
    state = result.inner_state
    key = jax.random.split(KEY, steps + 2)[steps]
    at_last = outer | {"key": jax.random.fold_in(outer["key"], steps - 1)}

    def next_params(goal):
        moving = {"a": state.params["a"], "b": state.params["b"]}
        loss = lambda w: problem.inner_loss(w | {"n": 3}, at_last | {"goal": goal}, data[-1], key)  # noqa: E731
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = optimizer.update({**jax.grad(loss)(moving), "n": None}, state.opt_state)
        return updates["a"], updates["b"]

    toward = 2 * (state.params["a"] - 1), 3 * state.params["b"] ** 2
    _, tangent = jax.jvp(next_params, (outer["goal"],), (jnp.ones(()),))
    wanted = sum(float(jnp.sum(t * d)) for t, d in zip(toward, tangent, strict=True))
    assert float(result.grad["goal"]) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kind", [FiniteDifference, SAMA])
def test_leaves_it_cannot_see_are_named(kind):
    problem = bilevel.Problem(
        lambda w, outer, batch, key: 0.5 * jnp.sum((w - outer["goal"]) ** 2) + jnp.sum(outer["offset"] ** 2),
        lambda w, outer, batch, key: jnp.sum(w**2),
        lambda key, outer: jnp.ones(2),
        lambda key: {"goal": jnp.array(1.0), "offset": jnp.array(2.0), "rate": jnp.array(0.1)},
    )
    outer = problem.start_outer(KEY)
    with pytest.warns(bilevel.StructuralZeroWarning) as caught:
        result = estimate(kind(lambda outer: optax.sgd(outer["rate"]), 3), problem, None, outer)
    said = sorted(str(warning.message) for warning in caught)
    assert len(said) == 2
    assert "leaf ['offset'] is" in said[0] and "nothing that is trained" in said[0]  # no estimator sees it
    assert "leaf ['rate'] is" in said[1] and "OneStep" in said[1]
    assert result.grad["offset"] == result.grad["rate"] == 0
    assert result.grad["goal"] != 0


def test_one_step_sees_the_learning_rate():
    problem, outer = Q.problem(), jnp.concatenate([jnp.asarray(Q.outer), jnp.array([np.log(Q.eta)])])
    lifted = bilevel.Problem(
        lambda w, lam, batch, key: problem.inner_loss(w, lam[:4], batch, key),
        lambda w, lam, batch, key: problem.outer_loss(w, lam[:4], batch, key),
        lambda key, lam: jnp.asarray(Q.start),
        lambda key: outer,
    )
    result = estimate(OneStep(lambda lam: optax.sgd(jnp.exp(lam[4])), 6), lifted, None, outer)
    before, w = Q.trained(5), Q.trained(6)
    gradient = Q.H @ before - Q.b - Q.C @ Q.outer
    wanted = np.append(Q.unrolled(w, 1), -Q.eta * gradient @ Q.toward(w))
    assert error(result.grad, wanted) < 1e-10


@pytest.mark.parametrize("kind", CHEAP)
def test_float32(kind):
    result = estimate(kind(SGD, 6), Q.problem(jnp.float32), None, jnp.asarray(Q.outer, jnp.float32))
    assert result.grad.dtype == jnp.float32
    assert error(result.grad, Q.unrolled(Q.trained(6), 1)) < 1e-3


@pytest.mark.parametrize("kind", CHEAP)
def test_in_a_run_and_under_vmap(kind):
    hypergradient, problem = kind(optax.adam(1e-2), 3), Q.problem()
    result = bilevel.run(bilevel.Nested(problem, hypergradient, optax.sgd(1e-2)), steps=3, progress=False)
    assert np.isfinite(result.history["outer_loss"]).all()
    outers = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)))
    found = jax.jit(jax.vmap(lambda lam: hypergradient.estimate(problem, None, lam, None, None, KEY).grad))(outers)
    for lam, grad in zip(outers, found, strict=True):
        assert error(grad, estimate(hypergradient, problem, None, lam).grad) < 1e-9


def test_settings_that_make_no_sense_are_refused():
    for kind in (FiniteDifference, SAMA):
        with pytest.raises(ValueError, match="radius"):
            kind(SGD, 3, radius=0.0)
    with pytest.raises(ValueError, match="steps"):
        OneStep(SGD, 0)
