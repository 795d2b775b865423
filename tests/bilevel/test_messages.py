"""Misuse is told where it begins: which argument, which data, which function of the user's."""

import dataclasses
import itertools
import random
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bilevel
import bilevel.extend
from bilevel import Batches, FullBatch, StructuralZeroWarning, Unrolled
from tests.bilevel.helpers import KEY

X, Y = np.ones((4, 3)), np.arange(4.0)
DATA = X, Y


def fit_loss(w, outer, batch, key):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2) + outer * jnp.sum(w**2)


def test_loss(w, outer, batch, key):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


test_loss.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


def problem(inner_loss=fit_loss, outer_loss=test_loss, **changed):
    start = {"init_inner": lambda key, outer: jnp.zeros(3), "init_outer": lambda key: jnp.asarray(0.5)} | changed
    return bilevel.Problem(inner_loss, outer_loss, **start)


def run(of=None, *, optimizer=None, inner=DATA, outer=DATA, steps=2, **settings):
    optimizer = optax.sgd(0.01) if optimizer is None else optimizer
    solver = bilevel.Nested(problem() if of is None else of, Unrolled(optimizer, 2), optax.sgd(0.01))
    return bilevel.run(solver, inner_data=inner, outer_data=outer, steps=steps, progress=False, **settings)


def fit(outer, data=DATA, of=None, steps=3):
    of = problem() if of is None else of
    return bilevel.fit(of, outer, optimizer=optax.sgd(0.01), data=data, steps=steps, progress=False)


# --- how a class is called ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [(2, DATA), (X, Y, 2), (X, Y), (DATA, DATA), (DATA,), (DATA, 2, "blocks")])
def test_batches_called_otherwise_say_the_signature(given):
    with pytest.raises((TypeError, ValueError), match=r"it is Batches\(arrays, size, \*, order='rows'\), .*\(\(x, y\)"):
        Batches(*given)


def test_an_unknown_argument_says_the_signature():
    given: Any = {"batch_size": 2}
    with pytest.raises(TypeError, match=r"^Batches\(\.\.\.\): .*; it is Batches\(arrays, size, \*, order='rows'\)"):
        Batches(DATA, **given)


def test_every_setting_of_the_engine_says_its_signature():
    with pytest.raises(TypeError, match=r"FullBatch\(\.\.\.\): too many .* it is FullBatch\(arrays\)"):
        FullBatch(X, Y)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match=r"missing a required argument: 'steps'; it is Unrolled\(optimizer, steps, \*,"):
        Unrolled(optax.sgd(0.1))  # pyright: ignore[reportCallIssue]


def test_an_error_inside_a_check_is_not_taken_for_a_wrong_call():
    with pytest.raises(ValueError, match=r"Batches\(size="):
        Batches(DATA, 2.5)  # pyright: ignore[reportArgumentType]


# --- iterators ----------------------------------------------------------------------------------------------------


def test_an_iterator_that_ends_says_which_how_many_it_gave_and_how_many_are_needed():
    with pytest.raises(ValueError, match=r"^inner_data: .* at outer step 1, after 3 batches, but 2 steps need 4, 2 e"):
        run(inner=iter([DATA] * 3))
    with pytest.raises(ValueError, match=r"^outer_data: .* at outer step 1, after 1 batch, but 2 steps need 2, 1 e"):
        run(outer=iter([DATA]))
    with pytest.raises(ValueError, match=r"^data: .* ended at step 0, after 0 batches, but 3 steps need 3, 1 each"):
        fit(0.5, data=iter([]))


@pytest.mark.parametrize("wide", [np.full(4, 2**40), np.full(4, 1e300)])
def test_numbers_of_an_iterator_that_do_not_fit_are_named(wide):
    single = lambda: iter([(np.float32(X), wide)] * 4)  # noqa: E731
    of = problem(init_inner=lambda key, outer: jnp.zeros(3, jnp.float32))
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        for name, data in (("inner_data", {"inner": single()}), ("outer_data", {"outer": single()})):
            given: Any = {"inner": np.float32(X), "outer": np.float32(X)} | data
            sentence = rf"^{name}: batch 0 of the iterator holds the number .*too large .* in leaf \[1\]"
            with pytest.raises(ValueError, match=sentence):
                run(of, **given)


def test_batches_of_an_estimate_are_checked_as_arrays_are():
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"outer batch holds the number 1099511627776, too l"):
        Unrolled(optax.sgd(0.1), 2).estimate(problem(), None, jnp.float32(1), None, np.asarray([2**40]), KEY)


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        ([DATA, (X[:2], Y[:2])], r"batch 1 of the iterator is \[0\] float64\[2, 3\].* is \[0\] float64\[4, 3\]"),
        ([DATA, {"x": X}], "batch 1 of the iterator is .*'x'"),
        ([DATA, list(DATA)], "batch 1 of the iterator is PyTreeDef"),
        ([{"x": [1.0, 2.0, 3.0]}] * 2, "batch 0 of the iterator holds a list of 3 numbers"),
        ([(X, "text")] * 2, r"batch 0 of the iterator holds a str .* in leaf \[1\]"),
    ],
)
def test_batches_of_an_iterator_that_cannot_be_stacked_are_named(batches, sentence):
    with pytest.raises(ValueError, match=f"^inner_data: {sentence}"):
        run(inner=iter(batches))


def test_what_an_iterator_raises_is_kept_and_placed():
    def broken():
        yield DATA
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone") as caught:
        run(inner=broken())
    assert "reading batch 1 of inner_data" in " ".join(caught.value.__notes__)


# --- an outer variable that is another than the problem's ---------------------------------------------------------


@pytest.mark.parametrize(
    ("outer", "expected"),
    [(jnp.zeros(7), "float64[7]"), (3, "int64[]"), (True, "bool[]"), (jax.random.key(0), "key<fry>[]")],
)
def test_fit_names_the_leaf_of_an_outer_of_another_kind(outer, expected):
    sentence = r"fit\(outer=.*: float64\[\] is expected, and found is " + re.escape(expected)
    with pytest.raises(ValueError, match=sentence):
        fit(outer)
    nested = problem(lambda w, o, b, k: fit_loss(w, o["a"], b, k), init_outer=lambda key: {"a": jnp.asarray(0.5)})
    with pytest.raises(ValueError, match=r"float64\[\] is expected in leaf \['a'\], and found is "):
        fit({"a": outer}, of=nested)


@pytest.mark.parametrize("outer", [{"a": jnp.asarray(0.5)}, None])
def test_a_leaf_that_fit_lacks_is_named(outer):
    with pytest.raises(ValueError, match=r"inner_loss failed .* init_outer returns: float64\[\] is expected, a"):
        fit(outer)


def test_an_outer_that_fits_may_have_more_leaves_and_other_containers():
    of = problem(lambda w, o, b, k: fit_loss(w, o[0], b, k), init_outer=lambda key: (jnp.asarray(0.5),))
    whole = fit((jnp.asarray(0.2),), of=of).inner.params
    np.testing.assert_array_equal(fit([0.2, np.arange(3)], of=of).inner.params, whole)


def test_variance_looks_at_the_outer_it_is_given():
    given: Any = {"outer": jnp.zeros(2), "inner_data": DATA, "outer_data": DATA}
    with pytest.raises(ValueError, match=r"variance\(outer=.* float64\[\] is expected, and found is float64\[2\]"):
        bilevel.variance(problem(), Unrolled(optax.sgd(0.1), 2), **given)


# --- errors of the user's functions -------------------------------------------------------------------------------


def broken(*_):
    raise AssertionError("a fault of the user's")


FAILING = {
    "inner_loss(inner, outer, batch, key), with inner: f": lambda: run(problem(lambda w, o, b, k: broken())),
    "outer_loss(inner, outer, batch, key), with inner: f": lambda: run(problem(fit_loss, lambda *_: broken())),
    "init_inner(key, outer), with outer: float64[]": lambda: run(problem(init_inner=lambda key, outer: broken())),
    "init_outer(key)": lambda: run(problem(init_outer=lambda key: broken())),
    "project(outer), with outer: float64[]": lambda: run(problem(project=lambda outer: broken())),
    "the optimizer, a function of outer, with outer: float64[]": lambda: run(optimizer=lambda outer: broken()),
    "record(state)": lambda: run(record=lambda state: broken()),
}


@pytest.mark.parametrize("note", FAILING)
def test_errors_of_a_users_function_are_kept_and_say_which_it_was(note):
    with pytest.raises(AssertionError, match="a fault of the user's") as caught:
        FAILING[note]()
    assert note in " ".join(caught.value.__notes__)


def test_a_note_has_the_functions_own_name_and_not_all_of_many_leaves():
    many = {f"w{i}": jnp.zeros(2) for i in range(40)}
    of = problem(broken, init_inner=lambda key, outer: many)
    with pytest.raises(AssertionError) as caught:
        run(of)
    note = " ".join(caught.value.__notes__)
    assert "inner_loss(inner, outer, batch, key) (the function broken)" in note and "and 28 more leaves" in note


@pytest.mark.parametrize("name", ["Dropout", "BatchNorm"])
def test_a_captured_module_that_changes_is_refused_with_the_remedy(name):
    settings = {"rate": 0.5} if name == "Dropout" else {"num_features": 3}
    module = getattr(nnx, name)(**settings, rngs=nnx.Rngs(0))

    def loss(w, outer, batch, key):
        return fit_loss(module(w.astype(jnp.float32)[None])[0].astype(w.dtype), outer, batch, key)

    with pytest.raises(ValueError, match=r"While tracing inner_loss\(.* captured .*nnx\.split\(model, nnx\.Param, "):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as flax computes
            run(problem(loss))


# --- losses that change, or stand in the wrong place --------------------------------------------------------------


def counting():
    count = [0.0]

    def loss(w, outer, batch, key):
        count[0] += 1.0
        return fit_loss(w, outer, batch, key) + count[0] * jnp.sum(w)

    return loss


def alternating(functions):
    return lambda w, outer, batch, key: fit_loss(next(functions)(w), outer, batch, key)


CHANGING = {
    "a counter": counting,
    "NumPy": lambda: lambda w, o, b, k: fit_loss(w, o, b, k) + jnp.sum(w * np.random.normal(size=3)),
    "random": lambda: lambda w, o, b, k: fit_loss(w, o, b, k) * random.random(),
    "operations": lambda: alternating(itertools.cycle([jnp.sin, jnp.cos])),
}


@pytest.mark.parametrize("kind", CHANGING)
def test_a_loss_that_is_another_at_each_call_is_refused(kind):
    with pytest.raises(ValueError, match="inner_loss is another function at each call"):
        run(problem(CHANGING[kind]()))
    with pytest.raises(ValueError, match="outer_loss is another function at each call"):
        run(problem(outer_loss=CHANGING[kind]()))


DRAWING = {
    "init_inner": lambda: {"init_inner": lambda key, outer: np.random.normal(size=3)},
    "init_outer": lambda: {"init_outer": lambda key: 0.5 + 0.1 * np.random.normal()},
    "project": lambda: {"project": lambda outer: outer * random.random()},
    "domain": lambda: {"domain": Drawing()},
}


@bilevel.extend.register
@dataclasses.dataclass(frozen=True)
class Drawing:
    def forward(self, u):
        return u * random.random()

    def inverse(self, value):
        return value / random.random()


@pytest.mark.parametrize("name", DRAWING)
def test_what_is_called_beside_the_losses_is_a_function_of_its_arguments_too(name, monkeypatch):
    monkeypatch.setattr(bilevel.bijectors, "check", lambda domain, outer: None)  # which would refuse this one
    with pytest.raises(ValueError, match=f"{name} is another function at each call"):
        run(problem(**DRAWING[name]()))


def test_an_optimizer_or_a_record_that_draws_with_numpy_is_refused():
    with pytest.raises(ValueError, match=r"solver\.hypergradient\.optimizer is another function at each call"):
        run(problem(), optimizer=lambda outer: optax.sgd(0.01 * random.random()))
    solver = bilevel.Nested(problem(), Unrolled(optax.sgd(0.01), 2), optax.sgd(0.01))
    with pytest.raises(ValueError, match="record is another function at each call"):
        record = lambda state: {"x": state.outer * random.random()}  # noqa: E731
        bilevel.run(solver, inner_data=DATA, outer_data=DATA, steps=1, progress=False, record=record)


def test_what_a_loss_counts_or_draws_without_effect_is_its_own_business():
    traces = []

    def loss(w, outer, batch, key):
        traces.append(1)
        noise = np.random.default_rng(0).normal(size=3)
        return fit_loss(w, outer, batch, key) + jnp.sum(w * noise) + 0 * jax.random.normal(key)

    run(problem(loss))
    assert len(traces) > 1


def test_losses_that_do_not_depend_on_inner_are_told():
    with pytest.warns(StructuralZeroWarning, match="inner_loss does not depend on inner"):
        run(problem(lambda w, outer, batch, key: outer**2, fit_loss))
    with pytest.warns(StructuralZeroWarning, match="outer_loss does not depend on inner"):
        run(problem(outer_loss=lambda w, outer, batch, key: outer**2))
    with pytest.warns(StructuralZeroWarning, match="outer_loss does not depend on inner"):
        aside = problem(outer_loss=lambda w, outer, batch, key: outer**2)
        Unrolled(optax.sgd(0.1), 2).estimate(aside, None, jnp.asarray(0.5), FullBatch(DATA), DATA, KEY)


FLAT = {
    "`sign`": lambda w: jnp.sum(jnp.sign(w)),
    "`round`": lambda w: jnp.sum(jnp.round(w)),
    "a comparison (`gt`)": lambda w: jnp.mean((w > 0.5).astype(float)),
    "`stop_gradient`": lambda w: jnp.sum(jax.lax.stop_gradient(w) ** 2),
}


def decayed(w, outer, batch, key):
    return jnp.sum((w - 1.0) ** 2) + outer["decay"] * jnp.sum(w**2)


@pytest.mark.parametrize("operation", FLAT)
@pytest.mark.parametrize("estimator", [Unrolled, bilevel.Implicit, bilevel.OneStep])
def test_an_outer_loss_without_a_slope_in_inner_is_told_by_its_operation(estimator, operation):
    """Whatever the estimator: neither its optimizer nor the way it looks is to blame."""
    hypergradient = estimator(optax.sgd(0.1), 3)
    said = re.escape(f"outer_loss reads inner through {operation} alone, whose derivative is 0 everywhere")

    def gradient(outer, direct):
        loss = lambda w, outer, batch, key: FLAT[operation](w) + direct * outer.get("direct", 0.0)  # noqa: E731
        flat = bilevel.Problem(decayed, loss, lambda key, outer: jnp.zeros(3), lambda key: outer)
        return hypergradient.estimate(flat, None, outer, None, None, KEY).grad

    with pytest.raises(ValueError, match=rf"every outer leaf is exactly 0 by construction: \['decay'\] \({said}"):
        gradient({"decay": jnp.asarray(0.1)}, 0.0)
    if operation == "`sign`":  # with a leaf that is learned all the same, and one that is not used
        several = {name: jnp.asarray(0.1) for name in ("decay", "direct", "unused")}
        with pytest.warns(StructuralZeroWarning, match=rf"leaf \['decay'\] is exactly 0 by construction: {said}"):
            with pytest.warns(StructuralZeroWarning, match=r"leaf \['unused'\] is .*: nothing that is trained or eval"):
                grad = gradient(several, 3.0)
        assert grad["direct"] == 3.0 and grad["decay"] == grad["unused"] == 0.0


def test_losses_in_each_others_places_are_told():
    with pytest.warns(StructuralZeroWarning, match="Only outer_loss depends on outer, and the training does not"):
        run(problem(test_loss, fit_loss))
    with pytest.warns(StructuralZeroWarning, match="Only outer_loss depends on outer, and the training does not"):
        solver = bilevel.SOBA(problem(test_loss, fit_loss), 0.01, 0.01)
        bilevel.run(solver, inner_data=DATA, outer_data=DATA, steps=1, progress=False)


def test_learned_rates_and_starts_are_not_taken_for_swapped_losses():
    """Warnings are errors here."""
    run(problem(test_loss, fit_loss), optimizer=lambda outer: optax.sgd(0.01 * outer))
    start = problem(test_loss, fit_loss, init_inner=lambda key, outer: jnp.full(3, outer))
    solver = bilevel.Nested(start, Unrolled(optax.sgd(0.01), 2), optax.sgd(0.01), inner_start="cold")
    bilevel.run(solver, inner_data=DATA, outer_data=DATA, steps=1, progress=False)
    fit(0.5, of=problem(fit_loss, lambda w, outer, batch, key: outer**2))


def test_a_run_that_is_done_says_so(tmp_path, capsys):
    for _ in range(2):
        solver = bilevel.Nested(problem(), Unrolled(optax.sgd(0.01), 2), optax.sgd(0.01))
        capsys.readouterr()
        bilevel.run(solver, inner_data=DATA, outer_data=DATA, steps=2, checkpoint_dir=tmp_path, title="search")
    assert capsys.readouterr().err.splitlines()[-1] == "search 2/2  already finished"


def test_the_final_training_needs_no_loss_that_reads_outer():
    fit(0.5, of=problem(test_loss, lambda w, outer, batch, key: outer * jnp.sum(w)))
