"""Any optax transformation as the inner optimizer: hypergradients against central differences, values against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import bilevel
from bilevel import Unrolled
from bilevel.differentiation import optimizers
from tests.bilevel.helpers import (
    KEY,
    LINE,
    NETWORK,
    ROWS,
    assert_close,
    assert_equal,
    estimate,
    network_batches,
    solve,
)

STEPS = 4
TREE = {"W": "adam", "b": "still", "V": "adam"}
OPTIMIZERS = {
    "momentum": optax.sgd(0.1, 0.9),
    "nesterov": optax.sgd(0.1, 0.9, nesterov=True),
    "adam": optax.adam(0.05),
    "adamw with a mask": optax.adamw(0.05, weight_decay=0.1, mask={"W": True, "b": False, "V": True}),
    "clip by norm, then adam": optax.chain(optax.clip_by_global_norm(0.05), optax.adam(0.05)),
    "warm-up and cosine": optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 6)),
    "inject_hyperparams with a schedule": optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.01, 4)),
    "lamb": optax.lamb(0.05),
    "MultiSteps": optax.MultiSteps(optax.adam(0.05), 2),
    "adagrad": optax.adagrad(0.1),
    "centred rmsprop with momentum": optax.rmsprop(0.02, centered=True, momentum=0.9),
    "lion": optax.lion(0.02),
    "factored adafactor": optax.adafactor(0.05, min_dim_size_to_factor=2),
    "muon": contrib.muon(0.05),
    "radam": optax.radam(0.05),
    "optimistic descent": optax.optimistic_gradient_descent(0.05),
    "polyak, which wants the value": optax.polyak_sgd(0.1),
    "reduce on plateau, which wants the value": optax.chain(optax.adam(0.05), contrib.reduce_on_plateau()),
    "l-bfgs without line search": optax.lbfgs(0.1, linesearch=None),
    "a transformation for each leaf": optax.partition({"adam": optax.adam(0.05), "still": optax.set_to_zero()}, TREE),
}
# MultiSteps accumulates in float32 whatever it is given, so values are rounded to 1e-8 or so: a difference is taken
# further apart, and knows less.
COARSE = {"MultiSteps": (1e-3, 1e-5)}

BATCHES = network_batches(STEPS)
VALIDATION = jax.tree.map(jnp.asarray, ROWS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hypergradient_is_that_of_central_differences(name):
    outer = NETWORK.start_outer(KEY)
    hypergradient = Unrolled(OPTIMIZERS[name], STEPS, checkpoint="none")
    leaves, structure = jax.tree.flatten(outer)
    keys = jax.random.split(KEY, len(leaves))
    direction = structure.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])

    def along(size):
        at = jax.tree.map(lambda x, d: x + size * d, outer, direction)
        return estimate(NETWORK, hypergradient, None, at, BATCHES, VALIDATION, KEY)

    h, tolerance = COARSE.get(name, (1e-4, 1e-7))
    sides = [float(along(h * i).value) for i in (-2, -1, 1, 2)]
    expected = (8 * (sides[2] - sides[1]) - (sides[3] - sides[0])) / (12 * h)
    found = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (along(0.0).grad, direction)), strict=True))
    np.testing.assert_allclose(found, expected, rtol=tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_optax(name):
    outer = NETWORK.start_outer(KEY)
    hypergradient = Unrolled(OPTIMIZERS[name], STEPS, checkpoint="none")
    state = hypergradient.init(NETWORK, outer, KEY)
    trained = solve(NETWORK, hypergradient, state, outer, BATCHES, KEY)
    keys = jax.random.split(KEY, STEPS + 2)[1:]
    params = state.params
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        transform = OPTIMIZERS[name]
        if isinstance(transform, optax.MultiSteps):
            transform = transform.gradient_transformation()
        transform = optax.with_extra_args_support(transform)
        opt_state = transform.init(params)

        @jax.jit
        def one(params, opt_state, t):
            batch = jax.tree.map(lambda x: x[BATCHES.index[t]], BATCHES.arrays)
            value, grad = jax.value_and_grad(NETWORK.inner_loss)(params, outer, batch, keys[t])
            updates, opt_state = transform.update(grad, opt_state, params, value=value, grad=grad)
            return optax.apply_updates(params, updates), opt_state

        for t in range(STEPS):
            params, opt_state = one(params, opt_state, t)
    assert_close(trained.params, params, 1e-14)


@pytest.mark.parametrize("name", ["adam", "lamb", "radam", "factored adafactor", "clip by norm, then adam"])
def test_an_update_is_that_of_optax_bit_for_bit(name):
    # One operation at a time: a compiler may contract a * b + c in one program and not in the other.
    transform = optax.with_extra_args_support(OPTIMIZERS[name])
    params = NETWORK.init_inner(KEY, None)
    state = transform.init(params)
    grads = jax.tree.map(lambda x: jnp.where(jnp.arange(x.size).reshape(x.shape) % 2 == 0, 0.0, x**3), params)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.disable_jit():
        for _ in range(2):
            expected = transform.update(grads, state, params)
            assert_equal(optimizers.update(transform, grads, state, params, jnp.zeros(()))[0], expected[0])
            state = expected[1]


def low_precision(inner_dtype, outer_dtype):
    return bilevel.Problem(
        lambda w, outer, batch, key: jnp.sum(((w - outer.astype(w.dtype)) ** 2).astype(jnp.float32)),
        lambda w, outer, batch, key: jnp.sum((w.astype(jnp.float32) - 1.0) ** 2),
        lambda key, outer: jnp.linspace(0.1, 0.7, 5).astype(inner_dtype),
        lambda key: jnp.full(5, 0.3, outer_dtype),
    )


@pytest.mark.parametrize(
    ("inner", "outer"),
    [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float64")],
)
@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_precisions_may_mix_and_are_kept(inner, outer, mode):
    inner, outer = jnp.dtype(inner), jnp.dtype(outer)
    problem, exact = low_precision(inner, outer), low_precision(jnp.float64, jnp.float64)
    hypergradient = Unrolled(optax.adamw(optax.cosine_decay_schedule(0.1, 10)), 3, mode=mode)
    solver = bilevel.Nested(problem, hypergradient, optax.adam(0.01))
    result = bilevel.run(solver, steps=3, progress=False)
    before = solver.init(KEY)
    assert [x.dtype for x in jax.tree.leaves(result.state)] == [x.dtype for x in jax.tree.leaves(before)]
    assert result.outer.dtype == outer and result.inner.params.dtype == inner

    found = hypergradient.estimate(problem, None, problem.start_outer(KEY), None, None, KEY)
    expected = hypergradient.estimate(exact, None, exact.start_outer(KEY), None, None, KEY)
    assert found.grad.dtype == outer
    assert_close(found.grad.astype(jnp.float64), expected.grad, 0.02)  # five roundings of bfloat16


def test_updates_in_a_wider_type_are_added_before_rounding():
    params = jnp.asarray([1.0, 1.0], jnp.bfloat16)
    updates = jnp.asarray([2.0**-8 + 2.0**-10, 2.0**-8 - 2.0**-10], jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        expected = optax.apply_updates(params, updates)
    assert_equal(optimizers.apply(params, updates), expected)


def test_warm_start_in_low_precision_takes_the_learning_rate_of_today():
    problem = bilevel.Problem(
        lambda w, outer, batch, key: jnp.sum((w - 1.0) ** 2),
        lambda w, outer, batch, key: jnp.sum(w.astype(jnp.float32) ** 2),
        lambda key, outer: jnp.zeros(3, jnp.bfloat16),
        lambda key: {"rate": jnp.asarray(0.1, jnp.float32)},
    )
    hypergradient = Unrolled(lambda outer: optax.inject_hyperparams(optax.sgd)(learning_rate=outer["rate"]), 2)
    outer = problem.start_outer(KEY)
    state = hypergradient.estimate(problem, hypergradient.init(problem, outer, KEY), outer, None, None, KEY).inner_state
    for rate in (0.1, 0.2):
        at = {"rate": jnp.asarray(rate, jnp.float32)}
        warm = hypergradient.estimate(problem, state, at, None, None, KEY)
        plain = Unrolled(lambda outer: optax.sgd(outer["rate"]), 2)
        expected = plain.estimate(
            problem, plain.init(problem, at, KEY)._replace(params=state.params), at, None, None, KEY
        )
        np.testing.assert_allclose(warm.grad["rate"], expected.grad["rate"], rtol=0.02)
        assert warm.grad["rate"] != 0


def decaying(rate):
    """Gradient descent whose rate starts from `rate`, and shrinks: a state that is derived from outer and moves."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -state * g, updates), 0.9 * state

    return optax.GradientTransformation(lambda params: rate, update)


def test_state_that_starts_from_outer_and_moves_is_differentiated_cold_and_refused_warm():
    hypergradient = Unrolled(lambda outer: decaying(outer[0]), 3)
    outer = jnp.full(2, 0.3)
    cold = lambda outer: hypergradient.estimate(LINE, None, outer, None, None, KEY)  # noqa: E731
    h = 1e-5
    expected = (cold(outer.at[0].add(h)).value - cold(outer.at[0].add(-h)).value) / (2 * h)
    np.testing.assert_allclose(cold(outer).grad[0], expected, rtol=1e-7)
    state = hypergradient.init(LINE, outer, KEY)
    with pytest.raises(ValueError, match=r"starts from outer and then changes at every step.*inner_state=None"):
        hypergradient.estimate(LINE, state, outer, None, None, KEY)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.lbfgs(), "value_fn.*line search"),
        (optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)), "value_fn.*line search"),
        (contrib.schedule_free_adamw(0.1), "ScheduleFreeState"),
        (optax.chain(optax.clip(1.0), contrib.schedule_free(optax.sgd(0.1), 0.1)), "ScheduleFreeState"),
        (contrib.sam(optax.sgd(0.1), optax.sgd(0.01)), "SAMState"),
    ],
    ids=["zoom", "backtracking", "schedule-free adamw", "schedule-free in a chain", "sam"],
)
def test_what_cannot_be_a_training_map_is_refused_by_name(optimizer, message):
    with pytest.raises(ValueError, match=message):
        Unrolled(optimizer, 2).estimate(LINE, None, jnp.ones(2), None, None, KEY)


@pytest.mark.parametrize("optimizer", [0.1, "adam", lambda outer: 0.1])
def test_what_is_no_optimizer_is_refused(optimizer):
    with pytest.raises((TypeError, ValueError), match=r"must be an optax\.GradientTransformation"):
        Unrolled(optimizer, 2).estimate(LINE, None, jnp.ones(2), None, None, KEY)


def test_a_schedule_in_the_place_of_an_optimizer_is_told_where_it_goes():
    for schedule in (lambda step: 0.1 * step, bilevel.Power(0.1, 0.5)):
        with pytest.raises(TypeError, match=r"returned float64\[2\], but .* goes into an optimizer, as in optax\.adam"):
            Unrolled(schedule, 2).init(LINE, jnp.ones(2), KEY)


def test_value_and_grad_reach_the_optimizer():
    seen = {}

    def update(updates, state, params=None, *, value, grad, **extra):
        seen.update(value=value, grad=grad)
        return jax.tree.map(lambda g: -value * g, grad), state

    transform = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    outer = jnp.full(2, 0.3)
    result = Unrolled(optax.chain(transform, optax.scale(0.1)), 1).solve(LINE, None, outer, None, KEY)
    value, grad = jax.value_and_grad(LINE.inner_loss)(jnp.zeros(2), outer, None, KEY)
    np.testing.assert_allclose(result.params, -0.1 * value * grad, rtol=1e-14)
    # and its dependence on outer is differentiated
    found = Unrolled(optax.chain(transform, optax.scale(0.1)), 1).estimate(LINE, None, outer, None, None, KEY).grad

    def by_hand(outer):
        value, grad = jax.value_and_grad(LINE.inner_loss)(jnp.zeros(2), outer, None, KEY)
        return LINE.outer_loss(-0.1 * value * grad, outer, None, KEY)

    assert_close(found, jax.grad(by_hand)(outer), 1e-12)
