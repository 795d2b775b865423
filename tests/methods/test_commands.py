"""HeteroLoRA, the baselines and Flexora's options from the command line, and their runs side by side."""

import json

import numpy as np
import pytest

from methods import cli, flexora
from tests.methods.test_flexora import float32_by_default, tiny_data, tiny_model  # noqa: F401
from tests.methods.test_training import tiny_glue  # noqa: F401

pytestmark = pytest.mark.usefixtures("float32_by_default")


def arguments(model, data, out, *more):
    sizes = "--train-rows 16 --outer-rows 8 --test-rows 0 --batch-size 4 --outer-batch-size 4 --length 24".split()
    steps = "--finetune-steps 3 --rank 2".split()
    return ["--model", str(model), "--data", str(data), "--out", str(out), *sizes, *steps, *more]


def read(file):
    return json.loads(file.read_text())


def test_dynamic_heterolora_and_a_baseline_on_a_classification_side_by_side(tiny_model, tiny_glue, tmp_path):  # noqa: F811
    one, other, page = (tmp_path / name for name in ("heterolora", "random", "page"))
    options = "--task rte --reallocations 2 --interval 2 --normalised".split()
    words = ["heterolora", *arguments(tiny_model, tiny_glue, one, *options)]
    assert cli.run(words) == 0
    row, selection = read(one / "results" / "heterolora.json"), read(one / "selection.json")
    sites = ["block_hidden", "ffn_input", "q_proj", "residual_attention", "residual_ffn", "v_proj"]
    assert sorted(row["on"]) == sites
    assert sum(map(sum, row["on"].values())) == 2  # a quarter of four LoRA modules and seven shortcuts
    assert len(selection["history"]["lora.q_proj"]) == 2
    sizes = {"q_proj": 32, "v_proj": 24} | dict.fromkeys(sites[:2] + sites[3:5], 32)
    assert row["parameters"] == 32 + sum(2 * sizes[site] * sum(on) for site, on in row["on"].items())
    for name in ("adapter-shortcuts.safetensors", "metrics.jsonl", "figures/side_by_side.png", "results/random-0.json"):
        assert (one / name).stat().st_size > 0, name
    report = (one / "report.md").read_text()
    assert cli.run(words) == 0 and (one / "report.md").read_text() == report

    words = arguments(tiny_model, tiny_glue, other, "--task", "rte", "--share", "0.5")
    assert cli.run(["baseline", "random-k", *words]) == 0
    row = read(other / "results" / "random-k.json")
    assert row["parameters"] <= 32 + 0.5 * 2 * 2 * (32 + 24)
    assert read(other / "adapter" / "adapter_config.json")["modules_to_save"] == ["score"]
    assert cli.run(["report", str(one), str(other), "--out", str(page)]) == 0
    text = (page / "report.md").read_text()
    assert "| heterolora | heterolora |" in text and "| random | random-k |" in text


def test_static_heterolora_without_shortcuts_is_an_adapter_of_peft(tiny_model, tiny_data, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    options = "--allocation static --proxy snip --shortcuts none --share 0.5 --interval 2 --random-baselines 0".split()
    assert cli.run(["heterolora", *arguments(tiny_model, tiny_data, out, *options)]) == 0
    on = read(out / "results" / "heterolora.json")["on"]
    assert sum(map(sum, on.values())) == 2 and set(on) == {"q_proj", "v_proj"}
    assert not (out / "adapter-shortcuts.safetensors").exists()
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert "| run | pretrained |" in (out / "report.md").read_text()


def test_flexora_chooses_modules_and_says_how_stable_the_choice_is(tiny_model, tiny_data, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    options = "--per module --searches 2 --outer-decay 0.1 --search-rows 8 --top-k 2 --random-baselines 0".split()
    steps = "--inner-steps 2 --outer-steps 3".split()
    assert cli.run(["flexora", *arguments(tiny_model, tiny_data, out, *options, *steps)]) == 0
    selection = read(out / "selection.json")
    assert len(selection["modules"]) == 2 and len(selection["alpha"]) == 4 and len(selection["searches"]) == 2
    on = read(out / "results" / "flexora.json")["on"]
    flat = np.concatenate([on["q_proj"], on["v_proj"]])
    assert np.flatnonzero(flat).tolist() == selection["modules"]
    assert "mean Jaccard index" in " ".join((out / "report.md").read_text().split())


def test_stability_is_the_mean_jaccard_index():
    found = flexora.stability([[0, 1], [1, 2], [0, 1]], 4)
    assert found["jaccard"] == pytest.approx((1 / 3 + 1 + 1 / 3) / 3) and found["random"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="Stability compares two or more"):
        flexora.stability([[0]], 4)


BAD = {
    "share": (["heterolora", "--share", "0"], "--share 0 must be above 0 and at most 1"),
    "shortcut": (["heterolora", "--shortcuts", "sideways"], "--shortcuts 'sideways' is none"),
    "interval": (["heterolora", "--interval", "0"], "--interval 0 must be at least 1"),
    "budget": (["baseline", "melora", "--share", "2"], "--share 2 must be above 0"),
    "dora": (["baseline", "uniform", "--adapter", "dora"], "the baselines are made for LoRA"),
    "search rows": (["flexora", "--search-rows", "3"], "--search-rows 3 must be between"),
    "accumulation of a baseline": (["baseline", "uniform", "--accumulate", "4"], "a baseline trains as published"),
    "searches": (["flexora", "--searches", "0"], "--searches 0 must be at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_sentence(name, tiny_model, tiny_data, tmp_path, capsys):  # noqa: F811
    (method, *more), sentence = BAD[name]
    words = [method, *more[:1], *arguments(tiny_model, tiny_data, tmp_path / "run"), *more[1:]]
    words = words if method == "baseline" else [method, *arguments(tiny_model, tiny_data, tmp_path / "run"), *more]
    assert cli.run(words) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
