"""The benchmarks on little data: that they run and go on, what they say of regret, and their page."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.lora import dropout, edits, filters, low_data_report, pruning
from benchmarks.lora.planted import auroc
from methods.adapters.filters import task_vectors

pytestmark = pytest.mark.usefixtures("float32_by_default")


@pytest.fixture
def common(tiny_model, tiny_glue, tmp_path):
    places = {name: tmp_path / name for name in ("out", "records", "docs")}
    sizes = {"seeds": 1, "steps": 3, "length": 24, "batch_size": 4}
    return {"task": "rte", "model": str(tiny_model), "data": str(tiny_glue), **places, **sizes}


def page(common):
    return (common["docs"] / low_data_report.PAGE).read_text()


def test_regret_is_what_the_learned_rates_cost_beyond_the_grids_choice(common, capsys):
    common["seeds"] = 2
    setup = dropout.Setup(**common, rows=8, burn_in=2, inner_steps=2, outer_steps=2, rates=(0.5,), betas=(0.1, 5.0))
    dropout.main(setup)
    assert "12/12" in (said := capsys.readouterr().out) and " left" in said
    runs = json.loads((common["records"] / "dropout-grid-rte.json").read_text())["runs"]
    for seed, run in enumerate(runs):
        folder = common["out"] / f"rte-grid-seed-{seed}"
        points = {file.name: json.loads(file.read_text()) for file in (folder / "validated").glob("grid-*.json")}
        best = json.loads((folder / "tested" / min(points, key=points.__getitem__)).read_text())
        assert len(points) == 2 and run["grid"]["test"] == pytest.approx(best["test"], rel=1e-5)
        assert run["grid"]["gradients"] == 2 * 3
        # Begun, searched, trained: a differentiated step costs a gradient and, where all is counted without the value
        # of the loss, a product of 1 to 2.2 (the record of unrolled schedules has 2.12); the outer gradient at most 2.
        assert 2 + 2 * (2 * 2) + 3 < run["unrolled"]["gradients"] < 2 + 2 * (2 * 3.2 + 2) + 3
        assert run["unrolled"]["rate ffn_hidden"] != pytest.approx(0.5, abs=1e-4)  # where it started
    regret = [100 * (run["unrolled"]["test"] - run["grid"]["test"]) for run in runs]
    regret = np.array(regret) / np.mean([run["grid"]["test"] for run in runs])
    assert f"| {regret.mean():+.2f} [" in (text := page(common)) and "| first-order |" in text
    (figure,) = (common["docs"] / "figures").glob("low-data-dropout-grid*.png")
    assert figure.stat().st_size > 0 and f"(figures/{figure.name})" in text
    dropout.main(setup)
    assert page(common) == text and "/12" not in capsys.readouterr().out  # nothing was done again


def test_every_position_pattern_and_compensation_is_in_the_table(common, monkeypatch):
    monkeypatch.setattr(dropout, "POSITIONS", ("attention_logits",))
    monkeypatch.setattr(dropout, "PATTERNS", ("column", "span"))
    monkeypatch.setattr(dropout, "TERMS", ("rescale", "js"))
    dropout.main(dropout.Setup(**common, rows=8, table=True))
    assert "| position | pattern | rescale | js |" in (text := page(common))
    assert text.count("| attention_logits |") == 2 and "without dropout" in text


def test_pruning_counts_what_is_removed_and_times_the_sliced_model(common):
    pruning.main(pruning.Setup(**common, rows=(8,), targets=(0.0, 0.5), repeats=3))
    record = json.loads((common["records"] / "pruning-none-rte.json").read_text())
    for run in record["runs"]:
        for of in run.values():
            assert set(of) == {"finegates 0", "magnitude 0", "finegates 0.5", "magnitude 0.5", "lora"}
            assert of["magnitude 0"]["removed"] == of["lora"]["removed"] == 0.0 < of["magnitude 0.5"]["removed"]
    assert [row["batch"] for row in record["times"]] == [1, 32, 1, 32]
    assert "| 8 | magnitude 0.5 |" in (text := page(common)) and "| saved, % |" in text


def test_edits_stand_beside_lora_of_as_many_parameters(common):
    edits.main(edits.Setup(**common, rows=8, inner_steps=2, outer_steps=2))
    runs = json.loads((common["records"] / "edits-rte.json").read_text())["runs"]
    assert [set(run) for run in runs] == [{"training rows", "validation rows", "no filter", "LoRA"}]
    one_rank = 2 * (32 + 24)  # q and v of two layers
    assert abs(runs[0]["LoRA"]["parameters"] - runs[0]["training rows"]["parameters"]) <= one_rank / 2
    assert "| validation rows |" in page(common)


def test_one_vector_tells_the_tokens_that_matter(common):
    weights = filters.encoder(jax.random.key(0))
    train, test = (filters.draw(np.random.default_rng(seed), 64) for seed in (0, 1))
    first = np.asarray(train["of_one"])
    marked = jnp.asarray(first / first.sum() - ~first / (~first).sum(), jnp.float32)
    output = lambda adapt: filters.MODEL.apply({"params": weights}, train["tokens"], None, adapt, method="hidden")  # noqa: E731
    layers = filters.relevance(weights, task_vectors(output, marked, filters.SITES, filters.CONFIG.num_layers), test)
    assert [auroc(layer.ravel(), np.asarray(test["of_one"]).ravel()) > 0.95 for layer in layers] == [True, True]
    words = weights["embed"].reshape(4, -1, filters.CONFIG.hidden_size).mean(axis=1)  # task 1: two classes, task 2: two
    classes = np.array([words[0] - words[1], words[2] - words[3]])
    assert np.corrcoef(classes)[0, 1] > 0.9  # both tasks write their class along one direction


def test_an_interval_holds_the_mean_in_nineteen_of_twenty_cases():
    draws = np.random.default_rng(0).normal(1.0, 2.0, (2000, 5))
    inside = [low <= 1.0 <= high for _, low, high in map(low_data_report.interval, draws)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
    assert np.isnan(low_data_report.interval(np.ones(1))[1:]).all()
