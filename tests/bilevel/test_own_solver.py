"""Solvers and linear solvers of one's own that do not keep their contract: each is told what is missing."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel
from bilevel.extend import child, register, setting
from bilevel.testing import check_hypergradient
from tests.bilevel.helpers import KEY, LINE


def linear(solve, **attributes):
    """An `Implicit` with a linear solver of this method."""
    cls = type("Mine", (), {"symmetric_only": False, "solve": solve, **attributes})
    return bilevel.Implicit(optax.sgd(0.5), 3, linear_solver=register(dataclasses.dataclass(frozen=True)(cls))())


COUNTS = {"iterations": 1, "matvecs": 1}
BAD_RESULTS = {
    "x alone": (lambda rhs: rhs, r"returned no pair, but float64\[2\]: it must return a pair: x, a tree like rhs"),
    "three": (lambda rhs: (rhs, 1, 2), "returned a tuple of 3"),
    "no counts": (lambda rhs: (rhs, {}), "iterations is missing"),
    "a count missing": (lambda rhs: (rhs, {"iterations": 1}), "matvecs is missing"),
    "a float": (lambda rhs: (rhs, COUNTS | {"matvecs": 0.5}), "matvecs is no integer"),
    "counts of None": (lambda rhs: (rhs, None), "iterations is missing"),
    "a shape": (lambda rhs: (rhs[:1], COUNTS), r"returned an x that is float64\[1\], where rhs is float64\[2\]"),
    "a dtype": (lambda rhs: (rhs.astype(jnp.float32), COUNTS), r"returned an x that is float32\[2\]"),
    "a tree": (lambda rhs: ({"x": rhs}, COUNTS), r"returned an x that is \['x'\] float64\[2\]"),
}


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_what_a_linear_solver_returns_is_understood_or_refused(name):
    result, words = BAD_RESULTS[name]
    estimator = linear(lambda self, matvec, rhs, start, key, *, symmetric: result(rhs))
    with pytest.raises(ValueError, match=rf"^Mine.solve:? {words}"):
        estimator.estimate(LINE, None, jnp.full(2, 0.3), None, None, KEY)


def test_python_numbers_of_a_linear_solver_go_through_a_run():
    half = lambda self, matvec, rhs, start, key, *, symmetric: (0.5 * rhs, COUNTS)  # noqa: E731  (the Hessian is 2)
    estimator = linear(half)
    found = bilevel.run(bilevel.Nested(LINE, estimator, optax.sgd(0.1)), steps=2, progress=False).history["hvps"]
    assert found.tolist() == [3, 3]
    # The other way in, through `solve`.
    grad = jax.grad(lambda o: jnp.sum(estimator.solve(LINE, None, o, None, KEY).params))(jnp.full(2, 0.3))
    assert jnp.allclose(grad, 1.0)
    with pytest.raises(ValueError, match=r"^Mine.solve: iterations is missing"):
        bad = linear(lambda self, matvec, rhs, start, key, *, symmetric: (0.5 * rhs, {}))
        jax.grad(lambda o: jnp.sum(bad.solve(LINE, None, o, None, KEY).params))(jnp.full(2, 0.3))


def test_what_is_missing_of_a_linear_solver_is_named():
    cls = type("Mine", (), {"solve": lambda self: None})
    with pytest.raises(ValueError, match=r"must be a linear solver, such as bilevel.CG\(\), but has no symmetric_only"):
        bilevel.Implicit(optax.sgd(0.1), 3, linear_solver=cls())
    cls.symmetric_only = False
    with pytest.raises(ValueError, match=r"holds a Mine, which is neither an array nor a pytree.*register above it"):
        bilevel.Implicit(optax.sgd(0.1), 3, linear_solver=cls())


class State(NamedTuple):
    outer: Any
    inner: Any
    step: Any
    key: Any


@register
@dataclasses.dataclass(frozen=True)
class Descent:
    """A solver by the Protocol alone, each step of which is changed by `change(state, metrics)`."""

    change: Any = dataclasses.field(metadata=setting())
    begin: Any = dataclasses.field(default=lambda state: state, metadata=setting())
    problem: Any = dataclasses.field(default=LINE, metadata=child(lambda value: value))
    inner_batches_per_step: ClassVar[int] = 3
    outer_batches_per_step: ClassVar[int] = 1

    def init(self, key):
        return self.begin(State(self.problem.start_outer(key), jnp.zeros(2), jnp.zeros((), jnp.int32), key))

    def step(self, state, inner_batches, outer_batch):
        estimator = bilevel.Unrolled(optax.sgd(0.1), 3)
        found = estimator.estimate(self.problem, None, state.outer, inner_batches, outer_batch, state.key)
        new = State(state.outer - 0.1 * found.grad, found.inner_state.params, state.step + 1, state.key)
        return self.change(new, {"outer_loss": found.value, "count": 1})


def test_a_solver_by_the_protocol_alone_runs():
    found = bilevel.run(Descent(lambda *pair: pair), steps=3, progress=False)
    by = bilevel.Nested(LINE, bilevel.Unrolled(optax.sgd(0.1), 3), optax.sgd(0.1), inner_start="cold")
    assert jnp.allclose(found.outer, bilevel.run(by, steps=3, progress=False).outer, rtol=1e-12)
    assert found.history["count"].tolist() == [1, 1, 1]  # a Python number among the metrics


BAD_STEPS = {
    "no pair": (lambda state, metrics: state, "returned no pair \\(state, metrics\\)"),
    "no dict": (lambda state, metrics: (state, 1.0), "returned no pair \\(state, metrics\\)"),
    "a shape": (lambda s, m: (s._replace(outer=s.outer[None]), m), r"\.outer is float64\[1, 2\], and was float64\[2\]"),
    "a dtype": (lambda s, m: (s._replace(inner=s.inner.astype(jnp.float32)), m), r"\.inner is float32\[2\], and was"),
    "less": (lambda s, m: (s._replace(inner=None), m), r"\.inner is not there, and was float64\[2\]"),
    "another tree": (lambda s, m: (tuple(s), m), "returned a state of another kind"),
    "a text": (lambda s, m: (s, m | {"note": "hello"}), "metric 'note' is a str"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_what_a_step_returns_is_understood_or_refused(name):
    change, words = BAD_STEPS[name]
    with pytest.raises(ValueError, match=rf"^Descent.step:? {words}|^Descent.step returned a state of.*{words}"):
        bilevel.run(Descent(change), steps=2, progress=False)


def test_a_step_that_is_not_counted_is_refused():
    with pytest.raises(ValueError, match=r"Descent.step: state.step was 0, and is 0 after 1 steps: a step must add 1"):
        bilevel.run(Descent(lambda s, m: (s._replace(step=s.step - 1), m)), steps=2, progress=False)


def test_what_is_missing_of_a_solver_or_of_its_state_is_named():
    with pytest.raises(ValueError, match=r"Descent.init returned a dict without outer, inner, step, key: the state"):
        bilevel.run(Descent(None, lambda state: state._asdict()), steps=1, progress=False)
    cls = type("Mine", (), {"problem": LINE, "init": None, "step": None})
    with pytest.raises(ValueError, match=r"has no inner_batches_per_step, outer_batches_per_step\."):
        bilevel.run(cls(), steps=1, progress=False)
    with pytest.raises(ValueError, match="holds a Mine, which is neither an array nor a pytree"):
        cls.inner_batches_per_step = cls.outer_batches_per_step = 1
        bilevel.run(cls(), steps=1, progress=False)


@pytest.mark.parametrize("kind", [int, bool, str, "int", "bool | None", "int | None"])
def test_a_field_that_says_not_what_it_is_is_refused_at_once(kind):
    cls = type("Mine", (), {"__annotations__": {"terms": kind}})
    with pytest.raises(TypeError, match=r"^Mine.terms: a field of .* must say what it is inside a compiled function"):
        register(dataclasses.dataclass(frozen=True)(cls))
    with pytest.raises(TypeError, match="Mine is no dataclass"):
        register(type("Mine", (), {}))


def counting():
    """A loss that is another function at each call."""
    calls = []

    def loss(w, outer, batch, key):
        calls.append(1)
        return jnp.sum((w - outer) ** 2) * len(calls)

    return dataclasses.replace(LINE, inner_loss=loss)


def test_who_measures_refuses_losses_that_change():
    estimator, data = bilevel.Unrolled(optax.sgd(0.01), 3), bilevel.Batches(jnp.ones((4, 1)), 2)
    for measure in (
        lambda: check_hypergradient(counting(), estimator),
        lambda: bilevel.variance(counting(), estimator, inner_data=data, samples=2),
        lambda: bilevel.compare(counting(), {"a": estimator}, reference="a"),
    ):
        with pytest.raises(ValueError, match="inner_loss is another function at each call"):
            measure()


def test_tasks_are_compared():
    """Each column for tasks is that of one task, times the tasks."""
    points = jax.random.normal(jax.random.key(1), (4, 2, 5, 2))
    tasks = points[:, 0], points[:, 1]
    problem = bilevel.Problem(
        lambda w, o, batch, key: jnp.mean(jnp.sum((w[None] - batch) ** 2, axis=1)) + o * jnp.sum(w**2),
        lambda w, o, batch, key: jnp.mean(jnp.sum((w[None] - batch) ** 2, axis=1)),
        lambda key, o: jnp.zeros(2),
        lambda key: jnp.asarray(0.1),
    )
    estimators = {
        "unrolled": bilevel.Unrolled(optax.sgd(0.1), 40),
        "implicit": bilevel.Implicit(optax.sgd(0.1), 40, linear_solver=bilevel.CG(max_steps=3)),
    }
    each = {name: bilevel.PerTask(estimator) for name, estimator in estimators.items()}
    found = bilevel.compare(problem, each, reference="unrolled", inner_data=bilevel.Batches(tasks, 3), repeats=1)
    data = {"inner_data": bilevel.FullBatch(tasks[0][0]), "outer_data": tasks[1][0]}
    alone = bilevel.compare(problem, estimators, reference="unrolled", repeats=1, **data)
    assert found["implicit"].relative_error < 1e-3
    assert found["unrolled"].hvps == 3 * alone["unrolled"].hvps == 120
    for name in estimators:
        assert 2.9 < found[name].gradients / alone[name].gradients < 3.2
