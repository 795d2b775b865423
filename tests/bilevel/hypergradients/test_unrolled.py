import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Levels, Unrolled
from bilevel.testing import central_differences, quadratic
from tests.bilevel.helpers import (
    KEY,
    NETWORK,
    ROWS,
    assert_close,
    assert_equal,
    estimate,
    jitted_estimate,
    network_batches,
)

Q = quadratic()
OUTER = {"tilt": np.array([0.3, -0.2, 0.5]), "rate": np.array(0.5), "start": 0.7 * Q.start}
SGD = lambda outer: optax.sgd(outer["rate"])  # noqa: E731
CHECKPOINTS = ["auto", "none", "step", "sqrt", Levels(1), Levels(3)]
modes = pytest.mark.parametrize("mode", ["mixed", "reverse"])


@modes
@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_every_schedule_gives_the_closed_form(mode, checkpoint, steps):
    hypergradient = Unrolled(SGD, steps, mode=mode, checkpoint=checkpoint)
    result = estimate(Q.problem, hypergradient, None, OUTER, None, None, KEY)
    np.testing.assert_allclose(result.value, Q.value(OUTER, steps), rtol=1e-12)
    assert_close(result.grad, Q.unrolled(OUTER, steps), 1e-10)


@modes
@pytest.mark.parametrize("checkpoint", ["none", "sqrt"])
@pytest.mark.parametrize(("steps", "truncate"), [(7, 1), (7, 3), (7, 7), (64, 10)])
def test_truncation_gives_its_closed_form(mode, checkpoint, steps, truncate):
    hypergradient = Unrolled(SGD, steps, mode=mode, checkpoint=checkpoint, truncate=truncate)
    outer = OUTER if truncate == steps else {name: OUTER[name] for name in ("tilt", "rate")}
    result = estimate(Q.problem, hypergradient, None, outer, None, None, KEY)
    np.testing.assert_allclose(result.value, Q.value(outer, steps), rtol=1e-12)
    assert_close(result.grad, Q.unrolled(outer, steps, truncate=truncate), 1e-10)


def test_truncation_hides_the_start_and_says_so():
    with pytest.warns(bilevel.StructuralZeroWarning, match=r"leaf \['start'\]"):
        result = Unrolled(SGD, 7, truncate=3).estimate(Q.problem, None, OUTER, None, None, KEY)
    assert_close(result.grad, Q.unrolled(OUTER, 7, truncate=3), 1e-10)


@pytest.mark.parametrize("truncate", [1, 3])
def test_truncation_keeps_batches_keys_and_state_of_the_full_training(truncate):
    outer, batches = NETWORK.start_outer(KEY), network_batches(5)
    arguments = None, outer, batches, jax.tree.map(jnp.asarray, ROWS), KEY
    full = estimate(NETWORK, Unrolled(optax.adam(0.05), 5), *arguments)
    cut = estimate(NETWORK, Unrolled(optax.adam(0.05), 5, truncate=truncate), *arguments)
    assert_close(cut.inner_state.params, full.inner_state.params, 1e-12)
    assert_close(cut.inner_state.opt_state, full.inner_state.opt_state, 1e-12)
    assert_close(cut.aux.info["inner_loss"], full.aux.info["inner_loss"], 1e-12)
    assert np.linalg.norm(cut.grad["weight"] - full.grad["weight"]) > 1e-6


@modes
@pytest.mark.parametrize("checkpoint", ["auto", "none"])
def test_network_with_dropout_equals_central_differences(mode, checkpoint):
    outer, batches = NETWORK.start_outer(KEY), network_batches(5)
    arguments = None, outer, batches, jax.tree.map(jnp.asarray, ROWS), KEY
    hypergradient = Unrolled(optax.adam(0.05), 5, mode=mode, checkpoint=checkpoint)
    result = estimate(NETWORK, hypergradient, *arguments)
    assert_close(result.grad, central_differences(NETWORK, hypergradient, *arguments), 1e-8)


@modes
def test_second_derivatives_of_the_outer_function(mode):
    outer = {name: jnp.asarray(OUTER[name]) for name in ("tilt", "rate")}
    hypergradient = Unrolled(SGD, 7, mode=mode)
    grad = lambda outer: hypergradient.estimate(Q.problem, None, outer, None, None, KEY).grad  # noqa: E731
    backward = jax.jit(jax.jacrev(grad))(outer)
    forward = jax.jit(jax.jacfwd(grad))(outer)
    h = 1e-5
    for name in outer:
        sides = []
        for sign in (1, -1):
            moved = outer | {"rate": outer["rate"] + sign * h}
            sides.append(Q.unrolled(jax.tree.map(np.asarray, moved), 7)[name])
        difference = (sides[0] - sides[1]) / (2 * h)
        assert_close(backward[name]["rate"], difference, 1e-7)
        assert_close(forward[name]["rate"], difference, 1e-7)


def test_derivatives_of_solve_reach_everything_it_reads():
    # A row of data, a frozen array of the loss and the starting point: all may be variables of a level above.
    def inner(scale, w, outer, batch, key):
        return 0.5 * jnp.sum(scale * (w - batch * outer) ** 2)

    def training(scale, batches, start, mode):
        problem = bilevel.Problem(
            jax.tree_util.Partial(inner, scale), lambda w, o, b, k: jnp.sum(w), lambda k, o: o, lambda k: 0.0
        )
        hypergradient = Unrolled(optax.sgd(0.5), 3, mode=mode)
        state = hypergradient.init(problem, jnp.ones(2), KEY)._replace(params=start)
        return jnp.sum(hypergradient.solve(problem, state, jnp.ones(2), batches, KEY).params ** 3)

    scale, start = jnp.array([0.5, 1.5]), jnp.array([0.3, -0.4])
    batches = jnp.arange(6.0).reshape(3, 2) / 5

    def by_hand(scale, batches, start):
        w = start
        for t in range(3):
            w = w - 0.5 * scale * (w - batches[t])
        return jnp.sum(w**3)

    expected = jax.grad(by_hand, (0, 1, 2))(scale, batches, start)
    for mode in ("mixed", "reverse"):
        assert_close(jax.grad(training, (0, 1, 2))(scale, batches, start, mode), expected, 1e-12)


@pytest.mark.parametrize("transform", ["jit", "vmap", "grad"])
@modes
def test_a_problem_built_inside_a_transformation_may_capture_its_values(transform, mode):
    def value(scale, shift):
        problem = bilevel.Problem(
            lambda w, o, b, k: jnp.sum(jnp.cosh(w - scale * o + jax.random.normal(shift))),
            lambda w, o, b, k: jnp.sum(w**2),
            lambda k, o: jnp.zeros(2),
            lambda k: jnp.ones(2),
        )
        hypergradient = Unrolled(optax.sgd(0.3), 4, mode=mode)
        result = hypergradient.estimate(problem, None, jnp.ones(2), None, None, KEY)
        return jnp.sum(result.grad) + result.value

    at, key = jnp.asarray(1.2), jax.random.key(4)
    if transform == "jit":
        np.testing.assert_allclose(jax.jit(value)(at, key), value(at, key), rtol=1e-12)
    elif transform == "vmap":
        both = jax.vmap(value)(jnp.array([1.2, 2.0]), jax.random.split(key))
        np.testing.assert_allclose(both[1], value(jnp.asarray(2.0), jax.random.split(key)[1]), rtol=1e-12)
    else:
        h = 1e-4
        numeric = (value(at + h, key) - value(at - h, key)) / (2 * h)
        np.testing.assert_allclose(jax.grad(value)(at, key), numeric, rtol=1e-6)


def test_a_complex_inner_variable():
    def inner(w, outer, batch, key):
        return jnp.sum(jnp.abs(w - outer * jnp.array([1.0 + 0.5j, 2.0 - 1.0j])) ** 2) + 0.1 * jnp.sum(w.real**4)

    problem = bilevel.Problem(
        inner,
        lambda w, outer, batch, key: jnp.sum(jnp.abs(w - 1j) ** 2),
        lambda key, outer: jnp.zeros(2, complex),
        lambda key: jnp.array([0.4, 0.6]),
    )
    arguments = None, jnp.array([0.4, 0.6]), None, None, KEY
    for mode in ("mixed", "reverse"):
        hypergradient = Unrolled(optax.sgd(0.1), 5, mode=mode)
        with jax.numpy_dtype_promotion("standard"):
            result = hypergradient.estimate(problem, *arguments)
            expected = central_differences(problem, hypergradient, *arguments)
        assert_close(result.grad, expected, 1e-8)
        assert np.all(np.diff(result.aux.info["inner_loss"]) < 0)  # it descends in the complex plane


def test_compilation_does_not_depend_on_the_number_of_steps():
    def size(steps):
        hypergradient = Unrolled(optax.adam(0.1), steps, checkpoint="step")
        arguments = Q.problem, hypergradient, None, {"tilt": OUTER["tilt"]}, None, None, KEY
        return len(str(jitted_estimate.trace(*arguments).jaxpr))

    assert size(1024) < 1.02 * size(16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "sideways"}, "mode='sideways'"),
        ({"checkpoint": "cbrt"}, "checkpoint='cbrt'"),
        ({"truncate": 0}, "truncate=0"),
        ({"truncate": 8}, "truncate=8"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Unrolled(optax.sgd(0.1), 7, **settings)


def test_levels_out_of_range_are_refused():
    with pytest.raises(ValueError, match="n=0"):
        Levels(0)


def test_a_hypergradient_is_a_pytree_of_arrays_only():
    hypergradient = Unrolled(optax.sgd(0.1), 7)
    leaves, structure = jax.tree.flatten(hypergradient)
    assert leaves == [] and jax.tree.unflatten(structure, leaves) == hypergradient
    assert_equal(jax.tree.leaves(Q.problem)[0], jnp.asarray(Q.H))
