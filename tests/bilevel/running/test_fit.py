import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.testing import quadratic
from tests.bilevel.helpers import KEY, assert_close, assert_equal

Q = quadratic()
OUTER = {"tilt": np.array([0.3, -0.2, 0.5])}


def fit(**settings):
    return bilevel.fit(Q.problem, OUTER, optimizer=optax.sgd(0.5), progress=False, **settings)


def test_it_is_the_training_at_the_outer_variable():
    result = fit(steps=7)
    assert_close(result.inner.params, Q.trained(OUTER, 7, rate=0.5), 1e-12)
    points = [Q.trained(OUTER, t, rate=0.5) for t in range(7)]
    losses = [0.5 * w @ Q.H @ w - (Q.b + Q.C @ OUTER["tilt"]) @ w for w in points]
    np.testing.assert_allclose(result.history["inner_loss"], losses, rtol=1e-10)
    assert_equal(result.outer, jax.tree.map(jnp.asarray, OUTER))


def test_an_optimizer_made_from_outer():
    outer = OUTER | {"rate": np.array(0.3)}
    result = bilevel.fit(Q.problem, outer, optimizer=lambda outer: optax.sgd(outer["rate"]), steps=5, progress=False)
    assert_close(result.inner.params, Q.trained(outer, 5), 1e-12)


def test_outer_may_hold_numbers_of_python():
    problem = bilevel.Problem(
        lambda w, outer, batch, key: (w - outer["a"]) ** 2, None, lambda key, outer: 0.0, lambda key: {"a": 0.5}
    )
    result = bilevel.fit(problem, {"a": 0.5, "n": 3}, optimizer=optax.sgd(0.1), steps=2, progress=False)
    np.testing.assert_allclose(result.inner.params, 0.5 * (1 - 0.8**2), rtol=1e-12)


def noisy(w, outer, batch, key):
    dropped = jax.random.bernoulli(outer["key"], 0.5, w.shape) & jax.random.bernoulli(key, 0.7, w.shape)
    return jnp.mean((jnp.where(dropped, w, 0.0)[None] - batch["x"]) ** 2)


NOISY = bilevel.Problem(noisy, noisy, lambda key, outer: jax.random.normal(key, (4,)), lambda key: {"key": key})


def test_killed_and_resumed_is_never_killed(tmp_path):
    data = bilevel.Batches({"x": jax.random.normal(KEY, (9, 4))}, 2)

    def train(**settings):
        outer = {"key": jax.random.key(3)}
        return bilevel.fit(
            NOISY, outer, optimizer=optax.adam(0.1), data=data, steps=9, key=KEY, progress=False, **settings
        )

    def kill(step, state, rows):
        raise KeyboardInterrupt

    whole = train()
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint_dir=tmp_path, callbacks=[kill])
    resumed = train(checkpoint_dir=tmp_path)
    assert_equal(resumed.state, whole.state)
    assert_equal(resumed.history, whole.history)


def test_a_nan_names_the_step():
    problem = bilevel.Problem(
        lambda w, outer, batch, key: jnp.sum(jnp.log(w)), None, lambda key, outer: jnp.full(2, 0.25), lambda key: 0.0
    )
    with pytest.raises(FloatingPointError, match=r"step 1: .*inner_loss"):
        bilevel.fit(problem, jnp.zeros(1), optimizer=optax.sgd(0.1), steps=4, progress=False)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="steps"):
        fit(steps=0)
    with pytest.raises(ValueError, match="data is a str"):
        fit(steps=1, data="train.csv")


def test_a_loss_without_a_gradient_is_refused_and_one_without_a_second_derivative_is_not():
    def train(inner_loss):
        problem = bilevel.Problem(inner_loss, None, lambda key, outer: jnp.full(2, 0.5), lambda key: jnp.ones(2))
        return bilevel.fit(problem, jnp.ones(2), optimizer=optax.sgd(0.1), steps=3, progress=False)

    def looping(w, outer, batch, key):
        return jnp.sum(jax.lax.while_loop(lambda x: jnp.sum(x) < 4.0, lambda x: 2.0 * x, w * outer))

    with pytest.raises(ValueError, match=r"^inner_loss cannot be differentiated, because of `while`: .*scan"):
        train(looping)

    @jax.custom_vjp
    def square(x):
        return x**2

    def backward(x, ct):  # a derivative of this would be wanted for a hypergradient only
        return (jax.pure_callback(lambda x, ct: np.asarray(2 * x * ct), jax.ShapeDtypeStruct((2,), x.dtype), x, ct),)

    square.defvjp(lambda x: (x**2, x), backward)
    trained = train(lambda w, outer, batch, key: 0.5 * jnp.sum(square(w - outer)))
    np.testing.assert_allclose(trained.inner.params, 1 - 0.5 * 0.9**3, rtol=1e-12)
