"""Plain `optax.adam` where a gradient is exactly 0: finite, and right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Unrolled
from bilevel.differentiation.smooth import smooth
from bilevel.testing import central_differences
from tests.bilevel.helpers import KEY, assert_close, estimate

X = jax.random.normal(jax.random.key(1), (6, 3))
Y = jax.random.normal(jax.random.key(2), (6, 2))


def dead_units(inner, outer, batch, key):
    # The first two hidden units are off for every row: their weights have gradient exactly 0 at every step.
    hidden = jax.nn.relu(X @ inner["W"] + jnp.array([[-99.0, -99.0, 1.0, 1.0]]))
    return jnp.mean(outer[:, None] ** 2 * (hidden @ inner["V"] - Y) ** 2)


def lora(inner, outer, batch, key):
    # B = 0 at first, so that A has gradient exactly 0 at the first step.
    weight = jnp.eye(3, 2) + inner["A"] @ inner["B"]
    return jnp.mean(outer[:, None] ** 2 * (X @ weight - Y) ** 2)


def problem(loss):
    def start(key, outer):
        if loss is lora:
            return {"A": jax.random.normal(jax.random.key(3), (3, 2)), "B": jnp.zeros((2, 2))}
        return {"W": jax.random.normal(jax.random.key(3), (3, 4)), "V": jax.random.normal(jax.random.key(4), (4, 2))}

    return bilevel.Problem(
        loss, lambda w, outer, batch, key: loss(w, 2 - outer, batch, key), start, lambda key: jnp.linspace(0.5, 1.5, 6)
    )


@pytest.mark.parametrize("loss", [dead_units, lora])
@pytest.mark.parametrize("mode", ["mixed", "reverse"])
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(0.02),
        optax.lamb(0.02),
        optax.chain(optax.clip_by_global_norm(0.5), optax.rmsprop(0.02, eps=1e-6)),
        optax.adagrad(0.05, initial_accumulator_value=0.0),
    ],
    ids=["adam", "lamb", "clip and rmsprop", "adagrad from 0"],
)
def test_hypergradient_at_zero_gradients(loss, mode, optimizer):
    hypergradient = Unrolled(optimizer, 3, mode=mode, checkpoint="none")
    arguments = None, problem(loss).start_outer(KEY), None, None, KEY
    found = estimate(problem(loss), hypergradient, *arguments).grad
    assert_close(found, central_differences(problem(loss), hypergradient, *arguments), 1e-7)


def test_gradient_clipped_at_a_stationary_start():
    # The norm of a gradient of zeros has no derivative; the clipped update has one, since it is not clipped there.
    target = lambda w, outer, batch, key: jnp.sum((w - outer) ** 2)  # noqa: E731
    at_rest = bilevel.Problem(target, lambda w, o, b, k: jnp.sum(w**3), lambda k, o: jnp.full(2, 0.5), lambda k: 0.0)
    hypergradient = Unrolled(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), 2)
    found = hypergradient.estimate(at_rest, None, jnp.full(2, 0.5), None, None, KEY).grad
    assert_close(found, np.full(2, 3 * 0.25 * (1 - 0.8**2)), 1e-12)


def test_derivative_of_the_first_adam_step_at_a_gradient_of_zero():
    # g / (|g| + eps) has slope 1 / eps at g = 0, and that is what comes out.
    moved = bilevel.Problem(
        lambda w, outer, batch, key: 0.5 * (w - outer) ** 2,
        lambda w, outer, batch, key: w,
        lambda key, outer: jnp.asarray(0.5),
        lambda key: jnp.asarray(0.5),
    )
    found = Unrolled(optax.adam(0.1, eps=1e-3), 1).estimate(moved, None, jnp.asarray(0.5), None, None, KEY).grad
    np.testing.assert_allclose(found, 0.1 / 1e-3, rtol=1e-9)


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_third_derivatives_through_adam_at_zero_gradients(mode):
    case, outer = problem(lora), jnp.linspace(0.5, 1.5, 6)
    hypergradient = Unrolled(optax.adam(0.02), 2, mode=mode, checkpoint="none")
    direction = jnp.array([1.0, -1.0, 0.5, 0.0, 1.0, -0.5])

    def first(t):
        grad = hypergradient.estimate(case, None, outer + t * direction, None, None, KEY).grad
        return jnp.vdot(grad, direction)

    second = jax.jit(jax.grad(first))
    third = jax.jit(jax.grad(jax.grad(first)))
    h = 1e-4
    numeric = (8 * (first(h) - first(-h)) - (first(2 * h) - first(-2 * h))) / (12 * h)
    np.testing.assert_allclose(second(0.0), numeric, rtol=1e-7)
    numeric = (8 * (second(h) - second(-h)) - (second(2 * h) - second(-2 * h))) / (12 * h)
    np.testing.assert_allclose(third(0.0), numeric, rtol=1e-6)


# Whatever hides a derivative inside an update is left out: the hypergradient is that of the values.


@jax.custom_vjp
def doubled_backwards(x):
    return x


doubled_backwards.defvjp(lambda x: (x, None), lambda _, ct: (2 * ct,))


def by_norm(g):
    return g / jax.lax.stop_gradient(1.0 + jnp.sqrt(jnp.sum(g**2)))


HIDING = {
    "stop_gradient": by_norm,
    "inside jit": jax.jit(by_norm),
    "inside checkpoint": jax.checkpoint(by_norm),
    "inside cond": lambda g: jax.lax.cond(jnp.sum(g) > -1e9, by_norm, lambda g: g, g),
    "inside scan": lambda g: jax.lax.scan(lambda c, _: (by_norm(c), None), g, None, length=2)[0],
    "a rule of its own": doubled_backwards,
    "a power": lambda g: g * jnp.power(g**2, 0.3),
    "a cube root": jnp.cbrt,
    "softmax, whose rule is true": lambda g: g * jax.nn.softmax(g.ravel()).reshape(g.shape),
}


@pytest.mark.parametrize("name", HIDING)
@pytest.mark.parametrize("mode", ["mixed", "forward"])
def test_an_update_is_differentiated_as_its_values_say(name, mode):
    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -0.05 * HIDING[name](g), updates), state

    optimizer = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    # A cube root is infinitely steep where B = 0 keeps a gradient at 0, so it starts elsewhere.
    loss = dead_units if name == "a power" else lora
    case = problem(loss)
    if name == "a cube root":
        case = bilevel.Problem(
            lambda w, o, b, k: jnp.sum((w - o) ** 2 * (1 + w**2)), lambda w, o, b, k: jnp.sum(w**3),
            lambda k, o: jnp.full(6, 0.2), lambda k: jnp.linspace(0.5, 1.5, 6),
        )  # fmt: skip
    hypergradient = Unrolled(optimizer, 2, mode=mode, checkpoint="auto")
    arguments = None, case.start_outer(KEY), None, None, KEY
    found = estimate(case, hypergradient, *arguments).grad
    assert_close(found, central_differences(case, hypergradient, *arguments), 1e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0])  # the first step is scaled down where the gradient is longer than 1
@pytest.mark.parametrize("steps", [1, 3])
def test_the_first_steps_of_l_bfgs(scale, steps):
    case = bilevel.Problem(
        lambda w, o, b, k: scale * jnp.sum((w - o) ** 2 * jnp.array([0.1, 0.3])),
        lambda w, o, b, k: jnp.sum((w - 1.0) ** 2),
        lambda k, o: jnp.zeros(2),
        lambda k: jnp.array([0.7, 0.4]),
    )
    hypergradient = Unrolled(optax.lbfgs(0.1, linesearch=None), steps)
    arguments = None, case.start_outer(KEY), None, None, KEY
    found = estimate(case, hypergradient, *arguments).grad
    assert_close(found, central_differences(case, hypergradient, *arguments), 1e-7)


def test_the_power_of_a_float_to_a_count_has_a_slope_under_strict_promotion():
    count = jnp.asarray(3, jnp.int32)

    def power(x):
        return smooth(lambda x: x**count)(x)

    np.testing.assert_array_equal(power(jnp.asarray(0.9)), jnp.asarray(0.9) ** count)
    np.testing.assert_allclose(jax.grad(power)(0.9), 3 * 0.9**2, rtol=1e-12)
