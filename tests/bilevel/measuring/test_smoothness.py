"""A training that is linear in outer is smooth, a chaotic one is not, and the score is what its formula says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Unrolled
from bilevel.testing import check_hypergradient, ridge
from tests.bilevel.helpers import KEY, NETWORK, ROWS

WIDTH = 48
SPREAD = np.linspace(-1.0, 1.0, WIDTH)
PENDULUM = bilevel.Problem(
    lambda w, o, b, k: jnp.sum(1 - jnp.cos(w + SPREAD * o)),
    lambda w, o, b, k: jnp.sum((w - 1.0) ** 2),
    lambda key, o: 1e-2 * jax.random.normal(key, (WIDTH,)),
    lambda key: jnp.full((WIDTH,), 0.3),
)


def pendulum(rate, **settings):
    return bilevel.smoothness(PENDULUM, Unrolled(optax.sgd(rate), 40), **settings)


def test_the_score_is_its_formula():
    problem = bilevel.Problem(
        lambda w, o, b, k: jnp.sum((w - jnp.sin(3 * o)) ** 2), lambda w, o, b, k: jnp.sum(w * o),
        lambda key, o: jnp.zeros(5), lambda key: jnp.linspace(0.0, 1.0, 5),
    )  # fmt: skip
    estimator, step = Unrolled(optax.sgd(0.25), 3), 0.4
    found = bilevel.smoothness(problem, estimator, step=step, directions=2, key=KEY)
    keys, outer = jax.random.split(KEY, 4), np.linspace(0.0, 1.0, 5)
    ends = lambda o: np.sin(3 * o) * (1 - 0.5**3)  # noqa: E731
    for i in range(2):
        # As the directions are drawn.
        (key,) = jax.random.split(jax.random.fold_in(keys[1], i), 1)
        v = np.asarray(jax.random.normal(key, (5,)))
        a, b, c = (ends(outer + n * step * v) for n in range(3))
        weight = np.abs(c - a) / np.abs(c - a).sum()
        np.testing.assert_allclose(found.scores[i], sum(weight * np.sign(b - a) * np.sign(c - b)), rtol=1e-10)
        change = np.sum(b * (outer + step * v)) - np.sum(a * outer)
        slope = np.sum(v * (a + outer * 3 * np.cos(3 * outer) * (1 - 0.5**3)))
        np.testing.assert_allclose(found.found[i], change, rtol=1e-10)
        np.testing.assert_allclose(found.foretold[i], step * slope, rtol=1e-10)
    assert min(found.scores) < 0.99  # which a formula that is always 1 would not give


def test_stable_training_is_smooth_and_one_beyond_the_stable_rate_is_not():
    smooth, rough = pendulum(0.5, step=1e-3), pendulum(4.0, step=1e-3)
    assert smooth.score > 0.99 and smooth.error < 0.05
    assert abs(rough.score) < 0.4 and rough.error > 10
    assert "tells in which direction" in str(smooth) and "lower the inner learning rate" in str(rough)
    assert str(rough).startswith(f"Smoothness {rough.score:.2f} at steps of 0.001 (")
    check = check_hypergradient(PENDULUM, Unrolled(optax.sgd(4.0), 40), directions=2)
    assert check.verdict == "undecided" and "rough, as bilevel.smoothness tells" in str(check)
    # What it misses is of second order.
    assert pendulum(0.5, step=5e-4).error == pytest.approx(smooth.error / 2, rel=0.1)


def test_who_compares_hypergradients_is_told_that_the_training_is_rough():
    ways = {"unrolled": Unrolled(optax.sgd(4.0), 40), "one step": bilevel.OneStep(optax.sgd(4.0), 40)}
    rough = bilevel.compare(PENDULUM, ways, reference="unrolled", repeats=1, step=1e-3)
    assert rough.smoothness.score < 0.5
    assert str(rough).splitlines()[-1].startswith(f"Smoothness {rough.smoothness.score:.2f} at steps of 0.001")
    calm = {name: Unrolled(optax.sgd(0.5), 40) for name in ("a", "b")}
    smooth = bilevel.compare(PENDULUM, calm, reference="a", repeats=1, step=1e-3)
    assert smooth.smoothness.score > 0.99 and "Smoothness" not in str(smooth)
    assert bilevel.compare(PENDULUM, calm, reference="a", repeats=1, step=None).smoothness is None
    with pytest.raises(ValueError, match=r"compare\(step=0.0\)"):
        bilevel.compare(PENDULUM, calm, reference="a", step=0.0)


def test_a_training_that_is_not_finite_a_step_away_is_told():
    root = bilevel.Problem(
        lambda w, o, b, k: 0.5 * (w - jnp.sqrt(o)) ** 2,
        lambda w, o, b, k: w,
        lambda key, o: jnp.zeros(()),
        lambda key: jnp.full((), 1e-4),
    )
    ways = {"unrolled": Unrolled(optax.sgd(0.5), 5)}
    found = bilevel.compare(root, ways, reference="unrolled", repeats=1, step=1.0)
    assert np.isnan(found.smoothness.score) and np.isfinite(found["unrolled"].norm)
    assert "Smoothness unknown at steps of 1: a training, or its hypergradient, is not finite near" in str(found)
    near = bilevel.compare(root, ways, reference="unrolled", repeats=1, step=1e-6)
    assert near.smoothness.score == 1.0 and "Smoothness" not in str(near)


def test_a_derivative_that_is_exact_and_of_no_use_is_told_apart():
    # Waves of a few hundredths in what training makes of outer: as the differences see it, and steps do not.
    wavy = bilevel.Problem(
        lambda w, o, b, k: 0.5 * (w - o - 0.1 * jnp.sin(4e2 * o)) ** 2,
        lambda w, o, b, k: w,
        lambda key, o: jnp.zeros(()),
        lambda key: jnp.ones(()),
    )
    even = bilevel.Problem(lambda w, o, b, k: 0.5 * (w - o) ** 2, *(getattr(wavy, n) for n in ("outer_loss", *STARTS)))
    found, calm = (check_hypergradient(p, Unrolled(optax.sgd(0.5), 30), tolerance=0.05) for p in (wavy, even))
    assert found.verdict == "exact" and found.coarse > 0.5
    assert str(found).splitlines()[-1].strip().startswith("It does not foretell steps of 1 % of outer")
    assert calm.verdict == "exact" and calm.coarse < 1e-6 and "foretell" not in str(calm)


STARTS = "init_inner", "init_outer"


def test_any_estimator_any_outer_and_free_coordinates():
    held_out = bilevel.Batches(ROWS, 5)
    settings = {"inner_data": held_out, "outer_data": held_out, "step": 1e-4}
    one = bilevel.smoothness(NETWORK, Unrolled(optax.sgd(0.1), 4), **settings)
    same = bilevel.smoothness(NETWORK, bilevel.Replay(optax.sgd(0.1), 4, segment=2), **settings)
    np.testing.assert_allclose(same.foretold, one.foretold, rtol=1e-9)
    np.testing.assert_allclose(same.found, one.found, rtol=1e-6)
    assert one.error < 0.01 < 0.99 < one.score
    problem, train, val = ridge()
    bounded = bilevel.Problem(
        lambda w, o, b, k: problem.inner_loss(w, jnp.log(o), b, k),
        lambda w, o, b, k: problem.outer_loss(w, jnp.log(o), b, k),
        lambda key, o: problem.init_inner(key, jnp.log(o)),
        lambda key: jnp.exp(problem.init_outer(key)),
        domain=bilevel.Positive(),
    )
    data = {"inner_data": train, "outer_data": val}
    free, natural = (bilevel.smoothness(p, Unrolled(optax.sgd(0.5), 9), **data) for p in (problem, bounded))
    np.testing.assert_allclose(natural.foretold, free.foretold, rtol=1e-9)
    np.testing.assert_allclose(natural.found, free.found, rtol=1e-9)
    # An estimator that sees nothing of the training foretells nothing of it.
    blind = bilevel.smoothness(problem, bilevel.OneStep(optax.sgd(0.5), 9), **data)
    assert blind.score == 1.0 and blind.error > 0.2


@pytest.mark.filterwarnings("ignore::bilevel.StructuralZeroWarning")
def test_where_nothing_moves_nothing_is_rough():
    still = bilevel.Problem(
        lambda w, o, b, k: jnp.sum(w**2), lambda w, o, b, k: jnp.sum(o * w), lambda k, o: jnp.ones(2), lambda k: 1.0
    )
    found = bilevel.smoothness(still, Unrolled(optax.sgd(0.1), 2))
    assert list(found.scores) == [1.0] * 4 and found.is_smooth


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_rough_training_whose_movement_is_rounded_away_is_not_smooth(precision):
    kind = jnp.dtype(precision)
    weak = bilevel.Problem(
        lambda w, o, b, k: jnp.sum((w - 1) ** 2) + kind.type(1e-9) * jnp.sin(1000 * o) * jnp.sum(w**2),
        lambda w, o, b, k: jnp.sum((w - 2) ** 2),
        lambda key, o: jnp.zeros(2, kind),
        lambda key: jnp.ones((), kind),
    )
    found = bilevel.smoothness(weak, Unrolled(optax.sgd(0.1), 30), key=jax.random.key(1))
    if precision == "float64":
        assert not found.is_undecided and found.score < 0.9 and 1 < found.error < np.inf
    else:
        assert found.is_undecided and not found.is_smooth and found.rounding == np.inf
        assert found.loss_rounding > 0.05 and not found.found.any() and found.error == np.inf
        assert "moves nothing of what is trained, by not even a last digit of float32" in str(found)


@pytest.mark.parametrize("rate", [1.0, 3.0])
def test_a_training_that_amplifies_a_last_digit_is_rough_and_not_undecided(rate):
    """Far beyond the stable rate a last digit of float64 moves a fifth of what a step moves, and double precision is
    all there is."""
    towards = jnp.asarray([1.0, -2.0, 0.5])
    chaotic = bilevel.Problem(
        lambda w, o, b, k: jnp.sum(jnp.cos(w * 3 + towards * o[0]) + jnp.sin(w * o[1])),
        lambda w, o, b, k: jnp.sum(w**2),
        lambda key, o: jnp.zeros(3),
        lambda key: jnp.asarray([0.3, 0.8]),
    )
    found = bilevel.smoothness(chaotic, Unrolled(optax.sgd(rate), 30), step=1e-3, directions=16)
    assert found.rounding > 0.05 and found.amplified and not found.is_undecided and found.score < 0.5
    said = str(found)
    assert "of a last digit of float64" in said and "lower the inner learning rate" in said and "x64" not in said
    # Where nothing moves at all, more digits are no remedy either.
    clipped = dataclasses.replace(chaotic, inner_loss=lambda w, o, b, k: jnp.sum((w - jnp.clip(o[0], 1.0, 2.0)) ** 2))
    still = bilevel.smoothness(clipped, Unrolled(optax.sgd(0.1), 5))
    assert still.is_undecided and "measure at larger steps" in str(still) and "x64" not in str(still)


def test_a_leaf_of_low_precision_that_does_not_move_is_not_what_rounds():
    def found(start):
        return bilevel.smoothness(
            bilevel.Problem(
                lambda w, o, b, k: jnp.sum((w["w"] - 1) ** 2) + jnp.exp(o) * jnp.sum(w["w"] ** 2),
                lambda w, o, b, k: jnp.sum((w["w"] - 2) ** 2),
                lambda key, o: start,
                lambda key: jnp.zeros((), jnp.float32),
            ),
            Unrolled(optax.sgd(0.1), 5),
        )

    alone = found({"w": jnp.zeros(2, jnp.float32)})
    idle = found({"w": jnp.zeros(2, jnp.float32), "idle": jnp.ones(3, jnp.bfloat16)})
    assert idle.is_smooth and idle.precision == alone.precision == "float32"
    assert idle.rounding == pytest.approx(alone.rounding)


def test_refusals():
    with pytest.raises(ValueError, match=r"smoothness\(step=0"):
        pendulum(0.5, step=0.0)
    with pytest.raises(ValueError, match=r"smoothness\(directions=0"):
        pendulum(0.5, directions=0)
    problem, train, val = ridge()
    with pytest.raises(FloatingPointError, match="smoothness: a training, or its hypergradient, is not finite"):
        bilevel.smoothness(problem, Unrolled(optax.sgd(1e200), 9), inner_data=train, outer_data=val)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_movement_that_drowns_in_rounding_gives_no_verdict(precision):
    """Adam makes little of a weak penalty: in single precision a step moves the weights by a few last digits."""
    x = np.random.default_rng(0).normal(size=(32, 8)).astype(precision)
    weights = np.random.default_rng(1).normal(size=8).astype(precision)
    with jax.numpy_dtype_promotion("standard"):
        problem = bilevel.Problem(
            lambda w, o, b, k: jnp.mean((x @ w - x @ weights) ** 2) + jnp.exp(o) * jnp.sum(w**2),
            lambda w, o, b, k: jnp.mean((x @ w - x @ weights) ** 2),
            lambda key, o: jnp.ones(8, precision),
            lambda key: jnp.asarray(-8.0, precision),
        )
        found = bilevel.smoothness(problem, Unrolled(optax.adam(1e-2), 3))
    if precision == "float64":
        assert found.is_smooth and max(found.rounding, found.loss_rounding) < 1e-5 and found.error < 0.05
    else:
        assert found.is_undecided and not found.is_smooth
        assert "undecided" in str(found) and "rounding in float32" in str(found) and "misses" not in str(found)


def test_leaves_of_several_precisions_are_as_good_as_the_coarsest():
    problem = bilevel.Problem(
        lambda w, o, b, k: sum(jnp.sum((w[n] - o[n]) ** 2).astype(jnp.float32) for n in o),
        lambda w, o, b, k: sum(jnp.sum((w[n] - 1) ** 2).astype(jnp.float32) for n in o),
        lambda key, o: jax.tree.map(jnp.zeros_like, o),
        lambda key: {"wide": jnp.full(3, 0.3), "narrow": jnp.full(3, 0.3, jnp.bfloat16)},
    )
    found = bilevel.smoothness(problem, Unrolled(optax.sgd(0.25), 3), step=1.0)
    assert found.precision == "bfloat16" and found.rounding > 1e-3
