"""`Replay`: the hypergradient of `Unrolled` in segments, its stores, and what a killed estimate goes on from."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Binomial, Levels, Replay, Unrolled
from bilevel.hypergradients import kept, replay_programs
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
    init_inner,
    init_outer,
    inner_loss,
    outer_loss,
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


# --- a folder ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_killed_at_any_write_it_goes_on_and_ends_in_the_same_bits(tmp_path, monkeypatch):
    made = Replay(OPTIMIZERS["adam"], STEPS, segment=4, keep="sqrt", store=str(tmp_path / "kept"))
    whole, replace = estimate(made, batch), os.replace
    moment = 0
    while True:
        moment += 4
        left, asked = [moment], []

        def dying(source, target, left=left, before=moment // 4 % 2):
            left[0] -= 1
            if left[0] == 0 and before:
                raise Killed  # before the file is there
            replace(source, target)
            if left[0] == 0:
                raise Killed  # after it

        def noted(step, asked=asked):
            asked.append(step)
            return batch(step)

        monkeypatch.setattr(kept.os, "replace", dying)
        try:
            estimate(made, batch)
        except Killed:
            monkeypatch.setattr(kept.os, "replace", replace)
            again = estimate(made, noted)
            assert_equal((whole.value, whole.grad["decay"], whole.aux), (again.value, again.grad["decay"], again.aux))
        else:
            break
        assert not list((tmp_path / "kept").iterdir())
    assert moment > 20


CHILD = """
    import sys, time
    import jax, optax
    jax.config.update("jax_enable_x64", True)
    sys.path.insert(0, sys.argv[2])
    from bilevel import Replay
    from tests.bilevel.hypergradients.replayed import OPTIMIZERS, batch, estimate

    def slow(step):
        time.sleep(0.02)
        return batch(step)

    found = estimate(Replay(OPTIMIZERS["adam"], 11, segment=2, store=sys.argv[1]), slow)
    print("done", float(found.grad["decay"]).hex())
"""


def test_a_process_that_is_killed_goes_on(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD))
    root = str(Path(__file__).parents[3])
    command = [sys.executable, str(script), str(tmp_path / "kept"), root]
    whole = subprocess.run(command[:2] + [str(tmp_path / "other"), root], capture_output=True, text=True, cwd=root)
    kills, found = 0, ""
    for attempt in range(6):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)
        journal, end = tmp_path / "kept" / kept.JOURNAL, time.monotonic() + 120
        before = json.loads(journal.read_text())["done"] if journal.exists() else 0
        while attempt < 4 and child.poll() is None and time.monotonic() < end:
            done = json.loads(journal.read_text())["done"] if journal.exists() else 0
            if done > before:
                child.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        found, said = child.communicate(timeout=120)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, said
    assert kills >= 2 and found == whole.stdout != ""


def interrupted(folder, after=8, **settings):
    """A folder with an unfinished estimate."""

    def stopping(step):
        if len(asked) > after:
            raise KeyboardInterrupt
        asked.append(step)
        return batch(step)

    asked = []
    made = Replay(OPTIMIZERS["adam"], STEPS, segment=3, store=str(folder), **settings)
    with pytest.raises(KeyboardInterrupt):
        estimate(made, stopping)
    return made


def test_an_interrupt_costs_a_segment_at_most(tmp_path):
    made, asked = interrupted(tmp_path / "kept", after=8), []

    def noted(step):
        asked.append(step)
        return batch(step)

    estimate(made, noted)
    # Of the third segment, steps 6 to 8, two batches had been asked for: it is the one that is lost.
    assert asked == [0, *range(6, STEPS), *range(9, STEPS), *range(6, 9), *range(3, 6), *range(3)]


def test_another_problem_is_refused_and_another_point_is_begun_anew(tmp_path):
    interrupted(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"kept holds an unfinished estimate of another problem \(other: settings"):
        estimate(Replay(OPTIMIZERS["adam"], STEPS, segment=4, store=str(tmp_path / "kept")), batch)
    twice = lambda w, outer, batch, key: (2 * inner_loss(w, outer, batch, key)[0], {"fit": jnp.zeros(())})  # noqa: E731
    other = bilevel.Problem(twice, outer_loss, init_inner, init_outer, has_aux=True)
    made = Replay(OPTIMIZERS["adam"], STEPS, segment=3, store=str(tmp_path / "kept"))
    with pytest.raises(ValueError, match="other: computation"):
        estimate(made, batch, problem=other)
    outer = PROBLEM.start_outer(KEY) | {"decay": jnp.asarray(-1.0)}
    with pytest.warns(UserWarning, match=r"unfinished estimate at another point \(other: outer\): it is begun anew"):
        found = estimate(made, batch, outer=outer)
    assert_close(found.grad["decay"], estimate(Unrolled(OPTIMIZERS["adam"], STEPS), outer=outer).grad["decay"], 1e-12)


CAPTURING = ("inner_loss", "outer_loss", "init_inner", "optimizer", "rule")


def capturing(place, array):
    """A problem and an optimizer, one function of which closes over an array."""
    there = lambda name: array if name == place else jnp.ones(6)  # noqa: E731

    @jax.custom_vjp
    def ruled(x):
        return x

    ruled.defvjp(lambda x: (x, None), lambda _, g: (g * there("rule")[0],))
    # A function compiled inside holds its constants itself.
    inner = jax.jit(lambda w, outer: jnp.sum((ruled(w) - outer * there("inner_loss")) ** 2))
    problem = bilevel.Problem(
        lambda w, outer, batch, key: inner(w, outer),
        lambda w, outer, batch, key: jnp.sum((w - there("outer_loss")) ** 2),
        lambda key, outer: 0.1 * there("init_inner"),
        lambda key: jnp.ones(6),
    )
    return problem, lambda outer: optax.sgd(0.1 * there("optimizer")[0] * jnp.exp(outer[0]))


@pytest.mark.filterwarnings("ignore::bilevel.CustomDerivativeWarning")
@pytest.mark.parametrize("place", CAPTURING)
def test_a_folder_knows_the_arrays_that_functions_captured(place, tmp_path):
    def search(array, stop=None):
        def ones(step):
            if step == stop:
                raise KeyboardInterrupt
            return jnp.ones(1)

        problem, optimizer = capturing(place, array)
        made = Replay(optimizer, 6, segment=2, store=str(tmp_path / "kept"))
        return made.estimate(problem, None, jnp.ones(6), ones, None, KEY)

    with pytest.raises(KeyboardInterrupt):
        search(jnp.ones(6), stop=4)
    with pytest.raises(ValueError, match=r"another problem \(other: .*(captured|computation)"):
        search(2 * jnp.ones(6))
    assert np.isfinite(search(jnp.ones(6)).grad).all()


def damage_truncate(folder):
    file = max(folder.glob("*.npz"), key=lambda path: path.name.startswith("here"))
    file.write_bytes(file.read_bytes()[:-40])
    return rf"{file.name} is damaged: remove the folder"


def damage_swap(folder):
    here, other = next(folder.glob("here*")), next(folder.glob("trace*"))
    shutil.copy(other, here)
    return rf"{here.name} holds other arrays: remove the folder"


def damage_missing(folder):
    file = next(folder.glob("start-0*"))
    file.unlink()
    return rf"{file.name} is missing"


def damage_journal(folder):
    (folder / kept.JOURNAL).write_text('{"version": 1')
    return "replay.json is damaged"


def damage_path(folder):
    note = json.loads((folder / kept.JOURNAL).read_text())
    note["files"]["here"] = "../here.1.npz"
    (folder / kept.JOURNAL).write_text(json.dumps(note))
    return "replay.json is damaged"


@pytest.mark.parametrize("damage", [damage_truncate, damage_swap, damage_missing, damage_journal, damage_path])
def test_what_is_damaged_is_refused_by_name(damage, tmp_path):
    made = interrupted(tmp_path / "kept")
    sentence = damage(tmp_path / "kept")
    with pytest.raises(ValueError, match=sentence):
        estimate(made, batch)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"holds letter\.txt, which is none of Replay's files"):
        estimate(Replay(OPTIMIZERS["adam"], STEPS, store=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_folder_that_cannot_be_made_is_one_sentence():
    with pytest.raises(ValueError, match="no such folder can be made"):
        estimate(Replay(OPTIMIZERS["adam"], STEPS, store="/proc/none/kept"))


def test_a_disk_without_room_is_said_before_and_loses_nothing_later(tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    usage = lambda free: lambda path: shutil._ntuple_diskusage(10, 10 - free, free)  # noqa: E731
    monkeypatch.setattr(kept.shutil, "disk_usage", usage(1))
    with pytest.raises(OSError, match=r"needs .* there, and the disk has 1 bytes free"):
        estimate(Replay(OPTIMIZERS["adam"], STEPS, segment=3, store=str(folder)))
    monkeypatch.undo()
    made, fsync, writes = interrupted(folder), os.fsync, []

    def full(number):
        writes.append(number)
        if len(writes) == 3:
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(kept.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\): what was done before is kept"):
        estimate(made, batch)
    monkeypatch.undo()
    whole = estimate(Replay(OPTIMIZERS["adam"], STEPS, segment=3))
    assert_equal(estimate(made, batch).grad["decay"], whole.grad["decay"])


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
