"""`Replay`: the hypergradient of `Unrolled` in segments, its schedules and stores."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Binomial, Levels, Replay, Unrolled
from bilevel.hypergradients import replay_programs
from bilevel.hypergradients.replay_actions import actions, most_kept
from bilevel.testing import ridge
from tests.bilevel.helpers import KEY, assert_close, assert_equal
from tests.bilevel.hypergradients.replayed import (
    OPTIMIZERS,
    PROBLEM,
    STEPS,
    X,
    Y,
    batch,
    estimate,
)

KEEPS = ("all", "sqrt", Levels(3), Binomial(1), Binomial(3))


def store(kind, tmp_path):
    return str(tmp_path / "kept") if kind == "folder" else kind


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 29])
def test_every_segment_is_reversed_once_from_a_start_that_is_kept(count, keep):
    starts, here, adjoint = {0}, 0, None
    for kind, at, is_kept in actions(count, keep):
        if kind == "load":
            assert at in starts
            here = at
        elif kind == "advance":
            assert here == at
            here = at + 1
            starts |= {here} if is_kept else set()
        elif kind == "outer":
            assert here == at == count and adjoint is None
            adjoint = count
        else:
            assert at in starts and adjoint == at + 1
            adjoint = at
            starts.remove(at)
    assert adjoint == 0 and not starts


@pytest.mark.parametrize(("keep", "most", "forward"), [("all", 64, 64), ("sqrt", 16, 128), (Levels(3), 12, 192)])
def test_fewer_states_cost_passes(keep, most, forward):
    todo = actions(64, keep)
    assert most_kept(todo) <= most
    assert sum(action.kind == "advance" for action in todo) <= forward


def test_a_binomial_schedule_keeps_as_many_as_it_says():
    assert most_kept(actions(64, Binomial(5))) <= 7


@pytest.mark.parametrize("kind", ["device", "host", "folder"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_the_hypergradient_of_unrolled(optimizer, kind, tmp_path):
    training = OPTIMIZERS[optimizer], STEPS
    expected = estimate(Unrolled(*training))
    found = estimate(Replay(*training, segment=3, store=store(kind, tmp_path)))
    assert_close(found.grad | {"key": None}, expected.grad | {"key": None}, 1e-12)
    assert_close((found.value, found.aux), (expected.value, expected.aux), 1e-12)
    trained = jax.jit(Unrolled(*training).solve)(PROBLEM, None, PROBLEM.start_outer(KEY), (X, Y), KEY)
    if optimizer == "injected":  # its start is fused with the first steps in one program, and not in the other
        assert_close(found.inner_state, trained, 1e-13)
    else:
        assert_equal(found.inner_state, trained)


@pytest.mark.parametrize(("segment", "keep"), [(1, "sqrt"), (2, Levels(3)), (2, Binomial(2)), (50, "sqrt")], ids=str)
def test_every_schedule_and_store_gives_the_same_bits(segment, keep, tmp_path):
    training = OPTIMIZERS["adam"], STEPS
    first = estimate(Replay(*training, segment=segment))
    other = estimate(Replay(*training, segment=segment, keep=keep, store=str(tmp_path / "kept")))
    assert_equal((first.value, first.inner_state), (other.value, other.inner_state))
    assert_equal(first.grad["decay"], other.grad["decay"])


def test_reverse_mode_and_a_warm_start():
    optimizer = OPTIMIZERS["injected"]
    state = Unrolled(optimizer, STEPS).solve(PROBLEM, None, PROBLEM.start_outer(KEY), (X, Y), KEY)
    expected = estimate(Unrolled(optimizer, STEPS), state=state)
    found = estimate(Replay(optimizer, STEPS, segment=4, mode="reverse", store="host"), state=state)
    assert_close(found.grad | {"key": None}, expected.grad | {"key": None}, 1e-12)


def test_batches_come_by_step_a_segment_at_a_time():
    asked = []

    def noted(step):
        asked.append(step)
        return batch(step)

    made = Replay(OPTIMIZERS["adam"], STEPS, segment=4)
    assert_equal(estimate(made, noted).grad["decay"], estimate(made).grad["decay"])
    forward, backward = list(range(STEPS)), [8, 9, 10, 4, 5, 6, 7, 0, 1, 2, 3]
    assert asked == [0, *forward, *backward]  # once before, to see what a batch is


class Drawn:
    """Batches in the order of `batch`, and on from there; its state is no number."""

    def __init__(self):
        self.at, self.read = 0, []

    def __next__(self):
        if self.at >= 2 * STEPS:
            raise StopIteration
        self.read.append(self.at)
        self.at += 1
        return batch((self.at - 1) % STEPS)

    def __iter__(self):
        return self

    def get_state(self):
        return {"at": [self.at]}

    def set_state(self, state):
        (self.at,) = state["at"]


def test_an_iterator_that_can_go_back_is_read_where_it_is_needed(tmp_path):
    made, source = Replay(OPTIMIZERS["adam"], STEPS, segment=3), Drawn()
    wanted, found = estimate(made, batch), estimate(made, source)
    assert_equal((wanted.value, wanted.grad["decay"]), (found.value, found.grad["decay"]))
    assert source.at == STEPS and max(source.read) == STEPS - 1
    assert source.read.count(STEPS - 1) < len(source.read) / STEPS + 2  # nothing is read anew to get to a step
    again = estimate(made, source)  # goes on from there: the same batches once more
    assert_equal(again.grad["decay"], wanted.grad["decay"])
    assert source.at == 2 * STEPS
    state = made.solve(PROBLEM, None, PROBLEM.start_outer(KEY), Drawn(), KEY)
    assert_equal(state.params["a"], wanted.inner_state.params["a"])

    # Killed, it goes on from the folder with the same batches: the iterator is back where it was.
    stored, source = Replay(OPTIMIZERS["adam"], STEPS, segment=3, store=str(tmp_path / "kept")), Drawn()

    def until(number, read=Drawn.__next__):
        if source.at > number:
            raise KeyboardInterrupt
        return read(source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drawn, "__next__", lambda self: until(7))
        with pytest.raises(KeyboardInterrupt):
            estimate(stored, source)
    assert source.at == 0
    resumed = estimate(stored, source)
    assert_equal(resumed.grad["decay"], wanted.grad["decay"])


def test_an_iterator_that_cannot_go_back_or_ends_is_a_sentence():
    with pytest.raises(ValueError, match="are an iterator, which only run reads"):
        estimate(Replay(OPTIMIZERS["adam"], STEPS), iter([batch(0)] * STEPS))
    short = Drawn()
    short.at = STEPS + 3
    with pytest.raises(ValueError, match="has no batch of inner step 8"):
        estimate(Replay(OPTIMIZERS["adam"], STEPS), short)


def test_batches_that_change_between_forward_and_backward_are_refused():
    calls = []

    def changing(step):
        calls.append(step)
        return X[step] + 0.1 * (len(calls) > STEPS + 3), Y[step]

    with pytest.raises(ValueError, match=r"batch\(step\) gave other inner batches for steps 8 to 10 than before"):
        estimate(Replay(OPTIMIZERS["adam"], STEPS, segment=4), changing)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda step: (X[step][: 4 - step], Y[step]), r"batch\(1\) of the inner batches is not like that of step 0"),
        (lambda step: X[step] if step else (X[0], Y[0]), r"batch\(1\) of the inner batches is not like that of step 0"),
        (lambda step: bilevel.FullBatch((X[0], Y[0])), r"batch\(0\) of the inner batches is a FullBatch: a function"),
    ],
)
def test_batches_of_other_kinds_are_one_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        estimate(Replay(OPTIMIZERS["adam"], STEPS, segment=4), wrong)


def test_gradients_that_are_arguments_are_not_used_up():
    """Of w^2 / 2 the gradient is w itself: the trained variable and outer are there after the backward pass."""
    halves = lambda tree: sum(0.5 * jnp.sum(x**2) for x in jax.tree.leaves(tree))  # noqa: E731
    problem = bilevel.Problem(
        lambda w, o, b, k: halves(w - o), lambda w, o, b, k: halves(w) + halves(o),
        lambda key, o: jnp.zeros(3), lambda key: jnp.arange(1.0, 4.0),
    )  # fmt: skip
    outer = problem.start_outer(KEY)
    for store in ("device", "host"):
        found = Replay(optax.sgd(0.5), 6, segment=2, store=store).estimate(problem, None, outer, None, None, KEY)
        wanted = Unrolled(optax.sgd(0.5), 6).estimate(problem, None, outer, None, None, KEY)
        assert_close((found.grad, found.inner_state.params), (wanted.grad, wanted.inner_state.params), 1e-13)
        assert outer.sum() == 6


def test_complex_variables():
    loss = lambda w, outer, batch, key: jnp.sum(jnp.abs(w - outer.astype(complex) * (1 + 2j)) ** 2)  # noqa: E731
    start = lambda key, outer: jnp.ones(3, complex)  # noqa: E731
    problem = bilevel.Problem(loss, lambda w, outer, batch, key: jnp.sum(jnp.abs(w) ** 2), start, lambda key: 0.5)
    one, other = (
        cls(optax.sgd(0.1), 6).estimate(problem, None, jnp.asarray(0.5), None, None, KEY) for cls in (Replay, Unrolled)
    )
    assert_close((one.value, one.grad), (other.value, other.grad), 1e-12)


def test_what_is_found_without_anything_to_differentiate_is_the_training():
    problem = bilevel.Problem(
        lambda w, outer, batch, key: jnp.mean((batch[0] @ w - batch[1]) ** 2) * outer.astype(w.dtype),
        lambda w, outer, batch, key: jnp.sum(w**2),
        lambda key, outer: jnp.ones((3, 1)),
        lambda key: jnp.asarray(3),
    )
    one, other = (estimate(cls(optax.sgd(0.1), STEPS), problem=problem) for cls in (Replay, Unrolled))
    assert one.grad is None and other.grad is None
    assert_close(one.value, other.value, 1e-12)

# --- where an estimator is used ------------------------------------------------------------------------------------


def test_it_is_refused_in_a_trace():
    made, outer = Replay(OPTIMIZERS["adam"], STEPS), PROBLEM.start_outer(KEY)
    for call in (
        lambda: jax.jit(lambda key: made.estimate(PROBLEM, None, outer, (X, Y), batch(0), key).value)(KEY),
        lambda: jax.vmap(lambda x: made.estimate(PROBLEM, None, outer, (x, Y), batch(0), KEY).value)(X[None]),
        lambda: jax.grad(lambda d: made.solve(PROBLEM, None, outer | {"decay": d}, (X, Y), KEY).params["a"].sum())(0.1),
    ):
        with pytest.raises(ValueError, match=r"Replay\.(estimate|solve) runs compiled programs from the host"):
            call()


def test_a_function_that_is_no_batch_of_a_step_is_one_sentence():
    with pytest.raises(ValueError, match=r"but must be batch\(step\): the batch of an inner step"):
        estimate(Replay(OPTIMIZERS["adam"], STEPS), lambda step, more: batch(step))


@pytest.mark.parametrize(
    "settings", [{"segment": 0}, {"store": ""}, {"store": 3}, {"store": "Host"}, {"keep": "some"}, {"mode": "forward"}]
)
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=r"Replay\("):
        Replay(OPTIMIZERS["adam"], STEPS, **settings)


def test_run_takes_its_steps_one_by_one(tmp_path):
    problem, train, val = ridge()

    def search(hypergradient, steps=5, **options):
        solver = bilevel.Nested(problem, hypergradient, optax.sgd(1.0))
        data = {"inner_data": bilevel.Batches(train, 1), "outer_data": val}
        return bilevel.run(solver, **data, steps=steps, progress=False, **options)

    made = Replay(optax.sgd(0.5), 20, segment=6, store=str(tmp_path / "kept"))
    one, other = search(made), search(Unrolled(optax.sgd(0.5), 20))
    for name in other.history:
        np.testing.assert_allclose(one.history[name], other.history[name], rtol=1e-10, err_msg=name)
    search(made, steps=3, checkpoint_dir=tmp_path / "run")
    assert_equal(search(made, checkpoint_dir=tmp_path / "run").outer, one.outer)


def test_it_is_measured_like_others():
    problem, train, val = ridge()
    ways = {"unrolled": Unrolled(optax.sgd(0.5), 9), "replay": Replay(optax.sgd(0.5), 9)}
    data = {"inner_data": bilevel.Batches(train, 1), "outer_data": val}
    found = bilevel.compare(problem, ways, reference="unrolled", samples=3, **data)
    assert found["replay"].relative_error < 1e-12 and found["replay"].temporary > 0
    np.testing.assert_allclose(found["replay"].variance, found["unrolled"].variance, rtol=1e-10)
    # One more evaluation of each step than keeping all states costs.
    np.testing.assert_allclose(found["replay"].gradients, found["unrolled"].gradients + 9, rtol=0.05)
    check = bilevel.testing.check_hypergradient(problem, ways["replay"], inner_data=train, outer_data=val)
    assert check.verdict == "exact"


def test_compilations_do_not_depend_on_the_number_of_steps():
    problem, train, val = ridge()

    def compiled(steps):
        programs = replay_programs.advanced, replay_programs.reversed_segment
        before = [program._cache_size() for program in programs]
        made = Replay(SGD, steps, segment=4)
        made.estimate(problem, None, jnp.zeros(()), bilevel.FullBatch(train), val, KEY)
        return [program._cache_size() - count for program, count in zip(programs, before, strict=True)]

    assert compiled(8) == [1, 1] and compiled(400) == [0, 0]


SGD = optax.sgd(0.25)
