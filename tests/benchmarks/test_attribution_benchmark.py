"""The benchmark of influences: its page is that of its record, a setting can be measured, and goes on where it was."""

import numpy as np
import optax
import pytest

from benchmarks.attribution import __main__ as command
from benchmarks.attribution import cases, report
from benchmarks.attribution.cases import Setting
from benchmarks.record import Record

pytestmark = pytest.mark.usefixtures("float32_by_default")


def test_the_page_is_that_of_the_record():
    page = (report.DOCS / report.PAGE).read_text(encoding="utf-8")
    record = Record(report.RECORD)
    assert report.page(record) == page
    rank, count = report.correlation(record)
    assert count >= 12 and f"is {rank:.2f}" in page


def test_a_setting_is_measured_once(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SUBSETS", 4)
    monkeypatch.setattr(cases, "MNIST_ROWS", 40)
    monkeypatch.setattr(cases, "MNIST_BATCH", 20)
    record, setting = Record(tmp_path / "record.jsonl"), Setting("sgd", optax.sgd(0.05), steps=6)
    rows = list(command.measure("mnist", setting, record))
    record.add(rows)
    assert rows[0]["section"] == "smoothness" and rows[0]["score"] > 0.9
    assert [row["score"] for row in rows[1:]] == list(command.ALWAYS)
    assert all(np.isfinite(row["value"]) for row in rows[1:])
    assert list(command.measure("mnist", setting, Record(tmp_path / "record.jsonl"))) == []
    assert len(report.points(record)) == 1
