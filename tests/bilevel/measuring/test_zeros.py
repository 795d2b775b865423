"""A hypergradient that is 0 for the values that there are is told: by a run, by the check, and by a comparison."""

import dataclasses
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


def leafwise(inner, outer, start):
    return bilevel.Problem(
        lambda w, o, b, k: inner(w, o), lambda w, o, b, k: outer(w, o),
        lambda key, o: jnp.zeros(2), lambda key: {name: jnp.asarray(value) for name, value in start.items()},
    )  # fmt: skip


def test_a_leaf_that_is_zero_by_construction_hides_no_other():
    idle = leafwise(
        lambda w, o: jnp.sum((w - 1) ** 2) + jnp.maximum(o["b"], 0.0) * jnp.sum(w**2),
        lambda w, o: jnp.sum((w - 2) ** 2),
        {"a": 0.0, "b": -1.0},
    )
    unseen = leafwise(
        lambda w, o: jnp.sum((w - 1) ** 2) + jnp.exp(o["a"]) * jnp.sum(w**2),
        lambda w, o: jnp.sum((w - 2) ** 2) + jnp.maximum(o["b"], 0.0),
        {"a": 0.0, "b": -1.0},
    )
    for solver in (
        Nested(idle, Unrolled(*TRAINING), optax.sgd(0.1)),
        Nested(unseen, FirstOrder(*TRAINING), optax.sgd(0.1)),
        bilevel.SOBA(idle, inner_step=0.1, outer_step=0.1),
    ):
        with pytest.warns(UserWarning) as caught:
            bilevel.run(solver, steps=3, progress=False)
        structural, zero = caught  # each is told of once
        assert structural.message.leaves == ("['a']",)
        assert zero.category is bilevel.ZeroHypergradientWarning
        assert "of outer leaf ['b'] was exactly 0 in all 3 outer steps" in str(zero.message)


STOCHASTIC = {
    **{name: {} for name in ("SOBA", "MASOBA", "TTSA", "StocBiO", "FSLA", "AmIGO", "BSA", "SUSTAIN", "MRBO", "PZOBO")},
    "F2SA": {"penalty": 10.0},
}


def stochastic(name, problem):
    cls = getattr(bilevel, name)
    wanted = {field.name for field in dataclasses.fields(cls)}
    settings = {"inner_step": 0.1, "outer_step": 0.01, "outer_momentum": 0.1, **STOCHASTIC[name]}
    return cls(problem, **{key: value for key, value in settings.items() if key in wanted})


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_solver_that_stands_still_says_so(name):
    relu, seen = (
        bilevel.Problem(
            lambda w, o, b, k, f=f: jnp.sum((w - 1) ** 2) + f(o) * jnp.sum(w**2),
            lambda w, o, b, k: jnp.sum((w - 2) ** 2),
            lambda key, o: jnp.zeros(2),
            lambda key: jnp.asarray(-1.0),
        )
        for f in (lambda o: jnp.maximum(o, 0.0), jnp.exp)
    )
    with pytest.warns(bilevel.ZeroHypergradientWarning, match=r"direction was exactly 0 in all 5.*a relu") as caught:
        result = bilevel.run(stochastic(name, relu), steps=5, progress=False)
    assert len(caught) == 1 and result.outer == -1.0
    # A first step with an adjoint of 0 moves nothing, and neither does a step size of 0: that is no zero slope.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bilevel.run(stochastic(name, seen), steps=1, progress=False)
        bilevel.run(dataclasses.replace(stochastic(name, seen), outer_step=0.0), steps=2, progress=False)


def test_what_weight_decay_moves_is_not_said_to_stand_still_and_underflow_is_a_cause():
    solver = Nested(alone(FLAT["relu"]), Unrolled(*TRAINING), optax.adamw(0.1, weight_decay=0.5))
    with pytest.warns(bilevel.ZeroHypergradientWarning) as caught:
        result = bilevel.run(solver, steps=3, progress=False)
    assert jnp.all(result.outer != 0.1) and "not moved outer" not in str(caught[0].message)
    assert "something else, such as a weight decay" in str(caught[0].message)
    tiny = bilevel.Problem(
        lambda w, o, b, k: jnp.sum((w - 1) ** 2) + jnp.exp(o) * jnp.sum(w**2),
        lambda w, o, b, k: 1e-38 * jnp.sum((w - 2) ** 2),
        lambda key, o: jnp.zeros(2, jnp.float32),
        lambda key: jnp.zeros((), jnp.float32),
    )
    with pytest.warns(bilevel.ZeroHypergradientWarning, match="a slope too small for float32 was rounded to 0"):
        bilevel.run(Nested(tiny, Unrolled(*TRAINING), optax.sgd(0.1)), steps=2, progress=False)
