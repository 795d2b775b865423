"""`Replay` in a folder: what a killed estimate goes on from, and what is refused."""

import json
import multiprocessing
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Replay, Unrolled
from bilevel.hypergradients import kept
from tests.bilevel.helpers import KEY, assert_close, assert_equal
from tests.bilevel.hypergradients.replayed import (
    OPTIMIZERS,
    PROBLEM,
    STEPS,
    batch,
    estimate,
    in_folder,
    init_inner,
    init_outer,
    inner_loss,
    outer_loss,
)


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


def test_killed_twenty_times_at_random_moments_it_ends_in_the_same_bits(tmp_path):
    """SIGKILL at any moment, of compilation too: what goes on from the folder is what was never interrupted."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax", "optax", "bilevel"])  # what takes a second, once for all of them

    def child(folder):
        process = context.Process(target=in_folder, args=(tmp_path / folder, tmp_path / f"{folder}.txt"))
        process.start()
        return process

    child("warm").join(120)  # compiles
    begun = time.monotonic()
    child("whole").join(120)
    takes, wanted = time.monotonic() - begun, (tmp_path / "whole.txt").read_text()
    rng, kills, ends, answer = np.random.default_rng(0), 0, 0, tmp_path / "killed.txt"
    while kills < 20 or not ends:
        process = child("killed")
        process.join(rng.uniform(0.3, 1.0) * takes if kills < 20 else 120)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join(120)
        if answer.exists() and answer.read_text():
            assert answer.read_text() == wanted
            answer.unlink()  # and from the beginning
            ends += 1
    assert ends and "0x" in wanted


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


def damage_names(folder):
    """Two files of the same arrays, each under the name of the other."""
    one, other = sorted(folder.glob("start-*"))[:2]
    one.rename(folder / "between")
    other.rename(one)
    (folder / "between").rename(other)
    return "holds other arrays: remove the folder"


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


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_swap, damage_names, damage_missing, damage_journal, damage_path]
)
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


@pytest.mark.parametrize("name", ["epoch.10.npz", "here.1.npz", "notes.part"])
def test_files_that_look_like_ones_own_are_left_alone_too(name, tmp_path):
    np.savez(tmp_path / "made.npz", a=np.arange(3))
    (tmp_path / "made.npz").rename(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match="is none of Replay's files: name a folder of its own"):
        estimate(Replay(OPTIMIZERS["adam"], STEPS, store=str(tmp_path)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: before}


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


SGD = optax.sgd(0.25)


def test_states_that_lie_there_already_need_no_more_room(tmp_path, monkeypatch):
    """Whoever has room for one estimate, and not for two, can go on."""
    folder = tmp_path / "kept"
    interrupted(folder)
    there = sum(path.stat().st_size for path in folder.glob("*.replay-state.npz"))
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    kept.refuse_without_room(folder, there + 1000)
    with pytest.raises(OSError, match=r"needs 1\.0\d kB there, and the disk has 1 kB free"):
        kept.refuse_without_room(folder, there + 1010)
