"""Central differences know how far they may be off: by rounding, by kinks, by steps that leave what is defined."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import FirstOrder, Unrolled
from bilevel.measuring.casts import lowered
from bilevel.measuring.differences import OFFSETS, differences
from bilevel.testing import check_hypergradient

TRAINING = Unrolled(optax.sgd(0.1), 5)


def squares(w, away=0.0):
    return jnp.sum((w - away) ** 2)


def problem(inner, outer, start, **settings):
    """A problem of two inner variables from losses of `(w, o)`."""
    return bilevel.Problem(
        lambda w, o, b, k: inner(w, o), lambda w, o, b, k: outer(w, o),
        lambda key, o: jnp.zeros(2), lambda key: jax.tree.map(jnp.asarray, start), **settings,
    )  # fmt: skip


def decayed(w, o):
    return squares(w, 1.0) + jnp.exp(o) * squares(w)


def times(factor):
    """The identity, with a derivative that is `factor` times its own."""

    @jax.custom_vjp
    def same(x):
        return x

    same.defvjp(lambda x: (x, None), lambda _, ct: (factor * ct,))
    return same


def offset_in_single(by):
    return lambda w, o: (jnp.float32(by) + squares(w.astype(jnp.float32), 2.0)).astype(w.dtype)


ROUNDING = {
    "bfloat16": lambda w, o: squares(w.astype(jnp.bfloat16), 2.0).astype(w.dtype),
    "float16": lambda w, o: squares(w.astype(jnp.float16), 2.0).astype(w.dtype),
    "bfloat16 within": lambda w, o: squares(w.astype(jnp.bfloat16).astype(jnp.float32), 2.0).astype(w.dtype),
    "float32": offset_in_single(30.0),
    "float32 far": offset_in_single(300.0),
}


@pytest.mark.parametrize("name", ROUNDING)
def test_an_exact_hypergradient_is_never_contradicted_by_rounding(name):
    case = problem(decayed, ROUNDING[name], 0.0)
    # At the first of these the values of a stencil may fall on the same step, so that its differences agree on 0.
    checks = [check_hypergradient(case, TRAINING, outer=jnp.asarray(at)) for at in (-1.4, -1.0, -0.35, 0.3, 1.1)]
    assert {check.verdict for check in checks} <= {"undecided", "exact"}
    for check in checks:
        assert check.uncertainty > 1e-5 and check.error <= 3 * check.uncertainty
        if check.verdict == "undecided":
            assert f"rounded to {name.split()[0]} on its way" in str(check)
    if name != "float32":
        assert {check.verdict for check in checks} == {"undecided"}


def test_rounding_that_no_cast_shows_is_measured():
    """A large number that is added and taken away leaves values on a grid of 1.5e-8 or of 1.2e-7."""
    barrier = jax.lax.optimization_barrier  # or the compiler takes both away
    for large, known in ((1e8, 1e-6), (1e9, 1e-5)):
        case = problem(decayed, lambda w, o, large=large: barrier(large + squares(w, 2.0)) - large, 0.0)
        for at in (-1.2, -0.3, 0.4, 0.9):
            check = check_hypergradient(case, TRAINING, outer=jnp.asarray(at))
            assert check.verdict in ("exact", "undecided") and check.uncertainty > known


def test_a_known_bias_is_never_confirmed_as_exact():
    same = times(1.02)
    biased = problem(decayed, lambda w, o: offset_in_single(60.0)(same(w), o), 0.0)
    verdicts = {
        check_hypergradient(biased, TRAINING, outer=jnp.asarray(at)).verdict for at in (-1.4, -0.6, 0.0, 0.5, 1.0)
    }
    assert verdicts <= {"biased", "undecided"} and "biased" in verdicts


def test_what_is_blind_is_not_confirmed_by_a_loss_that_rounds_everything_away():
    coarse = problem(decayed, lambda w, o: (squares(w, 2.0) + 1e4).astype(jnp.float16).astype(w.dtype), 0.0)
    check = check_hypergradient(coarse, FirstOrder(optax.sgd(0.1), 5))
    assert check.verdict == "undecided" and "rounded to float16" in str(check)


@pytest.mark.parametrize(
    ("function", "at"),
    [
        (jax.nn.relu, 0.0),
        (lambda o: jnp.maximum(o, 0.0), 0.0),
        (lambda o: jnp.abs(o) + o, 0.0),
        (lambda o: jnp.clip(o, 0.0, 1.0), 1.0),
    ],
    ids=["relu", "maximum", "abs", "clip"],
)
def test_a_kink_right_at_the_point_is_undecided(function, at):
    check = check_hypergradient(
        problem(lambda w, o: squares(w, 1.0) + function(o) * squares(w), lambda w, o: squares(w, 2.0), at), TRAINING
    )
    assert check.verdict == "undecided" and "there is a kink here" in str(check)


def test_a_kink_and_a_bend_are_told_apart():
    sizes = np.array([1e-3])
    ways = {"kink": lambda t: np.abs(t) + t**2, "bend": lambda t: t + 40 * t**2 - 9 * t**4, "none": lambda t: 0 * t}
    found = {name: differences(way(OFFSETS * sizes)[:, None], sizes, np.finfo(float).eps) for name, way in ways.items()}
    assert found["kink"].kink[0] and abs(found["kink"].doubt[0] - 1.0) < 1e-2
    assert not found["bend"].kink[0] and found["bend"].doubt[0] < 1e-9
    assert found["none"].still[0] and not found["bend"].still[0]
    # The same map in other units has the same differences in these.
    small = differences(1e-9 * ways["bend"](OFFSETS * sizes)[:, None], sizes, np.finfo(float).eps)
    np.testing.assert_allclose(small.slope, 1e-9 * found["bend"].slope, rtol=1e-10)


def logarithms(w, o):
    return squares(w, 1.0) + o[0] * squares(w) - 1e-3 * jnp.log(o[1]) * jnp.sum(w)


def near_one(w, o):
    return squares(w, 1.0) + squares(w) * (o + jnp.sqrt(1 - o**2))


def weighed(w, o):
    return squares(w, 1.0) + squares(w) * jnp.sum(jnp.arange(1.0, 4.0) * o) - 0.01 * jnp.sum(jnp.log(o)) * jnp.sum(w)


@pytest.mark.parametrize(
    ("inner", "start", "domain"),
    [
        (logarithms, np.array([1.0, 1e-5]), None),
        (logarithms, np.array([1.0, 1e-5]), bilevel.Positive()),
        (lambda w, o: squares(w, 1.0) + jnp.exp(o[1]) * squares(w) + 1e-9 * o[0], np.array([1e6, 0.1]), None),
        (lambda w, o: squares(w, 1.0) + (2 + jnp.sin(o)) * squares(w), 1e5, None),
        (near_one, 0.99999, bilevel.Interval(-1.0, 1.0)),
        (weighed, np.array([0.99989, 1e-5, 1e-4]), bilevel.Simplex()),
    ],
    ids=["sizes", "positive", "overflow", "waves", "interval", "simplex"],
)
def test_steps_are_of_the_size_of_entries_and_stay_in_the_domain(inner, start, domain):
    case = problem(inner, lambda w, o: squares(w, 2.0), start, domain=domain)
    check = check_hypergradient(case, TRAINING)
    assert check.verdict == "exact" and check.error < 1e-6


def test_differences_that_are_not_finite_are_not_charged_to_the_estimate():
    half = problem(
        lambda w, o: squares(w, 1.0) + jnp.exp(o["a"] + o["b"]) * squares(w),
        lambda w, o: squares(w, 2.0) + jnp.where(o["b"] > 0.5, jnp.nan, 0.0),
        {"a": 0.1, "b": 0.5},
    )
    check = check_hypergradient(half, TRAINING)
    assert check.verdict == "undecided" and [leaf.verdict for leaf in check.leaves] == ["exact", "undecided"]
    assert "leaf ['b']: the central differences are not finite" in str(check)


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


straight_through.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))


@pytest.mark.parametrize("unit", [1.0, 1e-7, 1e-200])
def test_the_unit_of_the_loss_changes_no_verdict(unit):
    def verdict(inner, factor=1.0):
        same = times(factor)
        estimator = Unrolled(optax.sgd(0.1), 5, mode="reverse")
        return check_hypergradient(problem(inner, lambda w, o: unit * squares(same(w), 2.0), 0.8), estimator).verdict

    assert verdict(lambda w, o: squares(w, 1.0) + straight_through(o) * squares(w)) == "wrong"
    assert [verdict(decayed, factor) for factor in (1.0, 1.5, -1.0)] == ["exact", "biased", "wrong"]


def test_a_truth_that_is_rounded_away_confirms_nothing():
    for factor in (1.0, -5.0):
        same = times(factor)
        case = problem(decayed, lambda w, o, same=same: 1.0 + 1e-14 * squares(same(w), 2.0), 0.0)
        assert check_hypergradient(case, TRAINING).verdict == "undecided"


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "exact"), (-1.0, "wrong"), (0.0, "wrong"), (100.0, "biased")])
def test_a_leaf_is_measured_by_its_own_size_and_the_whole_is_no_better(factor, verdict):
    same = times(factor)
    case = problem(
        lambda w, o: decayed(w, o["a"]),
        lambda w, o: squares(w, 2.0) + 1e-9 * jnp.exp(same(o["b"])),
        {"a": 0.0, "b": 0.0},
    )
    check = check_hypergradient(case, TRAINING)
    assert check.verdict == verdict and check.error < 1e-6
    assert [leaf.verdict for leaf in check.leaves] == ["exact", verdict]
    if verdict != "exact":
        assert str(check).startswith(f"Unrolled: {verdict} in ['b'], with a relative error of ")
        np.testing.assert_allclose(check.leaves[1].error, abs(factor - 1), rtol=1e-2)


def test_only_casts_of_what_depends_on_the_input_count():
    def down(x):
        return x.astype(jnp.float32).astype(x.dtype)

    def looped(x, y):
        return jax.lax.scan(lambda carry, _: (carry + down(carry) + y, None), x, None, length=2)[0]

    def whiled(x, y):
        return jax.lax.while_loop(lambda c: c[1] < 1, lambda c: (y + down(c[1]), c[0]), (x, y))[1]

    def chosen(x, y):
        return jax.lax.cond(y > 0, lambda: x, lambda: down(x))

    programs = {
        "none": (lambda x, y: jnp.sin(x) + down(y), None),
        "cast": (lambda x, y: down(x), "float32"),
        "unread": (lambda x, y: (down(x), x + y)[1], None),
        "coarsest": (lambda x, y: down(x) + x.astype(jnp.bfloat16).astype(x.dtype), "bfloat16"),
        "narrower operand": (lambda x, y: x * jnp.asarray(2, jnp.float32).astype(x.dtype), None),
        "scan": (looped, "float32"),
        "while": (whiled, "float32"),
        "cond": (chosen, "float32"),
        "jit": (lambda x, y: jax.jit(down)(x), "float32"),
        "reduced": (lambda x, y: jax.lax.reduce_precision(x, 8, 7), "bfloat16"),
    }
    for name, (program, dtype) in programs.items():
        jaxpr = jax.make_jaxpr(program)(jnp.ones(()), jnp.ones(())).jaxpr
        assert (name, lowered(jaxpr, 0)) == (name, dtype)


@pytest.mark.parametrize("width", [1e-3, 1e-5, 1e-8, 1e-11])
@pytest.mark.parametrize("slope", [3.0, 300.0, 3e5])
def test_waves_that_are_narrow_beside_a_step_contradict_nothing(width, slope):
    """An exact hypergradient that the differences of a step of 1e-4 do not see."""
    wave = lambda w, o: 0.5 * (o - 1.0) ** 2 + width * slope * jnp.sin((o - 0.3) / width) + squares(w, 2.0)  # noqa: E731
    check = check_hypergradient(problem(decayed, wave, 0.3), TRAINING, outer=jnp.asarray(0.3))
    # Two steps that are shorter than the wave agree on its slope, as long as there are two.
    assert check.verdict == ("exact" if width > 1e-11 else "undecided")
    if check.verdict == "undecided":
        assert "over shorter steps the differences are others" in str(check)
    elif width < 1e-3:
        assert check.coarse > 0.5 and "It does not foretell steps of 1 % of outer" in str(check)


@pytest.mark.parametrize("factor", [0.7, -1.0, 1.001])
def test_shorter_steps_confirm_that_an_estimate_is_off(factor):
    training = Unrolled(optax.sgd(0.1), 5, mode="reverse")
    scaled = lambda w, o: squares(w, 1.0) + jnp.exp(times(factor)(o)) * squares(w)  # noqa: E731
    for at in (-1.2, 0.4):
        check = check_hypergradient(problem(scaled, lambda w, o: squares(w, 2.0), 0.0), training, outer=jnp.asarray(at))
        assert check.verdict == ("wrong" if factor < 0 else "biased") and check.uncertainty < 1e-8
        assert check.error == pytest.approx(abs(1 - factor), rel=1e-4)


@pytest.mark.parametrize("width", [1e-5, 1e-6, 1e-8, 1e-11])
def test_an_estimate_that_misses_a_narrow_step_is_not_exact(width):
    """The slope at 0.3 is cos(0.3) + 1; over a step of 1e-4 it is cos(0.3)."""
    whole = lambda w, o: jnp.sin(o) + width * jnp.tanh((o - 0.3) / width)  # noqa: E731
    half = lambda w, o: jnp.sin(o) + width * jnp.tanh((jax.lax.stop_gradient(o) - 0.3) / width)  # noqa: E731
    for outer, verdict in ((whole, "exact"), (half, "biased")):
        check = check_hypergradient(problem(decayed, outer, 0.3), TRAINING, outer=jnp.asarray(0.3))
        assert check.verdict == (verdict if width > 1e-11 else "undecided"), str(check)
        if check.verdict == "biased":
            assert check.error == pytest.approx(1 / (1 + np.cos(0.3)), rel=1e-3)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.sgd(0.05, momentum=0.9)], ids=["sgd", "momentum"])
def test_between_the_kinks_of_a_network_of_relus_a_hypergradient_is_exact_or_biased(optimizer):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 4)), rng.normal(size=(16, 1))

    def network(w, x):
        return jax.nn.relu(x @ w["in"] + w["bias"][None]) @ w["out"]

    relus = bilevel.Problem(
        lambda w, o, b, k: (
            jnp.mean((network(w, x[:8]) - y[:8]) ** 2) + jnp.exp(o) * sum(squares(leaf) for leaf in jax.tree.leaves(w))
        ),
        lambda w, o, b, k: jnp.mean((network(w, x[8:]) - y[8:]) ** 2),
        lambda key, o: {
            "in": jax.random.normal(jax.random.key(0), (4, 8)) / 2,
            "bias": jnp.full(8, 0.1),
            "out": jax.random.normal(jax.random.key(1), (8, 1)) / 3,
        },
        lambda key: jnp.asarray(-3.0),
    )
    check = check_hypergradient(relus, Unrolled(optimizer, 100))
    assert check.verdict == "exact" and check.error < 1e-5, str(check)
    assert check_hypergradient(relus, bilevel.OneStep(optimizer, 100)).verdict in ("biased", "wrong")


def of_outer(outer, at):
    """A problem whose outer loss is a function of the outer variable alone, with a closed form, at a point."""
    return problem(decayed_by_none, lambda w, o: outer(o), at)


def decayed_by_none(w, o):
    return squares(w, 1.0)


@jax.custom_jvp
def floor_through(x):
    return jnp.floor(x)


floor_through.defjvp(lambda primals, tangents: (jnp.floor(primals[0]), tangents[0]))


def large_and_back(x, large):
    """The identity, rounded as a number of the size `large` is."""
    return jax.lax.optimization_barrier(large + x) - large


@pytest.mark.parametrize("outer", [
    lambda o: 1e-12 * jnp.tanh((o - 0.3) / 1e-12) + o,
    lambda o: 1e-12 * jnp.tanh((jax.lax.stop_gradient(o) - 0.3) / 1e-12) + o,
    lambda o: jnp.sin(o) + 1e-12 * jnp.sin(o / 1e-12),
], ids=["whole", "half", "waves"])  # fmt: skip
def test_the_shortest_step_is_heard_even_where_two_longer_ones_agree(outer):
    assert check_hypergradient(of_outer(outer, 0.3), TRAINING).verdict == "undecided"


@pytest.mark.parametrize("beside", [0.0, 0.37])
@pytest.mark.parametrize("stairs", [1e4, 1e6, 1e8, 1e11])
def test_a_staircase_contradicts_neither_the_slope_of_a_stair_nor_its_own(stairs, beside):
    """On a stair the slope is 0.1, over all of them it is 1.1: differences cannot tell which of them is wanted."""
    at = 0.3 + beside / stairs
    for floor in (jnp.floor, floor_through):
        check = check_hypergradient(of_outer(lambda o, f=floor: f(o * stairs) / stairs + 0.1 * o, at), TRAINING)
        # Stairs that no step but the shortest sees are taken for rounding: of the whole, the slope may be confirmed.
        confirmed = floor is floor_through and stairs >= 1e8
        assert check.verdict in (("exact", "undecided") if confirmed else ("undecided",)), str(check)


@pytest.mark.parametrize("count", [3, 20])
def test_an_edge_in_one_entry_of_many_is_an_edge(count):
    at = np.linspace(-1.0, 1.3, count)
    for stairs in (1e6, 1e8, 1e10):
        steps = of_outer(lambda o, n=stairs: jnp.sum(jnp.floor(o * n) / n + 0.5 * o**2), at)
        assert check_hypergradient(steps, TRAINING).verdict == "undecided"


@pytest.mark.parametrize("large", [1e2, 1e4, 1e6, 1e8])
def test_rounding_within_a_loss_contradicts_no_estimate_and_confirms_none_that_is_blind(large):
    """Next to a term that does not round: over the shortest steps only its slope is left."""
    for through, verdicts in ((lambda o: o, ("exact",)), (jax.lax.stop_gradient, ("biased", "undecided"))):
        outer = lambda o, through=through: large_and_back(jnp.exp(through(o)), large) + 0.1 * o  # noqa: E731
        assert check_hypergradient(of_outer(outer, 0.3), TRAINING).verdict in verdicts


def logs_and_one_large(o):
    return jnp.sum(jnp.log(o[1:])) + 3e3 * (o[0] - 1e10)


def blind_to_the_first(o):
    return logs_and_one_large(o.at[0].set(jax.lax.stop_gradient(o[0])))


@pytest.mark.parametrize(("outer", "at"), [
    (logs_and_one_large, np.r_[1e10, np.full(19, 1e-3)]),
    (blind_to_the_first, np.r_[1e10, np.full(19, 1e-3)]),
    (lambda o: jnp.sum(jnp.sin(o)), np.array([1e15, 0.1, 0.2])),
    (jnp.sin, 2.0**53),
    (jnp.sin, 1e15),
], ids=["sizes", "sizes, blind", "one entry", "2 ** 53", "1e15"])  # fmt: skip
def test_a_step_that_is_lost_in_rounding_says_nothing(outer, at):
    check = check_hypergradient(of_outer(outer, at), TRAINING)
    assert check.verdict == "undecided"
    if np.size(at) == 20:
        assert "a step of the small ones is lost in the rounding of the large ones" in str(check)


@pytest.mark.parametrize("through", [lambda o: o, jax.lax.stop_gradient], ids=["whole", "blind"])
def test_what_is_narrow_in_one_entry_is_seen(through):
    outer = lambda o: jnp.sum(o**2) + 1e-7 * jnp.tanh((through(o[5]) - 0.3) / 1e-7)  # noqa: E731
    check = check_hypergradient(of_outer(outer, np.full(8, 0.3)), TRAINING)
    assert check.verdict == ("biased" if through is jax.lax.stop_gradient else "exact")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_constant_that_is_taken_away_changes_no_verdict(dtype):
    """What was rounded where numbers were larger rounds no less when it is 0 at the end."""
    for constant in (0.0, 1000.0):
        rounded = lambda o, c=constant: (dtype(1000) + jnp.sin(o.astype(dtype))).astype(o.dtype) - c  # noqa: E731
        check = check_hypergradient(of_outer(rounded, 0.3), TRAINING)
        assert check.verdict == "undecided" and f"rounded to {jnp.dtype(dtype)} on its way" in str(check)
    two = lambda o: (dtype(1000) + jnp.sin(o[0].astype(dtype))).astype(o.dtype) - 1000.0 + 1e-3 * o[1]  # noqa: E731
    assert check_hypergradient(of_outer(two, np.array([0.3, 0.3])), TRAINING).verdict == "undecided"


def test_which_of_the_two_is_zero_is_told():
    clip = jax.custom_vjp(lambda x: jnp.clip(x, 0.0, 1.0))
    clip.defvjp(lambda x: (jnp.clip(x, 0.0, 1.0), None), lambda _, ct: (ct,))
    training = Unrolled(optax.sgd(0.1), 5, mode="reverse")
    check = check_hypergradient(of_outer(lambda o: 3 * clip(o) ** 2, 2.3), training)
    assert check.verdict == "wrong" and np.isnan(check.cosine)
    assert "wrong, not 0 where the differences are exactly 0" in str(check)
    nothing = times(0.0)
    check = check_hypergradient(of_outer(lambda o: nothing(o) ** 2, 2.3), training)
    assert check.verdict == "wrong" and "wrong, exactly 0 where the differences are not" in str(check)
