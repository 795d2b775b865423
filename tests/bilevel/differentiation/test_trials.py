"""Whether an optimizer stops where the gradient is 0, whether it takes turns, and which entries it leaves alone."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.differentiation.frozen import divide, traced
from bilevel.differentiation.trials import trial
from tests.bilevel.helpers import KEY, estimate

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
SGD, DECAY = optax.sgd(0.1), optax.add_decayed_weights(0.1)
LATE = optax.linear_schedule(0.0, 0.1, 10, transition_begin=1000)


def stateless(function):
    return optax.stateless(lambda updates, params: jax.tree.map(function, updates, params))


MOVES = {
    "adamw": optax.adamw(0.1),
    "decay behind a warm-up": optax.chain(DECAY, optax.sgd(optax.linear_schedule(0.0, 0.1, 10))),
    "adamw with a warm-up": optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 100)),
    "adamw of outer with a warm-up": lambda outer: optax.adamw(optax.linear_schedule(0.0, outer, 10)),
    "a decay that comes late": optax.chain(SGD, optax.add_decayed_weights(LATE)),
    "a decay on a condition": optax.chain(SGD, optax.conditionally_transform(DECAY, lambda step: step > 3)),
    "a decay toward the half": stateless(lambda u, p: -0.1 * (u + 0.3 * (p - 0.5))),
    "a decay that is gathered": optax.chain(DECAY, optax.MultiSteps(SGD, 2).gradient_transformation()),
    "a decay that is gathered for long": optax.chain(DECAY, optax.MultiSteps(SGD, 500).gradient_transformation()),
    "a decay that is applied now and then": optax.chain(DECAY, SGD, optax.apply_every(3)),
    "a bound": optax.chain(SGD, optax.keep_params_nonnegative()),
    "a box": stateless(lambda u, p: jnp.clip(p - 0.1 * u, -1.0, 1.0) - p),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 0), SGD),
}
RESTS = {
    "adam": optax.adam(0.1),
    "momentum": optax.sgd(0.1, 0.9, nesterov=True),
    "a warm-up": optax.sgd(optax.linear_schedule(0.0, 0.1, 10)),
    "clipping": optax.chain(optax.clip_by_global_norm(1.0), optax.clip(0.5), optax.adam(0.1)),
    "a decay of 0": optax.adamw(0.1, weight_decay=0.0),
    "a decay that is masked away": optax.adamw(0.1, mask={"w": False, "b": False}),
    "gathering": optax.MultiSteps(optax.adam(0.1), 16).gradient_transformation(),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "a function of outer": lambda outer: optax.adam(outer),
    "orthogonal updates, in a loop": optax.contrib.muon(0.1),
    "trust ratios": optax.lamb(0.1, weight_decay=0.0),
    "unless it is not finite": optax.apply_if_finite(optax.adam(0.1), 3),
}


def looked_at(optimizer, outer=None):
    outer = jnp.asarray(0.1) if outer is None else outer
    transform = optimizer if isinstance(optimizer, optax.GradientTransformation) else optimizer(outer)
    transform = optax.with_extra_args_support(transform)
    return traced(transform, PARAMS, transform.init(PARAMS)), lambda: trial(optimizer, PARAMS, outer)


@pytest.mark.parametrize("name", MOVES)
def test_an_optimizer_that_moves_at_a_gradient_of_zero_is_found(name):
    update, tried = looked_at(MOVES[name])
    assert not update.rests()
    assert tried().drifts


@pytest.mark.parametrize("name", RESTS)
def test_and_of_one_that_does_not_the_trace_tells(name):
    update, _ = looked_at(RESTS[name])
    assert update.rests()


T = jnp.asarray([2.0, -1.0, 3.0])
CASE = bilevel.Problem(
    lambda w, o, b, k: 0.5 * jnp.sum(jnp.exp(o) * (w - T) ** 2),
    lambda w, o, b, k: 0.5 * jnp.sum((w - 1.0) ** 2),
    lambda key, o: jnp.zeros(3),
    lambda key: jnp.asarray([0.3, -0.2, 0.5]),
)


@pytest.mark.parametrize("name", ["decay behind a warm-up", "adamw of outer with a warm-up", "a bound"])
def test_implicit_refuses_it_and_says_what_to_use(name):
    with pytest.raises(ValueError, match=r"Implicit: the optimizer moves .* where the gradient is 0.*FixedPoint"):
        bilevel.Implicit(MOVES[name], 2).estimate(CASE, None, jnp.full(3, 0.2), None, None, KEY)


TURNS = {
    "apply_every": optax.chain(SGD, optax.apply_every(12)),
    "MultiSteps": optax.MultiSteps(SGD, 12),
    "every second step": optax.chain(optax.conditionally_mask(optax.scale(0.5), lambda step: step % 2 == 0), SGD),
}


@pytest.mark.parametrize("name", TURNS)
def test_fixed_points_of_optimizers_that_take_turns_are_refused(name):
    with pytest.raises(ValueError, match="FixedPoint: the optimizer moves parameters at some steps only"):
        bilevel.FixedPoint(TURNS[name], 2).estimate(CASE, None, jnp.full(3, 0.2), None, None, KEY)


def test_others_take_none():
    ends = optax.sgd(optax.cosine_decay_schedule(0.1, 5))
    for optimizer in (optax.rprop(0.1), optax.sgd(LATE), optax.adam(0.1), ends):
        assert not trial(optimizer, PARAMS, ()).turns


def test_second_moments_that_are_not_at_rest_show():
    """With g = -c w (|g| + eps) at rest, adamw's second moment tends to g^2 at a rate of 0.999 a step, or of b2."""
    seen = {}
    for steps, b2 in ((300, 0.999), (300, 0.9), (2500, 0.9)):
        hypergradient = bilevel.FixedPoint(optax.adamw(1e-2, b2=b2, eps=0.1, weight_decay=0.3), steps)
        info = estimate(CASE, hypergradient, None, jnp.full(3, 0.2), None, None, KEY).aux.info
        seen[steps, b2] = float(info["stationarity_relative"])
    assert seen[300, 0.999] > 0.1
    assert seen[2500, 0.9] < 1e-3
    stops = bilevel.FixedPoint(optax.adam(1e-1), 300)
    assert estimate(CASE, stops, None, jnp.full(3, 0.2), None, None, KEY).aux.info["stationarity_relative"] < 0.1


def test_a_leaf_of_outer_without_entries_is_not_spoken_of():
    case = bilevel.Problem(
        lambda w, o, b, k: jnp.sum((w - o["a"]) ** 2),
        lambda w, o, b, k: jnp.sum(w**2),
        lambda key, o: jnp.zeros(3),
        lambda key: {"a": jnp.ones(3), "none": jnp.zeros(0)},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bilevel.Unrolled(SGD, 2).estimate(case, None, case.init_outer(KEY), None, None, KEY)


def newton(x):
    """y with y + y^3 = x."""
    step = lambda y: y - (y + y**3 - x) / (1 + 3 * y**2)  # noqa: E731
    return jax.lax.while_loop(lambda y: jnp.max(jnp.abs(y + y**3 - x)) > 1e-13, step, 0.5 * x)


def test_a_rule_in_an_optimizer_without_which_there_is_no_derivative_is_kept():
    projection = jax.custom_vjp(newton)
    projection.defvjp(lambda x: (projection(x),) * 2, lambda y, ct: (ct / (1 + 3 * y**2),))
    optimizer = stateless(lambda u, p: projection(p - 0.1 * u) - p)
    with pytest.warns(bilevel.CustomDerivativeWarning, match="The optimizer calls .*`newton`.* taken at its word"):
        found = bilevel.Unrolled(optimizer, 2).estimate(CASE, None, jnp.full(3, 0.2), None, None, KEY).grad

    def value(outer):
        w = jnp.zeros(3)
        for _ in range(2):
            w = newton(w - 0.1 * jax.grad(CASE.inner_loss)(w, outer, None, None))
        return CASE.outer_loss(w, outer, None, None)

    slopes = [(value(0.2 + 1e-5 * e) - value(0.2 - 1e-5 * e)) / 2e-5 for e in jnp.eye(3)]
    np.testing.assert_allclose(found, slopes, rtol=1e-7)


MASK = np.asarray([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
E = jnp.asarray([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
HIDDEN = {
    "a choice of parameters": lambda u, p: jnp.where(MASK > 0, p - 0.2 * u, p) - p,
    "a mean of old and new": lambda u, p: MASK * (p - 0.2 * u) + (1 - MASK) * p - p,
    "entries that are put back": lambda u, p: (p - 0.2 * u).at[1, 0].set(p[1, 0]) - p,
    "a difference": lambda u, p: u - (1 - MASK) * u,
    "a power": lambda u, p: jnp.sign(u) * jnp.abs(MASK * u) ** 1.5,
    "bounds": lambda u, p: jnp.clip(u, -MASK, MASK),
    "functions and their inverses": lambda u, p: jnp.exp(jnp.log1p(jnp.abs(MASK * u))) - 1,
    "a transformation there and back": lambda u, p: jnp.fft.ifft2(jnp.fft.fft2(u * MASK)).real,
    "a loop": lambda u, p: jax.lax.map(lambda x: -0.2 * x[0] * x[1], (u, jnp.asarray(MASK))),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_entries_that_stay_and_cannot_be_read_are_said_once(name):
    hidden = optax.stateless(lambda updates, params: updates | {"w": HIDDEN[name](updates["w"], params["w"])})
    update, tried = looked_at(hidden)
    with pytest.warns(UserWarning, match=r"the optimizer seems to leave \['w'\] of the inner variable") as said:
        division = divide("Implicit", update, tried)
    assert division.kinds == ("moving", "moving")
    assert len(said) == 1


def test_a_mask_in_the_state_is_found_and_an_estimate_says_it_once():
    def update(updates, state, params=None):
        return jnp.where(state, -0.2 * updates, 0.0), state

    hidden = optax.GradientTransformation(lambda params: jnp.asarray([True, True, False]), update)
    for kind in (bilevel.Implicit, bilevel.FixedPoint):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            kind(hidden, 2).estimate(CASE, None, jnp.full(3, 0.2), None, None, KEY)
        assert sum("seems to leave" in str(w.message) for w in said) == 1
