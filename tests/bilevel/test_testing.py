import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import FirstOrder, Unrolled
from bilevel.testing import _compare, central_differences, check_hypergradient, quadratic
from tests.bilevel.helpers import KEY, NETWORK, ROWS, assert_close

Q = quadratic()
OUTER = {"tilt": np.array([0.3, -0.2, 0.5]), "rate": np.array(0.5), "start": 0.7 * Q.start}
SGD = lambda outer: optax.sgd(outer["rate"])  # noqa: E731


@pytest.mark.parametrize(("steps", "truncate"), [(1, None), (6, None), (6, 2)])
def test_the_closed_forms_agree_with_training_by_hand(steps, truncate):
    # Hand-written descent, and differences of it, from where the truncated derivative begins.
    def descend(outer, w, count):
        for _ in range(count):
            w = w - outer["rate"] * (Q.H @ w - Q.b - Q.C @ outer["tilt"])
        return w

    def value(outer, w):
        away = w - Q.c
        return 0.5 * away @ Q.A @ away + 0.5 * np.sum(outer["tilt"] ** 2)

    np.testing.assert_allclose(Q.trained(OUTER, steps), descend(OUTER, OUTER["start"], steps), rtol=1e-12)
    np.testing.assert_allclose(Q.value(OUTER, steps), value(OUTER, descend(OUTER, OUTER["start"], steps)), rtol=1e-12)
    last = truncate or steps
    fixed = descend(OUTER, OUTER["start"], steps - last)
    closed = Q.unrolled(OUTER, steps, truncate=truncate)
    for name in OUTER:
        for i in np.ndindex(OUTER[name].shape):
            sides = []
            for sign in (1, -1):
                moved = {key: np.array(leaf, float) for key, leaf in OUTER.items()}
                moved[name][i] += sign * 1e-5
                begin = moved["start"] if last == steps else fixed
                sides.append(value(moved, descend(moved, begin, last)))
            np.testing.assert_allclose(closed[name][i], (sides[0] - sides[1]) / 2e-5, rtol=1e-6, atol=1e-8)


def test_implicit_is_the_limit_of_unrolled():
    outer = {"tilt": OUTER["tilt"]}
    assert_close(Q.unrolled(outer, 3000, rate=1.0), Q.implicit(outer, 3000, rate=1.0), 1e-10)


def test_central_differences_are_derivatives_of_the_training():
    found = central_differences(Q.problem, Unrolled(SGD, 7), None, OUTER, None, None, KEY)
    assert_close(found, Q.unrolled(OUTER, 7), 1e-9)


def test_central_differences_leave_out_what_does_not_move():
    problem = bilevel.Problem(
        lambda w, outer, batch, key: jnp.sum((w - outer["a"]) ** 2),
        lambda w, outer, batch, key: jnp.sum(w**2),
        lambda key, outer: jnp.zeros(2),
        lambda key: {"a": jnp.ones(2), "n": jnp.asarray(2), "key": key},
    )
    outer = problem.start_outer(KEY)
    found = central_differences(problem, Unrolled(optax.sgd(0.1), 2), None, outer, None, None, KEY)
    assert found["n"] is None and found["key"] is None
    np.testing.assert_allclose(found["a"], 2 * (1 - 0.8**2) ** 2, rtol=1e-9)


def test_an_exact_hypergradient_is_called_exact():
    check = check_hypergradient(Q.problem, Unrolled(SGD, 7), outer=OUTER)
    assert check.verdict == "exact" and check.error < 1e-9
    assert {leaf.name: leaf.verdict for leaf in check.leaves} == {f"['{name}']": "exact" for name in OUTER}
    assert str(check).startswith("Unrolled: exact, relative error ")


def test_a_bias_is_measured():
    outer = {"tilt": OUTER["tilt"], "rate": OUTER["rate"]}
    check = check_hypergradient(Q.problem, Unrolled(SGD, 7, truncate=3), outer=outer)
    found, true = Q.unrolled(outer, 7, truncate=3), Q.unrolled(outer, 7)
    stack = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    error = np.linalg.norm(stack(found) - stack(true)) / np.linalg.norm(stack(true))
    assert check.verdict == "biased"
    np.testing.assert_allclose(check.error, error, rtol=1e-6)
    assert f"biased by {100 * error:.3g} %" in str(check)


def test_a_leaf_that_is_not_seen_is_wrong_and_named_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check = check_hypergradient(Q.problem, FirstOrder(SGD, 7), outer=OUTER)
    verdicts = {leaf.name: leaf.verdict for leaf in check.leaves}
    assert verdicts["['rate']"] == verdicts["['start']"] == "wrong"
    assert "['rate']: wrong" in str(check)


def spoiled(rule):
    """A quadratic problem with a derivative of the outer loss that is not its own."""

    @jax.custom_vjp
    def same(x):
        return x

    same.defvjp(lambda x: (x, None), lambda _, ct: (rule(ct),))
    problem = Q.problem
    return bilevel.Problem(
        problem.inner_loss,
        lambda w, outer, batch, key: problem.outer_loss(same(w), {"tilt": 0.0 * outer["tilt"]}, batch, key),
        problem.init_inner,
        problem.init_outer,
    )


@pytest.mark.parametrize(
    ("rule", "verdict", "words"),
    [
        (lambda ct: -ct, "wrong", "no direction of descent, cosine -1"),
        (lambda ct: 0.0 * ct, "wrong", "wrong, exactly 0 where the differences are not: outer acts by a way that"),
        (lambda ct: ct * jnp.nan, "wrong", "not finite"),
        (lambda ct: 2.0 * ct, "biased", "biased by 100 %, cosine 1.000"),
    ],
    ids=["sign", "none", "nan", "factor"],
)
def test_a_wrong_derivative_is_found(rule, verdict, words):
    check = check_hypergradient(spoiled(rule), Unrolled(optax.sgd(0.5), 4), outer={"tilt": OUTER["tilt"]})
    assert check.verdict == verdict and words in str(check)


def test_many_entries_are_sampled():
    rows = jax.tree.map(jnp.asarray, ROWS)
    hypergradient = Unrolled(optax.sgd(0.1), 3, checkpoint="none")
    data = {"inner_data": bilevel.Batches(rows, 2), "outer_data": rows}
    check = check_hypergradient(NETWORK, hypergradient, **data, directions=4)
    assert check.verdict == "exact" and check.error < 1e-7


def test_a_loss_of_low_precision_is_undecided_not_confirmed():
    rounding = bilevel.Problem(
        lambda w, outer, batch, key: jnp.sum((w - outer) ** 2),
        lambda w, outer, batch, key: jnp.sum((w - 1.0) ** 2).astype(jnp.bfloat16).astype(jnp.float32),
        lambda key, outer: jnp.zeros(2),
        lambda key: jnp.full(2, 0.3),
    )
    assert check_hypergradient(rounding, Unrolled(optax.sgd(0.1), 3)).verdict != "exact"


def test_single_precision_is_checked_in_double():
    single = bilevel.Problem(
        lambda w, outer, batch, key: jnp.sum((w - outer * batch) ** 2),
        lambda w, outer, batch, key: jnp.sum(w**3),
        lambda key, outer: jnp.full(2, 0.1, jnp.float32),
        lambda key: jnp.full(2, 0.3, jnp.float32),
    )
    row = jnp.ones(2, jnp.float32)
    for enabled in (True, False):
        with jax.enable_x64(enabled):
            check = check_hypergradient(single, Unrolled(optax.adam(0.1), 4), inner_data=row)
            assert check.verdict == "exact" and check.error < 1e-8


def test_warm_starts_are_constants():
    outer = {"tilt": OUTER["tilt"], "rate": OUTER["rate"]}
    hypergradient = Unrolled(SGD, 5)
    state = hypergradient.init(Q.problem, outer, KEY)
    assert check_hypergradient(Q.problem, hypergradient, outer=outer, inner_state=state).verdict == "exact"


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="directions=0"):
        check_hypergradient(Q.problem, Unrolled(SGD, 2), outer=OUTER, directions=0)
    with pytest.raises(ValueError, match="nothing that can be learned"):
        check_hypergradient(Q.problem, Unrolled(optax.sgd(0.1), 2), outer={"n": jnp.asarray(1)})


@pytest.mark.parametrize(
    ("off", "known", "verdict"),
    [(1e-8, 1e-9, "exact"), (1e-3, 1e-9, "biased"), (2e-4, 1e-4, "exact"), (4e-4, 1e-4, "biased")]
    + [(0.4, 0.3, "undecided"), (0.4, 0.1, "biased"), (0.4, 0.6, "undecided"), (-2.0, 0.3, "wrong")],
)
def test_an_estimate_is_contradicted_by_differences_that_are_known_well_enough(off, known, verdict):
    true = np.array([3.0, 4.0])
    columns = true * (1 + off), true, np.array([0.0, 5.0 * known])
    assert _compare(columns, 1e-6, 0.0)[0] == verdict
