"""What a traced function hands on: whether it is new, and whether its derivative is whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient

from bilevel.differentiation.carried import computed, undetached
from bilevel.differentiation.tracing import evaluate_closed

W, S = jnp.arange(1.0, 4.0), jnp.ones(3)


def body(carry, x):
    w, s = carry
    return (w * 1.5, s), (x, s, w + x)


PASSED = {
    "as it is": (lambda w, s: (s, w), [False, False]),
    "times a number": (lambda w, s: (s, 2.0 * w), [False, True]),
    "a number": (lambda w, s: (1.0, w), [True, False]),
    "laid out anew": (lambda w, s: (w[::1], s.reshape(1, 3)), [False, False]),
    "through a function": (lambda w, s: jax.jit(lambda w, s: (s, w, w + s))(w, s), [False, False, True]),
    "through two": (
        lambda w, s: jax.checkpoint(lambda w, s: jax.jit(lambda s, w: (jnp.sin(w), s))(s, w))(w, s),
        [True, False],
    ),
    "through a rule of its own": (lambda w, s: (s, jax.nn.relu(w)), [False, True]),
    "through a loop": (lambda w, s: jax.lax.scan(body, (w, s), jnp.stack([w, s]))[0], [True, False]),
    "stacks of a loop": (lambda w, s: jax.lax.scan(body, (w, s), w)[1], [False, False, True]),
    "swapped in a loop": (lambda w, s: jax.lax.scan(lambda c, _: (c[::-1], None), (w, s), length=3)[0], [False, False]),
    "through a branch": (lambda w, s: jax.lax.cond(w[0] > 0, lambda: (w, 2 * s), lambda: (s, w)), [False, False]),
}


@pytest.mark.parametrize("name", PASSED)
def test_what_is_computed_is_told_from_what_is_handed_on(name):
    function, expected = PASSED[name]
    assert computed(jax.make_jaxpr(function)(W, S)) == expected


# Losses with a sum that is carried, and cut off from its derivative on the way out: value, and the new sum.


def plain(w, s, stop):
    return jnp.sum(w**2), stop(0.5 * s + w**2)


def called(w, s, stop):
    return jax.jit(lambda w, s: plain(w, s, stop))(w, s)


def remat(w, s, stop):
    return jax.checkpoint(lambda w, s: called(w, s, stop))(w, s)


def twice(w, s, stop):
    return plain(w, plain(w, s, stop)[1], stop)


def scanned(w, s, stop):
    def layer(total, x):
        value, new = plain(x[0], x[1], stop)
        return total + value, new

    return jax.lax.scan(layer, 0.0, (w[:, None], s[:, None]))


def looped(w, s, stop):
    def step(carry, _):
        value, s = plain(w, carry[1], stop)
        return (carry[0] + value, s), None

    return jax.lax.scan(step, (0.0, s), length=3)[0]


def edited(function):
    closed = jax.make_jaxpr(lambda w, s: function(w, s, stop_gradient))(W, S)
    return lambda w, s: evaluate_closed(undetached(closed, [True, False]), w, s)


@pytest.mark.parametrize("function", [plain, called, remat, twice, scanned, looped])
def test_what_is_carried_has_its_whole_derivative(function):
    whole = lambda w, s: function(w, s, lambda x: x)  # noqa: E731
    found, expected = edited(function)(W, S), whole(W, S)
    jax.tree.map(np.testing.assert_array_equal, found, list(expected))
    of = lambda f: jax.jacobian(lambda *x: f(*x)[1], (0, 1))(W, S)  # noqa: E731
    assert all(np.abs(x).max() > 0 for x in of(whole))
    jax.tree.map(np.testing.assert_allclose, of(edited(function)), of(whole))


def hidden(w, s, stop):
    s = stop(s + w)  # read by the loss, which is not to see that it depends on w
    return jnp.sum(s * w), s


def hidden_in_a_loop(w, s, stop):
    def step(carry, _):
        value, s = hidden(w, carry[1], stop)
        return (carry[0] * 0.5 + value, s), None

    return jax.lax.scan(step, (0.0, s), length=2)[0]


@pytest.mark.parametrize("function", [hidden, hidden_in_a_loop])
def test_what_a_loss_hides_from_itself_stays_hidden(function):
    of = lambda f: jax.grad(lambda *x: f(*x)[0], (0, 1))(W, S)  # noqa: E731
    as_written = lambda w, s: function(w, s, stop_gradient)  # noqa: E731
    found, expected = of(edited(function)), of(as_written)
    jax.tree.map(np.testing.assert_allclose, found, expected)
    assert not np.allclose(found[0], of(lambda w, s: function(w, s, lambda x: x))[0])
