import importlib
import itertools

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Batches, Nested, Unrolled
from bilevel.running.chunks import History, batches, wanted_batches
from tests.bilevel.helpers import KEY, LINE, LINE_SOLVER, assert_equal
from tests.bilevel.trainings import DATA, PROBLEM, SOLVER, TEST, TRAIN, Counter, Killed, killer, run


def test_the_loop_is_the_step_repeated():
    result = run(steps=4, **DATA, key=KEY)
    solver_key, inner_key, outer_key = jax.random.split(KEY, 3)
    state, rows = SOLVER.init(solver_key), []
    step = jax.jit(Nested.step)
    for t in range(4):
        inner = DATA["inner_data"].take(inner_key, 3 * t, 3)
        outer = DATA["outer_data"].take(outer_key, t, 1)
        outer = jax.tree.map(lambda x: x[outer.index[0]], outer.arrays)  # noqa: B023
        state, metrics = step(SOLVER, state, inner, outer)
        rows.append(metrics)
    np.testing.assert_allclose(result.outer["a"], state.outer["a"], rtol=1e-12)
    assert_equal(result.outer["key"], state.outer["key"])
    np.testing.assert_allclose(result.inner.params, state.inner.params, rtol=1e-12)
    for name in rows[0]:
        assert result.history[name].shape == (4,)
        np.testing.assert_allclose(result.history[name], [row[name] for row in rows], rtol=1e-12)


def test_the_batches_of_a_step_are_those_of_its_number():
    """Whether they are shuffled for one step or for many, and wherever in an epoch that begins."""
    data = Batches(jnp.arange(9), 2), Batches(jnp.arange(5), 2)  # four and two batches an epoch
    keys, wanted = jax.random.split(KEY), wanted_batches(LINE_SOLVER)
    assert wanted == (3, 1)
    start = LINE_SOLVER.init(KEY)
    for number in (1, 2, 3):
        state = start._replace(step=jnp.int32(number))
        inner = data[0].take(keys[0], 3 * number, 3).index
        outer = data[1].take(keys[1], number, 1).index[0]
        for first in {None, 1, number}:
            sources = data
            if first is not None:
                sources = [s.shuffle(k, first * n, 4 * n) for s, k, n in zip(data, keys, wanted, strict=True)]
            found = batches(LINE_SOLVER, state, list(zip(sources, keys, strict=True)))
            np.testing.assert_array_equal(found[0].index, inner)
            np.testing.assert_array_equal(found[1].index, outer)


def test_a_run_that_returns_at_every_step_is_the_same_run():
    assert DATA["inner_data"].per_epoch == 2  # and three batches a step: every other step begins inside an epoch
    seen = []
    alone = run(steps=5, **DATA, callbacks=[lambda step, state, rows: seen.append(step)], callback_every=1)
    assert seen == [1, 2, 3, 4, 5]
    assert_equal(alone.state, run(steps=5, **DATA).state)


def test_without_a_key_it_is_key_0():
    assert_equal(run(steps=2, **DATA).state, run(steps=2, **DATA, key=jax.random.key(0)).state)
    assert not np.array_equal(run(steps=2, **DATA).outer["a"], run(steps=2, **DATA, key=KEY).outer["a"])


def test_bare_arrays_are_the_full_batch_at_every_step():
    whole = run(steps=3, inner_data=TRAIN, outer_data=TEST)
    wrapped = run(steps=3, inner_data=bilevel.FullBatch(TRAIN), outer_data=bilevel.FullBatch(TEST))
    assert_equal(whole.state, wrapped.state)
    # one row more than there are inner steps: nobody may take the rows for steps
    assert len(TRAIN["id"]) != SOLVER.inner_batches_per_step


def test_one_trace_however_many_chunks():
    def traced(steps, inner_steps):
        traces = []

        def counting(w, outer, batch, key):
            traces.append(1)
            return jnp.sum((w - outer) ** 2)

        problem = bilevel.Problem(counting, LINE.outer_loss, LINE.init_inner, LINE.init_outer)
        solver = Nested(problem, Unrolled(optax.sgd(0.1), inner_steps), optax.sgd(0.1))
        chunks = []
        run(solver, steps, callbacks=[lambda step, state, rows: chunks.append(step)])
        return len(traces), len(chunks)

    once, _ = traced(1, 5)
    often, chunks = traced(40, 5)
    assert chunks > 3 and often == once > 0
    assert traced(2, 64)[0] == once


def test_a_compiled_run_is_found_again():
    traces = []

    def counting(w, outer, batch, key):
        traces.append(1)
        return jnp.sum((w - outer) ** 2)

    problem = bilevel.Problem(counting, LINE.outer_loss, LINE.init_inner, LINE.init_outer)
    solver = Nested(problem, Unrolled(optax.sgd(0.1), 3), optax.sgd(0.1))
    run(solver, 5, key=KEY)
    count = len(traces)
    run(solver, 5, key=jax.random.key(11))
    assert len(traces) == count


def test_iterators_give_a_batch_for_each_inner_step():
    counter = Counter()
    by_iterator = run(steps=3, inner_data=counter, outer_data=TEST)
    assert counter.at == 3 * SOLVER.inner_batches_per_step
    counter, state = Counter(), SOLVER.init(jax.random.split(jax.random.key(0), 3)[0])
    for _ in range(3):
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *itertools.islice(counter, 3))
        state, _ = jax.jit(Nested.step)(SOLVER, state, stacked, TEST)
    np.testing.assert_allclose(by_iterator.outer["a"], state.outer["a"], rtol=1e-12)


def test_an_iterator_that_ends_is_an_error_that_says_when():
    few = itertools.islice(Counter(), 7)
    with pytest.raises(ValueError, match="ended at outer step 2"):
        run(steps=4, inner_data=few, outer_data=TEST)


def test_callbacks_see_new_rows_and_can_stop():
    seen = []

    def callback(step, state, metrics):
        assert int(state.step) == step
        seen.append((step, len(metrics["outer_loss"])))
        return step >= 3

    result = run(LINE_SOLVER, 500, callbacks=[callback, lambda *_: None])
    steps = [step for step, _ in seen]
    assert steps == sorted(set(steps)) and steps[-1] == sum(count for _, count in seen)
    assert 3 <= steps[-1] < 500 and len(result.history["outer_loss"]) == steps[-1] == int(result.state.step)


def test_a_metric_that_a_solver_does_not_have_is_told_with_those_that_it_has():
    with pytest.raises(KeyError, match="direction_norm") as raised:
        run(LINE_SOLVER, 2, callbacks=[lambda step, state, metrics: metrics["direction_norm"]])
    assert raised.value.__notes__[-1].startswith("The metrics of a step of Nested here are hvps, hypergradient_norm, ")
    with pytest.raises(KeyError) as raised:
        run(LINE_SOLVER, 2, callbacks=[lambda step, state, metrics: {}[0]])
    assert not getattr(raised.value, "__notes__", None)


def test_what_is_recorded_is_in_the_history():
    result = run(LINE_SOLVER, 5, record=lambda state: {"outer": state.outer, "step": state.step})
    np.testing.assert_array_equal(result.history["step"], np.arange(1, 6))
    after = [run(LINE_SOLVER, steps).outer for steps in range(1, 6)]
    np.testing.assert_array_equal(result.history["outer"], after)


@pytest.mark.parametrize("steps", [0, -2, 1.5])
def test_a_number_of_steps_that_is_none_is_refused(steps):
    with pytest.raises(ValueError, match=r"run\(steps="):
        run(LINE_SOLVER, steps)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner_data": {}}, "inner_data .*empty"),
        ({"inner_data": {"x": np.ones((3, 1)), "y": np.ones(4)}}, "inner_data .*one row count"),
        ({"outer_data": np.zeros((0, 2))}, "outer_data .*empty"),
        ({"outer_data": "train.csv"}, "outer_data is a str"),
        ({"inner_data": print}, "inner_data is a builtin_function_or_method"),
    ],
)
def test_unusable_data_is_refused_in_a_sentence(data, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(LINE_SOLVER, 2, **data)
    assert "\n" not in str(caught.value)


def dataset():
    rows = {"x": np.asarray(TRAIN["x"]), "id": np.arange(11), "seed": np.arange(11)}
    return datasets.Dataset.from_dict(rows).with_format("numpy")  # whatever format it was used in: this one rounds


def dataset_problem():
    def inner(w, outer, batch, key):
        return jnp.mean((batch["x"] @ w - outer["a"][batch["id"]]) ** 2)

    return bilevel.Problem(
        inner,
        lambda w, outer, batch, key: jnp.mean((batch["x"] @ w - 1.0) ** 2),
        PROBLEM.init_inner,
        PROBLEM.init_outer,
    )


@pytest.mark.filterwarnings("ignore::bilevel.StructuralZeroWarning")
def test_a_dataset_is_sampled_on_the_device_and_resumed_exactly(tmp_path):
    solver = Nested(dataset_problem(), Unrolled(optax.adam(0.1), 3), optax.adam(0.05))
    source, held_out = dataset(), dataset().select(range(6))
    arrays = {"x": jnp.asarray(TRAIN["x"]), "id": jnp.arange(11), "seed": jnp.arange(11)}
    by_arrays = run(solver, inner_data=Batches(arrays, 4), outer_data=jax.tree.map(lambda x: x[:6], arrays))
    data = {"inner_data": Batches(source, 4), "outer_data": held_out}
    whole = run(solver, **data)
    assert_equal(whole.state, by_arrays.state)
    with pytest.raises(Killed):
        run(solver, **data, checkpoint_dir=tmp_path, callbacks=[killer(2)])
    assert_equal(run(solver, **data, checkpoint_dir=tmp_path).state, whole.state)
    assert np.isfinite(
        bilevel.compare(
            solver.problem,
            {"one": solver.hypergradient},
            reference="one",
            inner_data=data["inner_data"],
            outer_data=held_out,
            repeats=1,
        )["one"].norm
    )


def test_a_dataset_may_come_as_an_iterator_of_batches():
    solver = Nested(dataset_problem(), Unrolled(optax.adam(0.1), 3), optax.adam(0.05))
    batches = dataset().with_format("numpy").repeat(4).iter(batch_size=4, drop_last_batch=True)
    stream = (batch | {"x": batch["x"].astype(float)} for batch in batches)  # datasets' numbers are float32
    held_out = {"x": TRAIN["x"], "id": jnp.arange(11), "seed": jnp.arange(11)}
    result = run(solver, steps=3, inner_data=stream, outer_data=held_out)
    assert np.isfinite(result.history["outer_loss"]).all()


def test_the_history_takes_the_memory_of_its_rows():
    history, buffer = History(), np.zeros((512, 1000))
    for i in range(60):
        buffer[0] = i
        history.append({"x": buffer, "n": np.full(512, i)}, 1)
    rows = history.rows()
    np.testing.assert_array_equal(rows["x"], np.broadcast_to(np.arange(60.0)[:, None], (60, 1000)))
    np.testing.assert_array_equal(history.rows(57)["n"], [57, 58, 59])
    assert rows["x"].base.nbytes <= 1.5 * rows["x"].nbytes + 8000 and not np.shares_memory(rows["x"], buffer)
    with pytest.raises(ValueError, match=r"rows of metrics are x float64\[3\], but .* n int64\[\], x float64\[1000\]"):
        history.append({"x": np.zeros((1, 3))}, 1)


def test_rows_that_are_large_come_in_smaller_chunks(monkeypatch):
    record = lambda state: {"outer": state.outer, "large": jnp.full(4, state.outer[0])}  # noqa: E731
    whole = run(LINE_SOLVER, 30, record=record)
    jax.clear_caches()
    monkeypatch.setattr(importlib.import_module("bilevel.running.chunks"), "BUFFER_BYTES", 300)
    monkeypatch.setattr(importlib.import_module("bilevel.running.loop"), "CHUNK_SECONDS", 100.0)
    counts = []
    append = History.append
    monkeypatch.setattr(History, "append", lambda self, rows, count: (counts.append(count), append(self, rows, count)))
    assert_equal(run(LINE_SOLVER, 30, record=record).history, whole.history)
    assert 1 < max(counts) <= 300 // (8 * 6) and sum(counts) == 30


def test_what_a_callback_writes_into_its_rows_is_its_own():
    def spoil(step, state, rows):
        for values in rows.values():
            values[...] = -1

    spoiled = run(LINE_SOLVER, 5, callbacks=[spoil], callback_every=2)
    assert_equal(spoiled.history, run(LINE_SOLVER, 5).history)


SCHEDULES = {
    "negative": (lambda step: 0.1 - 0.04 * step, "-0.02 for step 3"),
    "nan": (lambda step: jnp.where(step < 2, 0.1, jnp.nan), "nan for step 2"),
    "infinite": (lambda step: 0.1 / jnp.maximum(3.0 - step, 0.0), "inf for step 3"),
    "of optax": (optax.linear_schedule(0.1, -0.1, 6), r"-0\.0333333 for step 4"),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("field", ["inner_step", "outer_step", "linear_step"])
def test_a_schedule_that_leaves_its_range_is_refused_before_the_first_step(name, field):
    schedule, message = SCHEDULES[name]
    worked = []
    solver = bilevel.SOBA(LINE, **({"inner_step": 0.1, "outer_step": 0.1} | {field: schedule}))
    with pytest.raises(ValueError, match=rf"SOBA\({field}=.*the schedule gives {message}, but a value must be .* >= 0"):
        run(solver, 5, callbacks=[lambda *_: worked.append(1)])
    assert not worked
    assert len(run(solver, 2).history["outer_loss"]) == 2


def test_a_share_that_leaves_its_range_is_refused(tmp_path):
    solver = bilevel.MASOBA(LINE, 0.1, 0.1, average=lambda step: 0.5 + 0.2 * step)
    with pytest.raises(ValueError, match=r"MASOBA\(average=.*gives 1\.1 for step 3, but a value must be .* <= 1"):
        run(solver, 5)
