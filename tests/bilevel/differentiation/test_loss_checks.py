"""Losses that captured the outer variable, or that cannot be differentiated, are refused in a sentence."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Problem, Unrolled
from tests.bilevel.estimators import ROWS, TABLE
from tests.bilevel.helpers import KEY

SGD = optax.sgd(0.1)
ESTIMATORS = {row.name: row.make(SGD, 3) for row in TABLE if not row.tasks and not row.setting}
each = pytest.mark.parametrize("name", ESTIMATORS)
OUTER = {"a": jnp.array([0.3, 0.4]), "b": jnp.array([0.1, 0.2])}


def problem(inner, outer_loss=lambda w, o, b, k: jnp.sum((w - 1.0) ** 2), outer=OUTER):
    return Problem(inner, outer_loss, lambda key, outer: jnp.zeros(2), lambda key: outer)


def estimate(name, case, outer=OUTER):
    return ESTIMATORS[name].estimate(case, None, outer, None, None, KEY)


# Captured.


@each
def test_a_captured_leaf_is_an_error_and_named(name):
    case = problem(lambda w, o, b, k: jnp.sum((w - o["a"] - OUTER["b"]) ** 2))
    with pytest.raises(ValueError, match=r"inner_loss holds outer leaf \['b'\] as a constant"):
        estimate(name, case)
    # beside a loss that reads the leaf, too
    direct = problem(
        lambda w, o, b, k: jnp.sum((w - o["a"] - o["b"]) ** 2), lambda w, o, b, k: jnp.sum(w * OUTER["b"] + o["a"])
    )
    with pytest.raises(ValueError, match=r"outer_loss holds outer leaf \['b'\] as a constant"):
        estimate(name, direct)


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap"])
def test_a_captured_value_of_a_transformation_is_recognised(transform):
    def value(a):
        case = problem(lambda w, o, b, k: jnp.sum((w - a) ** 2))
        return Unrolled(SGD, 2).estimate(case, None, {"a": a}, None, None, KEY).value

    with pytest.raises(ValueError, match=r"inner_loss holds outer leaf \['a'\]"):
        getattr(jax, transform)(value)(jnp.ones((3, 2)) if transform == "vmap" else jnp.ones(2))


def test_a_run_recognises_a_copy_that_no_loss_reads():
    captured = jnp.array([0.1, 0.2])
    case = problem(lambda w, o, b, k: jnp.sum((w - o["a"] - captured) ** 2))
    with pytest.raises(ValueError, match=r"inner_loss holds outer leaf \['b'\]"):
        bilevel.run(bilevel.Nested(case, ESTIMATORS["mixed"], SGD), steps=2, progress=False)
    with pytest.raises(ValueError, match=r"inner_loss holds outer leaf \['b'\]"):
        bilevel.run(bilevel.SOBA(case, 0.1, 0.1), steps=2, progress=False)


def test_a_start_that_is_also_a_prior_is_fine():
    prior = OUTER["b"]
    case = problem(
        lambda w, o, b, k: jnp.sum((w - o["a"] - o["b"]) ** 2) + jnp.sum((o["b"] - prior) ** 2 * w**2),
        lambda w, o, b, k: jnp.sum(w**2) + jnp.sum((o["b"] - prior) ** 2),
    )
    assert np.all(estimate("mixed", case).grad["b"] != 0)
    assert np.isfinite(
        bilevel.run(bilevel.Nested(case, ESTIMATORS["mixed"], SGD), steps=2, progress=False).outer["b"]
    ).all()


# Neither loss depends on it.


@each
def test_losses_without_the_outer_variable_are_an_error_for_every_estimator(name):
    case = problem(lambda w, o, b, k: jnp.sum((w - 0.5) ** 2))
    with pytest.raises(ValueError, match=r"Neither loss depends on outer \(\['a'\], \['b'\]\)"):
        estimate(name, case)


@each
def test_one_leaf_without_influence_is_a_warning(name):
    case = problem(lambda w, o, b, k: jnp.sum((w - o["a"]) ** 2), lambda w, o, b, k: jnp.sum((w - o["a"] - 1.0) ** 2))
    with pytest.warns(bilevel.StructuralZeroWarning, match=r"leaf \['b'\] is exactly 0"):
        result = estimate(name, case)
    if not ROWS[name].random:
        np.testing.assert_array_equal(result.grad["b"], 0.0)


# Not differentiable.


def looped(x):
    return jax.lax.while_loop(lambda c: jnp.sum(c) > 1e-3, lambda c: 0.5 * c, x)


def called(x):
    return jax.pure_callback(
        lambda x: np.asarray(x), jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential"
    )


@jax.custom_vjp
def ruled(x):
    return x**3


ruled.defvjp(lambda x: (x**3, x), lambda x, ct: (3 * called(x) ** 2 * ct,))


def squares(function, w, o, b, k):
    return jnp.sum((function(w - o["a"]) - o["b"]) ** 2)


# A minimiser of one's own meets the loss first, and its errors are its own.
SECOND = [name for name in ESTIMATORS if ROWS[name].second_order and name != "implicit solve"]


@pytest.mark.parametrize("name", [*SECOND, "first order", "finite difference", "evolution"])
@pytest.mark.parametrize(
    ("function", "primitive", "remedy"), [(looped, "while", "jax.lax.scan"), (called, "pure_callback", "custom_jvp")]
)
@pytest.mark.parametrize("nested", [False, True])
def test_an_inner_loss_without_a_gradient_names_the_operation(name, function, primitive, remedy, nested):
    if nested:  # inside a compiled function inside a loop
        inside = jax.jit(function)
        function = lambda x: jax.lax.scan(lambda c, _: (inside(c), None), x, None, length=2)[0]  # noqa: E731
    case = problem(functools.partial(squares, function))
    with pytest.raises(ValueError, match=rf"inner_loss cannot be differentiated, because of `{primitive}`.*{remedy}"):
        estimate(name, case)


@pytest.mark.filterwarnings("ignore::bilevel.CustomDerivativeWarning")  # a rule that asks the host is not known
@pytest.mark.parametrize("name", SECOND)
def test_a_second_derivative_that_is_not_there_is_named(name):
    case = problem(functools.partial(squares, ruled))
    message = (
        r"inner_loss cannot be differentiated twice, forward over reverse, because of `custom_vjp_call`.*FirstOrder|"
        r"inner_loss has a derivative of its own \(`ruled`"
    )
    with pytest.raises(ValueError, match=message):
        estimate(name, case)


@pytest.mark.filterwarnings("ignore::bilevel.StructuralZeroWarning")
@pytest.mark.parametrize("name", ["evolution", "first order"])
def test_estimators_without_second_derivatives_take_it(name):
    case = problem(
        functools.partial(squares, ruled), lambda w, o, b, k: jnp.sum((w - 1.0) ** 2) + jnp.sum(o["a"] ** 2 + o["b"])
    )
    assert np.isfinite(estimate(name, case).grad["a"]).all()


@pytest.mark.parametrize("name", ["finite difference", "sama"])
def test_differences_of_gradients_refuse_a_rule_that_is_not_known_to_be_true(name):
    with pytest.raises(ValueError, match=r"has a derivative of its own \(`ruled`.*a difference of gradients in outer"):
        estimate(name, problem(functools.partial(squares, ruled)))


@pytest.mark.parametrize("name", ["mixed", "forward", "implicit", "finite difference"])
def test_an_outer_loss_without_a_gradient_names_the_operation(name):
    inner = lambda w, o, b, k: jnp.sum((w - o["a"] - o["b"]) ** 2)  # noqa: E731
    case = problem(inner, lambda w, o, b, k: jnp.sum(called(w) * o["a"]))
    with pytest.raises(ValueError, match="outer_loss cannot be differentiated, because of `pure_callback`"):
        estimate(name, case)
    assert np.isfinite(estimate("evolution", case).grad["a"]).all()


def test_an_outer_loss_without_a_forward_derivative():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, ct: (3 * x**2 * ct,))
    inner = lambda w, o, b, k: jnp.sum((w - o["a"] - o["b"]) ** 2)  # noqa: E731
    case = problem(inner, lambda w, o, b, k: jnp.sum(cube(w)))
    with pytest.raises(ValueError, match=r"outer_loss cannot be differentiated in forward mode.*custom_vjp_call"):
        estimate("forward", case)
    assert np.isfinite(estimate("mixed", case).grad["a"]).all()


def test_a_loop_that_depends_on_nothing_that_is_differentiated_is_fine():
    case = problem(lambda w, o, b, k: jnp.sum((w - o["a"] - o["b"] * looped(jnp.ones(2))) ** 2))
    assert np.isfinite(estimate("mixed", case).grad["a"]).all()


def test_an_error_of_the_loss_itself_is_left_alone():
    def broken(w, o, b, k):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        estimate("mixed", problem(broken))


# Steep.


def steep_problem(start):
    # The gradient of w is 0 at w = 0, whatever v, but depends on outer there.
    return Problem(
        lambda w, o, b, k: jnp.sum((w["v"] - 1.0) ** 2) + jnp.sum(w["w"] ** 2) - jnp.sum(w["w"] * o),
        lambda w, o, b, k: jnp.sum((w["w"] - 1.0) ** 2) + jnp.sum(w["v"] * o),
        lambda key, outer: {"v": jnp.zeros(2), "w": jnp.full(2, start)},
        lambda key: jnp.zeros(2),
    )


def told(case, optimizer, **settings):
    solver = bilevel.Nested(case, Unrolled(optimizer, 3), optax.adam(1e-3), **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bilevel.run(solver, steps=3, progress=False)
    return [str(w.message) for w in caught if w.category is bilevel.SteepUpdateWarning]


def test_a_gradient_of_zero_that_depends_on_outer_is_told_for_adam():
    (message,) = told(steep_problem(0.0), optax.adam(1e-3), inner_start="cold")
    assert "['w']" in message and "['v']" not in message and "eps" in message
    assert told(steep_problem(0.0), optax.adam(1e-3, eps=1e-2)) == []
    assert told(steep_problem(0.0), optax.sgd(1e-3)) == []
    assert told(steep_problem(0.1), optax.adam(1e-3)) == []


def test_a_large_hypergradient_for_another_reason_is_not_blamed_on_adam():
    case = dataclasses.replace(
        steep_problem(0.1), outer_loss=lambda w, o, b, k: 1e6 * jnp.sum((w["w"] - 1.0) ** 2) + jnp.sum(w["v"] * o)
    )
    assert told(case, optax.adam(1e-1)) == []
