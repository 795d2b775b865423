"""Trackers: the right numbers at the right steps, once each after a resume, and a training that no service can end."""

import shutil
import sys
import types
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel.extend import Tracker
from bilevel.running.trackers.base import described, numbers
from bilevel.testing import ridge

PROBLEM, TRAIN, VAL = ridge()
SOLVER = bilevel.SOBA(PROBLEM, inner_step=0.5, outer_step=0.5)


def run(steps, *callbacks, **settings):
    settings = {"record": lambda state: {"w": state.inner.params}, "progress": False} | settings
    return bilevel.run(SOLVER, inner_data=TRAIN, outer_data=VAL, steps=steps, callbacks=callbacks, **settings)


def expected(result):
    """What a tracker has to tell of a run: its history, the arrays by their norm."""
    found = dict(result.history)
    found["w_norm"] = np.linalg.norm(np.asarray(found.pop("w")), axis=1)
    return [{name: float(rows[i]) for name, rows in found.items()} for i in range(len(found["outer_loss"]))]


def assert_told(told, result):
    """`told` is `[(step, row)]`, each step once and in order."""
    assert [step for step, _ in told] == list(range(1, len(told) + 1))
    for (_, row), wanted in zip(told, expected(result), strict=True):
        assert row.keys() == wanted.keys()
        np.testing.assert_allclose([row[name] for name in row], [wanted[name] for name in row], rtol=1e-6)


# --- the contract ---------------------------------------------------------------------------------------------------


class Kept(Tracker):
    """What it is told, in `log`; `there`: the last step that the service says it has."""

    def __init__(self, there=0, fails=""):
        self.log, self.there, self.fails = [], there, fails

    def _did(self, *what):
        self.log.append(what)
        if what[0] == self.fails:
            raise OSError("no network")

    def begin(self, settings, start):
        self._did("begin", settings, start)
        return self.there

    def write(self, step, row):
        self._did("write", step, row)

    def flush(self):
        self._did("flush")

    def end(self, error):
        self._did("end", error)

    @property
    def rows(self):
        return [(step, row) for kind, step, row in (each for each in self.log if each[0] == "write")]


def test_settings_once_then_rows_then_the_end():
    kept = Kept()
    kept.settings = {"mine": 1}
    result = run(5, kept, callback_every=2)
    assert_told(kept.rows, result)
    kinds = [each[0] for each in kept.log]
    assert kinds == ["begin", "write", "write", "flush", "write", "write", "flush", "write", "flush", "end"]
    _, settings, start = kept.log[0]
    assert start == 0 and {"solver": "SOBA", "inner_step": 0.5, "steps": 5, "mine": 1}.items() <= settings.items()
    assert kept.log[-1] == ("end", None)


def test_a_resumed_run_writes_only_what_is_not_there(tmp_path):
    """The run was saved after 4 steps and killed after its 6th was written."""
    first, second = Kept(), Kept(there=6)
    run(4, first, checkpoint_dir=tmp_path)
    result = run(9, second, checkpoint_dir=tmp_path)
    assert second.log[0][2] == 4
    assert_told([*first.rows, *expected_rows(result, 5, 6), *second.rows], result)
    assert [step for step, _ in second.rows] == [7, 8, 9]


def expected_rows(result, first, last):
    return [(i, expected(result)[i - 1]) for i in range(first, last + 1)]


def test_a_run_that_was_finished_opens_nothing(tmp_path):
    run(3, checkpoint_dir=tmp_path)
    kept = Kept()
    run(3, kept, checkpoint_dir=tmp_path)
    assert kept.log == []


@pytest.mark.parametrize("fails", ["begin", "write", "flush", "end"])
def test_a_service_that_fails_is_one_warning_and_ends_no_training(fails):
    kept, other = Kept(fails=fails), Kept()
    with pytest.warns(RuntimeWarning, match=r"^Kept failed, and .* \(OSError: no network\)\.$") as said:
        result = run(4, kept, other)
    assert len(said) == 1
    assert_told(other.rows, result)
    assert sum(each[0] == fails for each in kept.log) == 1 and kept.log[-1][0] == "end"


def test_the_end_says_what_ended_the_run():
    def stop(step, state, metrics):
        raise RuntimeError("mine")

    kept = Kept()
    with pytest.raises(RuntimeError, match="mine") as raised:
        run(4, kept, stop)
    assert kept.log[-1] == ("end", raised.value)


def test_only_the_first_process_writes(monkeypatch):
    kept = Kept()
    monkeypatch.setattr("bilevel.running.trackers.base.is_first", lambda: False)
    run(2, kept)
    assert kept.log == []


def test_fit_is_tracked_too():
    import optax

    kept = Kept()
    result = bilevel.fit(
        PROBLEM, jnp.zeros(()), optimizer=optax.sgd(0.5), data=TRAIN, steps=3, progress=False, callbacks=[kept]
    )
    assert [row for _, row in kept.rows] == [{"inner_loss": float(x)} for x in result.history["inner_loss"]]


def test_a_stack_of_runs_tells_means():
    kept = Kept()
    result = run(3, kept, key=jax.random.split(jax.random.key(0), 2))
    told = [row["outer_loss"] for _, row in kept.rows]
    np.testing.assert_allclose(told, result.history["outer_loss"].mean(axis=1), rtol=1e-6)
    norms = np.linalg.norm(result.history["w"], axis=2).mean(axis=1)
    np.testing.assert_allclose([row["w_norm"] for _, row in kept.rows], norms, rtol=1e-6)


def test_what_holds_no_real_numbers_is_left_out():
    row = {"a": np.float32(2), "b": True, "c": np.array(["x"]), "d": np.array([3.0, 4.0]), "e": 1j}
    assert numbers(row | {"f": jnp.asarray(1, jnp.bfloat16)}) == {"a": 2.0, "b": 1.0, "d_norm": 5.0, "f": 1.0}


def test_settings_are_paths_of_fields():
    import optax

    solver = bilevel.Nested(PROBLEM, bilevel.Unrolled(optax.sgd(0.5), steps=20), optax.sgd(1.0))
    told = described("solver", solver)
    assert told["solver"] == "Nested" and told["hypergradient"] == "Unrolled" and told["inner_start"] == "warm"
    assert told["hypergradient.steps"] == 20
    assert all(isinstance(value, bool | int | float | str) for value in told.values())


# --- the services, by stand-ins that record what they are told --------------------------------------------------------


def module(monkeypatch, name, **parts):
    made = types.ModuleType(name)
    made.__dict__.update(parts)
    monkeypatch.setitem(sys.modules, name, made)
    above, _, last = name.rpartition(".")
    if above:
        setattr(sys.modules[above], last, made)


class Board:
    """Stands in for tensorboard: `files[path]` are the events of a file."""

    def __init__(self, monkeypatch):
        self.files = {}
        for name in ("tensorboard", "backend", "backend.event_processing", "compat", "compat.proto", "summary"):
            module(monkeypatch, name if name == "tensorboard" else f"tensorboard.{name}")
        module(monkeypatch, "tensorboard.summary.writer")

        class Message(SimpleNamespace):
            def HasField(self, name):
                return hasattr(self, name)

        event = lambda **parts: Message(**{"summary": Message(value=[]), "step": 0} | parts)  # noqa: E731
        session = type("SessionLog", (Message,), {"START": 1})
        summary = type("Summary", (Message,), {"Value": Message})
        metadata = type("SummaryMetadata", (Message,), {"PluginData": Message})
        proto = "tensorboard.compat.proto"
        module(monkeypatch, f"{proto}.event_pb2", Event=event, SessionLog=session)
        module(monkeypatch, f"{proto}.summary_pb2", Summary=summary, SummaryMetadata=metadata)
        module(monkeypatch, f"{proto}.tensor_pb2", TensorProto=Message)
        board = self

        class Writer:
            def __init__(self, folder):
                from pathlib import Path

                Path(folder).mkdir(parents=True, exist_ok=True)
                self.path = f"{folder}/events.out.tfevents.{len(board.files):010d}"
                Path(self.path).touch()
                board.files[self.path], self.closed = [], False

            def add_event(self, event):
                assert not self.closed
                board.files[self.path].append(event)

            def flush(self):
                pass

            def close(self):
                self.closed = True

        module(monkeypatch, "tensorboard.summary.writer.event_file_writer", EventFileWriter=Writer)
        load = lambda path: SimpleNamespace(Load=lambda: iter(self.files[path]))  # noqa: E731
        module(monkeypatch, "tensorboard.backend.event_processing.event_file_loader", LegacyEventFileLoader=load)

    def tracker(self, folder):
        return bilevel.TensorBoard(folder / "board")

    def rows(self):
        """What a reader shows: a session's start hides older events from its step on."""
        shown = []
        for event in (event for events in self.files.values() for event in events):
            if event.HasField("session_log"):
                shown = [(step, row) for step, row in shown if step < event.step]
            row = {value.tag: value.simple_value for value in event.summary.value if value.HasField("simple_value")}
            shown += [(event.step, row)] if row else []
        return shown

    def settings(self):
        texts = [v.tensor.string_val[0].decode() for e in self.files.values() for x in e for v in x.summary.value
                 if v.tag == "settings"]  # fmt: skip
        return dict(line.strip("| ").split(" | ") for line in texts[0].splitlines()[2:])


class Wandb:
    """Stands in for wandb: `runs[id]`, which go on."""

    def __init__(self, monkeypatch):
        self.runs, service = {}, self

        class Run:
            def __init__(self, config):
                self.config, self.rows, self.resumed, self.step, self.codes = config, [], False, 0, []

            def log(self, row, step):
                assert step >= self.step
                self.rows.append((step, row))
                self.step = step + 1

            def finish(self, exit_code):
                self.codes.append(exit_code)

        def init(*, project, name, group, id, config, resume, reinit):
            assert (project, resume, reinit) == ("project", "allow", "create_new")
            known = service.runs.get(id)
            run = service.runs.setdefault(id, Run(config))
            run.resumed = known is not None
            return run

        module(monkeypatch, "wandb", init=init)

    def tracker(self, folder):
        return bilevel.WandB("project", id="mine")

    def rows(self):
        assert set(self.runs["mine"].codes) == {0}
        return self.runs["mine"].rows

    def settings(self):
        return self.runs["mine"].config


class Mlflow:
    """Stands in for mlflow, with one experiment."""

    def __init__(self, monkeypatch):
        self.runs, self.experiments, service = {}, {}, self
        entities = {
            "Param": lambda key, value: (key, value),
            "Metric": lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step),
        }

        class Client:
            def __init__(self, tracking_uri):
                pass

            def get_experiment_by_name(self, name):
                return SimpleNamespace(experiment_id="1") if name in service.experiments else None

            def create_experiment(self, name):
                service.experiments[name] = "1"
                return "1"

            def search_runs(self, experiments, filter_string, max_results):
                assert experiments == ["1"]
                found = [run for run in service.runs.values() if f"tags.`bilevel.id` = '{run.id}'" == filter_string]
                return [SimpleNamespace(info=run.info, data=SimpleNamespace(metrics={m.key: 0 for m in run.metrics}))
                        for run in found]  # fmt: skip

            def create_run(self, experiment, run_name, tags):
                run = SimpleNamespace(id=tags["bilevel.id"], params={}, metrics=[], status="RUNNING")
                run.info = SimpleNamespace(run_id=f"run{len(service.runs)}")
                service.runs[run.info.run_id] = run
                return run

            def update_run(self, run, status):
                service.runs[run].status = status

            def get_metric_history(self, run, name):
                return [m for m in service.runs[run].metrics if m.key == name]

            def log_batch(self, run, metrics=(), params=()):
                assert len(metrics) <= 1000 and len(params) <= 100
                service.runs[run].metrics += metrics
                service.runs[run].params |= dict(params)

            def set_terminated(self, run, status):
                service.runs[run].status = status

        module(monkeypatch, "mlflow", MlflowClient=Client)
        module(monkeypatch, "mlflow.entities", **entities)

    def tracker(self, folder):
        return bilevel.MLflow("experiment", id="mi'ne")

    def rows(self):
        (run,) = self.runs.values()
        assert run.status == "FINISHED"
        rows = {}
        for metric in run.metrics:
            assert metric.key not in rows.setdefault(metric.step, {})
            rows[metric.step][metric.key] = metric.value
        return list(rows.items())

    def settings(self):
        return next(iter(self.runs.values())).params


SERVICES = {"tensorboard": Board, "wandb": Wandb, "mlflow": Mlflow}


@pytest.mark.parametrize("name", SERVICES)
def test_every_step_is_told_once_also_after_a_kill(name, tmp_path, monkeypatch):
    """Saved after 4 steps, killed after the 9th, resumed to the 12th: 5 to 9 are computed twice."""
    service = SERVICES[name](monkeypatch)
    run(4, service.tracker(tmp_path), checkpoint_dir=tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "saved")
    run(9, service.tracker(tmp_path), checkpoint_dir=tmp_path / "run", callback_every=2)
    result = run(12, service.tracker(tmp_path), checkpoint_dir=tmp_path / "saved")
    assert_told(service.rows(), result)
    assert service.settings()["solver"] == "SOBA" and float(service.settings()["inner_step"]) == 0.5


def test_a_run_that_begins_anew_hides_what_tensorboard_had(tmp_path, monkeypatch):
    board = Board(monkeypatch)
    run(5, board.tracker(tmp_path))
    result = run(3, board.tracker(tmp_path))
    assert_told(board.rows(), result)


def test_event_files_are_what_tensorboard_reads(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="extra tensorboard")

    for steps in (4, 9):
        result = run(steps, bilevel.TensorBoard(tmp_path / "board"), checkpoint_dir=tmp_path / "run")
    read = reader.EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    rows = {}
    for tag in read.Tags()["scalars"]:
        for event in read.Scalars(tag):
            rows.setdefault(event.step, {})[tag] = event.value
    assert_told(list(rows.items()), result)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bilevel.TensorBoard("folder"), "tensorboard is not installed, which bilevel.TensorBoard writes with"),
        (lambda: bilevel.WandB("project"), "wandb is not installed, which bilevel.WandB logs with"),
        (lambda: bilevel.MLflow("experiment"), "mlflow is not installed, which bilevel.MLflow logs with"),
    ],
)
def test_a_missing_library_is_one_sentence(make, said, monkeypatch):
    name = said.partition(" ")[0]
    monkeypatch.setitem(sys.modules, name, None)
    for loaded in [loaded for loaded in sys.modules if loaded.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    with pytest.raises(ModuleNotFoundError) as raised:
        make()
    assert str(raised.value) == f"{said}: pip install 'bilevel[{name}]'."
