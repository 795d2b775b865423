"""HiddenKey, FineGates and LoRATRF from the command line, on a tiny model."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from methods import cli, experiment, hiddenkey, inside, loratrf, report
from methods.adapters import load_edit, load_peft, slicing
from tests.methods import test_flexora

tiny_model, tiny_data = test_flexora.tiny_model, test_flexora.tiny_data
float32_by_default = test_flexora.float32_by_default

SIZES = "--train-rows 16 --outer-rows 8 --test-rows 0 --batch-size 4 --outer-batch-size 4 --length 24 --rank 2"
STEPS = "--inner-steps 2 --outer-steps 2 --finetune-steps 4"


def arguments(method, model, data, out, *more):
    places = ["--model", str(model), "--data", str(data), "--out", str(out)]
    return [method, *places, *SIZES.split(), *STEPS.split(), *more]


def run(*words):
    assert cli.run(arguments(*words)) == 0
    out = words[3]
    for name in ("config.json", "metrics.jsonl", "report.md"):
        assert (out / name).stat().st_size > 0, name
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("float32_by_default")
def test_hiddenkey_learns_rates_beside_a_grid_and_continues(tiny_model, tiny_data, tmp_path):
    out = tmp_path / "run"
    words = "hiddenkey", tiny_model, tiny_data, out, "--grid", "0.1", "0.3"
    rows = run(*words)
    assert [row["step"] for row in rows if row["stage"] == "search"] == [1, 2]
    found = json.loads((out / "selection.json").read_text())
    assert set(found) == {"rate attention_logits", "rate ffn_hidden", "beta"}
    assert found["rate ffn_hidden"] != pytest.approx(0.1, abs=1e-4)
    points = json.loads((out / "grid.json").read_text())
    assert len(points) == 4 and all(np.isfinite(point["validation_loss"]) for point in points)
    best = json.loads((out / "results" / "grid.json").read_text())
    assert best["validation_loss"] == pytest.approx(min(point["validation_loss"] for point in points), rel=1e-5)
    assert (out / "figures" / "rates.png").stat().st_size > 0
    # What is left when training is over is LoRA, and goes to PEFT.
    bench = experiment.prepare(hiddenkey.HiddenKeySettings(**json.loads((out / "config.json").read_text()), out=out))
    names, shapes = bench.pretrained.hf_names, bench.pretrained.config.site_shapes()
    config, lora, head = load_peft(out / "adapter", names, shapes, bench.num_layers)
    bound = inside.bind(bench._replace(lora=config), {"lora": lora, "head": head})
    loss = json.loads((out / "results" / "hiddenkey.json").read_text())["validation_loss"]
    assert experiment.loss_over(bench, bound, bench.outer) == pytest.approx(loss, rel=1e-6)
    bare = experiment.loss_over(bench, inside.bind(bench, {"lora": {}, "head": {}}), bench.outer)
    assert bare != pytest.approx(loss, rel=1e-4)
    before = (out / "report.md").read_text()
    run(*words)
    assert (out / "report.md").read_text() == before


@pytest.mark.usefixtures("float32_by_default")
def test_finegates_leaves_a_smaller_model_that_runs(tiny_model, tiny_data, tmp_path):
    out = tmp_path / "run"
    more = "--outer", "sparsity", "--target-sparsity", "0.5", "--gate-lr", "0.8", "--finetune-steps", "8"
    run("finegates", tiny_model, tiny_data, out, *more)
    row = json.loads((out / "results" / "sparsity-0.5.json").read_text())
    assert row["removed"] > 0 and row["sliced_differs_by"] < 1e-5
    model, weights = slicing.load(out / "sliced-0.5")
    logits = model.apply({"params": weights}, jnp.ones((1, 4), jnp.int32))
    assert jnp.isfinite(logits).all()
    for name in ("sparsity.png", "gates-sparsity-0.5.png"):
        assert (out / "figures" / name).stat().st_size > 0


@pytest.mark.usefixtures("float32_by_default")
def test_loratrf_trains_an_edit_beside_lora(tiny_model, tiny_data, tmp_path):
    out = tmp_path / "run"
    run("loratrf", tiny_model, tiny_data, out, "--edit-rank", "2", "--outer", "vectors")
    rows = {name: json.loads((out / "results" / f"{name}.json").read_text()) for name in ("loratrf", "lora")}
    assert rows["loratrf"]["parameters"] > rows["lora"]["parameters"]
    assert "reconstruction" in (out / "report.md").read_text()
    bench = experiment.prepare(loratrf.LoRATRFSettings(**json.loads((out / "config.json").read_text()), out=out))
    found = load_edit(out / "adapter", bench.pretrained.config.site_shapes(), bench.num_layers)
    trained = {"lora": found.params, "head": found.head}
    bound = inside.bind(bench._replace(lora=found.config), trained, before=found.edit)
    again = report.arm(bench, [0, 1], experiment.evaluate_with(bench, bound))
    assert again["metrics"] == pytest.approx(rows["loratrf"]["metrics"])
    assert all(leaves["d"].any() for leaves in found.edit.params.values())


BAD = {
    "implicit with one pass": (["hiddenkey", "--hypergradient", "implicit"], "needs --backward both"),
    "hard masks in the search": (["hiddenkey", "--temperature", "0"], "--temperature 0 must be above 0"),
    "no beta": (["hiddenkey", "--beta", "0"], "--beta 0 must be above 0"),
    "dora beside an edit": (["loratrf", "--adapter", "dora"], "stands beside LoRA or rsLoRA"),
    "unknown rule": (["hiddenkey", "--rules", "attention_logits rows kl"], "unknown word 'rows'"),
    "sparsity": (["finegates", "--target-sparsity", "1.0"], "--target-sparsity 1 must be at least 0 and below 1"),
    "no outer steps": (["loratrf", "--outer-steps", "0"], "--outer-steps 0 must be at least 1"),
    "filter": (["loratrf", "--outer", "thresholds"], "needs a filter that has them"),
}


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_code_2(name, tiny_model, tiny_data, tmp_path, capsys):
    (method, *more), sentence = BAD[name]
    assert cli.run(arguments(method, tiny_model, tiny_data, tmp_path / "run", *more)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("bilevel: ") and sentence in said, said
    assert not (tmp_path / "run").exists()
