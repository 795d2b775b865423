"""A run never returns what is not finite; it says where that began."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Batches, Nested, Unrolled
from bilevel.testing import check_hypergradient
from tests.bilevel.estimators import ROWS
from tests.bilevel.helpers import KEY, LINE
from tests.bilevel.trainings import run


def failing(where, at):
    """A problem whose training, or evaluation, goes wrong once outer step `at` is reached."""
    bad = lambda outer: jnp.where(outer["count"] < at - 0.5, 1.0, jnp.nan)  # noqa: E731

    def inner_loss(w, outer, batch, key):
        scale = bad(outer) if where == "inner" else 1.0
        return jnp.sum((w["w"] - outer["a"]) ** 2 * jnp.where(batch == 2, scale, 1.0))

    def outer_loss(w, outer, batch, key):
        # the hypergradient of count is -1: descent with step 1 counts the outer steps
        value = jnp.sum((w["w"] - 1.0) ** 2) - outer["count"]
        if where == "outer":
            value = value * bad(outer)
        if where == "hypergradient":
            value = value + jnp.sqrt(jnp.where(outer["count"] < at - 0.5, 1.0, 0.0) * jnp.sum(outer["a"] ** 2))
        return value

    problem = bilevel.Problem(
        inner_loss, outer_loss, lambda k, o: {"w": jnp.zeros(2)}, lambda k: {"a": jnp.full(2, 0.3), "count": 0.0}
    )
    transform = optax.partition({"a": optax.sgd(0.01), "count": optax.sgd(1.0)}, {"a": "a", "count": "count"})
    return Nested(problem, Unrolled(optax.sgd(0.1), 4), transform)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("inner", r"inner_loss is nan at inner step 2 .*\['w'\]"),
        ("outer", r"outer_loss is nan at a finite point"),
        ("hypergradient", r"the hypergradient is not finite at outer leaf \['a'\]"),
    ],
)
def test_a_nan_names_step_and_leaf(where, message, at):
    batches = itertools.cycle([jnp.asarray(t) for t in range(4)])
    with pytest.raises(FloatingPointError, match=rf"Outer step {at}: {message}"):
        run(failing(where, at), 6, inner_data=batches)


def test_a_nan_in_the_middle_of_a_chunk_names_its_step_and_keeps_what_was_done(tmp_path):
    solver = failing("outer", 9)
    with pytest.raises(FloatingPointError, match="Outer step 9: outer_loss is nan"):
        run(solver, 40, inner_data=jnp.zeros(1), checkpoint_dir=tmp_path)
    steps = []
    with pytest.raises(FloatingPointError, match="Outer step 9"):
        callbacks = [lambda step, *_: steps.append(step)]
        run(solver, 40, inner_data=jnp.zeros(1), checkpoint_dir=tmp_path, callbacks=callbacks)
    assert not steps or steps[0] > 1


def test_a_start_that_is_not_finite_is_told():
    problem = bilevel.Problem(LINE.inner_loss, LINE.outer_loss, LINE.init_inner, lambda key: jnp.full(2, jnp.nan))
    with pytest.raises(FloatingPointError, match=r"already not finite.*start values"):
        run(Nested(problem, Unrolled(optax.sgd(0.1), 2), optax.sgd(0.1)), 2, key=KEY)


@pytest.mark.parametrize("name", ["Nested", "SOBA"])
def test_a_label_that_is_no_class_is_looked_for_and_no_step_is_blamed_before_there_was_one(name):
    def loss(w, outer, batch, key):  # to such a label JAX answers NaN
        said = optax.softmax_cross_entropy_with_integer_labels(batch[0] @ w, batch[1])
        return jnp.mean(said) + outer * jnp.sum(w**2)

    problem = bilevel.Problem(loss, loss, lambda k, o: jnp.ones((2, 3)), lambda k: jnp.zeros(()))
    nested = Nested(problem, Unrolled(optax.sgd(0.1), 3), optax.sgd(0.1))
    data = jnp.eye(3, 2), jnp.asarray([1, 2, 3])
    with pytest.raises(
        FloatingPointError, match=r"a finite point: look for .* a label out of range, as the batch\[1\] "
    ):
        run(nested if name == "Nested" else bilevel.SOBA(problem, 0.1, 0.1), 4, inner_data=data, outer_data=data)


def counting(inner_loss=None, outer_loss=None, init_inner=None, start=0.3):
    """A problem whose outer leaf `n` counts the outer steps, by a solver that moves it by 1 a step."""
    return bilevel.Problem(
        inner_loss or (lambda w, outer, batch, key: jnp.sum((w["w"] - outer["a"]) ** 2)),
        lambda w, outer, batch, key: (
            jnp.sum((w["w"] - 1.0) ** 2)
            + 0.01 * jnp.sum(outer["a"] ** 2)
            - outer["n"]
            + (outer_loss(w, outer, batch) if outer_loss else 0.0)
        ),
        init_inner or (lambda key, outer: {"w": jnp.zeros(2), "b": jnp.zeros(())}),
        lambda key: {"a": jnp.full(2, start), "n": 0.0},
    )


def moving(rate=0.01, count=1.0):
    return optax.partition({"a": optax.sgd(rate), "n": optax.sgd(count)}, {"a": "a", "n": "n"})


def until(step, rate):
    """A schedule that is NaN from `step` on."""
    return lambda count: jnp.where(count < step, rate, jnp.nan)


def trained(name, rate):
    """The estimator of a row of the table, three steps of gradient descent long."""
    return ROWS[name].make(optax.sgd(rate), 3)


@pytest.mark.filterwarnings("ignore::bilevel.StructuralZeroWarning")
@pytest.mark.parametrize("last", [0, 6])
@pytest.mark.parametrize("name", ["Nested", "SOBA"])
def test_a_last_update_that_diverges_is_told_at_its_own_step(name, last):
    """Metrics are taken before the update: nothing but the state shows it."""
    rate = until(last, 0.1)
    if name == "Nested":
        solver = Nested(LINE, trained("mixed", 0.1), optax.sgd(rate))
    else:
        solver = bilevel.SOBA(LINE, 0.1, rate)
    if last:
        assert np.isfinite(run(solver, last).outer).all()
    if name == "SOBA":  # its schedule is a setting of ours, and looked at before
        refusal, message = ValueError, rf"the schedule gives nan for step {last}, but a value must be"
    else:
        refusal, message = FloatingPointError, rf"Outer step {last}: .* made outer not finite while losses and hyp"
    with pytest.raises(refusal, match=message):
        run(solver, last + 1)


def test_an_inner_update_that_diverges_in_the_last_step_is_told():
    solver = Nested(counting(), Unrolled(optax.sgd(until(4, 0.1)), 1), moving())
    with pytest.raises(FloatingPointError, match=r"Outer step 4: the inner optimizer made .*inner\['w'\] not finite"):
        run(solver, 5)


def test_the_root_leaf_of_a_training_has_a_name():
    problem = bilevel.Problem(lambda w, o, b, k: jnp.sum((w - o) ** 2), None, lambda k, o: jnp.ones(2), lambda k: 0.5)
    train = lambda steps, rate: bilevel.fit(problem, 0.5, optimizer=optax.sgd(rate), steps=steps, progress=False)  # noqa: E731
    with pytest.raises(FloatingPointError, match=r"^Training step 3: the inner optimizer made inner not finite, where"):
        train(4, until(3, 0.1))
    with pytest.raises(FloatingPointError, match=r"^Training step \d+: .*inner"):
        train(2000, 1e3)


def test_a_state_of_an_optimizer_that_overflows_is_told():
    """Adam's second moment is infinite, its update 0: nothing moves any more, and every number shown is finite."""
    problem = bilevel.Problem(
        lambda w, o, b, k: jnp.sum(w * 1e30), None, lambda k, o: jnp.ones(2, jnp.float32), lambda k: 0.0
    )
    with pytest.raises(FloatingPointError, match=r"Training step 0: the update made state.*nu.* not finite"):
        bilevel.fit(problem, 0.5, optimizer=optax.adam(0.1), steps=1, progress=False)


def test_infinities_that_are_meant_are_left_alone():
    """A mask among the inner leaves, and the best value so far of a schedule, are infinite from the start."""
    mask = jnp.array([0.0, -jnp.inf])
    problem = bilevel.Problem(
        lambda w, o, b, k: jnp.sum((jax.nn.softmax(w["w"] + jax.lax.stop_gradient(w["mask"])) - o) ** 2),
        None,
        lambda k, o: {"w": jnp.ones(2), "mask": mask},
        lambda k: 0.5,
    )
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(accumulation_size=2))
    result = bilevel.fit(problem, 0.5, optimizer=optimizer, steps=3, progress=False)
    np.testing.assert_array_equal(result.inner.params["mask"], mask)


@pytest.mark.filterwarnings("ignore::bilevel.InexactHypergradientWarning")
@pytest.mark.parametrize(
    ("estimator", "seconds", "first"),
    [
        ("mixed", 1e-9, 3),
        ("mixed", 9.0, 3),
        ("mixed", 9.0, 4),
        ("implicit by a series", 9.0, 3),
        ("first order", 1.0, 0),
    ],
)
def test_a_gradient_that_is_nan_where_the_loss_is_finite(estimator, seconds, first, monkeypatch):
    """sqrt at 0 from outer step `first` on, in the middle of a chunk (1, 2, 4, ... steps long) or as its first step."""
    monkeypatch.setattr(importlib.import_module("bilevel.running.loop"), "CHUNK_SECONDS", seconds)

    def inner_loss(w, outer, batch, key):
        distance = jnp.where(outer["n"] < first - 0.5, 1.0, 0.0) + 0.0 * jnp.sum(w["w"])
        return jnp.sum((w["w"] - outer["a"]) ** 2) + w["b"] ** 2 + jnp.sqrt(distance)

    solver = Nested(counting(inner_loss), trained(estimator, 0.1), moving())
    message = rf"Outer step {first}: the gradient of inner_loss is not finite at inner step 0 at inner\['w'\] .*norm"
    with pytest.raises(FloatingPointError, match=message) as caught:
        run(solver, 9)
    assert "['b']" not in str(caught.value) and "learning rate" not in str(caught.value)


@pytest.mark.parametrize("solver", [bilevel.SOBA, bilevel.MRBO])
def test_a_gradient_that_is_nan_under_a_stochastic_solver(solver):
    loss = lambda w, o, b, k: jnp.sum((w["w"] - o["a"]) ** 2) + jnp.linalg.norm(w["b"])  # noqa: E731
    start = lambda key, outer: {"w": jnp.ones(2), "b": jnp.zeros(3)}  # noqa: E731
    with pytest.raises(FloatingPointError, match=r"Outer step 0: the gradient of inner_loss .*inner\['b'\].*norm"):
        run(solver(counting(loss, init_inner=start), 0.1, 0.1), 3)


def test_a_gradient_of_the_outer_loss_that_is_nan():
    problem = counting(outer_loss=lambda w, outer, batch: jnp.linalg.norm(w["w"]), start=0.0)
    with pytest.raises(FloatingPointError, match=r"Outer step 0: the gradient of outer_loss .* at inner\['w'\] while"):
        run(Nested(problem, trained("mixed", 0.1), moving()), 3)


@pytest.mark.parametrize("how", ["Nested", "SOBA", "fit"])
def test_a_batch_that_is_not_finite_is_named(how):
    rows = {"x": jnp.ones((8, 2)), "y": jnp.ones(8).at[5].set(jnp.nan)}
    loss = lambda w, o, b, k: jnp.mean((b["x"] @ (w["w"] - o["a"]) - b["y"]) ** 2)  # noqa: E731
    problem, data = counting(loss), Batches(rows, 2)
    with pytest.raises(FloatingPointError, match=r"inner_loss is nan.* the batch\['y'\] holds .* the data") as caught:
        if how == "fit":
            outer = {"a": jnp.ones(2), "n": 0.0}
            bilevel.fit(problem, outer, optimizer=optax.sgd(0.1), data=data, steps=20, progress=False)
        elif how == "SOBA":
            run(bilevel.SOBA(problem, 0.1, 0.1), 20, inner_data=data)
        else:
            run(Nested(problem, trained("mixed", 0.1), moving()), 20, inner_data=data)
    assert "learning rate" not in str(caught.value) and "['x']" not in str(caught.value)


@pytest.mark.parametrize("how", ["inner", "outer", "SOBA", "fit"])
def test_weights_that_hold_nan_are_named(how):
    weights = {"layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2).at[1].set(jnp.nan)}}

    def loss(v, w, o, b, k):
        return jnp.sum((v["layer"]["kernel"] @ (w["w"] - o["a"]) - v["layer"]["bias"]) ** 2) - o["n"]

    bound, plain = jax.tree_util.Partial(loss, weights), counting()
    inner = plain.inner_loss if how == "outer" else bound
    outer = bound if how == "outer" else plain.outer_loss
    problem = bilevel.Problem(inner, outer, plain.init_inner, plain.init_outer)
    name = "outer_loss" if how == "outer" else "inner_loss"
    message = rf"arrays bound to {name} hold NaN, at {name}.*\['layer'\]\['bias'\]: the file or array"
    with pytest.raises(FloatingPointError, match=message) as caught:
        if how == "fit":
            bilevel.fit(problem, {"a": jnp.ones(2), "n": 0.0}, optimizer=optax.sgd(0.1), steps=3, progress=False)
        elif how == "SOBA":
            run(bilevel.SOBA(problem, 0.1, 0.1), 3)
        else:
            run(Nested(problem, trained("mixed", 0.1), moving()), 3)
    assert "learning rate" not in str(caught.value) and "kernel" not in str(caught.value)


@pytest.mark.parametrize("how", ["outer", "inner"])
def test_a_start_that_is_nan_is_told_even_where_no_number_shows_it(how):
    bad = jnp.array([0.0, jnp.nan])
    start = (lambda key, outer: {"w": jnp.zeros(2), "b": bad}) if how == "inner" else None
    problem = counting(lambda w, o, b, k: jnp.sum((w["w"] - o["a"][:1]) ** 2), init_inner=start)
    if how == "outer":
        problem = bilevel.Problem(
            problem.inner_loss, problem.outer_loss, problem.init_inner, lambda key: {"a": bad, "n": 0.0}
        )
    leaf = r"outer\['a'\]" if how == "outer" else r"inner\['b'\]"
    with pytest.raises(FloatingPointError, match=rf"step 0: .* already not finite, in {leaf}; check the start values"):
        run(Nested(problem, trained("mixed", 0.1), moving()), 2)


def test_nothing_done_before_is_lost(tmp_path):
    def inner_loss(w, outer, batch, key):
        distance = jnp.where(outer["n"] < 5.5, 1.0, 0.0) + 0.0 * jnp.sum(w["w"])
        return jnp.sum((w["w"] - outer["a"]) ** 2) + jnp.sqrt(distance)

    solver = Nested(counting(inner_loss), trained("mixed", 0.1), moving())
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="Outer step 6: the gradient of inner_loss"):
            run(solver, 9, checkpoint_dir=tmp_path, callbacks=[lambda *_: None])
    assert [path.name for path in tmp_path.iterdir() if path.name.isdecimal()] == ["6"]


def poisoned(at, where="mu"):
    """Gradient descent whose state holds a NaN after its update number `at`, and moves nothing by it."""
    init = lambda params: {"count": jnp.zeros((), jnp.int32), where: jnp.zeros(2)}  # noqa: E731

    def update(grads, state, params=None):
        bad = jnp.where(state["count"] == at, jnp.nan, 0.0)
        new = {"count": state["count"] + 1, where: state[where] + bad}
        return jax.tree.map(lambda g: -0.1 * g, grads), new

    return optax.GradientTransformation(init, update)


def test_a_nan_in_the_state_of_the_inner_optimizer_alone_is_its_own():
    solver = Nested(counting(), Unrolled(poisoned(7), 3), moving())
    message = r"Outer step 2: the update made state\.inner\.opt_state\['mu'\] of the inner optimizer .* at inner step 1"
    with pytest.raises(FloatingPointError, match=message) as caught:
        run(solver, 5)
    assert "outer optimizer" not in str(caught.value)


def test_a_nan_in_the_state_of_the_outer_optimizer_alone_is_its_own():
    solver = Nested(LINE, Unrolled(optax.sgd(0.1), 2), poisoned(2))
    with pytest.raises(FloatingPointError, match=r"Outer step 2: the outer optimizer made state\.opt_state\['mu'\]"):
        run(solver, 5)


def test_a_nan_in_a_mutable_entry_is_of_the_loss():
    def inner_loss(w, outer, batch, key):
        seen = w["seen"] + 1.0
        return jnp.sum((w["w"] - outer) ** 2), {"seen": jnp.where(seen == 5, jnp.nan, seen)}

    start = lambda key, outer: {"w": jnp.zeros(2), "seen": jnp.zeros(())}  # noqa: E731
    outer_loss = lambda w, o, b, k: jnp.sum((w["w"] - 1) ** 2)  # noqa: E731
    problem = bilevel.Problem(inner_loss, outer_loss, start, lambda key: jnp.ones(2), mutable=["seen"])
    message = r"Outer step 1: inner_loss returned the mutable inner\['seen'\] not finite at inner step 1"
    with pytest.raises(FloatingPointError, match=message):
        run(Nested(problem, Unrolled(optax.sgd(0.1), 3), optax.sgd(0.1)), 4)


@pytest.mark.parametrize("how", ["Nested", "SOBA"])
def test_a_nan_that_record_makes_is_of_record(how):
    nested = Nested(LINE, Unrolled(optax.sgd(0.1), 2), optax.sgd(0.1))
    solver = bilevel.SOBA(LINE, 0.1, 0.1) if how == "SOBA" else nested
    record = lambda state: {"size": jnp.sum(state.outer), "root": jnp.sqrt(2.5 - state.step.astype(float))}  # noqa: E731
    message = r"Outer step 2: record returned root not finite, while .* in record"
    with pytest.raises(FloatingPointError, match=message) as told:
        run(solver, 6, record=record)
    assert "size" not in str(told.value) and "optimizer" not in str(told.value)


def test_aux_is_handed_on_as_it_is():
    """Nothing is computed from what the losses return beside their values; NaN there may be meant, as in jax."""
    problem = bilevel.Problem(
        lambda w, o, b, k: (jnp.sum((w - o) ** 2), {"share": jnp.nan}),
        lambda w, o, b, k: (jnp.sum((w - 1) ** 2), jnp.inf),
        lambda k, o: jnp.zeros(2),
        lambda k: jnp.ones(2),
        has_aux=True,
    )
    solver = Nested(problem, Unrolled(optax.sgd(0.1), 2), optax.sgd(0.1))
    assert np.isfinite(run(solver, 2).outer).all()
    aux = solver.hypergradient.estimate(problem, None, jnp.ones(2), None, None, KEY).aux
    assert np.isnan(aux.inner["share"]).all() and np.isinf(aux.outer)


RATE = {"lr": jnp.asarray(0.1), "shift": jnp.full(2, 0.3)}


def learned_rate(rate, by="optimizer"):
    """A learned inner learning rate that an outer step of size `rate` puts out of its range."""
    optimizer = (lambda outer: optax.sgd(outer["lr"])) if by == "optimizer" else optax.sgd(0.1)
    factor = (lambda o: 1.0) if by == "optimizer" else (lambda o: jnp.log(jax.lax.stop_gradient(o["lr"])))
    problem = bilevel.Problem(
        lambda w, o, b, k: jnp.sum((w - o["shift"]) ** 4 - 5 * factor(o) * w),
        lambda w, o, b, k: jnp.sum((w - 1.0) ** 2) + (5.0 * o["lr"] if by == "loss" else -5.0 * o["lr"]),
        lambda k, o: jnp.full(2, 0.5),
        lambda k: RATE,
    )
    moves = optax.partition({"lr": optax.sgd(rate), "shift": optax.sgd(1e-3)}, {"lr": "lr", "shift": "shift"})
    return Nested(problem, Unrolled(optimizer, 8), moves, inner_start="cold")


@pytest.mark.filterwarnings("ignore::bilevel.SteepUpdateWarning")
@pytest.mark.parametrize("seconds", [1e-9, 9.0])
@pytest.mark.parametrize("by", ["optimizer", "loss"])
def test_an_outer_step_out_of_range_is_named_with_its_leaf(by, seconds, monkeypatch):
    monkeypatch.setattr(importlib.import_module("bilevel.running.loop"), "CHUNK_SECONDS", seconds)
    message = r"Outer step \d+: .*The move of outer\['lr'\] from \S+ to \S+ in"
    with pytest.raises(FloatingPointError, match=message) as told:
        run(learned_rate(1.0 if by == "optimizer" else 0.03, by), 9)
    assert "outer['shift']" not in str(told.value) and "Problem(domain=...)" in str(told.value)


@pytest.mark.parametrize("kind", ["SOBA"])
def test_an_outer_step_out_of_range_under_a_stochastic_solver(kind):
    problem = bilevel.Problem(
        lambda w, o, b, k: jnp.sum(w**2) * jnp.log(jax.lax.stop_gradient(o["scale"])) ** 2 + jnp.sum(o["free"] * w),
        lambda w, o, b, k: jnp.sum(w**2) + 5.0 * o["scale"] + jnp.sum(o["free"] ** 2),
        lambda k, o: jnp.full(2, 0.5),
        lambda k: {"scale": 2.0, "free": jnp.ones(2)},
    )
    message = r"inner_loss is nan .*The move of outer\['scale'\] from \S+ to -\S+ in"
    with pytest.raises(FloatingPointError, match=message):
        run(getattr(bilevel, kind)(problem, 0.01, 0.15), 9)


def test_data_that_are_not_finite_are_not_blamed_on_the_move():
    rows = jnp.ones(8).at[5].set(jnp.nan)
    problem = counting(lambda w, o, b, k: jnp.mean((w["w"] - o["a"] - jnp.mean(b)) ** 2))
    with pytest.raises(FloatingPointError, match="check the data") as caught:
        run(Nested(problem, trained("mixed", 0.1), moving()), 20, inner_data=Batches(rows, 1))
    assert "The move" not in str(caught.value)


# Steep updates, and half precision.

ZEROS = bilevel.Problem(
    lambda w, o, b, k: jnp.sum((w["w"] - o) ** 2) + jnp.sum((w["b"] - 1.0) ** 2),
    lambda w, o, b, k: jnp.sum((w["w"] - 1.0) ** 2),
    lambda key, outer: {"w": jnp.zeros(3, outer.dtype), "b": jnp.zeros(2, outer.dtype)},
    lambda key: jnp.array([0.0, 0.5, 1.0]),
)


@pytest.mark.parametrize("name", ["adopt", "acprop", "ademamix", "cocob", "adan", "rmsprop", "adam"])
def test_a_steep_update_is_named_whatever_the_optimizer(name):
    optimizer = getattr(optax.contrib, name, None) or getattr(optax, name)
    optimizer = optimizer() if name == "cocob" else optimizer(0.1)
    message = r"norm .* of inner\['w'\] is exactly 0 .* larger eps"
    with pytest.warns(bilevel.SteepUpdateWarning, match=message) as caught:
        run(Nested(ZEROS, Unrolled(optimizer, 3), optax.sgd(0.0)), 1)
    assert len(caught) == 1 and "inner['b']" not in str(caught[0].message)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adagrad(0.1), optax.adam(0.1, eps=0.1)])
def test_a_hypergradient_that_is_large_for_another_reason_is_left_alone(optimizer):
    big = bilevel.Problem(
        ZEROS.inner_loss, lambda w, o, b, k: 1e6 * ZEROS.outer_loss(w, o, b, k), ZEROS.init_inner, ZEROS.init_outer
    )
    run(Nested(big, Unrolled(optimizer, 3), optax.sgd(0.0)), 1)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_adam_whose_slope_is_beyond_half_precision_is_told_by_the_cause(dtype):
    problem = bilevel.Problem(
        ZEROS.inner_loss, ZEROS.outer_loss, ZEROS.init_inner, lambda key: jnp.array([0.0, 0.5, 1.0], dtype)
    )
    message = r"Outer step 0: the hypergradient .*inner\['w'\] is exactly 0 .* slope of about 1 / eps.*larger eps"
    with pytest.raises(FloatingPointError, match=message) as caught:
        run(Nested(problem, Unrolled(optax.adam(0.1), 3 if dtype == jnp.float16 else 6), optax.sgd(0.1)), 1)
    assert "in a loss" not in str(caught.value)
    if dtype == jnp.float16:
        assert "65504, the largest number of its type" in str(caught.value) and "float32" in str(caught.value)
    mended = Nested(problem, Unrolled(optax.adam(0.1, eps=0.1), 3), optax.sgd(0.1))
    assert np.isfinite(run(mended, 1).outer).all()


def test_a_loss_beyond_half_precision_is_told_by_the_cause():
    problem = bilevel.Problem(
        lambda w, o, b, k: jnp.sum(w * jnp.float16(400)) * jnp.float16(400) * o,
        None,
        lambda k, o: jnp.ones(2, jnp.float16),
        lambda k: jnp.ones((), jnp.float16),
    )
    message = r"inner_loss is inf .*\(float16 holds no number above 65504: compute in"
    with pytest.raises(FloatingPointError, match=message):
        bilevel.fit(problem, jnp.ones((), jnp.float16), optimizer=optax.adam(0.1), steps=1, progress=False)


MASK = jnp.array([0.3, -jnp.inf])


def masked(**changes):
    """A problem whose outer variable holds an infinity from the start, that means something."""
    given = {
        "inner_loss": lambda w, o, b, k: jnp.sum((w - jnp.exp(o)) ** 2),
        "outer_loss": LINE.outer_loss,
        "init_inner": LINE.init_inner,
        "init_outer": lambda key: MASK,
    }
    return bilevel.Problem(**given | changes)


def test_an_infinity_that_was_meant_and_becomes_nan_is_told_at_its_step():
    """With weight decay: 0 times infinity."""
    fine = run(Nested(masked(), Unrolled(optax.sgd(0.1), 2), optax.sgd(0.1)), 2)
    np.testing.assert_array_equal(jnp.isfinite(fine.outer), [True, False])
    solver = Nested(masked(), Unrolled(optax.sgd(0.1), 2), optax.adamw(0.1, weight_decay=0.1))
    with pytest.raises(FloatingPointError, match="step 0: the outer optimizer made outer not finite"):
        run(solver, 1)


def test_a_record_that_hands_on_an_infinity_that_was_meant_is_told_so():
    solver = Nested(masked(), Unrolled(optax.sgd(0.1), 2), optax.sgd(0.1))
    message = r"step 0: record returned x not finite, .*: state\.outer holds an infinity from the start, which record"
    with pytest.raises(FloatingPointError, match=message):
        run(solver, 2, record=lambda state: {"x": state.outer})


def test_what_is_infinite_by_meaning_does_not_spoil_a_check():
    assert check_hypergradient(masked(), Unrolled(optax.sgd(0.1), 2)).verdict == "exact"


def test_a_projection_that_returns_nan_is_named():
    problem = masked(init_outer=lambda key: jnp.full(2, 0.3), project=lambda outer: jnp.log(outer - 1.0))
    message = "step 0: project made outer not finite, while the step before it is finite: look for .* in project"
    with pytest.raises(FloatingPointError, match=message):
        run(Nested(problem, Unrolled(optax.sgd(0.1), 2), optax.sgd(0.1)), 2)


def start(function, first, **settings):
    """A run whose `init_inner` is `function` of outer, at each step anew."""
    given = {"init_inner": lambda key, outer: function(outer), "init_outer": lambda key: jnp.full(2, first)}
    problem = masked(inner_loss=lambda w, o, b, k: jnp.sum((w - 1.0) ** 2), **given)
    run(Nested(problem, Unrolled(optax.sgd(0.1), 2), optax.sgd(0.5), inner_start="cold"), 9, **settings)


def test_a_start_that_is_nan_later_is_told_as_one():
    """Descent on the square of .64 (sqrt(o) + 1) goes below 0 at once."""
    with pytest.raises(FloatingPointError, match=r"step \d: init_inner returned inner not finite.* in init_inner"):
        start(lambda outer: jnp.sqrt(outer) + 2.0, 0.2)


def test_a_derivative_that_is_infinite_beside_the_losses_is_told_by_the_function():
    with pytest.raises(FloatingPointError, match=r"step 0: the hypergradient is not finite .* at 0 in init_inner\."):
        start(jnp.sqrt, 0.0)
    problem = masked(init_outer=lambda key: {"rate": 0.0}, inner_loss=lambda w, o, b, k: jnp.sum((w - 1.0) ** 2))
    solver = Nested(problem, Unrolled(lambda outer: optax.sgd(jnp.sqrt(outer["rate"])), 2), optax.sgd(0.1))
    with pytest.raises(FloatingPointError, match=r"at 0 in the optimizer, which is a function of outer\."):
        run(solver, 2)
