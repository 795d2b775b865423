"""Hypergradients that are zero by construction are told, with the leaf's name, and no others."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import FirstOrder, Levels, StructuralZeroWarning, Unrolled
from tests.bilevel.helpers import KEY

FIRST = {"a": jnp.full(2, 0.3)}


def inner(w, outer, batch, key):
    return jnp.sum((w - outer["a"]) ** 2 * (1.0 + w**2))


def outer_loss(w, outer, batch, key):
    return jnp.sum((w - 1.0) ** 2)


def problem(inner=inner, outer_loss=outer_loss, start=lambda key, outer: jnp.zeros(2)):
    return bilevel.Problem(inner, outer_loss, start, lambda key: FIRST)


def told(hypergradient, case, outer, inner_state=None):
    """Names in the warnings of an estimate."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = hypergradient.estimate(case, inner_state, outer, None, None, KEY)
    assert all(w.category is StructuralZeroWarning for w in caught)
    zeros = [name for name, leaf in (result.grad or {}).items() if leaf is not None and not np.any(leaf)]
    names = [w.message.args[0].split("outer leaf ")[1].split(" is exactly")[0] for w in caught]
    assert all(f"['{name}']" in " ".join(names) for name in zeros)
    return names


USES_VALUE = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(),
    lambda updates, state, params=None, *, value, **extra: (jax.tree.map(lambda g: -0.1 * value * g, updates), state),
)


@pytest.mark.parametrize("mode", ["mixed", "reverse", "forward"])
@pytest.mark.parametrize("checkpoint", ["none", "step", Levels(2)])
@pytest.mark.parametrize("optimizer", [optax.adam(0.1), USES_VALUE], ids=["adam", "uses the value"])
def test_a_leaf_that_nothing_reads_is_named(mode, checkpoint, optimizer):
    checkpoint = "auto" if mode == "forward" else checkpoint
    unused = FIRST | {"idle": jnp.ones(3), "count": jnp.asarray(2), "key": jax.random.key(1)}
    hypergradient = Unrolled(optimizer, 5, mode=mode, checkpoint=checkpoint)
    assert told(hypergradient, problem(), unused) == ["['idle']"]
    assert told(hypergradient, problem(), FIRST) == []


def seen_by(case):
    """A problem, an optimizer and an outer variable `x` that acts in one place only."""
    x = {"x": jnp.asarray(0.2)}
    sgd = optax.sgd(0.1)
    if case == "outer loss":
        return problem(outer_loss=lambda w, outer, b, k: jnp.sum(w) * outer["x"]), sgd, x
    if case == "inner loss":
        return problem(inner=lambda w, outer, b, k: inner(w, outer, b, k) * outer["x"]), sgd, x
    if case == "learning rate":
        return problem(), lambda outer: optax.sgd(outer["x"]), x
    if case == "injected learning rate":
        return problem(), lambda outer: optax.inject_hyperparams(optax.sgd)(learning_rate=outer["x"]), x
    if case == "weight decay":
        start = lambda key, outer: jnp.ones(2)  # noqa: E731
        return problem(start=start), lambda outer: optax.adamw(0.1, weight_decay=outer["x"]), x
    if case == "momentum":
        return problem(), lambda outer: optax.sgd(0.1, momentum=outer["x"]), x
    if case == "start":
        return problem(start=lambda key, outer: jnp.zeros(2) + outer["x"]), sgd, x
    if case == "value alone":
        # A shift of the loss moves nothing, unless the optimizer looks at the loss.
        return problem(inner=lambda w, outer, b, k: inner(w, outer, b, k) + outer["x"]), USES_VALUE, x
    if case == "dropout rate":

        def dropped(w, outer, batch, key):
            keep = jax.random.uniform(key, w.shape) > 0.5
            return inner(jnp.where(keep, w / (1 - outer["x"]), 0.0), outer, batch, key)

        return problem(inner=dropped), sgd, x
    raise AssertionError(case)


CASES = {
    "outer loss": "directly",
    "inner loss": "by the gradient",
    "learning rate": "by the optimizer",
    "injected learning rate": "by the optimizer",
    "weight decay": "by the optimizer",
    "momentum": "by the optimizer",
    "start": "by the start",
    "value alone": "by the optimizer",
    "dropout rate": "by the gradient",
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_an_estimator_cannot_see_is_named(case):
    built, optimizer, extra = seen_by(case)
    for mode in ("mixed", "reverse"):
        assert told(Unrolled(optimizer, 3, mode=mode), built, FIRST | extra) == []
    # What acts otherwise than by the gradient is told apart, since Implicit does not see it either.
    names = {"directly": ["['a']"], "by the gradient": ["['a'], ['x']"]}.get(CASES[case], ["['a']", "['x']"])
    assert told(FirstOrder(optimizer, 3), built, FIRST | extra) == names


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case] != "directly"])
def test_the_estimator_that_is_advised_sees_the_leaf(case):
    built, optimizer, extra = seen_by(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FirstOrder(optimizer, 3).estimate(built, None, FIRST | extra, None, None, KEY)
    (said,) = (str(w.message) for w in caught if "['x']" in str(w.message))
    assert said.endswith("use Unrolled or Implicit." if CASES[case] == "by the gradient" else "use Unrolled.")
    if "Implicit" in said:
        assert bilevel.Implicit(optimizer, 3).estimate(built, None, FIRST | extra, None, None, KEY).grad["x"] != 0


def test_the_remedy_is_in_the_message():
    with pytest.warns(StructuralZeroWarning, match=r"FirstOrder.*\['a'\].*inside training.*use Unrolled or Implicit"):
        FirstOrder(optax.sgd(0.1), 2).estimate(problem(), None, FIRST, None, None, KEY)


def test_a_warm_start_hides_what_acts_on_the_start_alone():
    built, optimizer, extra = seen_by("start")
    hypergradient = Unrolled(optimizer, 3)
    outer = FIRST | extra
    assert told(hypergradient, built, outer, hypergradient.init(built, outer, KEY)) == ["['x']"]


def test_values_decide_nothing():
    # At w = a = 0 every derivative is 0, and nobody is to blame.
    case = problem(outer_loss=lambda w, outer, b, k: jnp.sum(w**2))
    result = Unrolled(optax.sgd(0.1), 3).estimate(case, None, {"a": jnp.zeros(2)}, None, None, KEY)
    np.testing.assert_array_equal(result.grad["a"], 0.0)


@pytest.mark.parametrize("make", [Unrolled, FirstOrder])
def test_losses_without_the_outer_variable_are_an_error(make):
    captured = {"a": jnp.ones(2)}
    case = problem(inner=lambda w, outer, b, k: inner(w, captured, b, k))
    with pytest.raises(ValueError, match=r"Neither loss depends on outer \(\['a'\]\)"):
        make(optax.sgd(0.1), 2).estimate(case, None, FIRST, None, None, KEY)


def test_a_leaf_that_nothing_reads_is_not_said_to_act_inside_training():
    with pytest.warns(StructuralZeroWarning) as caught:
        FirstOrder(optax.sgd(0.1), 2).estimate(problem(), None, FIRST | {"idle": jnp.ones(2)}, None, None, KEY)
    told = {w.message.args[0].split("outer leaf ")[1] for w in caught}
    assert {text.split(" is exactly")[0] for text in told} == {"['a']", "['idle']"}
    assert all("nothing that is trained" in text for text in told if "idle" in text)


def test_an_optimizer_without_a_derivative_is_told_from_a_captured_value():
    with pytest.raises(ValueError, match=r"\['a'\] \(.*the inner optimizer has no derivative by its gradient \(lion"):
        Unrolled(optax.sign_sgd(0.1), 2).estimate(problem(), None, FIRST, None, None, KEY)


def test_an_outer_variable_without_any_number_that_moves():
    case = bilevel.Problem(
        lambda w, outer, b, k: jnp.sum((w - outer) ** 2),
        outer_loss,
        lambda k, o: jnp.zeros(2),
        lambda k: jnp.asarray(3),
    )
    result = Unrolled(optax.sgd(0.1), 2).estimate(case, None, jnp.asarray(3), None, None, KEY)
    assert result.grad is None
    np.testing.assert_allclose(result.inner_state.params, 3 * (1 - 0.8**2), rtol=1e-14)


# Where an influence is lost, it is said.

PLACES = bilevel.Problem(
    lambda w, outer, b, k: jnp.sum((w - outer["rest"]) ** 2),
    outer_loss,
    lambda key, outer: outer["start"],
    lambda key: {"rest": jnp.ones(2), "start": jnp.full(2, 0.1), "idle": jnp.asarray(1.0)},
)
IDLE = "outer leaf ['idle'] is exactly 0 by construction: nothing that is trained or evaluated depends on it"


def messages(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(w.category is StructuralZeroWarning for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("hypergradient", "start", "reason"),
    [
        (Unrolled(optax.sgd(0.1), 3), "warm", "inner_start='cold'"),
        (Unrolled(optax.sgd(0.1), 3, mode="forward"), "warm", "inner_start='cold'"),
        (bilevel.Implicit(optax.sgd(0.1), 3), "warm", "inner_start='cold'"),
        (bilevel.EvolutionStrategies(optax.sgd(0.1), 3, population=2), "warm", "inner_start='cold'"),
        (bilevel.FiniteDifference(optax.sgd(0.1), 3), "warm", "inner_start='cold'"),
        (bilevel.Reversible(0.1, 0.5, 3), "warm", "inner_start='cold'"),
        (Unrolled(optax.sgd(0.1), 3, truncate=2), "cold", "it acts only before the last 2 of 3 inner steps"),
        (bilevel.OneStep(optax.sgd(0.1), 3), "cold", "it acts only before the last 1 of 3 inner steps"),
        (bilevel.Implicit(optax.sgd(0.1), 3), "cold", "does not depend on how it was found"),
    ],
)
def test_an_influence_that_is_lost_is_told_with_the_reason(hypergradient, start, reason):
    outer = PLACES.start_outer(KEY)
    state = hypergradient.init(PLACES, outer, KEY) if start == "warm" else None
    said = messages(lambda: hypergradient.estimate(PLACES, state, outer, None, None, KEY))
    assert len(said) == 2
    assert any(reason in text and "['start']" in text for text in said)
    assert any(IDLE in text for text in said)


def test_a_learned_start_with_a_warm_start_names_the_cure():
    case = bilevel.Problem(outer_loss, outer_loss, lambda key, outer: outer["a"], lambda key: FIRST)
    solver = bilevel.Nested(case, Unrolled(optax.sgd(0.1), 3), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"every outer leaf is exactly 0.*\['a'\].*inner_start='cold'"):
        bilevel.run(solver, steps=2, progress=False)
    cold = bilevel.Nested(case, Unrolled(optax.sgd(0.1), 3), optax.sgd(0.1), inner_start="cold")
    assert bilevel.run(cold, steps=2, progress=False).history["outer_loss"][1] < 2 * 0.7**2 * 0.8**6


@pytest.mark.parametrize("kind", [bilevel.SOBA, bilevel.StocBiO, bilevel.PZOBO])
def test_stochastic_solvers_tell_of_zeros_too(kind):
    solver = kind(PLACES, 0.1, 0.1)
    said = messages(lambda: solver.step(solver.init(KEY), None, None))
    assert any("['start']" in text and "init_inner" in text and "inner_start='cold'" in text for text in said)
    assert any(IDLE in text for text in said)


def test_a_stochastic_solver_of_nothing_is_refused():
    case = problem(inner=lambda w, outer, b, k: jnp.sum(w**2))
    solver = bilevel.SOBA(case, 0.1, 0.1)
    with pytest.raises(ValueError, match=r"Neither loss depends on outer \(\['a'\]\)"):
        solver.step(solver.init(KEY), None, None)


# Where a way into the losses ends in an operation without a slope, the operation is named.

FLAT = {
    "round": (jnp.round, "`round`"),
    "floor": (jnp.floor, "`floor`"),
    "sign": (jnp.sign, "`sign`"),
    "argmax": (lambda o: jnp.argmax(o).astype(float) * jnp.ones(2), "`argmax`"),
    "an integer": (lambda o: o.astype(int).astype(float), "a conversion to int64"),
    "a comparison": (lambda o: jnp.where(o > 0.1, 1.0, 2.0), r"a comparison \(`gt`\)"),
    "stop_gradient": (jax.lax.stop_gradient, "`stop_gradient`"),
    "in a loop": (lambda o: jax.lax.scan(lambda c, x: (c + jnp.round(o), x), jnp.zeros(2), None, 3)[0], "`round`"),
    "in a branch": (lambda o: jax.lax.cond(o[0] > 0.1, lambda: jnp.ones(2), lambda: jnp.zeros(2)), "a comparison"),
}
ESTIMATE = {
    "Unrolled": Unrolled(optax.sgd(0.1), 2),
    "forward": Unrolled(optax.sgd(0.1), 2, mode="forward"),
    "Implicit": bilevel.Implicit(optax.sgd(0.1), 2),
    "FirstOrder": FirstOrder(optax.sgd(0.1), 2),
    "OneStep": bilevel.OneStep(optax.sgd(0.1), 2),
    "FiniteDifference": bilevel.FiniteDifference(optax.sgd(0.1), 2),
    "Reversible": bilevel.Reversible(0.1, 0.5, 2),
}


def flattened(flat, by):
    """What is said of a problem whose outer leaf `f` acts through `flat` alone, beside a leaf `a` that acts freely."""
    both = FIRST | {"f": jnp.full(2, 0.3)}
    case = bilevel.Problem(
        lambda w, o, b, k: jnp.sum((w - o["a"] - flat(o["f"])) ** 2),
        lambda w, o, b, k: jnp.sum((w - 1.0) ** 2) + jnp.sum(o["a"] ** 2),
        lambda k, o: jnp.zeros(2),
        lambda k: both,
    )
    if by in ("SOBA", "MRBO"):
        solver = getattr(bilevel, by)(case, 0.1, 0.1)
        return messages(lambda: solver.step(solver.init(KEY), None, None))
    return messages(lambda: ESTIMATE[by].estimate(case, None, both, None, None, KEY))


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("by", ["Implicit", "SOBA"])
def test_an_operation_without_a_slope_is_named(name, by):
    flat, words = FLAT[name]
    (said,) = flattened(flat, by)
    assert re.search(rf"outer leaf \['f'\] is exactly 0 .*: its way into .* runs through {words}", said)
    assert "EvolutionStrategies" in said and "how it was found" not in said and "nothing that" not in said


@pytest.mark.parametrize("by", sorted({"MRBO", *ESTIMATE} - {"Implicit"}))
def test_every_estimator_names_an_operation_without_a_slope(by):
    told = [said for said in flattened(jnp.round, by) if "['f']" in said]
    assert len(told) == 1 and "runs through `round`" in told[0] and "Unrolled or Implicit" not in told[0]


def test_a_slope_that_is_lost_in_the_gradient_of_the_loss_is_named():
    case = problem(inner=lambda w, o, b, k: jnp.sum(jnp.abs(w - o["f"]) + (w - o["a"]) ** 2))
    said = messages(lambda: ESTIMATE["Implicit"].estimate(case, None, FIRST | {"f": jnp.ones(2)}, None, None, KEY))
    assert len(said) == 1 and "['f']" in said[0] and "runs through a comparison" in said[0]


def test_a_way_with_a_slope_beside_one_without_is_told_as_before():
    case = problem(inner=lambda w, o, b, k: inner(w, o, b, k) * (1.0 + jnp.round(o["x"]) + o["x"]))
    said = messages(lambda: ESTIMATE["FirstOrder"].estimate(case, None, FIRST | {"x": 0.2}, None, None, KEY))
    assert len(said) == 1 and "['a'], ['x']" in said[0] and "use Unrolled or Implicit" in said[0]


@pytest.mark.parametrize("by", ["Unrolled", "Implicit", "SOBA"])
def test_where_nothing_else_acts_it_is_an_error_that_names_it(by):
    outer = jnp.full(2, 0.3)
    case = bilevel.Problem(
        lambda w, o, b, k: jnp.sum((w - jnp.round(o)) ** 2), outer_loss, lambda k, o: jnp.zeros(2), lambda k: outer
    )
    solver = bilevel.SOBA(case, 0.1, 0.1)
    with pytest.raises(ValueError, match=r"every outer leaf is exactly 0 by construction: outer \(.* through `round`"):
        if by == "SOBA":
            solver.step(solver.init(KEY), None, None)
        else:
            ESTIMATE[by].estimate(case, None, outer, None, None, KEY)
