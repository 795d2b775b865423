"""A hypergradient that is 0 for the values that there are is told: by a run, by the check, and by a comparison."""

import warnings

import jax.numpy as jnp
import optax
import pytest

import bilevel
from bilevel import FirstOrder, Nested, Replay, Unrolled
from bilevel.testing import check_hypergradient

TRAINING = optax.sgd(0.1), 5


def through(function):
    """Training is drawn to `function` of outer, a dict of `seen` and `other`."""
    return bilevel.Problem(
        lambda w, o, b, k: jnp.sum((w - function(o["seen"]) - o["other"]) ** 2),
        lambda w, o, b, k: jnp.sum((w - 0.5) ** 2),
        lambda key, o: jnp.zeros(3),
        lambda key: {"seen": jnp.full(3, 0.1), "other": jnp.zeros(3)},
    )


def alone(function):
    """The same, with nothing but `seen`."""
    both = through(function)
    return bilevel.Problem(
        lambda w, o, b, k: both.inner_loss(w, {"seen": o, "other": 0.0}, b, k),
        lambda w, o, b, k: both.outer_loss(w, o, b, k),
        lambda key, o: jnp.zeros(3),
        lambda key: jnp.full(3, 0.1),
    )


FLAT = {
    "clip": lambda o: jnp.clip(o, 0.2, 0.9),
    "relu": lambda o: jnp.maximum(o - 1.0, 0.0),
    "product": lambda o: 0.0 * o,
    "choice": lambda o: jnp.where(o > 1.0, o, 0.3),
}


@pytest.mark.parametrize("estimator", [Unrolled(*TRAINING), Replay(*TRAINING, segment=2)], ids=["unrolled", "replay"])
@pytest.mark.parametrize("name", FLAT)
def test_a_run_that_stands_still_says_so(name, estimator):
    solver = Nested(alone(FLAT[name]), estimator, optax.adam(0.1))
    with pytest.warns(bilevel.ZeroHypergradientWarning, match=r"exactly 0 in all 3 outer steps.*a clip") as caught:
        result = bilevel.run(solver, steps=3, progress=False)
    assert len(caught) == 1 and jnp.all(result.outer == 0.1)


def test_a_run_that_moves_at_last_does_not():
    """Adam's momentum carries outer over the edge."""
    start = alone(lambda o: jnp.clip(o, 0.1, 0.9))
    solver = Nested(start, Unrolled(*TRAINING), optax.sgd(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bilevel.run(solver, steps=3, progress=False).history["hypergradient_norm"].any()


def test_what_is_zero_by_construction_is_said_once():
    solver = Nested(alone(lambda o: o), FirstOrder(*TRAINING), optax.adam(0.1))
    with pytest.warns(bilevel.StructuralZeroWarning) as caught:
        bilevel.run(solver, steps=3, progress=False)
    assert {warning.category for warning in caught} == {bilevel.StructuralZeroWarning}


def test_a_loss_that_reads_no_inner_variable_is_told_once():
    constant = bilevel.Problem(
        lambda w, o, b, k: jnp.sum((w - o) ** 2), lambda w, o, b, k: 0.0 * o + 1.0,
        lambda key, o: jnp.zeros(3), lambda key: jnp.asarray(0.1),
    )  # fmt: skip
    with pytest.warns(bilevel.StructuralZeroWarning, match="outer_loss does not depend on inner") as caught:
        bilevel.run(Nested(constant, Unrolled(*TRAINING), optax.sgd(0.1)), steps=3, progress=False)
    assert {warning.category for warning in caught} == {bilevel.StructuralZeroWarning}


@pytest.mark.parametrize("name", FLAT)
def test_the_check_says_that_both_are_zero(name):
    check = check_hypergradient(alone(FLAT[name]), Unrolled(*TRAINING))
    assert check.verdict == "zero" and "central differences are 0 as well" in str(check)
    leaves = {leaf.name: leaf.verdict for leaf in check_hypergradient(through(FLAT[name]), Unrolled(*TRAINING)).leaves}
    assert leaves == {"['seen']": "zero", "['other']": "exact"}


def test_a_comparison_says_that_there_is_nothing_to_compare_with():
    ways = {"unrolled": Unrolled(*TRAINING), "implicit": bilevel.Implicit(*TRAINING)}
    told = str(bilevel.compare(alone(FLAT["clip"]), ways, reference="unrolled", repeats=1))
    assert "The gradient of unrolled is exactly 0 here" in told
