"""The benchmark of one device: its hypergradient is right, and the page shows its record."""

from pathlib import Path

from benchmarks import accelerator
from benchmarks.record import Record


def test_a_hypergradient_in_single_precision_is_near_that_in_double():
    found = accelerator.agreement()
    assert 0 < found["error"] < 1e-4


def test_the_page_shows_the_record():
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert accelerator.table(Record(accelerator.RECORD)) in page


def test_the_share_of_a_chip_is_told_where_it_is_known():
    assert accelerator._share(98.9e12, "NVIDIA H200") == 0.1
    assert accelerator._share(1e12, "cpu") is None
