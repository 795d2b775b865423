"""What a user may write inside a loss: control flow, rematerialisation, rules of one's own, tasks in parallel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Unrolled
from bilevel.testing import central_differences
from tests.bilevel.helpers import KEY, assert_close, estimate


@jax.custom_vjp
def own_reverse_rule(x):
    return x**3


own_reverse_rule.defvjp(lambda x: (x**3, x), lambda x, ct: (3 * x**2 * ct,))


@jax.custom_jvp
def own_forward_rule(x):
    return x**3


own_forward_rule.defjvp(lambda primals, tangents: (primals[0] ** 3, 3 * primals[0] ** 2 * tangents[0]))


def looped(x):
    return jax.lax.scan(lambda carry, _: (carry * x, None), jnp.ones_like(x), None, length=3)[0]


def branched(x):
    return jax.lax.cond(jnp.sum(x) > -100.0, lambda x: x**3, lambda x: x, x)


def counted(x):
    return jax.lax.fori_loop(0, 3, lambda i, y: y * x, jnp.ones_like(x))


CUBES = {
    "custom_vjp": own_reverse_rule,
    "custom_jvp": own_forward_rule,
    "remat": jax.checkpoint(lambda x: x**3),
    "jit": jax.jit(lambda x: x**3),
    "scan": looped,
    "fori_loop": counted,
    "cond": branched,
    "vmap": jax.vmap(lambda x: x**3),
}


def problem(cube):
    return bilevel.Problem(
        lambda w, outer, batch, key: jnp.sum(cube(w - outer) ** 2) + jnp.sum((w - outer) ** 2),
        lambda w, outer, batch, key: jnp.sum(cube(w) + w * outer),
        lambda key, outer: jnp.array([0.1, 0.2]),
        lambda key: jnp.array([0.7, -0.4]),
    )


@functools.cache
def expected():
    arguments = None, jnp.array([0.7, -0.4]), None, None, KEY
    return central_differences(problem(lambda x: x**3), Unrolled(optax.sgd(0.1, 0.5), 3), *arguments)


@pytest.mark.parametrize("name", CUBES)
@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_the_same_function_in_other_words_has_the_same_hypergradient(name, mode):
    case = problem(CUBES[name])
    hypergradient = Unrolled(optax.sgd(0.1, 0.5), 3, mode=mode)
    found = estimate(case, hypergradient, None, jnp.array([0.7, -0.4]), None, None, KEY)
    assert_close(found.grad, expected(), 1e-8)


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_many_tasks_under_one_initialisation(mode):
    # MAML on quadratics: w_K = a + M^K (start - a) for each task, so the gradient has a closed form.
    case = bilevel.Problem(
        lambda w, outer, batch, key: 0.5 * jnp.sum((w - batch) ** 2),
        lambda w, outer, batch, key: 0.5 * jnp.sum((w - batch) ** 2),
        lambda key, outer: outer,
        lambda key: jnp.zeros(2),
    )
    hypergradient = Unrolled(optax.sgd(0.25), 3, mode=mode)
    tasks = jnp.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]])
    start = jnp.array([0.2, 0.1])

    def mean(start):
        one = lambda task: hypergradient.estimate(case, None, start, jnp.stack([task] * 3), task, KEY)  # noqa: E731
        return jax.tree.map(lambda x: jnp.mean(x, 0), jax.vmap(one)(tasks).grad)

    keep = 0.75**3
    np.testing.assert_allclose(mean(start), keep**2 * (start - np.mean(tasks, 0)), rtol=1e-12)


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_trees_of_any_kind(mode):
    # tuples, None, empty containers and a leaf that the loss does not read
    case = bilevel.Problem(
        lambda w, outer, batch, key: jnp.sum((w[0]["a"] - outer[0]) ** 2 * outer[1][()]),
        lambda w, outer, batch, key: jnp.sum(w[0]["a"] ** 2),
        lambda key, outer: ({"a": jnp.zeros(2), "none": None}, (), jnp.ones(3)),
        lambda key: (jnp.full(2, 0.3), {(): jnp.asarray(1.0)}, None),
    )
    outer = case.start_outer(KEY)
    result = Unrolled(optax.sgd(0.1), 2, mode=mode).estimate(case, None, outer, None, None, KEY)
    np.testing.assert_allclose(result.grad[0], 2 * 0.3 * (1 - 0.8**2) ** 2, rtol=1e-12)
    assert jax.tree.structure(result.grad) == jax.tree.structure(outer)
    np.testing.assert_array_equal(result.inner_state.params[2], 1.0)
