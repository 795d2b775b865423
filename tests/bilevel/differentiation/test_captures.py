"""A value that a function reads from outside is the one that it has now, in whatever way it is read."""

import array
import dataclasses
import functools
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.differentiation import captures
from bilevel.differentiation.captures import forget_outdated, look_again
from bilevel.testing import check_hypergradient
from tests.bilevel.helpers import KEY

VALUE: Any = 1.0
TABLE: dict[str, Any] = {"deep": [0, {"value": 1.0}]}
HELPERS: Any = types.ModuleType("helpers_of_a_user")
HELPERS.VALUE = 1.0
sys.modules["helpers_of_a_user"] = HELPERS


def body(carry, _):
    return carry * VALUE, None


def in_a_scan():
    return jax.lax.scan(body, jnp.ones(()), None, length=1)[0]


@jax.jit
def compiled(x):
    return x * VALUE


def imported_inside():
    import helpers_of_a_user  # pyright: ignore[reportMissingImports]

    return helpers_of_a_user.VALUE


def default(value=1.0):
    return value


class Model:
    scale = 1.0

    def __init__(self):
        self.value = 1.0
        self.array = np.ones(3)

    def __call__(self):
        return self.value

    def of_the_class(self):
        return self.scale

    def of_the_array(self):
        return jnp.asarray(self.array)[1]


@dataclasses.dataclass(eq=False)
class Settings:
    value: float = 1.0

    def __call__(self):
        return self.value


def closing():
    value = 1.0

    def read():
        return value

    def write(new):
        nonlocal value
        value = new

    return read, write


def written(name):
    return lambda value: globals().update({name: value})


MODEL, SETTINGS, (CLOSED, WRITE) = Model(), Settings(), closing()
WAYS: dict[str, Any] = {
    "a global name": (lambda: VALUE, written("VALUE")),
    "a global name of a function called": (functools.partial(lambda f: f() * 1.0, lambda: VALUE), written("VALUE")),
    "the body of a scan": (in_a_scan, written("VALUE")),
    "a compiled function": (lambda: compiled(1.0), written("VALUE")),
    "a checkpointed function": (lambda: jax.checkpoint(compiled)(1.0), written("VALUE")),
    "an entry of an entry": (lambda: TABLE["deep"][1]["value"], lambda x: TABLE["deep"][1].update(value=x)),
    "an attribute of a module": (lambda: HELPERS.VALUE, lambda x: setattr(HELPERS, "VALUE", x)),
    "a module imported inside": (imported_inside, lambda x: setattr(HELPERS, "VALUE", x)),
    "what it closed over": (CLOSED, WRITE),
    "a default": (default, lambda x: setattr(default, "__defaults__", (x,))),
    "an attribute of an object": (lambda: MODEL.value, lambda x: setattr(MODEL, "value", x)),
    "an object that is called": (MODEL, lambda x: setattr(MODEL, "value", x)),
    "a dataclass that is called": (SETTINGS, lambda x: setattr(SETTINGS, "value", x)),
    "an attribute of a class": (MODEL.of_the_class, lambda x: setattr(Model, "scale", x)),
    "an array written in place": (MODEL.of_the_array, lambda x: MODEL.array.__setitem__(1, x)),
    "a number of NumPy": (lambda: VALUE, lambda x: written("VALUE")(np.float64(x))),
    "an array of JAX": (lambda: VALUE, lambda x: written("VALUE")(jnp.asarray(x))),
}


def problem_of(read):
    def inner_loss(w, o, b, k):
        return jnp.sum((w - read() * o) ** 2)

    return bilevel.Problem(inner_loss, lambda w, o, b, k: jnp.sum((w - 1.0) ** 2), lambda k, o: 0.0, lambda k: 3.0)


SGD = optax.sgd(0.1)
UNROLLED = bilevel.Unrolled(optax.sgd(0.25), 2)


def gradient(value):
    """Of ((1 - .5^2) value o - 1)^2 by o, at o = 3."""
    return 2 * 0.75 * value * (0.75 * value * 3.0 - 1)


@pytest.mark.parametrize("way", WAYS)
def test_training_computes_with_the_value_that_is_there(way):
    read, write = WAYS[way]
    problem = problem_of(read)
    try:
        for value in (1.0, 2.0):
            write(value)
            trained = bilevel.fit(problem, 3.0, optimizer=SGD, steps=3, progress=False)
            np.testing.assert_allclose(trained.inner.params, 3 * value * (1 - 0.8**3), rtol=1e-12)
    finally:
        write(1.0)


@pytest.mark.parametrize("way", ["a global name", "the body of a scan", "a compiled function"])
def test_an_estimate_and_what_measures_it_compute_with_the_value_that_is_there(way):
    read, write = WAYS[way]
    problem = problem_of(read)
    try:
        for value in (1.0, 2.0):
            write(value)
            estimate = UNROLLED.estimate(problem, None, jnp.asarray(3.0), None, None, KEY)
            np.testing.assert_allclose(estimate.grad, gradient(value), rtol=1e-12)
            function = bilevel.value_and_hypergrad(problem, UNROLLED)
            np.testing.assert_allclose(function(jnp.asarray(3.0), None, None, None, KEY)[1], gradient(value))
            assert check_hypergradient(problem, UNROLLED).verdict == "exact"
    finally:
        write(1.0)


def rate(step):
    return VALUE * 0.25


MEASURES = {
    "variance": lambda problem, estimator: (
        bilevel.variance(problem, estimator, inner_data=bilevel.Batches(jnp.zeros((2, 1)), 1), samples=2).mean
    ),
    "compare": lambda problem, estimator: bilevel.compare(problem, {"a": estimator}, reference="a").rows[0].grad,
}


@pytest.mark.parametrize("measure", MEASURES)
def test_measuring_alone_looks_at_the_value_that_is_there(measure):
    problem, estimator = problem_of(lambda: 1.0), bilevel.Unrolled(optax.sgd(rate), 2)
    try:
        for value in (1.0, 2.0):
            written("VALUE")(value)
            seen = 1 - (1 - 0.5 * value) ** 2
            found = MEASURES[measure](problem, estimator)
            np.testing.assert_allclose(found, 2 * seen * (3 * seen - 1), rtol=1e-12)
    finally:
        written("VALUE")(1.0)


def after_a_step(rate=0.25, outer_rate=0.1, start=0.0, outer=3.0, project=1.0):
    """`outer` after a step of descent on (w_2 - 1)^2, w_2 being that of two steps of descent on (w - outer)^2."""
    left = (1 - 2 * rate) ** 2
    grad = 2 * (1 - left) * ((1 - left) * outer + left * start - 1)
    return project * (outer - outer_rate * grad)


PLAIN = problem_of(lambda: 1.0)
cold = functools.partial(bilevel.Nested, inner_start="cold")
READERS = {
    "rate": cold(PLAIN, bilevel.Unrolled(optax.sgd(rate), 2), SGD),
    "rate, of outer": cold(PLAIN, bilevel.Unrolled(lambda o: optax.sgd(0.25 * VALUE), 2), SGD),
    "outer_rate": cold(PLAIN, UNROLLED, optax.sgd(rate)),
    "start": cold(dataclasses.replace(PLAIN, init_inner=lambda k, o: 0.25 * VALUE), UNROLLED, SGD),
    "outer": cold(dataclasses.replace(PLAIN, init_outer=lambda k: 0.25 * VALUE), UNROLLED, SGD),
    "project": cold(dataclasses.replace(PLAIN, project=lambda o: 0.25 * VALUE * o), UNROLLED, SGD),
}


@pytest.mark.parametrize("name", READERS)
def test_schedules_starts_and_projections_are_looked_at_too(name):
    read = lambda state: {"twice": state.outer * VALUE}  # noqa: E731
    try:
        for value in (1.0, 2.0):
            written("VALUE")(value)
            found = bilevel.run(READERS[name], steps=1, progress=False, record=read)
            right = after_a_step(**{name.partition(",")[0]: 0.25 * value})
            np.testing.assert_allclose(found.outer, right, rtol=1e-12)
            np.testing.assert_allclose(found.history["twice"], [right * value], rtol=1e-12)
    finally:
        written("VALUE")(1.0)


def test_step_sizes_of_stochastic_solvers_are_looked_at_too():
    try:
        for value in (1.0, 2.0):
            written("VALUE")(value)
            found = bilevel.run(bilevel.SOBA(PLAIN, rate, 0.1), steps=1, progress=False).inner
            np.testing.assert_allclose(jax.tree.leaves(found)[0], 2 * 3.0 * 0.25 * value, rtol=1e-12)
    finally:
        written("VALUE")(1.0)


def test_what_did_not_change_is_not_traced_again():
    traced = []

    def read():
        traced.append(1)  # which is a change of what it reads, by itself
        return TABLE["deep"][1]["value"]

    problem = problem_of(read)
    train = lambda: bilevel.fit(problem, 3.0, optimizer=SGD, steps=1, progress=False)  # noqa: E731
    train()
    count = len(traced)
    train()
    TABLE["deep"][1]["value"] = 1.0
    train()
    assert len(traced) == count


@pytest.mark.parametrize("entry", [0, 1, 777, 999])
def test_every_entry_of_a_large_array_is_looked_at(monkeypatch, entry):
    monkeypatch.setattr(captures, "BYTES", 64)
    numbers = np.random.default_rng(0).normal(size=1000)
    problem = problem_of(lambda: jnp.asarray(numbers)[1])
    before = forget_outdated(problem)
    assert before.whole and forget_outdated(problem) == before
    numbers[entry] += 1e-15
    assert forget_outdated(problem).number != before.number
    numbers[entry] -= 1e-15
    numbers[:] = numbers[::-1].copy()
    assert forget_outdated(problem).number != before.number


def test_what_is_not_known_to_be_looked_at_is_found_in_the_trace(monkeypatch):
    """An object that shows nothing of what it holds: the loss is traced anew at each run, and compared."""
    hidden = array.array("d", [1.0])
    problem = problem_of(lambda: hidden[0])
    assert not forget_outdated(problem).whole
    bilevel.fit(problem, 3.0, optimizer=SGD, steps=1, progress=False)
    hidden[0] = 2.0
    with pytest.raises(ValueError, match="inner_loss has changed since JAX traced it in this process"):
        bilevel.fit(problem, 3.0, optimizer=SGD, steps=1, progress=False)
    monkeypatch.setattr(captures, "VALUES", 10)
    assert not forget_outdated(problem_of(lambda: 1.0)).whole


def test_nothing_is_done_inside_a_trace():
    problem, seen = problem_of(lambda: VALUE), []
    jax.jit(lambda outer: seen.append(forget_outdated(problem, outer)) or outer)(jnp.ones(()))
    assert seen == [captures.Reads(0, False)]


def test_objects_that_are_gone_are_forgotten():
    before = len(captures._KNOWN)
    look_again(problem_of(lambda: Model()))
    for _ in range(3):
        look_again(problem_of(lambda: VALUE))
    assert len(captures._KNOWN) <= before + 20
