"""Inner entries that training carries without a gradient: batch statistics, counters, keys, constants."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Binomial, FiniteDifference, FirstOrder, Levels, OneStep, Problem, Unrolled
from bilevel.testing import central_differences
from tests.bilevel.helpers import KEY, LINE, assert_close, assert_equal, estimate

X = np.asarray(jax.random.normal(jax.random.key(1), (12, 3)))
Y = np.asarray(jax.random.normal(jax.random.key(2), (12,)))


class Network(nn.Module):
    """A layer, its outputs normalised by the batch in training and by running statistics elsewhere."""

    @nn.compact
    def __call__(self, x, train):
        # A bias would be without effect: the gradient of one is rounding noise, and Adam would make steps of it.
        x = nn.Dense(4, use_bias=False, param_dtype=x.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.6, param_dtype=x.dtype, dtype=x.dtype)(x)
        return nn.Dense(1, param_dtype=x.dtype)(x / (1.0 + x**2))[:, 0]


def apply(variables, x, **settings):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # flax's own rules
        return Network().apply(variables, x, **settings)


def inner_loss(variables, outer, batch, key):
    x, y = batch
    prediction, updates = apply(variables, x, train=True, mutable=["batch_stats"])
    fit = jnp.mean(outer["weight"] * (prediction - y) ** 2)
    return fit + jnp.exp(outer["decay"]) * jnp.sum(variables["params"]["Dense_0"]["kernel"] ** 2), updates


def outer_loss(variables, outer, batch, key):
    x, y = batch
    return jnp.mean((apply(variables, x, train=False) - y) ** 2)


def start(key, outer):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        variables = Network().init(key, jnp.asarray(X), train=True)
    # flax keeps statistics in float32 unless they are given in another precision
    params, statistics = (jax.tree.map(lambda x: x.astype(float), variables[n]) for n in ("params", "batch_stats"))
    return {"params": jax.tree.map(lambda x: outer["scale"] * x, params), "batch_stats": statistics}


NORMALISED = Problem(
    inner_loss,
    outer_loss,
    start,
    lambda key: {"weight": jnp.linspace(0.5, 1.5, 4), "decay": jnp.asarray(-3.0), "scale": jnp.asarray(1.2)},
    mutable=("batch_stats",),
)
BATCHES = (jnp.asarray(X.reshape(3, 4, 3)), jnp.asarray(Y.reshape(3, 4)))
VALIDATION = (jnp.asarray(X), jnp.asarray(Y))
ARGUMENTS = None, NORMALISED.start_outer(KEY), BATCHES, VALIDATION, KEY


@pytest.fixture(scope="module")
def expected():
    return central_differences(NORMALISED, Unrolled(optax.adam(0.05), 3), *ARGUMENTS)


@pytest.mark.parametrize(
    ("mode", "checkpoint"),
    [
        ("mixed", "none"),
        ("mixed", "step"),
        ("mixed", Levels(2)),
        ("mixed", Binomial(2)),
        ("reverse", "none"),
        ("reverse", "sqrt"),
        ("forward", "auto"),
    ],
    ids=str,
)
def test_batch_normalisation_equals_central_differences(mode, checkpoint, expected):
    hypergradient = Unrolled(optax.adam(0.05), 3, mode=mode, checkpoint=checkpoint)
    result = estimate(NORMALISED, hypergradient, *ARGUMENTS)
    assert_close(result.grad, expected, 1e-7)


def test_statistics_are_those_of_a_training_by_hand():
    hypergradient, optimizer = Unrolled(optax.sgd(0.1), 3), optax.sgd(0.1)
    outer = ARGUMENTS[1]
    variables = NORMALISED.start_inner(jax.random.split(KEY, 5)[0], outer)
    result = estimate(NORMALISED, hypergradient, *ARGUMENTS)
    state = optimizer.init(variables["params"])
    for t in range(3):
        batch = BATCHES[0][t], BATCHES[1][t]

        def loss(params, variables=variables, batch=batch):
            return inner_loss(variables | {"params": params}, outer, batch, None)

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        moves, state = optimizer.update(grads, state)
        variables = {"params": optax.apply_updates(variables["params"], moves)} | updates
    assert_close(result.inner_state.params, variables, 1e-12)
    assert np.linalg.norm(variables["batch_stats"]["BatchNorm_0"]["mean"]) > 1e-3


def test_statistics_without_a_gradient_are_no_parameters():
    state = Unrolled(optax.adam(0.05), 3).init(NORMALISED, ARGUMENTS[1], KEY)
    moments = optax.tree_utils.tree_get(state.opt_state, "mu")
    assert len(jax.tree.leaves(moments)) == len(jax.tree.leaves(state.params["params"]))


# Counters, keys and constants, with a closed form: w' = w - eta (w - lam), s' = s / 2 + w (before the step).


def carrying(inner, outer, batch, key):
    noise = jax.random.fold_in(inner["rng"], 1)
    updates = {
        "sum": 0.5 * inner["sum"] + inner["w"],
        "count": inner["count"] + 1,
        "rng": noise,
        "fixed": inner["fixed"],
    }
    return 0.5 * jnp.sum(inner["fixed"] * (inner["w"] - outer) ** 2), updates


def reported(inner, outer, batch, key):
    value, updates = carrying(inner, outer, batch, key)
    return value, (updates, {"count": inner["count"]})


def summed(inner, outer, batch, key):
    return jnp.sum(inner["sum"] * jnp.array([1.0, 2.0]))


def carried_start(key, outer):
    return {
        "w": jnp.zeros(2),
        "sum": jnp.zeros(2),
        "count": jnp.int32(0),
        "rng": jax.random.key(5),
        "fixed": jnp.ones(2),
    }


NAMES = ("sum", "count", "rng", "fixed")
CARRIED = Problem(carrying, summed, carried_start, lambda key: jnp.array([0.3, -0.4]), mutable=NAMES)


@pytest.mark.parametrize(
    "hypergradient",
    [
        Unrolled(optax.sgd(0.25), 4),
        Unrolled(optax.sgd(0.25), 4, checkpoint="sqrt"),
        Unrolled(optax.sgd(0.25), 4, checkpoint=Binomial(2)),
        Unrolled(optax.sgd(0.25), 4, mode="reverse", checkpoint="step"),
        Unrolled(optax.sgd(0.25), 4, mode="forward"),
    ],
    ids=lambda h: f"{h.mode}-{h.checkpoint}",
)
def test_a_carried_sum_has_its_closed_form(hypergradient):
    result = estimate(CARRIED, hypergradient, None, jnp.array([0.3, -0.4]), None, None, KEY)
    # w_t = (1 - .75^t) lam, and the sum is that of .5^(3 - t) w_t.
    slope = sum(0.5 ** (3 - t) * (1 - 0.75**t) for t in range(4))
    np.testing.assert_allclose(result.grad, slope * np.array([1.0, 2.0]), rtol=1e-12)
    inner = result.inner_state.params
    assert inner["count"] == 4
    key = jax.random.key(5)
    for _ in range(4):
        key = jax.random.fold_in(key, 1)
    assert_equal(inner["rng"], key)
    np.testing.assert_array_equal(inner["fixed"], 1.0)


def test_truncation_and_one_step_hold_the_sum_of_before():
    arguments = None, jnp.array([0.3, -0.4]), None, None, KEY
    cut = estimate(CARRIED, Unrolled(optax.sgd(0.25), 4, truncate=2), *arguments)
    # Of the last two steps, the first adds a constant, the second w_3 = .75 w_2 + .25 lam.
    np.testing.assert_allclose(cut.grad, 0.25 * np.array([1.0, 2.0]), rtol=1e-12)
    # The last step moves the weights, and adds to the sum where they were.
    np.testing.assert_array_equal(estimate(CARRIED, OneStep(optax.sgd(0.25), 4), *arguments).grad, 0.0)


@pytest.mark.filterwarnings("ignore::bilevel.StructuralZeroWarning")
@pytest.mark.parametrize(
    "hypergradient",
    [
        FirstOrder(optax.sgd(0.25), 3),
        FiniteDifference(optax.sgd(0.25), 3),
        bilevel.SAMA(optax.sgd(0.25), 3),
        bilevel.Implicit(optax.sgd(0.25), 3),
        bilevel.FixedPoint(optax.sgd(0.25, 0.9), 3),
        bilevel.EvolutionStrategies(optax.sgd(0.25), 3, population=4),
        bilevel.PersistentES(optax.sgd(0.25), 3, population=4),
    ],
    ids=lambda h: type(h).__name__,
)
def test_other_estimators_train_the_same_and_hold_it_at_the_end(hypergradient):
    problem = Problem(
        reported,
        lambda *a: (summed(*a) + jnp.sum(a[0]["w"] ** 2), None),
        carried_start,
        CARRIED.init_outer,
        has_aux=True,
        mutable=NAMES,
    )
    state = hypergradient.init(problem, jnp.array([0.3, -0.4]), KEY)
    result = estimate(problem, hypergradient, state, jnp.array([0.3, -0.4]), None, None, KEY)
    assert result.inner_state.params["count"] == 3
    np.testing.assert_array_equal(result.aux.inner["count"], [0, 1, 2])
    again = estimate(problem, hypergradient, result.inner_state, jnp.array([0.3, -0.4]), None, None, KEY)
    assert again.inner_state.params["count"] == 6


def test_a_run_carries_it_on_and_fit_too(tmp_path):
    solver = bilevel.Nested(CARRIED, Unrolled(optax.sgd(0.25), 3), optax.adam(0.1))
    result = bilevel.run(solver, steps=4, progress=False, checkpoint_dir=tmp_path)
    assert result.inner.params["count"] == 12
    resumed = bilevel.run(solver, steps=5, progress=False, checkpoint_dir=tmp_path)
    assert resumed.inner.params["count"] == 15
    assert (
        bilevel.fit(CARRIED, result.outer, optimizer=optax.sgd(0.1), steps=6, progress=False).inner.params["count"] == 6
    )


def test_second_derivatives_through_a_carried_sum():
    # The outer loss is quadratic in the sum, so the second derivative is 2 slope^2.
    problem = Problem(
        carrying, lambda w, o, b, k: jnp.sum(w["sum"] ** 2), carried_start, CARRIED.init_outer, mutable=NAMES
    )
    slope = sum(0.5 ** (3 - t) * (1 - 0.75**t) for t in range(4))
    for mode in ("mixed", "reverse"):
        hypergradient = Unrolled(optax.sgd(0.25), 4, mode=mode, checkpoint="step")
        grad = lambda lam: hypergradient.estimate(problem, None, lam, None, None, KEY).grad  # noqa: B023, E731
        second = jax.jit(jax.jacrev(grad))(jnp.array([0.3, -0.4]))
        np.testing.assert_allclose(second, 2 * slope**2 * np.eye(2), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Problem(*LINE_PARTS, mutable="sum"), "sequence of names"),
        (lambda: train(Problem(*LINE_PARTS, mutable=("sum",))), "must return a dict with these entries, not a"),
        (lambda: train(changed(mutable=("w", "missing"))), "not a dict of count, fixed, rng, sum, w"),
        (lambda: train(changed(inner=lambda *a: carrying(*a)[0])), "pair \\(scalar, updates\\), as mutable says"),
        (lambda: train(changed(inner=lambda *a: (carrying(*a)[0], {"sum": jnp.zeros(2)}))), "return all of them"),
        (lambda: train(changed(inner=lambda *a: (carrying(*a)[0], 3))), "returned a int"),
        (lambda: train(changed(inner=carrying, has_aux=True)), r"a pair \(updates, aux\)"),
        (lambda: train(CARRIED, bilevel.Reversible(0.25, 0.9, 3)), "Reversible cannot undo"),
        (lambda: bilevel.SOBA(CARRIED, 0.1, 0.1), "SOBA.*carries no mutable"),
    ],
)
def test_what_cannot_be_carried_is_refused_in_a_sentence(build, message):
    with pytest.raises(ValueError, match=message):
        build()


LINE_PARTS = LINE.inner_loss, LINE.outer_loss, LINE.init_inner, LINE.init_outer


def changed(inner=carrying, mutable=NAMES, has_aux=False):
    return Problem(inner, summed, carried_start, CARRIED.init_outer, mutable=mutable, has_aux=has_aux)


def train(problem, hypergradient=None):
    hypergradient = hypergradient or Unrolled(optax.sgd(0.1), 2)
    return hypergradient.estimate(problem, None, jnp.array([0.3, -0.4]), None, None, KEY)
