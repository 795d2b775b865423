"""`--track`: every command hands its metrics on besides writing them, and a service that fails ends none."""

import dataclasses
import json
import logging
import shutil
import sys

import numpy as np
import pytest

from bilevel.extend import Tracker
from methods import cli, processes, tracking
from methods.logs import LOGGER, listening
from methods.runfolder import RunFolder
from tests.methods.small import flexora_words

pytestmark = pytest.mark.usefixtures("float32_by_default")


class Service:
    """A tracker for each stage; `told[stage]` is what came by: settings, rows and the end."""

    def __init__(self, fails=False):
        self.told, self.stages = {}, []
        service = self

        class Told(Tracker):
            def __init__(self, stage):
                self.stage, self.settings = stage, stage.settings
                service.stages.append(stage)

            def begin(self, settings, start):
                if fails:
                    raise OSError("no network")
                rows = service.told.setdefault(self.stage.id, [])
                rows.append(settings)
                return max((row[0] for row in rows if isinstance(row, tuple)), default=0)

            def write(self, step, row):
                service.told[self.stage.id].append((step, row))

            def end(self, error):
                pass

        self.make = Told


def logged(out):
    """`{stage: [(step, numbers)]}` of metrics.jsonl."""
    found = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        stage = found.setdefault(row.pop("stage"), [])
        stage.append((row.pop("step"), {name: x for name, x in row.items() if not isinstance(x, list)}))
    return found


def test_a_tracker_of_ones_own_is_told_what_the_file_holds(tiny_model, tiny_data, tmp_path, monkeypatch):
    service, out = Service(), tmp_path / "run"
    monkeypatch.setitem(tracking.TRACKERS, "mine", service.make)
    words = flexora_words(tiny_model, tiny_data, out)
    assert cli.run([*words, "--track", "mine", "--keep-checkpoints"]) == 0
    run = json.loads((out / "tracking.json").read_text())["id"]
    written = logged(out)
    assert {"search", "finetune flexora"} <= written.keys()
    results = {file.stem: json.loads(file.read_text()) for file in (out / "results").iterdir()}
    tests = {f"{run}-test-{arm}": result for arm, result in results.items()}  # told, and no steps of a stage
    assert service.told.keys() == {f"{run}-{stage.replace(' ', '-')}" for stage in written} | tests.keys()
    for stage, result in tests.items():
        _, (step, told) = service.told[stage]
        assert step == 1 and told["layers"] == len(result["layers"]) and told["parameters"] == result["parameters"]
        assert {name: told[name] for name in result["metrics"]} == pytest.approx(result["metrics"])
    for stage, rows in written.items():
        settings, *told = service.told[f"{run}-{stage.replace(' ', '-')}"]
        assert settings["option.rank"] == 2 and settings["steps"] == len(told)
        assert [step for step, _ in told] == [step for step, _ in rows]
        for (_, row), (_, wanted) in zip(told, rows, strict=True):
            assert {name: row[name] for name in wanted} == pytest.approx(wanted)
    # Without one, or with another, the run goes on; what is there already is not told again.
    before = {stage: list(rows) for stage, rows in service.told.items()}
    shutil.rmtree(out / "checkpoints")
    (out / "results" / "flexora.json").unlink()
    assert cli.run(words) == 0
    assert service.told == before
    assert not any(stage.startswith("test ") for stage in logged(out))


@dataclasses.dataclass(frozen=True)
class Made:
    """A run's settings."""

    track: str = "mine"


def test_rows_without_a_run_are_told_once_and_by_the_first_process_alone(tmp_path, monkeypatch):
    service, rows = Service(), {"inner_loss": np.array([3.0, 2.0])}
    monkeypatch.setitem(tracking.TRACKERS, "mine", service.make)
    folder = RunFolder(tmp_path / "run", Made())
    for _ in range(2):
        folder.tell("finetune", rows)
    (told,) = service.told.values()
    assert [row for row in told if isinstance(row, tuple)] == [(1, {"inner_loss": 3.0}), (2, {"inner_loss": 2.0})]
    service.told.clear()
    callbacks = folder.callbacks("finetune")
    monkeypatch.setattr(folder, "callbacks", lambda stage: callbacks)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    folder.tell("finetune", rows)
    assert not service.told


def test_a_service_that_fails_ends_no_command(tiny_model, tiny_data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setitem(tracking.TRACKERS, "mine", Service(fails=True).make)
    words = flexora_words(tiny_model, tiny_data, out)
    with pytest.warns(RuntimeWarning, match="Told failed, and the run goes on without it"):
        assert cli.run([*words, "--track", "mine"]) == 0
    assert len(logged(out)["search"]) == 3


def test_what_is_missing_is_said_before_anything_is_written(tiny_model, tiny_data, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    out = tmp_path / "run"
    assert cli.run([*flexora_words(tiny_model, tiny_data, out), "--track", "tensorboard"]) == 2
    said = "bilevel: tensorboard is not installed, which bilevel.TensorBoard writes with: "
    assert capsys.readouterr().err == f"{said}pip install 'bilevel[tensorboard]'.\n"
    assert not out.exists()


def test_a_command_shows_news_on_stdout_and_warnings_on_stderr_once(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)])  # as libraries do
    before = LOGGER.level, LOGGER.propagate, list(LOGGER.handlers)
    with listening():
        LOGGER.info("some %s", "news")
        logging.getLogger("bilevel").warning("a warning")
    assert capsys.readouterr() == ("some news\n", "a warning\n")
    assert (LOGGER.level, LOGGER.propagate, LOGGER.handlers) == before


def test_tensorboard_reads_what_a_command_has_written(tiny_model, tiny_data, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="extra tensorboard")
    out = tmp_path / "run"
    assert cli.run([*flexora_words(tiny_model, tiny_data, out), "--track", "tensorboard"]) == 0
    for stage, rows in logged(out).items():
        found = reader.EventAccumulator(str(out / "tensorboard" / stage.replace(" ", "-")))
        found.Reload()
        for name in rows[0][1]:
            told = [(event.step, event.value) for event in found.Scalars(name)]
            assert told == [(step, pytest.approx(row[name])) for step, row in rows]
