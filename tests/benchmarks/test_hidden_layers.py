"""Hidden layers: the task is what it says, and every score of it is one of its layers."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks.lora import hidden_layers, report
from benchmarks.lora.hidden_layers import Hidden, draw, judged, main
from methods import models
from methods.models.hooks import identity
from methods.objective import Bound

pytestmark = pytest.mark.usefixtures("float32_by_default")


@pytest.fixture
def small(tiny_model, tmp_path) -> Hidden:
    return Hidden(
        tiny_model, tmp_path / "out", planted=1, rank=2, rows=16, tokens=4, batch=2, warmup=3, outer=2, flexora=1
    )


def test_the_hidden_update_is_where_and_as_large_as_said_and_reaches_the_minimum(small):
    pretrained = models.load(small.model)
    drawn = draw(small, pretrained, jax.random.key(0))
    given, weights = drawn.given, pretrained.weights
    assert drawn.there.sum() == small.planted and len(drawn.train["tokens"]) == len(drawn.val["tokens"]) == 8
    missed = float(given.loss(weights, Bound(identity, {}), drawn.val))
    assert 1e-4 < missed < 1.0
    # The teacher's states are those of weights that have the update added, where it is, in the size that was asked for.
    for number, there in enumerate(drawn.there):
        for site in hidden_layers.SITES:
            kernel = np.asarray(weights["blocks"][site]["kernel"])[number]
            update = np.asarray(drawn.update[site]["a"])[number] @ np.asarray(drawn.update[site]["b"])[number]
            size = np.linalg.norm(update) / np.linalg.norm(kernel)
            np.testing.assert_allclose(size, small.size if there else 0.0, rtol=1e-4)
    moved = weights | {"blocks": dict(weights["blocks"])}
    for site in hidden_layers.SITES:
        kernel = weights["blocks"][site]["kernel"] + drawn.update[site]["a"] @ drawn.update[site]["b"]
        moved["blocks"][site] = weights["blocks"][site] | {"kernel": kernel}
    assert float(given.loss(moved, Bound(identity, {}), drawn.val)) < 1e-6 * missed


def test_layers_are_judged_by_their_scores():
    hidden = Hidden(None, None, planted=2)
    there = np.array([True, False, True, False])
    assert judged(hidden, there, np.array([3.0, 1.0, 2.0, 0.0])) == {"auroc": 1.0, "found": 2}
    assert judged(hidden, there, np.array([3.0, 2.5, 2.0, 0.0])) == {"auroc": 0.75, "found": 1}


def test_it_runs_goes_on_where_it_was_and_says_what_was_found(small, capsys, tmp_path):
    main(small)
    said, rows = capsys.readouterr().out, small.out / "hidden_layers.jsonl"
    assert "1 of 2 layers has a hidden update (1 draw)" in said and "hidden_layers.png" in said
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["way"] for row in kept] == list(hidden_layers.WAYS)
    assert all(np.isfinite(row["scores"]).all() and len(row["scores"]) == 2 for row in kept)
    assert (small.out / "hidden_layers.png").stat().st_size > 10_000
    main(dataclasses.replace(small, seeds=2))
    again = [json.loads(line) for line in rows.read_text().splitlines()]
    assert again[: len(kept)] == kept and len(again) == 2 * len(kept)
    assert "(2 draws)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is of another model, or of other settings: name another folder"):
        main(dataclasses.replace(small, size=0.2))
    none = tmp_path / "none.jsonl"
    figure, page = report.write(tmp_path / "docs", none, none, none, rows)
    text = page.read_text()
    assert "1 of its 2 layers" in text and "over 2 draws" in text and f"figures/{figure.name}" in text
    for name, what in hidden_layers.WAYS.items():
        told = [row["auroc"] for row in again if row["way"] == name]
        assert f"| {what} | {np.mean(told):.3f} ± {np.std(told, ddof=1):.3f} |" in text
