"""The first problem of the documentation, and other outer methods around the same hypergradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

import bilevel
from bilevel.testing import quadratic
from tests.bilevel.helpers import KEY


def test_ten_lines_find_a_weight_decay():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=20)

    def rows(count):
        x = rng.normal(size=(count, 20))
        return {"x": x, "y": x @ truth + 2.0 * rng.normal(size=count)}

    train, val = rows(40), rows(200)

    def val_loss(w, log_l2, batch, key):
        return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)

    def train_loss(w, log_l2, batch, key):
        return val_loss(w, log_l2, batch, key) + jnp.exp(log_l2) * jnp.sum(w**2)

    problem = bilevel.Problem(
        inner_loss=train_loss,
        outer_loss=val_loss,
        init_inner=lambda key, log_l2: jnp.zeros(20),
        init_outer=lambda key: -6.0,
    )
    solver = bilevel.Nested(
        problem,
        hypergradient=bilevel.Unrolled(optax.adam(1e-1), steps=50),
        outer_optimizer=optax.adam(3e-1),
    )
    result = bilevel.run(
        solver,
        inner_data=bilevel.Batches(train, 20),
        outer_data=bilevel.Batches(val, 100),
        steps=40,
        progress=False,
    )
    model = bilevel.fit(
        problem, result.outer, optimizer=optax.adam(1e-1), data=bilevel.Batches(train, 20), steps=200, progress=False
    )

    def ridge(log_l2):
        gram = train["x"].T @ train["x"] / 40 + np.exp(log_l2) * np.eye(20)
        w = np.linalg.solve(gram, train["x"].T @ train["y"] / 40)
        return float(val_loss(w, log_l2, val, None))

    best = scipy.optimize.minimize_scalar(ridge, bounds=(-6, 2), method="bounded")
    assert ridge(float(result.outer)) < best.fun + 0.25 * (ridge(-6.0) - best.fun)
    assert float(val_loss(model.inner.params, result.outer, val, None)) < ridge(-6.0)


Q = quadratic()
HYPERGRADIENT = bilevel.Unrolled(optax.sgd(0.5), 7)


def best_tilt():
    """Where the (quadratic) outer function of the unrolled training has derivative 0."""
    at = lambda tilt: Q.unrolled({"tilt": tilt}, 7, rate=0.5)["tilt"]  # noqa: E731
    hessian = np.stack([at(e) - at(np.zeros(3)) for e in np.eye(3)], axis=1)
    return np.linalg.solve(hessian, -at(np.zeros(3)))


def test_scipy_as_the_outer_method():
    function = jax.jit(bilevel.value_and_hypergrad(Q.problem, HYPERGRADIENT))

    def objective(tilt):
        value, grad = function({"tilt": jnp.asarray(tilt)}, None, None, None, KEY)
        return float(value), np.asarray(grad["tilt"])

    found = scipy.optimize.minimize(objective, np.zeros(3), jac=True, method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(found.x, best_tilt(), rtol=1e-6)


def test_optax_l_bfgs_with_its_line_search_as_the_outer_method():
    estimate = bilevel.value_and_hypergrad(Q.problem, HYPERGRADIENT)
    transform = optax.lbfgs()

    def value(outer):
        return estimate(outer, None, None, None, KEY)[0]

    @jax.jit
    def step(outer, state):
        loss, grad = estimate(outer, None, None, None, KEY)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = transform.update(grad, state, outer, value=loss, grad=grad, value_fn=value)
            return optax.apply_updates(outer, updates), state

    outer = {"tilt": jnp.zeros(3)}
    state = transform.init(outer)
    for _ in range(12):
        outer, state = step(outer, state)
    np.testing.assert_allclose(outer["tilt"], best_tilt(), rtol=1e-6)
