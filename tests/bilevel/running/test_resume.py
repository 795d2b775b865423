"""Interrupted and resumed runs equal those that were not; what is not the same run is refused."""

import dataclasses
import importlib
import json
import logging
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
import bilevel.extend
from bilevel import Batches, Nested, Unrolled
from bilevel.running.fingerprint import differences
from tests.bilevel.helpers import LINE, LINE_SOLVER, assert_equal
from tests.bilevel.trainings import DATA, TEST, TRAIN, Counter, Killed, killer, run


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


def test_iterators_resume_where_they_stood(tmp_path):
    whole = run(steps=5, inner_data=Counter(), outer_data=TEST)
    with pytest.raises(Killed):
        run(steps=5, inner_data=Counter(), outer_data=TEST, checkpoint_dir=tmp_path, callbacks=[killer(2)])
    resumed = run(steps=5, inner_data=Counter(), outer_data=TEST, checkpoint_dir=tmp_path)
    assert_equal(resumed.state, whole.state)


def test_an_iterator_over_other_data_is_refused(tmp_path):
    run(steps=2, inner_data=Counter(), outer_data=TEST, checkpoint_dir=tmp_path)

    class Other(Counter):
        def __next__(self):
            return super().__next__() | {"x": jnp.ones((4, 3))}

    with pytest.raises(ValueError, match=r"inner_data: the iterator gives other batches .* before outer step 2"):
        run(steps=4, inner_data=Other(), outer_data=TEST, checkpoint_dir=tmp_path)


def test_a_plain_iterator_is_not_resumed(tmp_path):
    run(steps=2, inner_data=iter(Counter()), outer_data=TEST, checkpoint_dir=tmp_path)
    plain = (batch for batch in Counter())
    with pytest.raises(ValueError, match="cannot be resumed exactly from a plain iterator"):
        run(steps=4, inner_data=plain, outer_data=TEST, checkpoint_dir=tmp_path)


def test_an_interrupt_while_the_device_is_busy_keeps_what_is_done(tmp_path):
    module = importlib.import_module("bilevel.running.loop")
    chunk, whole = module.chunk, run(steps=6, **DATA)

    class Busy:
        """Results that take their time: the interrupt comes while they are waited for."""

        def __init__(self, value):
            self.value = value

        def __array__(self, *args, **kwargs):
            raise KeyboardInterrupt

    calls = []

    def interrupted(*args):
        calls.append(1)
        state, rows, holes = chunk(*args)
        return state, rows if len(calls) < 4 else jax.tree.map(Busy, rows), holes

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "chunk", interrupted)
        run(steps=6, **DATA, checkpoint_dir=tmp_path)
    steps = []
    resumed = run(steps=6, **DATA, checkpoint_dir=tmp_path, callbacks=[lambda step, state, rows: steps.append(step)])
    assert steps[0] > 1
    assert_equal(resumed.state, whole.state)
    assert_equal(resumed.history, whole.history)


def test_callbacks_are_called_at_the_same_steps_however_fast_the_machine_and_after_a_kill(tmp_path):
    module = importlib.import_module("bilevel.running.loop")

    def calls(seconds: float, steps: int = 23, kill: int | None = None, **settings: Any) -> tuple[list[Any], Any]:
        seen = []

        def callback(step, state, rows):
            seen.append((step, rows["outer_loss"].tolist(), int(state.step)))
            if step == kill:
                raise Killed
            return rows["outer_loss"][-1] < 0.8 and step > 12

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "CHUNK_SECONDS", seconds)
            try:
                result = run(LINE_SOLVER, steps, callbacks=[callback], callback_every=5, **settings)
            except Killed:
                return seen, None
        return seen, result

    slow, result = calls(1e-9)
    assert [step for step, _, _ in slow] == [5, 10, 15] == [state for _, _, state in slow]
    assert [len(rows) for _, rows, _ in slow] == [5, 5, 5] and int(result.state.step) == 15
    fast, again = calls(100.0)
    assert fast == slow
    assert_equal(again.state, result.state)
    # Killed before the callback of step 10 had returned, and then after it had stopped the run.
    before, _ = calls(100.0, kill=10, checkpoint_dir=tmp_path)
    after, resumed = calls(1e-9, checkpoint_dir=tmp_path)
    assert before == slow[:2] and after == slow[1:]
    assert_equal(resumed.history, result.history)
    stopped, resumed = calls(1.0, checkpoint_dir=tmp_path)
    assert stopped == slow[2:]
    assert_equal(resumed.state, result.state)
    # The last step has its call, whatever its number.
    assert [step for step, _, _ in calls(1.0, steps=12)[0]] == [5, 10, 12]


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "10"])
def test_a_period_of_callbacks_that_is_none_is_refused(every):
    with pytest.raises(ValueError, match=r"callback_every=.* must be an integer >= 1"):
        run(LINE_SOLVER, 2, callback_every=every)


@pytest.mark.parametrize("every", [-1.0, float("nan"), True, "60", None])
def test_a_period_of_checkpoints_that_is_none_is_refused(every):
    with pytest.raises(ValueError, match=r"checkpoint_every=.* must be a number"):
        run(LINE_SOLVER, 2, checkpoint_every=every)


def test_checkpoints_as_often_as_asked_for_the_newest_two_kept(tmp_path):
    seen = []

    def names(step, state, rows):
        seen.append(sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()))

    run(LINE_SOLVER, 4, checkpoint_dir=tmp_path / "none", callbacks=[lambda *_: None])
    assert [p.name for p in (tmp_path / "none").iterdir() if p.name.isdecimal()] == ["4"]
    run(LINE_SOLVER, 4, checkpoint_dir=tmp_path, checkpoint_every=0, callbacks=[names])
    assert seen == [[], [1], [1, 2], [2, 3]]


def line(inner_rate=0.1, outer_rate=0.05, steps=3, scale=1.0, start=0.3, kind="sgd", shift=None, weights=None):
    """`LINE_SOLVER`, with everything that a resumed run may have been changed in."""

    def inner_loss(weights, w, outer, batch, key):
        target = outer if shift is None else outer + shift
        return scale * jnp.sum(weights * (w - target) ** 2)

    weights = jnp.ones(2) if weights is None else weights
    problem = bilevel.Problem(
        jax.tree_util.Partial(inner_loss, weights), LINE.outer_loss, LINE.init_inner, lambda key: jnp.full(2, start)
    )
    return Nested(problem, Unrolled(getattr(optax, kind)(inner_rate), steps), optax.adam(outer_rate))


ROWS = {"x": jnp.arange(6.0)}
CHANGES = {
    "inner learning rate": ({"inner_rate": 0.2}, {}, r"hypergradient\.optimizer computation, numbers: -0\.1 -> -0\.2"),
    "outer learning rate": ({"outer_rate": 0.1}, {}, r"solver\.outer_optimizer computation, numbers: -0\.05 -> -0\.1"),
    "optimizer": ({"kind": "adam"}, {}, r"solver\.hypergradient\.optimizer computation"),
    "K": ({"steps": 4}, {}, r"solver\.hypergradient\.steps: 3 -> 4"),
    "a number in a loss": ({"scale": 1.5}, {}, r"inner_loss computation, numbers: 1\.0 -> 1\.5"),
    "an array in a loss": ({"shift": jnp.ones(2)}, {}, r"inner_loss computation"),
    "frozen weights": ({"weights": jnp.full(2, 2.0)}, {}, r"problem\.inner_loss.*float64\[2\] with hash .* -> "),
    "the start": ({"start": 0.4}, {}, r"init_outer computation, numbers: 0\.3 -> 0\.4"),
    "the key": ({}, {"key": jax.random.key(5)}, r"key: threefry2x32 \[0, 0\] -> threefry2x32 \[0, 5\]"),
    "data": ({}, {"inner_data": Batches({"x": ROWS["x"].at[3].set(9.0)}, 2)}, r"inner_data\['x'\]: .* hash .* -> "),
    "more rows": ({}, {"inner_data": Batches({"x": jnp.arange(7.0)}, 2)}, r"\['x'\]: float64\[6\].*float64\[7\]"),
    "batch size": ({}, {"inner_data": Batches(ROWS, 3)}, r"inner_data is: Batches\(size=2, .* -> Batches\(size=3"),
    "order": ({}, {"inner_data": Batches(ROWS, 2, order="blocks")}, r"inner_data is: .*rows.* -> .*blocks"),
    "kind of data": ({}, {"inner_data": ROWS}, r"inner_data is: Batches.* -> FullBatch"),
    "held-out data": ({}, {"outer_data": ROWS}, r"outer_data is: None -> FullBatch"),
}


@pytest.fixture(scope="module")
def line_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("line")
    run(line(), 2, inner_data=Batches(ROWS, 2), checkpoint_dir=folder)
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_and_what_differs_is_named(line_run, name):
    settings, arguments, message = CHANGES[name]
    before = sorted(line_run.rglob("*"))
    with pytest.raises(ValueError, match=message) as caught:
        run(line(**settings), 4, **({"inner_data": Batches(ROWS, 2)} | arguments), checkpoint_dir=line_run)
    assert str(line_run / "fingerprint.json") in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(line_run.rglob("*")) == before


def test_the_same_run_is_resumed_however_it_is_written(line_run, tmp_path):
    folder = shutil.copytree(line_run, tmp_path / "copy")
    other_schedule = line()
    other_schedule = Nested(other_schedule.problem, Unrolled(optax.sgd(0.1), 3, checkpoint="step"), optax.adam(0.05))
    resumed = run(other_schedule, 4, inner_data=Batches(ROWS, 2), checkpoint_dir=folder)
    assert_equal(resumed.history, run(line(), 4, inner_data=Batches(ROWS, 2)).history)


def test_another_jax_is_named_and_may_be_accepted(line_run, tmp_path):
    folder = shutil.copytree(line_run, tmp_path / "copy")
    file = folder / "fingerprint.json"
    items = json.loads(file.read_text())
    file.write_text(json.dumps(items | {"jax": "0.4.1", "inner_loss computation": "of another jax"}))
    resume = lambda: run(line(), 3, inner_data=Batches(ROWS, 2), checkpoint_dir=folder)  # noqa: E731
    with pytest.raises(ValueError, match=rf"differs in jax: 0\.4\.1 -> {jax.__version__}: .*delete .*fingerprint.json"):
        resume()
    file.write_text("{")
    with pytest.raises(ValueError, match=r"fingerprint.json is damaged .*delete"):
        resume()
    file.unlink()
    with pytest.warns(RuntimeWarning, match="has no fingerprint.json"):
        resume()
    assert json.loads(file.read_text()) == items
    assert differences(items, items) == []


def test_fewer_steps_than_are_done_are_refused(line_run):
    with pytest.raises(ValueError, match=r"run\(steps=1\): .* holds a checkpoint of step 2; ask for at least as many"):
        run(line(), 1, inner_data=Batches(ROWS, 2), checkpoint_dir=line_run)


@pytest.mark.parametrize("record", [None, lambda state: {"b": state.outer}, lambda state: {"a": state.outer[0]}])
def test_another_record_is_refused_before_any_work_and_loses_nothing(tmp_path, record):
    old = lambda state: {"a": state.outer}  # noqa: E731
    run(LINE_SOLVER, 2, checkpoint_dir=tmp_path, record=old)
    before = sorted(tmp_path.rglob("*"))
    worked = []
    with pytest.raises(ValueError, match=r"holds a run that recorded a float64\[2\], but record= gives"):
        run(LINE_SOLVER, 4, checkpoint_dir=tmp_path, record=record, callbacks=[lambda *_: worked.append(1)])
    assert not worked and sorted(tmp_path.rglob("*")) == before
    assert run(LINE_SOLVER, 4, checkpoint_dir=tmp_path, record=old).history["a"].shape == (4, 2)


def damage_half(folder):
    for path in folder.rglob("*"):
        if path.is_file() and "metadata" not in path.name.lower():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_bit(folder):
    path = max((path for path in (folder / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_missing(folder):
    next(path for path in (folder / "state").rglob("*") if path.is_file()).unlink()


def damage_empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = damage_half, damage_bit, damage_missing, damage_empty


@pytest.fixture(scope="module")
def line_whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("line")
    run(LINE_SOLVER, 2, checkpoint_dir=folder)
    run(LINE_SOLVER, 4, checkpoint_dir=folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(line_whole, tmp_path, damage, capfd):
    folder = shutil.copytree(line_whole, tmp_path / "copy")
    damage(folder / "4")
    with pytest.warns(RuntimeWarning, match=r"Checkpoint .*/4 is damaged \(.*\): the run goes on from 2"):
        resumed = run(LINE_SOLVER, 6, checkpoint_dir=folder)
    assert_equal(resumed.history, run(LINE_SOLVER, 6).history)
    assert capfd.readouterr().err == ""
    assert (folder / "4.damaged").is_dir() and (folder / "6").is_dir()
    assert_equal(run(LINE_SOLVER, 6, checkpoint_dir=folder).state, resumed.state)


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_all_are_damaged_it_is_said_in_a_sentence(line_whole, tmp_path, damage, capfd):
    folder = shutil.copytree(line_whole, tmp_path / "copy")
    damage(folder / "2")
    damage(folder / "4")
    with pytest.raises(ValueError, match=r"no checkpoint that can be read \(2: .*; 4: .*\): .*empty folder") as caught:
        run(LINE_SOLVER, 6, checkpoint_dir=folder)
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_a_checkpoint_whose_hashes_were_not_written_yet_is_as_good_as_whole(line_whole, tmp_path):
    folder = shutil.copytree(line_whole, tmp_path / "copy")
    shutil.rmtree(folder / "2")
    (folder / "4" / "sha256.json").unlink()
    assert_equal(run(LINE_SOLVER, 6, checkpoint_dir=folder).history, run(LINE_SOLVER, 6).history)


def test_a_folder_of_something_else_is_refused_and_quietly(tmp_path, capfd):
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "model.bin").write_bytes(b"weights")
    logging.getLogger("absl").setLevel(logging.INFO)
    with pytest.raises(ValueError, match=r"holds no checkpoint that can be read \(4: "):
        run(LINE_SOLVER, 2, checkpoint_dir=tmp_path)
    assert capfd.readouterr().err == ""
    assert (tmp_path / "4" / "model.bin").read_bytes() == b"weights"


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_noticed_before_the_first_step(tmp_path, where):
    (tmp_path / "file").write_text("")
    worked = []

    def init_outer(key):
        worked.append(1)
        return jnp.full(2, 0.3)

    problem = bilevel.Problem(LINE.inner_loss, LINE.outer_loss, LINE.init_inner, init_outer)
    with pytest.raises(ValueError, match=r"checkpoint_dir .* cannot be written \(.*\): name another folder"):
        run(Nested(problem, Unrolled(optax.sgd(0.1), 3), optax.sgd(0.1)), 2, checkpoint_dir=tmp_path / where)
    assert not worked


def test_a_save_that_fails_is_told_and_loses_nothing(tmp_path, monkeypatch):
    run(LINE_SOLVER, 2, checkpoint_dir=tmp_path)
    import orbax.checkpoint as ocp

    def full(self, step, **kwargs):
        (tmp_path / f"{step}.orbax-checkpoint-tmp").mkdir()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.warns(RuntimeWarning, match=r"Checkpoint .*/4 could not be written \(.*No space left.*\)"):
            result = run(LINE_SOLVER, 4, checkpoint_dir=tmp_path)
    assert_equal(result.history, run(LINE_SOLVER, 4).history)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "fingerprint.json"]
    assert_equal(run(LINE_SOLVER, 4, checkpoint_dir=tmp_path).state, result.state)


@pytest.mark.parametrize("name", ["SOBA", "SABA"])
def test_stochastic_solvers_resume_and_know_their_step_sizes(tmp_path, name):
    more = {"inner_blocks": 3, "outer_blocks": 3} if name == "SABA" else {}

    def solver(rate):
        return getattr(bilevel, name)(LINE, bilevel.Power(rate, 0.5), lambda step: 0.1 * rate, **more)

    data = {"inner_data": Batches(ROWS, 2), "outer_data": Batches(ROWS, 2)}
    with pytest.raises(Killed):
        run(solver(0.1), 6, **data, checkpoint_dir=tmp_path, callbacks=[killer(3)])
    with pytest.raises(ValueError, match=r"solver\.outer_step, code: .*solver\.inner_step\.value: 0\.1 .* -> 0\.2"):
        run(solver(0.2), 6, **data, checkpoint_dir=tmp_path)
    assert_equal(run(solver(0.1), 6, **data, checkpoint_dir=tmp_path).state, run(solver(0.1), 6, **data).state)


def with_rule(slope, kind="vjp"):
    """A problem whose inner loss holds a function with a rule that gives it this slope."""

    def forward(x):
        return x, None

    if kind == "vjp":
        passed = jax.custom_vjp(lambda x: x)
        passed.defvjp(forward, lambda _, ct: (slope * ct,))
    else:
        passed = jax.custom_jvp(lambda x: x)
        passed.defjvp(lambda primals, tangents: (primals[0], slope * tangents[0]))
    return bilevel.Problem(
        lambda w, o, b, k: jnp.sum((w - passed(o)) ** 2), LINE.outer_loss, LINE.init_inner, LINE.init_outer
    )


def called_back(scale):
    """A problem whose outer loss is scaled on the host, without a derivative of its own."""
    settings = {"scale": scale}
    host = lambda x: np.asarray(settings["scale"] * np.asarray(x), x.dtype)  # noqa: E731

    def outer_loss(w, o, b, k):
        scaled = jax.pure_callback(host, jax.ShapeDtypeStruct((), w.dtype), jax.lax.stop_gradient(w[0]))
        return jnp.sum((w - 1.0) ** 2) + scaled

    return bilevel.Problem(LINE.inner_loss, outer_loss, LINE.init_inner, LINE.init_outer)


def minimising(settings):
    def minimise(problem, outer, batch, key):
        return settings["shrink"] * outer

    return Nested(LINE, bilevel.ImplicitSolve(minimise), optax.sgd(0.1))


def nested(problem):
    return Nested(problem, Unrolled(optax.sgd(0.1), 2, mode="reverse"), optax.sgd(0.1))


HELD = {
    "a rule by custom_vjp": (
        lambda x: nested(with_rule(x)),
        r"inner_loss first derivative computation, numbers: .*0\.5 ->",
    ),
    "a rule by custom_jvp": (lambda x: nested(with_rule(x, "jvp")), r"inner_loss first derivative .*, numbers"),
    "a function of the host": (lambda x: nested(called_back(x)), "outer_loss computation: "),
    "a dict of a schedule": (
        lambda x: bilevel.SOBA(LINE, closed_schedule({"rate": {"value": x}}), 0.1),
        r"solver\.inner_step, code: ",
    ),
    "a dict of a solver": (lambda x: minimising({"shrink": x}), r"solver\.hypergradient\.minimise, code: "),
}


def closed_schedule(settings):
    return lambda step: 0.1 * settings["rate"]["value"]


@pytest.mark.parametrize("name", HELD)
@pytest.mark.filterwarnings("ignore::bilevel.InexactHypergradientWarning")
def test_what_is_held_out_of_sight_of_a_trace_is_named(tmp_path, name):
    make, message = HELD[name]
    run(make(0.5), 1, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=message):
        run(make(0.75), 2, checkpoint_dir=tmp_path)
    run(make(0.5), 2, checkpoint_dir=tmp_path)


def test_numbers_are_told_as_they_were_written(tmp_path):
    make = lambda rate: bilevel.Nested(  # noqa: E731
        bilevel.Problem(
            lambda w, o, b, k: jnp.sum((w - o) ** 2 * jnp.float32(rate)),
            lambda w, o, b, k: jnp.sum((w - 1) ** 2),
            lambda k, o: jnp.zeros(2, jnp.float32),
            lambda k: jnp.ones(2, jnp.float32),
        ),
        Unrolled(optax.sgd(0.1), 2),
        optax.sgd(0.1),
    )
    run(make(0.01), 1, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"inner_loss computation, numbers: 0\.01 -> 0\.02[;:]"):
        run(make(0.02), 2, checkpoint_dir=tmp_path)


def test_what_is_no_checkpoint_is_neither_removed_nor_renamed(tmp_path):
    """A search in a folder, and runs of other seeds in numbered folders below it."""
    run(LINE_SOLVER, 3, checkpoint_dir=tmp_path)
    for seed in ("0", "1", "12"):
        run(LINE_SOLVER, 2, checkpoint_dir=tmp_path / seed)
    (tmp_path / "0" / "results.txt").write_text("mine")
    (tmp_path / "2").write_text("mine")
    (tmp_path / "12.damaged").mkdir()
    files = (path for seed in ("0", "1", "12") for path in (tmp_path / seed).rglob("*"))
    before = {path: path.read_bytes() for path in files if path.is_file()}
    longer = run(LINE_SOLVER, 9, checkpoint_dir=tmp_path, checkpoint_every=0, callbacks=[lambda *_: None])
    assert_equal(longer.state, run(LINE_SOLVER, 9).state)
    assert before and before == {path: path.read_bytes() for path in before}
    assert (tmp_path / "2").read_text() == "mine" and (tmp_path / "12.damaged").is_dir()
    ours = [path.name for path in tmp_path.iterdir() if (path / "sha256.json").is_file()]
    assert sorted(ours) == ["8", "9"]


def test_what_stands_in_the_way_of_a_checkpoint_is_named(tmp_path):
    run(LINE_SOLVER, 3, checkpoint_dir=tmp_path)
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "mine.txt").write_text("mine")
    with pytest.warns(RuntimeWarning, match=r"4 could not be written \(something that is no checkpoint has its name"):
        run(LINE_SOLVER, 4, checkpoint_dir=tmp_path)
    assert (tmp_path / "4" / "mine.txt").read_text() == "mine"


def test_a_folder_that_was_moved_away_is_not_made_anew(tmp_path):
    folder, away = tmp_path / "run", tmp_path / "away"

    def moves(step, state, metrics):
        if step == 3:
            folder.rename(away)

    with pytest.warns(RuntimeWarning, match=r"could not be written \(its folder was moved or removed\)"):
        run(LINE_SOLVER, 4, checkpoint_dir=folder, checkpoint_every=2, callbacks=[moves], callback_every=1)
    assert not folder.exists() and away.is_dir()


@pytest.mark.parametrize("what", ["moved", "copied"])
def test_a_checkpoint_of_another_step_than_its_name_is_damaged(line_whole, tmp_path, what):
    folder = shutil.copytree(line_whole, tmp_path / "copy")
    if what == "moved":
        (folder / "4").rename(folder / "5")
    else:
        shutil.rmtree(folder / "4")
        shutil.copytree(folder / "2", folder / "4")
    with pytest.warns(RuntimeWarning, match=r"it is the one of step [24]\): the run goes on from 2"):
        resumed = run(LINE_SOLVER, 6, checkpoint_dir=folder)
    assert_equal(resumed.history, run(LINE_SOLVER, 6).history)


@pytest.mark.parametrize(("text", "said"), [("[1]", "holds no texts"), ("{", "is damaged"), (None, "is a folder")])
def test_a_fingerprint_that_is_none_is_refused_in_a_sentence(line_whole, tmp_path, text, said):
    folder = shutil.copytree(line_whole, tmp_path / "copy")
    (folder / "fingerprint.json").unlink()
    (folder / "fingerprint.json").mkdir() if text is None else (folder / "fingerprint.json").write_text(text)
    with pytest.raises(ValueError, match=rf"fingerprint\.json .*{said}") as caught:
        run(LINE_SOLVER, 6, checkpoint_dir=folder)
    assert "\n" not in str(caught.value)


def scaled(factor):
    @bilevel.extend.register
    @dataclasses.dataclass(frozen=True)
    class Scaled:
        def forward(self, u):
            return factor * u

        def inverse(self, value):
            return value / factor

    return Scaled()


def on_the_host(start):
    """`init_outer` that JAX cannot trace."""
    return lambda key: np.full(2, start + 0.0 * np.asarray(jax.random.key_data(key))[0])


OTHERS = {
    "domain": lambda x: {"domain": scaled(x)},
    "init_outer": lambda x: {"init_outer": on_the_host(x)},
    "project": lambda x: {"project": lambda outer: outer * x},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_body_of_a_function_of_the_problem_is_another_run(tmp_path, name):
    def solver(value):
        return dataclasses.replace(LINE_SOLVER, problem=dataclasses.replace(LINE, **OTHERS[name](value)))

    run(solver(0.5), 2, checkpoint_dir=tmp_path)
    run(solver(0.5), 2, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=rf"holds another run, which differs in {name}"):
        run(solver(0.25), 4, checkpoint_dir=tmp_path)


def test_another_body_of_record_is_another_run(tmp_path):
    run(LINE_SOLVER, 2, checkpoint_dir=tmp_path, record=lambda state: {"x": state.outer})
    run(LINE_SOLVER, 3, checkpoint_dir=tmp_path, record=lambda state: {"x": state.outer})
    with pytest.raises(ValueError, match="holds another run, which differs in record computation"):
        run(LINE_SOLVER, 4, checkpoint_dir=tmp_path, record=lambda state: {"x": 1000 * state.outer})


def test_a_key_is_the_same_typed_or_as_words(tmp_path):
    whole = run(LINE_SOLVER, 4, key=jax.random.key(3))
    run(LINE_SOLVER, 2, key=jax.random.PRNGKey(3), checkpoint_dir=tmp_path)
    assert_equal(run(LINE_SOLVER, 4, key=jax.random.key(3), checkpoint_dir=tmp_path).state, whole.state)
    with pytest.raises(ValueError, match=r"differs in key: threefry2x32 \[0, 3\] -> threefry2x32 \[0, 4\]: rep"):
        run(LINE_SOLVER, 5, key=jax.random.PRNGKey(4), checkpoint_dir=tmp_path)


def test_callbacks_are_given_each_row_once_however_a_run_was_extended(tmp_path):
    rows: list[Any] = []
    callback = lambda step, state, new: rows.append((step, new["outer_loss"].tolist()))  # noqa: E731
    for steps in (4, 7, 8):
        run(LINE_SOLVER, steps, checkpoint_dir=tmp_path, callbacks=[callback], callback_every=3)
    assert [step for step, _ in rows] == [3, 4, 6, 7, 8]
    assert [x for _, new in rows for x in new] == run(LINE_SOLVER, 8).history["outer_loss"].tolist()
