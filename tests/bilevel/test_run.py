import importlib
import itertools
import sys

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Batches, Nested, Unrolled
from tests.bilevel.helpers import KEY, LINE, LINE_SOLVER, assert_equal

TRAIN = {"x": jax.random.normal(jax.random.key(1), (11, 3)), "id": jnp.arange(11), "key": jax.random.split(KEY, 11)}
TEST = jax.random.normal(jax.random.key(2), (6, 3))


def inner_loss(w, outer, batch, key):
    noise = jax.vmap(lambda k: jax.random.normal(k, (3,)))(batch["key"])
    mask = jax.random.bernoulli(outer["key"], 0.5, (3,))
    return jnp.mean((jnp.where(mask, batch["x"] + 0.1 * noise, 0.0) @ w - outer["a"][batch["id"]]) ** 2)


def outer_loss(w, outer, batch, key):
    return jnp.mean((batch @ w - 1.0) ** 2) + 0.01 * jnp.sum(outer["a"] ** 2)


PROBLEM = bilevel.Problem(
    inner_loss, outer_loss, lambda key, outer: jnp.zeros(3), lambda key: {"a": jnp.full(11, 0.1), "key": key, "n": 5}
)
SOLVER = Nested(PROBLEM, Unrolled(optax.adam(0.1), 3, checkpoint="none"), optax.adam(0.05))
DATA = {"inner_data": Batches(TRAIN, 4), "outer_data": Batches(TEST, 2)}


def run(solver=SOLVER, steps=6, **settings):
    return bilevel.run(solver, steps=steps, progress=False, **(settings or DATA))


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


def test_without_a_key_it_is_key_0():
    assert_equal(run(steps=2, **DATA).state, run(steps=2, **DATA, key=jax.random.key(0)).state)
    assert not np.array_equal(run(steps=2, **DATA).outer["a"], run(steps=2, **DATA, key=KEY).outer["a"])


def test_bare_arrays_are_the_full_batch_at_every_step():
    whole = run(steps=3, inner_data=TRAIN, outer_data=TEST)
    wrapped = run(steps=3, inner_data=bilevel.FullBatch(TRAIN), outer_data=bilevel.FullBatch(TEST))
    assert_equal(whole.state, wrapped.state)
    # one row more than there are inner steps: nobody may take the rows for steps
    assert len(TRAIN["id"]) != SOLVER.inner_batches


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


class Killed(BaseException):
    pass


def killer(at):
    def callback(step, state, metrics):
        if step >= at:
            raise Killed

    return callback


@pytest.mark.parametrize("data", ["batches", "arrays"])
def test_killed_and_resumed_is_never_killed(tmp_path, data):
    data = DATA if data == "batches" else {"inner_data": TRAIN, "outer_data": TEST}
    whole = run(steps=7, **data)
    for at in (1, 3):
        with pytest.raises(Killed):
            run(steps=7, **data, checkpoint_dir=tmp_path, callbacks=[killer(at)])
    resumed = run(steps=7, **data, checkpoint_dir=tmp_path)
    assert_equal(resumed.state, whole.state)
    assert_equal(resumed.history, whole.history)
    # and once more, with nothing left to do
    again = run(steps=7, **data, checkpoint_dir=tmp_path)
    assert_equal(again.state, whole.state)
    assert_equal(again.history, whole.history)


def test_a_finished_run_goes_on_where_it_ended(tmp_path):
    run(steps=3, **DATA, checkpoint_dir=tmp_path)
    longer = run(steps=6, **DATA, checkpoint_dir=tmp_path)
    whole = run(steps=6, **DATA)
    assert_equal(longer.state, whole.state)


def test_a_resumed_run_traces_once(tmp_path):
    traces = []

    def counts(**settings):
        def counting(w, outer, batch, key):
            traces.append(1)
            return jnp.sum((w - outer) ** 2)

        traces.clear()
        problem = bilevel.Problem(counting, LINE.outer_loss, LINE.init_inner, LINE.init_outer)
        run(Nested(problem, Unrolled(optax.sgd(0.1), 3), optax.sgd(0.1)), 6, **settings)
        return len(traces)

    once = counts()
    with pytest.raises(Killed):
        counts(checkpoint_dir=tmp_path, callbacks=[killer(2)])
    assert counts(checkpoint_dir=tmp_path) == once > 0


class Counter:
    """An iterator of batches that can be put back where it was."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        rows = (np.arange(4) + 4 * self.at) % 11
        return jax.tree.map(lambda x: x[rows], TRAIN)

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def test_iterators_give_a_batch_for_each_inner_step():
    counter = Counter()
    by_iterator = run(steps=3, inner_data=counter, outer_data=TEST)
    assert counter.at == 3 * SOLVER.inner_batches
    counter, state = Counter(), SOLVER.init(jax.random.split(jax.random.key(0), 3)[0])
    for _ in range(3):
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *itertools.islice(counter, 3))
        state, _ = jax.jit(Nested.step)(SOLVER, state, stacked, TEST)
    np.testing.assert_allclose(by_iterator.outer["a"], state.outer["a"], rtol=1e-12)


def test_iterators_resume_where_they_stood(tmp_path):
    whole = run(steps=5, inner_data=Counter(), outer_data=TEST)
    with pytest.raises(Killed):
        run(steps=5, inner_data=Counter(), outer_data=TEST, checkpoint_dir=tmp_path, callbacks=[killer(2)])
    resumed = run(steps=5, inner_data=Counter(), outer_data=TEST, checkpoint_dir=tmp_path)
    assert_equal(resumed.state, whole.state)


def test_a_plain_iterator_is_not_resumed(tmp_path):
    run(steps=2, inner_data=iter(Counter()), outer_data=TEST, checkpoint_dir=tmp_path)
    plain = (batch for batch in Counter())
    with pytest.raises(ValueError, match="cannot be resumed exactly from a plain iterator"):
        run(steps=4, inner_data=plain, outer_data=TEST, checkpoint_dir=tmp_path)


def test_an_iterator_that_ends_is_an_error_that_says_when():
    few = itertools.islice(Counter(), 7)
    with pytest.raises(ValueError, match="ended at outer step 2"):
        run(steps=4, inner_data=few, outer_data=TEST)


def test_an_interrupt_while_the_device_is_busy_keeps_what_is_done(tmp_path):
    module = importlib.import_module("bilevel.run")
    chunk, whole = module._chunk, run(steps=6, **DATA)

    class Busy:
        """Results that take their time: the interrupt comes while they are waited for."""

        def __init__(self, value):
            self.value = value

        def __array__(self, *args, **kwargs):
            raise KeyboardInterrupt

    calls = []

    def interrupted(*args):
        calls.append(1)
        state, rows = chunk(*args)
        return (state, rows) if len(calls) < 3 else (state, jax.tree.map(Busy, rows))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_chunk", interrupted)
        run(steps=6, **DATA, checkpoint_dir=tmp_path)
    steps = []
    resumed = run(steps=6, **DATA, checkpoint_dir=tmp_path, callbacks=[lambda step, state, rows: steps.append(step)])
    assert steps[0] > 1
    assert_equal(resumed.state, whole.state)
    assert_equal(resumed.history, whole.history)


def test_a_checkpoint_of_another_problem_is_refused_in_a_sentence(tmp_path):
    run(steps=1, **DATA, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="Checkpoint 1 does not fit this solver or is damaged"):
        run(LINE_SOLVER, 2, checkpoint_dir=tmp_path)


def test_a_damaged_checkpoint_is_refused_in_a_sentence(tmp_path):
    run(LINE_SOLVER, 2, checkpoint_dir=tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file() and "metadata" not in path.name.lower():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="Checkpoint 2 does not fit this solver or is damaged"):
        run(LINE_SOLVER, 3, checkpoint_dir=tmp_path)


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


def test_what_is_recorded_is_in_the_history():
    result = run(LINE_SOLVER, 5, record=lambda state: {"outer": state.outer, "step": state.step})
    np.testing.assert_array_equal(result.history["step"], np.arange(1, 6))
    assert result.history["outer"].shape == (5, 2)
    np.testing.assert_array_equal(result.history["outer"][-1], result.outer)


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
        run(solver, 40, inner_data=jnp.zeros(1), checkpoint_dir=tmp_path, callbacks=[lambda step, *_: steps.append(step)])
    assert not steps or steps[0] > 1


def test_a_start_that_is_not_finite_is_told():
    problem = bilevel.Problem(LINE.inner_loss, LINE.outer_loss, LINE.init_inner, lambda key: jnp.full(2, jnp.nan))
    with pytest.raises(FloatingPointError, match=r"already not finite.*start values"):
        run(Nested(problem, Unrolled(optax.sgd(0.1), 2), optax.sgd(0.1)), 2, key=KEY)


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


def test_progress_where_there_is_no_terminal(capfd):
    bilevel.run(LINE_SOLVER, steps=3)
    assert "3/3" in capfd.readouterr().err


def test_progress_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert len(bilevel.run(LINE_SOLVER, steps=3).history["outer_loss"]) == 3


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
