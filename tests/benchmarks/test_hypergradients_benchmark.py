"""The hypergradient benchmark: what it measures is what it says."""

import json

import numpy as np
import pytest

from benchmarks.hypergradients import estimators, goals, measure, report, side_by_side
from benchmarks.hypergradients.__main__ import Options, jobs, run
from benchmarks.record import Record

EXACT = ("mixed, step", "mixed, sqrt", "mixed, binomial", "reverse, none", "forward", "reversible")


@pytest.mark.slow
def test_every_estimator_is_measured_and_exact_ones_agree():
    few = [name for name in estimators.estimators(estimators.PROBLEMS["quadratic"][0](), 4) if "K/4" in name]
    rows = {row["name"]: row for row in estimators.measure("quadratic", 4, few, repeats=1)}
    assert not {"failed", *few} & {key for row in rows.values() for key in (*row, row["name"])}
    assert all(row["seconds"] > 0 and row["temporary"] >= 0 for row in rows.values())
    assert max(rows[name]["error"] for name in EXACT) < 1e-10
    assert rows["first order"]["error"] > 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries
def test_libraries_compute_the_same_hypergradient():
    rows = side_by_side.agreement("quadratic", 3)
    assert {row["name"] for row in rows} >= {"bilevel, mixed, binomial", "equinox, sqrt(K) checkpoints"}
    assert max(row["error"] for row in rows) < 1e-12


def test_resident_peak_sees_what_is_used_and_freed():
    if measure.resident_peak(lambda: None) is None:
        pytest.fail("this system does not tell a process's peak of resident memory")
    megabytes = 64
    peak = measure.resident_peak(lambda: np.ones(megabytes * 2**17).sum())
    assert peak == pytest.approx(megabytes * 2**20, rel=0.1)


def test_record_goes_on_after_a_line_that_was_cut_short(tmp_path):
    path = tmp_path / "record.jsonl"
    Record(path).add([{"section": "depth", "name": "a", "seconds": 1.0}, {"section": "depth", "name": "b"}])
    path.write_text(path.read_text()[:-5])
    record = Record(path)
    assert [row["name"] for row in record.rows] == ["a"]
    record.add([{"section": "depth", "name": "c"}])
    assert [row["name"] for row in Record(path).rows] == ["a", "c"]
    path.write_text("{\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        Record(path)
    lines = {b"[1, 2]": r"is \[1, 2\] and no row", b"null": "is None and no row", b"\xff": "is not JSON"}
    for line, what in lines.items():
        path.write_bytes(line + b"\n")
        with pytest.raises(ValueError, match=f"line 1 {what}: remove the line"):
            Record(path)


def test_a_record_keeps_settings_whole_and_shortens_what_was_measured(tmp_path):
    row = {"settings": {"size": 0.30000001}, "grad": [1 / 3], "seconds": 1 / 3}
    Record(tmp_path / "record.jsonl").add([row])
    assert Record(tmp_path / "record.jsonl").rows == [row | {"seconds": 0.333333}]


@pytest.mark.slow
def test_a_job_is_run_once_in_a_process_of_its_own(tmp_path):
    options, record = Options(sections=("depth",)), Record(tmp_path / "record.jsonl")
    (job,) = jobs(options, record)
    record.add(run(job | {"depths": [1]}, record))
    assert [row["blocks"] for row in record.rows] == [1]
    assert not list(jobs(options, record))
    (failed,) = run(job | {"depths": ["many"]}, record)
    assert "Error" in failed["failed"]


def test_goals_are_judged_and_the_largest_estimators_left_out(tmp_path):
    record = Record(tmp_path / "record.jsonl")
    shared = {"section": "estimators", "problem": "quadratic", "compile_seconds": 1.0}
    for steps, temporary, ratio in ((16, 1000, 4.0), (64, 1000 + 4 * 200, 6.0)):
        common = shared | {"steps": steps}
        record.add([common | {"name": "training", "seconds": 1.0, "ratio": 1.0, "temporary": 0, "state": 100}])
        record.add([common | {"name": "mixed, sqrt", "seconds": ratio, "ratio": ratio, "temporary": temporary}])
    found = {goal.text: goal for goal in goals.goals(record)}
    assert [(goal.measured, goal.is_met) for goal in found.values()] == [((2.0,), True), ((4.0, 6.0), False)]
    options = Options(sections=("estimators",), steps=(16, 64, 256), seconds=20.0)
    job = next(job for job in jobs(options, record) if job["problem"] == "quadratic")
    assert (job["steps"], job["skip"]) == (256, ["mixed, sqrt"])


def test_record_keeps_gradients_whole(tmp_path):
    record, grad = Record(tmp_path / "record.jsonl"), [1 / 3]
    record.add([{"grad": grad, "seconds": 1 / 3}])
    assert json.loads(record.path.read_text()) == {"grad": grad, "seconds": 0.333333}


def test_page_shows_what_was_measured_and_dashes_for_what_was_not(tmp_path):
    record = Record(tmp_path / "record.jsonl")
    shared = {"section": "peers", "problem": "data weighting", "steps": 64}
    record.add(
        [shared | {"name": side_by_side.REFERENCE, "seconds": 1.0, "resident": 2e6, "temporary": 1e6, "grad": []}]
    )
    record.add([shared | {"name": "higher", "seconds": 3.0, "resident": 8e6, "temporary": None, "error": 1e-6}])
    record.add([{"section": "agreement", "problem": "quadratic", "steps": 16, "name": "higher", "error": 0.5}])
    *figures, page = report.write(record, tmp_path / "out")
    assert [figure.name for figure in figures] == ["hypergradient-peers.png", "hypergradient-front.png"]
    text = page.read_text(encoding="utf-8")
    assert "| higher | 3 | 8 | – | – | 1e-06 |" in text
    assert "but for: higher on the quadratic problem (5e-01)" in text
    shown = {line.rpartition("(")[2] for line in text.splitlines() if line.startswith("![")}
    assert shown == {f"{figure.name})" for figure in figures}


def test_the_front_shows_the_longest_training_with_the_least_memory_first(tmp_path):
    record = Record(tmp_path / "record.jsonl")
    record.add([{"section": "machine", "date": "2026-01-02", "system": "x", "versions": {"higher": "0.2"}}])
    shared = {"section": "peers", "problem": "data weighting", "cores": 1, "seconds": 1.0}
    record.add([shared | {"steps": 64, "name": "higher", "resident": 1e6}])
    sizes = {"higher": 9e6, "bilevel, mixed, sqrt": 3e6, "bilevel, mixed, none": 2e6}
    record.add([shared | {"steps": 256, "name": name, "resident": size} for name, size in sizes.items()])
    text = report.front_table(record)
    assert text.index('| **bilevel**, `"sqrt"` | 3 | 1.0 | 1.00 |') < text.index("| higher 0.2 | 9 | 3.0 | 1.00 |")
    assert "none" not in text and "K = 256" in text and "2026-01-02, by `python -m" in text
