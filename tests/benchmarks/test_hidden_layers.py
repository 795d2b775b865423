"""Hidden layers: the task is what it says, and every score of it is one of its layers."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.lora import hidden_layers, report
from benchmarks.lora.hidden_layers import WAYS, Hidden, draw, judged, main, measure
from benchmarks.record import Record, short
from methods import fingerprint, models
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
    hidden = Hidden(Path(), Path(), planted=2)
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
    with pytest.raises(ValueError, match="line 1 is of other settings: name another folder"):
        main(dataclasses.replace(small, size=0.2))
    none = tmp_path / "none.jsonl"
    figure, page = report.write(tmp_path / "docs", none, none, none, rows)
    text = page.read_text()
    assert "1 of its 2 layers" in text and "over 2 draws" in text and f"figures/{figure.name}" in text
    for name, what in hidden_layers.WAYS.items():
        told = [row["auroc"] for row in again if row["way"] == name]
        assert f"| {what} | {np.mean(told):.3f} ± {np.std(told, ddof=1):.3f} |" in text


@pytest.fixture
def recorded(small, monkeypatch):
    """A record by hand of two seeds, `recorded(**entries)`; what is measured is told, and computes nothing."""
    asked = {name: value for name, value in dataclasses.asdict(small).items() if name not in ("model", "out", "seeds")}
    monkeypatch.setattr(hidden_layers, "draw", lambda hidden, pretrained, key: _Drawn)
    told = {way: np.array([2.0, 1.0]) for way in WAYS}
    monkeypatch.setattr(hidden_layers, "scores", lambda hidden, drawn, key: told)

    def made(seeds=2, **entries):
        row = {"found": 0, "scores": [1.0, 2.0], "there": [True, False], "seconds": 1.0, "model": "tiny"}
        row |= {"sha256": fingerprint.digest(small.model), "settings": asked}
        jobs = [{"seed": seed, "way": way, "auroc": 0.1 * seed} for seed in range(seeds) for way in WAYS]
        rows = [row | job | entries for job in jobs]
        shutil.rmtree(small.out, ignore_errors=True)
        Record(small.out / "hidden_layers.jsonl").add(rows)
        return rows

    return made


class _Drawn:
    there = np.array([True, False])


def _again(small, **options):
    return measure(dataclasses.replace(small, **options), Record(small.out / "hidden_layers.jsonl"))


def test_a_record_is_of_the_model_whose_files_hold_the_same_whatever_they_are_called(small, recorded, tmp_path):
    rows = recorded()
    assert _again(small, seeds=2) == rows
    moved = shutil.copytree(small.model, tmp_path / "elsewhere" / "another-1.0")
    assert _again(small, seeds=2, model=moved) == rows
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    renamed = moved.rename(tmp_path / small.model.name)  # the name of the first, with other files
    with pytest.raises(ValueError, match="line 1 is of another model, or of one that it does not tell: name another"):
        _again(small, seeds=2, model=renamed)
    recorded(sha256=None)
    with pytest.raises(ValueError, match="line 1 is of another model, or of one that it does not tell: name another"):
        _again(small, seeds=2)
    with pytest.raises(FileNotFoundError, match=r"--model .*nowhere is not there"):
        _again(small, model=tmp_path / "nowhere")


def test_a_file_is_known_by_its_sha256_and_a_folder_by_those_of_all_its_files(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        (folder / "model.gguf").write_bytes(b"some")
    assert fingerprint.digest(folders[0] / "model.gguf").startswith("a6b46dd0d1ae5e86")  # of echo -n some | sha256sum
    assert len({fingerprint.digest(folder) for folder in folders}) == 1
    (folders[1] / "config.json").write_text("{}")
    assert len({fingerprint.digest(folder) for folder in folders}) == 2


def test_a_seed_of_which_ways_are_missing_is_made_again_for_these_alone(small, recorded):
    rows = recorded()
    file, lost = small.out / "hidden_layers.jsonl", list(WAYS)[-2:]
    kept = [row for row in rows if row["seed"] == 0 or row["way"] not in lost]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    told = _again(small, seeds=2)
    assert [(row["seed"], row["way"]) for row in told] == [(seed, way) for seed in (0, 1) for way in WAYS]
    assert short([row for row in told if row["seed"] == 1 and row["way"] in lost]) == Record(file).rows[len(kept) :]
    assert [row["way"] for row in Record(file).rows[len(kept) :]] == lost
    # And the page, which is made of the record alone, takes no means over seeds that differ.
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    none = small.out / "none.jsonl"
    with pytest.raises(ValueError, match=f"not one row of {lost[0]!r} for each of its seeds, 0, 1: continue it"):
        report.write(small.out, none, none, none, file)


def test_only_the_seeds_that_are_asked_for_are_told(small, recorded):
    rows = recorded(5)
    assert _again(small, seeds=1) == rows[: len(WAYS)]
    assert "(1 draw)" in str(hidden_layers.table(_again(small, seeds=1)).title)
    with pytest.raises(ValueError, match="--seeds 0 must be at least 1"):
        _again(small, seeds=0)


def test_settings_are_told_apart_to_the_last_digit(small, recorded):
    rows = recorded()
    for row in rows:
        row["settings"]["size"] = 0.30000001
    file = small.out / "hidden_layers.jsonl"
    file.unlink()
    Record(file).add(rows)
    with pytest.raises(ValueError, match="line 1 is of other settings"):
        _again(small)
    assert _again(small, size=0.30000001, seeds=2) == rows


def test_a_line_that_is_no_row_is_refused_with_its_number(small, recorded):
    for entries in ({"seed": "0"}, {"way": "luck"}, {"scores": [1.0]}, {"there": [1, 0]}, {"auroc": None}):
        recorded(**entries)
        with pytest.raises(ValueError, match="line 1 is no row of this benchmark: remove it"):
            _again(small)


def test_the_committed_record_is_of_the_model_that_the_demonstration_fetches():
    rows = Record(report.HIDDEN).rows
    known = (Path(__file__).parents[2] / "scripts" / "fetch_demo.py").read_text()
    assert rows and all(f'"{row["sha256"]}"' in known and f'{row["model"]}.gguf"' in known for row in rows)
    assert all(hidden_layers._is_row(row) for row in rows)
