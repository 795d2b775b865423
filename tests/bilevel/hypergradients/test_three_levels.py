"""A third level on `Implicit.solve`: its hypergradient, and second derivatives."""

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel
from bilevel import Implicit
from tests.bilevel.implicit import Q
from tests.bilevel.quadratic import KEY, central_difference, error


def three_levels(captured):
    """min_mu G(lam*(mu)), lam* = argmin F(w*(lam, mu), lam, mu), w* = argmin f(w, lam, mu)."""
    A = jnp.asarray(Q.A)

    def low_loss(w, seen, batch, key):
        return 0.5 * jnp.sum(jnp.exp(0.2 * seen["mu"][0]) * w**2) + jnp.sum(jnp.cosh(w - jnp.pad(seen["lam"], (0, 2))))

    def top(mu, hypergradient, low_hypergradient):
        def middle_loss(lam, seen, batch, key):
            known = mu if captured else seen
            low = bilevel.Problem(low_loss, low_loss, lambda key, outer: jnp.zeros(6), lambda key: None)
            state = low_hypergradient.solve(low, None, {"lam": lam, "mu": known}, None, key)
            w = state.params
            return 0.5 * (w - 1) @ A @ (w - 1) / 30 + 0.5 * jnp.sum((lam - known[1]) ** 2)

        def outer_loss(lam, seen, batch, key):
            return jnp.sum(lam**3) + (0.0 if captured else jnp.sum(seen**2))

        middle = bilevel.Problem(middle_loss, outer_loss, lambda key, mu: jnp.zeros(4), lambda key: None)
        if captured:
            state = hypergradient.solve(middle, None, mu, None, KEY)
            return outer_loss(state.params, mu, None, None), None
        result = hypergradient.estimate(middle, None, mu, None, None, KEY)
        return result.value, result.grad

    return top


LOW = Implicit(optax.sgd(0.4), 60)


@pytest.mark.parametrize(
    "middle",
    [bilevel.Unrolled(optax.sgd(0.4), 60), Implicit(optax.sgd(0.4), 60), Implicit(optax.adam(0.05), 600)],
    ids=["unrolled", "implicit", "implicit-adam"],
)
def test_three_levels(middle):
    top, mu = three_levels(captured=False), jnp.array([0.3, -0.4])
    found = jax.jit(lambda mu: top(mu, middle, LOW)[1])(mu)
    value = jax.jit(lambda mu: top(mu, bilevel.FirstOrder(optax.sgd(0.4), 60), LOW)[0])
    wanted = central_difference(lambda mu: float(value(jnp.asarray(mu))), mu)
    assert error(found, wanted) < 1e-6


def test_three_levels_with_a_captured_variable():
    top, mu = three_levels(captured=True), jnp.array([0.3, -0.4])
    middle = Implicit(optax.sgd(0.4), 60)
    value = jax.jit(lambda mu: top(mu, middle, LOW)[0])
    wanted = central_difference(lambda mu: float(value(jnp.asarray(mu))), mu)
    assert error(jax.jit(jax.grad(lambda mu: top(mu, middle, LOW)[0]))(mu), wanted) < 1e-6


def test_second_derivatives_of_solve():
    # w* = lam^3, so d2/dlam2 of w*^2 = 30 lam^4; by forward over reverse and reverse over reverse
    problem = bilevel.Problem(
        lambda w, lam, batch, key: 0.5 * (w - lam**3) ** 2,
        lambda w, lam, batch, key: w**2,
        lambda key, lam: jnp.zeros(()),
        lambda key: jnp.array(1.2),
    )
    hypergradient = Implicit(optax.sgd(0.5), 60)

    def loss(lam):
        return hypergradient.solve(problem, None, lam, None, KEY).params ** 2

    lam = jnp.array(1.2)
    assert jax.jit(jax.grad(loss))(lam) == pytest.approx(6 * 1.2**5, rel=1e-10)
    assert jax.jit(jax.hessian(loss))(lam) == pytest.approx(30 * 1.2**4, rel=1e-9)
    assert jax.jit(jax.grad(jax.grad(loss)))(lam) == pytest.approx(30 * 1.2**4, rel=1e-9)
