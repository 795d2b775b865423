"""The allocation benchmark: what is said beforehand, its intervals, its page, and that it goes on where it was."""

import numpy as np
import pytest

from benchmarks.lora import allocation, report
from benchmarks.record import Record, seconds_left


def test_a_detectable_difference_is_detected_in_four_of_five_pairs():
    """Simulated: questions answered differently with probability d, the difference in one direction being delta."""
    n, d = 400, allocation.DISCORDANCE
    delta = allocation.detectable(n)
    rng = np.random.default_rng(0)
    signs = rng.choice([1, -1, 0], p=[(d + delta) / 2, (d - delta) / 2, 1 - d], size=(20_000, n))
    z = signs.sum(1) / np.sqrt(np.maximum(1, np.abs(signs).sum(1)))
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.03)
    assert allocation.detectable(n, 4) == pytest.approx(delta / 2)


def test_intervals_hold_what_they_are_intervals_of():
    rng = np.random.default_rng(1)
    draws = rng.choice([1, -1, 0], p=[0.2, 0.1, 0.7], size=(60, 3, 100))
    intervals = [report.interval(difference) for difference in draws]
    assert np.mean([low <= 0.1 <= high for low, high in intervals]) > 0.9
    low, high = report.interval(np.ones((3, 10), int))
    assert (low, high) == pytest.approx((1.0, 1.0))


def test_what_is_in_the_record_is_not_run_again_and_is_on_the_page(tmp_path):
    file = tmp_path / "record.jsonl"
    record = Record(file)
    plan = {
        "plan": "rte",
        "test_rows": 4,
        "majority": 0.5,
        "discordance": 0.2,
        "detectable": 0.07,
        "detectable_at_best": 0.03,
        "seeds": 5,
    }
    rest = {"parameters": 96, "search_seconds": 0.0, "seconds": 30.0}
    answers = {"uniform": ("1100", "1110"), "random": ("1100", "1010"), "flexora": ("1111", "1111")}
    rows = [
        {"task": "rte", "seed": seed, "method": method, "right": right, **rest}
        for method, of in answers.items()
        for seed, right in enumerate(of)
    ]
    record.add([plan, *rows])
    todo = list(allocation.jobs(Record(file), ("rte", "piqa"), (0, 1, 4)))
    assert {"task": "rte", "seed": 0, "method": "uniform"} not in todo
    assert len(todo) == 2 * 2 + 5 + 2 * 5  # static and dynamic of two seeds, all of seed 4 of rte, two seeds of piqa
    assert seconds_left(record, todo, "task", "method") == pytest.approx(30 * len(todo))
    none = tmp_path / "none.jsonl"
    figure, page = report.write(tmp_path / "docs", none, file, hidden=none)
    text = page.read_text(encoding="utf-8")
    assert figure.stat().st_size > 0 and "| flexora | 2 | 96 | 100.0 ± 0.0 | +37.5 [" in text and "| 38% |" in text


def test_every_method_tests_what_was_trained_for_as_many_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(allocation.Case, "model", lambda self: tmp_path)
    for case in allocation.CASES.values():
        for method in allocation.METHODS:
            settings = allocation.settings_of(case, 0, method, tmp_path)
            before = settings.reallocations * settings.interval if method == "dynamic" else 0
            assert before + settings.finetune_steps == case.steps
            assert settings.lora_alpha / settings.rank == allocation.SCALE
            assert settings.rank * (allocation.SHARE if method == "uniform" else 1) == allocation.RANK
            assert case.train_rows + case.outer_rows <= 512 and case.length <= 64 and case.steps <= 200
