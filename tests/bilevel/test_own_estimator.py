"""An estimator of one's own that does not keep the contract: what it is told, and that `check_estimator` finds it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import bijectors
from bilevel.extend import Answer, Trained, combine, register, split_inner
from bilevel.testing import DUTIES, check_estimator
from tests.bilevel.estimators import ROWS
from tests.bilevel.helpers import KEY

OUTER = {"a": jnp.full(3, 0.3), "rate": jnp.asarray(0.1)}
PROBLEM = bilevel.Problem(
    lambda w, o, batch, key: 0.5 * jnp.sum(jnp.array([0.3, 0.7, 1.0]) * w**2) - jnp.sum(w * o["a"]) * (1 + o["rate"]),
    lambda w, o, batch, key: 0.5 * jnp.sum((w - 1.0) ** 2) + 0.1 * jnp.sum(o["a"] ** 2),
    lambda key, o: jnp.zeros(3),
    lambda key: OUTER,
)


def own(differentiate, **attributes):
    """An estimator with this method."""
    cls = type("Mine", (Trained,), {"differentiate": differentiate, **attributes})
    return register(dataclasses.dataclass(frozen=True)(cls))


def through(query, estimator, loss=None):
    """Reverse mode through all of training: what is right."""

    def objective(moving):
        moved = dataclasses.replace(query, outer=query.at(moving))
        state, trace = estimator.trajectory(moved)
        value, aux = (loss or query.outer_loss)(state.params, query.at(moving))
        return value, (state, trace, aux)

    (value, (state, trace, aux)), grad = jax.value_and_grad(objective, has_aux=True)(query.moving)
    return Answer(value, grad, state, trace, aux)


def right(self, query):
    return through(query, self)


def changed(change):
    """The right answer, changed."""
    return own(lambda self, query: change(through(query, self)))


def beside(self, query):
    """The outer loss, not by the query."""
    loss = lambda params, outer: query.problem.outer_value(params, outer, query.outer_batch, query.keys.outer)  # noqa: E731
    return through(query, self, loss)


def undifferentiated(self, query):
    answer = beside(self, query)
    return answer._replace(value=query.outer_loss(answer.state.params, query.outer)[0])


def ask(cls, problem=PROBLEM, outer=OUTER, optimizer=None):
    return cls(optimizer or optax.sgd(0.5), 4).estimate(problem, None, outer, None, None, KEY)


def test_the_right_one_is_right():
    found = ask(own(right)).grad
    wanted = bilevel.Unrolled(optax.sgd(0.5), 4).estimate(PROBLEM, None, OUTER, None, None, KEY).grad
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, wanted)


BAD_ANSWERS = {
    "a tuple": (lambda a: tuple(a), r"differentiate returned a tuple of 6, but must return an Answer\(value, grad"),
    "a vector of value": (lambda a: a._replace(value=a.value[None]), r"value is float64\[1\], but must be the outer"),
    "no value": (lambda a: a._replace(value=None), "value is None, but must be the outer loss"),
    "a subtree of grad": (lambda a: a._replace(grad=a.grad["a"]), r"grad has no array at leaf \['a'\]"),
    "None in grad": (lambda a: a._replace(grad=a.grad | {"rate": None}), r"grad has no array at leaf \['rate'\]"),
    "more in grad": (lambda a: a._replace(grad=a.grad | {"b": a.value}), r"grad has a leaf \['b'\]"),
    "a shape in grad": (
        lambda a: a._replace(grad=a.grad | {"a": a.grad["a"][None]}),
        r"grad is float64\[1, 3\] at leaf \['a'\], where float64\[3\] is expected",
    ),
    "a dtype in grad": (
        lambda a: a._replace(grad=a.grad | {"a": a.grad["a"].astype(jnp.float32)}),
        r"grad is float32\[3\] at leaf \['a'\]",
    ),
    "another tree": (lambda a: a._replace(grad=list(a.grad.values())), "grad has no array at leaf"),
    "no state": (lambda a: a._replace(state=a.state.params), r"state is float64\[3\], but must be an InnerState"),
    "other params": (
        lambda a: a._replace(state=a.state._replace(params=a.state.params[:2])),
        r"state.params is float64\[2\] at leaf outermost, where float64\[3\]",
    ),
    "no trace": (lambda a: a._replace(trace=None), "trace is None, but must be a Trace whose value holds the 4 inner"),
    "a short trace": (
        lambda a: a._replace(trace=jax.tree.map(lambda x: x[:2], a.trace)),
        r"trace is Trace\(value=float64\[2\]\), but must be a Trace",
    ),
    "a text in info": (lambda a: a._replace(info={"note": "hello"}), r"info\['note'\] holds 'hello'"),
    "a list of info": (lambda a: a._replace(info=[1]), "info is a list, but must be a dict"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_an_answer_that_is_not_one_is_refused_in_a_sentence(name):
    change, words = BAD_ANSWERS[name]
    with pytest.raises(ValueError, match=rf"^Mine: {words}"):
        ask(changed(change))


def test_numbers_of_info_become_arrays_that_run_can_carry():
    cls = changed(lambda a: a._replace(info={"hvps": 50, "share": 0.5, "many": np.arange(2)}))
    info = ask(cls).aux.info
    assert all(isinstance(info[name], jax.Array) for name in ("hvps", "share", "many")) and info["hvps"] == 50
    solver = bilevel.Nested(PROBLEM, cls(optax.sgd(0.5), 4), optax.sgd(0.1))
    assert bilevel.run(solver, steps=2, progress=False).history["hvps"].tolist() == [50, 50]


def test_every_leaf_of_an_estimate_is_an_array():
    rate = lambda outer: optax.sgd(outer["rate"])  # noqa: E731
    problem = dataclasses.replace(PROBLEM, inner_loss=lambda w, o, batch, key: jnp.sum((w - 1.0) ** 2))
    with pytest.warns(bilevel.StructuralZeroWarning, match=r"\['rate'\].*where this estimator does not look; use Unr"):
        grad = bilevel.FirstOrder(rate, 4).estimate(problem, None, OUTER, None, None, KEY).grad
    assert isinstance(grad["rate"], jax.Array) and grad["rate"].at[()].set(1.0) == 1.0


def test_the_outer_loss_is_that_of_the_query():
    with pytest.raises(ValueError, match=r"^Mine: differentiate never called query.outer_loss\(params, outer\)"):
        ask(own(beside))
    with pytest.raises(ValueError, match=r"^Mine: differentiate called query.outer_loss, but never differentiated it"):
        ask(own(undifferentiated))
    # Differentiated by what it does not read: that is a zero by construction, and no fault.
    unread = dataclasses.replace(PROBLEM, outer_loss=lambda w, o, batch, key: jnp.sum(w**2))
    with pytest.warns(bilevel.StructuralZeroWarning, match="use Unrolled or Implicit"):
        assert not ask(bilevel.FirstOrder, unread).grad["a"].any()


def test_what_leaves_a_term_out_is_not_told_of_an_optimizer():
    def direct(self, query):
        state, trace = self.trajectory(query)
        loss = lambda moving: query.outer_loss(state.params, query.at(moving))  # noqa: E731
        (value, aux), grad = jax.value_and_grad(loss, has_aux=True)(query.moving)
        return Answer(value, grad, state, trace, aux)

    with pytest.warns(bilevel.StructuralZeroWarning, match=r"\['rate'\].*this estimator leaves that out") as caught:
        ask(own(direct, takes_frozen=True))
    assert not any("lion" in str(w.message) for w in caught)


def newton(self, query):
    """The implicit form by a dense solve over all of the inner variable, forward over reverse."""
    state, trace = self.trajectory(query)
    params, rest = split_inner(query.problem, state.params)
    slope = lambda p, m: jax.grad(lambda p: query.inner_loss(combine(p, rest), query.at(m), self.steps - 1))(p)  # noqa: E731
    return solved(query, params, lambda p: combine(p, rest), slope, state, trace, symmetric=True)


def newton_of_what_moves(self, query):
    """The same over what moves, on the mean over the batches."""
    state, trace = self.trajectory(query)
    params, whole = self.trainable(query, state)
    slope = lambda p, m: jax.grad(lambda p: query.mean_inner_loss(whole(p), query.at(m)))(p)  # noqa: E731
    return solved(query, params, whole, slope, state, trace)


def solved(query, params, whole, slope, state, trace, symmetric=False):
    value, pull, aux = jax.vjp(lambda p, m: query.outer_loss(whole(p), query.at(m)), params, query.moving, has_aux=True)
    rhs, direct = pull(jnp.ones_like(value))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    row = lambda e: jax.jvp(lambda p: slope(p, query.moving), (params,), (unravel(e),))[1]  # noqa: E731
    matrix = jax.vmap(lambda e: jax.flatten_util.ravel_pytree(row(e))[0])(jnp.eye(flat.size))
    adjoint = jnp.linalg.lstsq(matrix.T if symmetric else matrix, jax.flatten_util.ravel_pytree(rhs)[0])[0]
    (mixed,) = jax.vjp(lambda m: slope(params, m), query.moving)[1](unravel(adjoint))
    return Answer(value, jax.tree.map(jnp.subtract, direct, mixed), state, trace, aux)


BLIND = {"blind": "it does not act through the inner gradient at the trained point; use Unrolled"}
OWN = {"meet_custom_rule": lambda self, name: None}


def test_frozen_parts_and_own_rules_are_refused_unless_they_are_heeded():
    assert not check_estimator(own(newton, **BLIND)).unmet  # refuses both
    assert not check_estimator(own(newton_of_what_moves, **BLIND), duties=("frozen", "batches")).unmet  # is right
    found = check_estimator(own(newton, **BLIND, **OWN, takes_frozen=True), duties=("own rules", "frozen"))
    assert len(found.unmet) == 3 and "self.trainable" in found.unmet[1]
    freezing = optax.partition({"on": optax.sgd(0.1), "off": optax.set_to_zero()}, {"x": "on", "y": "off"})
    two = bilevel.Problem(
        lambda w, o, batch, key: jnp.sum((w["x"] * w["y"] - o["a"]) ** 2),
        lambda w, o, batch, key: jnp.sum(w["x"] ** 2),
        lambda key, o: {"x": jnp.ones(3), "y": jnp.ones(3)},
        lambda key: OUTER,
    )
    with pytest.raises(ValueError, match=r"^Mine: the optimizer never moves inner leaf \['y'\].*self.trainable"):
        ask(own(newton, **BLIND), two, {"a": OUTER["a"]}, freezing)


def test_the_mean_of_the_query_is_that_of_implicit():
    rows = jax.random.normal(jax.random.key(1), (4, 2, 3))
    problem = dataclasses.replace(
        PROBLEM,
        inner_loss=lambda w, o, batch, key: 0.5 * jnp.mean(jnp.sum((w[None] - batch) ** 2 * jnp.exp(batch), axis=1))
        - jnp.sum(w * o["a"]) * (1 + jax.random.uniform(key)),
    )
    outer = {"a": OUTER["a"]}
    found, wanted = (
        estimator.estimate(problem, None, outer, rows, None, KEY).grad["a"]
        for estimator in (
            own(newton_of_what_moves, **BLIND)(optax.sgd(0.1), 4),
            bilevel.Implicit(optax.sgd(0.1), 4, linear_solver=bilevel.Dense()),
        )
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    with jax.debug_key_reuse(True):
        ask(own(newton_of_what_moves, **BLIND), PROBLEM)


BROKEN = {
    "compiled": (own(lambda self, query: shaken(through(query, self))), "must be a pure function"),
    "results": (changed(lambda a: a._replace(value=2.0 * a.value)), "value is not the outer loss"),
    "domains": (own(lambda self, query: scaled_in_a_domain(query, through(query, self))), "must be in natural units"),
    "batches": (own(lambda self, query: by_kind(query, through(query, self))), "batches drawn by Indexed or stacked"),
    "keys": (own(lambda self, query: again(query, through(query, self))), "a random key is consumed twice"),
}
COUNT = iter(range(10**6))


def shaken(answer):
    return answer._replace(grad=jax.tree.map(lambda g: g * (1.0 + 0.1 * next(COUNT)), answer.grad))


def scaled_in_a_domain(query, answer):
    return answer._replace(grad=bijectors.free_gradient(query.problem.domain, query.moving, answer.grad)[1])


def by_kind(query, answer):
    double = isinstance(query.inner_batches, bilevel.Indexed)
    return answer._replace(grad=jax.tree.map(lambda g: g * (1.0 + double), answer.grad))


def again(query, answer):
    return answer._replace(info={"noise": jax.random.normal(query.keys.outer)})


@pytest.mark.parametrize("duty", BROKEN)
def test_what_is_broken_is_found_and_said(duty):
    cls, words = BROKEN[duty]
    found = check_estimator(cls, duties=(duty,))
    assert found.unmet and all(sentence.startswith(f"{duty}: ") for sentence in found.unmet)
    assert words in str(found) and str(found).startswith("Mine: ")




def test_only_duties_that_there_are():
    with pytest.raises(ValueError, match="there is no 'speed', but compiled, results"):
        check_estimator(own(right), duties=("speed",))
    assert set(BROKEN) <= set(DUTIES)


APART = ("domains", "own rules", "frozen")
"""Duties that the other tests of the table do not try on every row."""


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS.values() if not row.tasks], ids=lambda row: row.name)
def test_estimators_of_the_table_keep_the_contract(row):
    assert check_estimator(row.make, duties=APART).unmet == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reverse", "evolution"])
def test_no_duty_is_found_unmet_where_all_are_met(name):
    check = check_estimator(ROWS[name].make)
    assert check.unmet == () and check.tried == tuple(DUTIES)
    assert str(check).endswith("are as a hypergradient must have them")
