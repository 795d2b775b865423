"""Domains of outer leaves: the maps themselves, and solvers that stay inside."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Compose, FirstOrder, Interval, Nested, Positive, Problem, Simplex, Softplus, Unrolled, bijectors
from tests.bilevel.helpers import KEY, assert_equal

RATE = Compose(Interval(math.log(1e-6), 0.0), Positive())
INSIDE = {
    Positive(): np.geomspace(1e-12, 1e12, 9),
    Softplus(): np.geomspace(1e-12, 1e3, 9),
    Interval(-2.0, 5.0): -2.0 + 7.0 * np.array([1e-9, 0.1, 0.5, 0.9, 1 - 1e-9]),
    Simplex(): np.array([[0.2, 0.3, 0.5], [1e-9, 1e-3, 1 - 1e-3 - 1e-9]]),
    RATE: np.array([1.1e-6, 1e-3, 0.9]),
}
each = pytest.mark.parametrize("bijector", INSIDE, ids=repr)


@each
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_back_and_forth(bijector, dtype):
    values = jnp.asarray(INSIDE[bijector], dtype)
    again = bijector.forward(bijector.inverse(values))
    assert again.dtype == values.dtype
    np.testing.assert_allclose(again, values, rtol=1e-10 if dtype == jnp.float64 else 1e-4)


@each
def test_every_number_stands_for_one_inside(bijector):
    u = jnp.linspace(-20.0, 20.0, 30).reshape(10, 3)
    u = u - jnp.mean(u, axis=-1, keepdims=True) if bijector == Simplex() else u
    values = bijector.forward(u)
    assert np.all(np.asarray(values) > (-2 if isinstance(bijector, Interval) else 0))
    if bijector == Simplex():
        np.testing.assert_allclose(jnp.sum(values, -1), 1.0, rtol=1e-14)
    # rounding near an end is what the inverse amplifies
    np.testing.assert_allclose(bijector.inverse(values), u, rtol=1e-6, atol=1e-6)


@each
def test_the_inverse_is_finite_where_rounding_has_reached_an_end(bijector):
    ends = bijector.forward(jnp.array([-1e3, 1e3 if isinstance(bijector, Interval | Simplex) else 0.0]))
    assert np.all(np.isfinite(bijector.inverse(ends)))


def toward(target):
    """min |outer - target|^2 / 2, the inner problem beside it."""
    return Problem(
        lambda w, outer, batch, key: jnp.sum(w**2),
        lambda w, outer, batch, key: 0.5 * sum(jnp.sum((outer[n] - target[n]) ** 2) for n in target) + 0 * jnp.sum(w),
        lambda key, outer: jnp.zeros(2),
        lambda key: {"decay": jnp.array([0.5, 2.0]), "mix": jnp.array([0.2, 0.8]), "shift": jnp.asarray(1.0), "n": 3},
        domain={"decay": Positive(), "mix": Simplex(), "shift": None, "n": None},
    )


def test_a_step_is_the_step_of_the_free_variable():
    target = {"decay": jnp.array([1.5, -3.0]), "mix": jnp.array([0.6, 0.4]), "shift": jnp.asarray(-1.0)}
    solver = Nested(toward(target), FirstOrder(optax.sgd(0.1), 1), optax.sgd(0.3))
    state, metrics = solver.step(solver.init(KEY), None, None)
    decay, mix = np.array([0.5, 2.0]), np.array([0.2, 0.8])
    slope = decay - np.array([1.5, -3.0])
    np.testing.assert_allclose(state.outer["decay"], decay * np.exp(-0.3 * decay * slope), rtol=1e-14)
    pull = mix - np.array([0.6, 0.4])
    moved = mix * np.exp(-0.3 * mix * (pull - mix @ pull))
    np.testing.assert_allclose(state.outer["mix"], moved / moved.sum(), rtol=1e-14)
    np.testing.assert_allclose(state.outer["shift"], 1.0 - 0.3 * 2.0, rtol=1e-14)
    # reported in natural units
    norm = np.sqrt(np.sum(slope**2) + np.sum(pull**2) + 4.0)
    np.testing.assert_allclose(metrics["hypergradient_norm"], norm, rtol=1e-14)


@pytest.mark.filterwarnings("ignore:Only outer_loss depends on outer")  # so it is: the optimum is known then
def test_a_run_ends_at_the_optimum_inside_and_at_the_border_of_what_is_outside():
    target = {"decay": jnp.array([1.5, -3.0]), "mix": jnp.array([0.6, 0.4]), "shift": jnp.asarray(-1.0)}
    solver = Nested(toward(target), FirstOrder(optax.sgd(0.1), 1), optax.adam(0.1))
    result = bilevel.run(solver, steps=400, progress=False)
    decay = np.asarray(result.outer["decay"])
    assert 0 < decay[1] < 0.05
    np.testing.assert_allclose(decay[0], 1.5, rtol=1e-3)
    np.testing.assert_allclose(result.outer["mix"], [0.6, 0.4], rtol=1e-3)
    np.testing.assert_allclose(result.outer["shift"], -1.0, atol=1e-3)
    assert_equal(result.outer["n"], jnp.asarray(3))


def test_a_learning_rate_and_the_stochastic_solvers_are_in_natural_units_too():
    problem = Problem(
        lambda w, outer, batch, key: 0.5 * jnp.sum((w - 1.0) ** 2),
        lambda w, outer, batch, key: 0.5 * jnp.sum((w - 1.0) ** 2),
        lambda key, outer: jnp.zeros(2),
        lambda key: {"rate": jnp.asarray(1e-2)},
        domain={"rate": RATE},
    )
    hypergradient = Unrolled(lambda outer: optax.sgd(outer["rate"]), 3)
    result = bilevel.run(Nested(problem, hypergradient, optax.adam(0.3), inner_start="cold"), steps=60, progress=False)
    assert 0.2 < result.outer["rate"] < 1.0
    decaying = dataclasses.replace(
        problem, inner_loss=lambda w, outer, batch, key: 0.5 * jnp.sum((w - 1.0) ** 2) + outer["rate"] * jnp.sum(w**2)
    )
    result = bilevel.run(bilevel.SOBA(decaying, 0.3, 50.0), steps=40, progress=False)
    assert 1e-6 < result.outer["rate"] < 5e-3


def test_pzobo_perturbs_inside_the_domain():
    def problem(domain, natural):
        # In a training that leaves the domain the loss is no number, and so is the step.
        def loss(w, u, batch, key):
            outer = natural(u)
            return 0.5 * jnp.sum((w - jnp.sqrt(outer["decay"]) - outer["share"]) ** 2)

        def value(w, u, batch, key):
            return 0.5 * jnp.sum((w - 2.0) ** 2) + 0.1 * jnp.sum(natural(u)["decay"] ** 2)

        start = {"decay": jnp.full(3, 0.01), "share": jnp.full(3, 0.5)}
        return Problem(loss, value, lambda key, u: jnp.zeros(3), lambda key: start, domain=domain)

    domain = {"decay": Positive(), "share": Interval(0.0, 1.0)}
    bounded = problem(domain, lambda u: u)
    free = dataclasses.replace(
        problem(None, partial(bijectors.natural, bounded.domain)),
        init_outer=lambda key: bijectors.free(bounded.domain, bounded.init_outer(key)),
    )
    settings = {"inner_step": 0.5, "outer_step": 0.3, "smoothing": 0.5}
    moved = bilevel.run(bilevel.PZOBO(bounded, **settings), steps=20, progress=False).outer
    # The same as the free variable alone: perturbations and steps are taken there.
    by_hand = bilevel.run(bilevel.PZOBO(free, **settings), steps=20, progress=False).outer
    assert float(jnp.max(jnp.abs(moved["decay"] - 0.01))) > 1e-2
    assert_close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9)  # noqa: E731
    jax.tree.map(assert_close, moved, bijectors.natural(bounded.domain, by_hand))


def test_what_cannot_be_a_domain_is_refused_in_a_sentence():
    bounds = {"decay": Positive(), "mix": Simplex(), "shift": None, "n": None}
    problem = dataclasses.replace(toward({}), domain=bounds)
    for name, start in (("decay", jnp.array([0.5, -2.0])), ("mix", jnp.array([0.2, 0.9]))):
        outside = dataclasses.replace(problem, init_outer=lambda key: {**problem.init_outer(key), name: start})  # noqa: B023
        with pytest.raises(ValueError, match=rf"outer leaf \['{name}'\], which is outside the domain"):
            outside.start_outer(KEY)
    with pytest.raises(ValueError, match="must be a tree like the top of outer"):
        dataclasses.replace(problem, domain={"decay": Positive()}).start_outer(KEY)
    with pytest.raises(ValueError, match="low must be below high"):
        Interval(1.0, 0.0)


def test_one_bijector_for_a_whole_tree():
    problem = dataclasses.replace(toward({}), domain=Positive(), init_outer=lambda key: {"a": {"b": 2.0}, "c": 0.5})
    free = bijectors.free(problem.domain, problem.start_outer(KEY))
    np.testing.assert_allclose(free["a"]["b"], math.log(2.0))
    np.testing.assert_allclose(jax.tree.leaves(bijectors.natural(problem.domain, free)), [2.0, 0.5])


@pytest.mark.parametrize("bijector", [bilevel.Positive(), bilevel.Softplus(), bilevel.Interval(0.0, 1.0)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_start_on_the_border_would_never_move_and_is_refused(bijector, dtype):
    loss = lambda w, outer, batch, key: jnp.sum((w - outer) ** 2)  # noqa: E731

    def starting(at):
        return bilevel.Problem(loss, loss, lambda k, o: o, lambda k: jnp.asarray(at, dtype), domain=bijector)

    with pytest.raises(ValueError, match=r"in outer, which .*domain.*start inside"):
        starting(0.0).start_outer(KEY)
    assert starting(1e-6).start_outer(KEY) == jnp.asarray(1e-6, dtype)


@pytest.mark.parametrize("start", [1e-37, 1e-300])
def test_a_small_positive_start_is_no_border(start):
    """Steps of a positive number are relative to it."""
    free = bijectors.free(bilevel.Positive(), jnp.asarray(start))
    np.testing.assert_allclose(free, np.log(start), rtol=1e-6)
    problem = bilevel.Problem(
        lambda w, o, b, k: jnp.sum(w**2), lambda w, o, b, k: jnp.log(o) + jnp.sum(w), lambda k, o: jnp.zeros(1),
        lambda k: jnp.asarray(start), domain=bilevel.Positive(),
    )  # fmt: skip
    np.testing.assert_allclose(problem.start_outer(jax.random.key(0)), start, rtol=1e-6)
