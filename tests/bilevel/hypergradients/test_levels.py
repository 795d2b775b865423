"""Three levels: the inner loss of one problem trains another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Unrolled
from bilevel.testing import central_differences
from tests.bilevel.helpers import KEY, assert_close, estimate

# bottom: u learns a target that w and theta bend;  middle: w makes the trained u small;  top: theta judges both.


def bottom_loss(theta, u, w, batch, key):
    return jnp.sum((u - w * theta) ** 2 * (1.0 + u**2)) + 0.1 * jnp.sum(jax.random.normal(key, u.shape) * u)


def bottom_in_outer(u, outer, batch, key):
    return bottom_loss(outer["theta"], u, outer["w"], batch, key)


def unused(inner, outer, batch, key):
    return jnp.sum(inner**2)


def start(key, outer):
    return jnp.array([0.2, -0.3])


def first(key):
    return jnp.array([0.2, -0.3])


def trained_bottom(way, estimator, w, theta, key):
    """The bottom level trained at (w, theta); `theta` reaches it in one of three ways."""
    if way == "outer":
        problem, outer = bilevel.Problem(bottom_in_outer, unused, start, first), {"w": w, "theta": theta}
    elif way == "partial":
        problem = bilevel.Problem(jax.tree_util.Partial(bottom_loss, theta), unused, start, first)
        outer = w
    else:
        problem = bilevel.Problem(lambda *args: bottom_loss(theta, *args), unused, start, first)
        outer = w
    return estimator.solve(problem, None, outer, None, key).params


def top_problem(way, estimator):
    def middle_loss(w, theta, batch, key):
        u = trained_bottom(way, estimator, w, theta, key)
        return jnp.sum((u - 0.5) ** 2) + 0.1 * jnp.sum((w - theta) ** 2)

    def top_loss(w, theta, batch, key):
        u = trained_bottom(way, estimator, w, theta, key)
        return jnp.sum(u**2) + jnp.sum((w - 1.0) ** 2)

    return bilevel.Problem(middle_loss, top_loss, lambda key, theta: jnp.array([0.4, 0.6]), lambda key: jnp.ones(2))


@pytest.mark.parametrize("way", ["outer", "partial", "captured"])
@pytest.mark.parametrize(
    ("bottom", "middle", "checkpoint"),
    [
        ("mixed", "mixed", "auto"),
        ("mixed", "reverse", "none"),
        ("reverse", "mixed", "none"),
        ("reverse", "reverse", "none"),
    ],
)
def test_top_hypergradient_equals_central_differences(way, bottom, middle, checkpoint):
    problem = top_problem(way, Unrolled(optax.sgd(0.1), 4, mode=bottom, checkpoint=checkpoint))
    hypergradient = Unrolled(optax.sgd(0.2, 0.5), 2, mode=middle, checkpoint=checkpoint)
    arguments = None, jnp.array([0.7, 1.3]), None, None, KEY
    found = estimate(problem, hypergradient, *arguments).grad
    assert_close(found, central_differences(problem, hypergradient, *arguments), 1e-8)


def test_three_levels_of_adam():
    problem = top_problem("outer", Unrolled(optax.adam(0.05), 3, checkpoint="step"))
    hypergradient = Unrolled(optax.adam(0.05), 2, checkpoint="step")
    arguments = None, jnp.array([0.7, 1.3]), None, None, KEY
    found = estimate(problem, hypergradient, *arguments).grad
    assert_close(found, central_differences(problem, hypergradient, *arguments), 1e-7)


def test_middle_hypergradient_may_itself_be_an_inner_gradient():
    # grad of the middle problem's outer function, differentiated again: the middle loss is a hypergradient's value.
    def value(w, theta):
        problem = bilevel.Problem(bottom_in_outer, unused, start, first)
        outer = {"w": w, "theta": theta}
        return Unrolled(optax.sgd(0.1), 3).estimate(problem, None, outer, None, None, KEY)

    theta, w = jnp.array([0.7, 1.3]), jnp.array([0.4, 0.6])
    through = jax.jit(jax.jacrev(lambda theta: value(w, theta).grad["w"]))(theta)
    h = 1e-5
    for i in range(2):
        e = h * jnp.eye(2)[i]
        numeric = (value(w, theta + e).grad["w"] - value(w, theta - e).grad["w"]) / (2 * h)
        np.testing.assert_allclose(through[:, i], numeric, rtol=1e-6)
