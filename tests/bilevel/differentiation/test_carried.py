"""What a traced function hands on: whether it is new, and whether its derivative is whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient

from bilevel.differentiation.carried import handed_on, hidden_in, undetached
from bilevel.differentiation.tracing import evaluate_closed

W, S = jnp.arange(1.0, 4.0), jnp.ones(3)


def body(carry, x):
    w, s = carry
    return (w * 1.5, s), (x, s, w + x)


HANDED_ON = {
    "as it is": (lambda w, s: (s, w), [1, 0]),
    "cut off": (lambda w, s: (stop_gradient(s), w), [1, 0]),
    "times a number": (lambda w, s: (s, 2.0 * w), [1, None]),
    "a number": (lambda w, s: (1.0, w), [None, 0]),
    "numbers": (lambda w, s: (jnp.zeros_like(w), jnp.ones(3), np.ones(3)), [None, None, None]),
    "turned": (lambda w, s: (w[::-1], w.astype(jnp.float32).astype(w.dtype)), [None, None]),
    "laid out anew": (lambda w, s: (w[::1], s.reshape(1, 3)), [0, None]),
    "and back": (lambda w, s: (s.reshape(1, 3).T.reshape(3), jnp.outer(w, w).T), [1, None]),
    "through a function": (lambda w, s: jax.jit(lambda w, s: (s, w, w + s))(w, s), [1, 0, None]),
    "through two": (
        lambda w, s: jax.checkpoint(lambda w, s: jax.jit(lambda s, w: (jnp.sin(w), s))(s, w))(w, s),
        [None, 1],
    ),
    "through a rule of its own": (lambda w, s: (s, jax.nn.relu(w)), [1, None]),
    "through a loop": (lambda w, s: jax.lax.scan(body, (w, s), jnp.stack([w, s]))[0], [None, 1]),
    "stacks of a loop": (lambda w, s: jax.lax.scan(body, (w, s), w)[1], [0, None, None]),
    "stacks turned in a loop": (
        lambda w, s: jax.lax.scan(lambda c, x: (c, (x.reshape(1).reshape(()), x.reshape(1))), 0.0, w)[1],
        [0, None],
    ),
    "swapped in a loop": (lambda w, s: jax.lax.scan(lambda c, _: (c[::-1], None), (w, s), length=3)[0], [None, None]),
    "turned in a loop": (
        lambda w, s: jax.lax.scan(lambda c, _: (c.T, None), jnp.outer(w, s), length=2)[0],
        [None],
    ),
    "through a loop without an end": (
        lambda w, s: jax.lax.while_loop(lambda c: c[0][0] < 9, lambda c: (2 * c[0], c[1]), (w, s)),
        [None, 1],
    ),
    "through a branch": (
        lambda w, s: jax.lax.cond(w[0] > 0, lambda: (w, 2 * s, s), lambda: (s, w, s)),
        [None, None, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HANDED_ON)
def test_what_is_handed_on_is_told_from_all_else(name):
    function, expected = HANDED_ON[name]
    assert handed_on(jax.make_jaxpr(function)(W, S)) == expected


def test_a_square_that_is_turned_is_another_until_it_is_turned_back():
    square = jnp.arange(9.0).reshape(3, 3)
    turned = jax.make_jaxpr(lambda q: (q.T, q.T.T, q.T.reshape(9).reshape(3, 3), q.reshape(9).reshape(3, 3)))(square)
    assert handed_on(turned) == [None, 0, None, 0]
    cubes = jax.make_jaxpr(lambda q: (q.transpose(1, 2, 0).transpose(1, 2, 0).transpose(1, 2, 0)))(jnp.ones((3, 3, 3)))
    assert handed_on(cubes) == [0]


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


def branched(w, s, stop):
    return jax.lax.cond(w[0] > 0, lambda w, s: plain(w, s, stop), lambda w, s: plain(2 * w, s, stop), w, s)


def without_end(w, s, stop):
    def step(carry):
        value, s = plain(w, carry[1], stop)
        return carry[0] + value, s

    return jax.lax.while_loop(lambda c: c[0] < 30.0, step, (0.0, s))


def edited(function):
    closed = jax.make_jaxpr(lambda w, s: function(w, s, stop_gradient))(W, S)
    return lambda w, s: evaluate_closed(undetached(closed, [True, False]), w, s)


@pytest.mark.parametrize("function", [plain, called, remat, twice, scanned, looped, branched, without_end])
def test_what_is_carried_has_its_whole_derivative(function):
    whole = lambda w, s: function(w, s, lambda x: x)  # noqa: E731
    found, expected = edited(function)(W, S), whole(W, S)
    jax.tree.map(np.testing.assert_array_equal, found, list(expected))
    of = lambda f: jax.jacfwd(lambda *x: f(*x)[1], (0, 1))(W, S)  # noqa: E731
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


def hidden_in_a_function(w, s, stop):
    return jax.jit(lambda w, s: jax.checkpoint(lambda w, s: hidden(w, s, stop))(w, s))(w, s)


def hidden_in_a_branch(w, s, stop):
    return jax.lax.cond(w[0] > 0, lambda w, s: hidden(w, s, stop), lambda w, s: hidden(2 * w, s, stop), w, s)


def hidden_beside(w, s, stop):
    jax.debug.print("{}", stop(w)[0])
    v = stop(jnp.sin(w))  # no part of what is carried
    value, s = hidden(w, s, stop)
    return value * jnp.sum(v), s


HIDDEN = [hidden, hidden_in_a_loop, hidden_in_a_function, hidden_in_a_branch, hidden_beside]


@pytest.mark.parametrize("function", HIDDEN)
def test_what_a_loss_hides_from_itself_stays_hidden(function):
    of = lambda f: jax.grad(lambda *x: f(*x)[0], (0, 1))(W, S)  # noqa: E731
    as_written = lambda w, s: function(w, s, stop_gradient)  # noqa: E731
    found, expected = of(edited(function)), of(as_written)
    jax.tree.map(np.testing.assert_allclose, found, expected)
    assert not np.allclose(found[0], of(lambda w, s: function(w, s, lambda x: x))[0])


@pytest.mark.parametrize("function", HIDDEN)
def test_but_not_from_what_is_carried_nor_from_the_derivative_of_its_gradient(function):
    of = lambda f: jax.jacobian(lambda *x: f(*x)[1], (0, 1))(W, S)  # noqa: E731
    jax.tree.map(np.testing.assert_allclose, of(edited(function)), of(lambda w, s: function(w, s, lambda x: x)))
    gradient = lambda w, s: jax.grad(lambda w: function(w, s, stop_gradient)[0])(w)  # noqa: E731
    found = jax.jacobian(jax.grad(lambda w: edited(function)(w, S)[0]))(W)
    steps = 1e-6 * jnp.eye(3)
    apart = [(gradient(W + step, S) - gradient(W - step, S)) / 2e-6 for step in steps]
    np.testing.assert_allclose(found, np.stack(apart, 1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("by", [jax.custom_jvp, jax.custom_vjp])
def test_a_cut_behind_a_rule_of_its_own_is_found(by):
    function = lambda w, s: plain(w, s, stop_gradient)  # noqa: E731
    inside = by(function)
    if by is jax.custom_jvp:
        inside.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    else:
        inside.defvjp(lambda w, s: (function(w, s), w), lambda w, cotangents: (cotangents[0] * w, cotangents[1]))
    cut = lambda w, s: jax.jit(lambda w, s: (*inside(w, s), s + w))(w, s)  # noqa: E731
    closed = undetached(jax.make_jaxpr(cut)(W, S), [True, False, False])
    assert [hidden_in(closed, i) for i in range(3)] == [None, f"{by.__name__}_call", None]
    attended = jax.make_jaxpr(lambda w, s: (jnp.sum(w), jax.nn.softmax(w) + jax.nn.gelu(w)))(W, S)
    assert hidden_in(undetached(attended, [True, False]), 1) is None


FORMULAS = {
    "logsumexp": lambda w: jax.scipy.special.logsumexp(w),
    "log_softmax": lambda w: jax.jit(jax.nn.log_softmax)(w)[0],
    "solve": lambda w: jnp.sum(jnp.linalg.solve(jnp.diag(w) + 0.1, w)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_of_jax_that_stops_a_gradient_is_no_cut(name):
    def value(w, s):
        result = FORMULAS[name](w)
        return result, s + result

    closed = jax.make_jaxpr(value)(W, S)
    assert "stop_gradient" in str(closed) and str(undetached(closed, [True, False])) == str(closed)
    # Nor is one handed to a function of JAX such a formula.
    cut = lambda w, s: (jnp.sum(w), jax.tree.map(stop_gradient, [jax.vmap(stop_gradient)(w)]))  # noqa: E731
    tree = jax.make_jaxpr(cut)(W, S)
    assert "stop_gradient" not in str(undetached(tree, [True, False]))
