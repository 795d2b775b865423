"""Every command: its run folder, which it continues, its page, and what is particular to it."""

import dataclasses
import json
import os
import re
import shutil
from importlib import import_module

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from methods import bench as benches
from methods import cli, evaluation, flexora, hiddenkey, lora, loratrf
from methods.adapters import load_edit, load_peft, slicing
from methods.options import parse
from methods.pages import Run
from methods.tasks import METRICS
from methods.tasks.generation import METRICS as WRITTEN
from tests.methods.commands import TABLE
from tests.methods.small import arguments, flexora_words

pytestmark = pytest.mark.usefixtures("float32_by_default")


def read(file):
    return json.loads(file.read_text())


def rows(out, stage):
    """The logged rows of a stage."""
    found = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["stage"] == stage]


def settings_of(kind, out):
    """The settings of a finished run."""
    return kind(**read(out / "config.json"), out=out)


def test_every_command_has_a_row():
    assert set(TABLE) == set(cli.COMMANDS) - {"report"}


def test_every_command_knows_its_name():
    """By which the configuration of a run that was made from Python is repeated."""
    for name, row in cli.COMMANDS.items():
        if name != "report":
            assert import_module(row.module).COMMAND.command == name


def test_a_run_from_python_leaves_the_configuration_of_a_command(finished, tmp_path):
    out = finished("lora")
    given = read(out / "config.json")
    settings = lora.LoRASettings(**given | {"targets": tuple(given["targets"]), "out": tmp_path / "run"})
    lora.COMMAND.main(settings)
    both = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (out, tmp_path / "run")]
    assert both[0]["command"] == both[1]["command"] == "lora"
    same = lambda found: {name: value for name, value in found["settings"].items() if name != "out"}  # noqa: E731
    assert same(both[0]) == same(both[1])
    assert cli.run(["lora", "--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (out, tmp_path / "again")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("name", TABLE)
def test_it_leaves_a_whole_run_folder_and_continues_it(name, finished, command_line, capsys):
    out, row = finished(name), TABLE[name]
    common = "config.json", "fingerprint.json", "metrics.jsonl", "report.md", "finished.json"
    for file in (*common, *row.files, *(f"results/{arm}.json" for arm in row.arms)):
        assert (out / file).stat().st_size > 0, file
    assert {file.stem for file in (out / "results").iterdir()} == set(row.arms)
    page = (out / "report.md").read_text()
    assert all(f"| {arm} |" in page for arm in row.arms)
    for other in row.arms[1:]:  # compared with the first that was trained
        assert f"- against {other}: " in page
    for figure in (out / "figures").glob("*"):
        assert f"(figures/{figure.name})" in page
    for arm in row.arms:
        result = read(out / "results" / f"{arm}.json")
        assert result["layers"] == [layer for layer in range(2) if any(on[layer] for on in result["on"].values())]
        assert result["accuracy"]["total"] == 6 and result["parameters"] >= 0

    umask = os.umask(0)
    os.umask(umask)
    modes = {str(file.relative_to(out)): file.stat().st_mode & 0o777 for file in out.rglob("*") if file.is_file()}
    assert set(modes.values()) == {0o666 & ~umask}, modes  # whoever may read the folder may read all of it

    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.suffix != ".png"}
    words, _ = command_line(name)
    capsys.readouterr()
    assert cli.run(words) == 0
    assert capsys.readouterr().out.count("already finished") == 1 and not (out / "checkpoints").exists()
    assert {file: file.read_bytes() for file in before} == before


ELSEWHERE = {
    "": {"out", "quiet", "track", "finetune_epochs"},  # by the run folder, by the command line, and as --finetune-steps
    "flexora": {"released"},  # as what it says of other options
    "allocate": {"budget_params", "budget_modules", "top_k"},  # as the budget
    "baseline": {"accumulate", "validate_every", "patience"},  # which it refuses
}
"""Options that a command reads in another way than a run reads them, and how."""


@pytest.mark.parametrize("name", TABLE)
def test_an_option_is_read_or_refused_as_one_without_effect(name, finished, command_line, options_read):
    finished(name)
    command = import_module(cli.COMMANDS[name].module).COMMAND
    settings = parse(command, name, command_line(name)[0][1:])
    options = {field.name for field in dataclasses.fields(command.settings)}
    without = options - options_read[name] - ELSEWHERE[""] - ELSEWHERE.get(name, set())
    assert {"model", "rank", "batch_size"} <= options_read[name]
    assert without <= set(command.unused(settings)), without - set(command.unused(settings))


@pytest.mark.parametrize("name", ["lora", "flexora", "select-data", "attribute"])
def test_the_page_names_the_optimizer_that_trained(name, finished, command_line, tmp_path):
    shutil.copytree(finished(name), out := tmp_path / "run")
    command = import_module(cli.COMMANDS[name].module).COMMAND
    settings = command.used(parse(command, name, [*command_line(name)[0][1:], "--out", str(out)]))
    bench = command.prepare(settings)
    folder = benches.open_run(benches.settled(settings, bench), bench, benches.unsettled(settings))
    results = {file.stem: read(file) for file in (out / "results").iterdir()}
    selection = read(out / "selection.json") if (out / "selection.json").exists() else {}
    for optimizer, said in {"adamw": "AdamW", "sgd": "gradient descent", "momentum": "descent with momentum"}.items():
        used = dataclasses.replace(settings, finetune_optimizer=optimizer)
        made = command.page(Run(used, bench, folder, selection, results)).made
        assert said in made and ("AdamW" in made) == (optimizer == "adamw"), made
        assert name != "attribute" or ("eps_root" in made) == (optimizer == "adamw")


def test_what_was_deleted_of_a_finished_run_is_made_again_and_is_the_same(command_line, tmp_path, capsys):
    words, _ = command_line("flexora")
    out = tmp_path / "run"
    words = [str(out) if word == words[words.index("--out") + 1] else word for word in words]
    assert cli.run([*words, "--keep-checkpoints"]) == 0
    assert {each.name for each in (out / "checkpoints").iterdir()} >= {"search", "finetune-flexora"}
    files = *out.glob("*.json"), *(out / "results").iterdir(), out / "report.md"
    before = {file: file.read_bytes() for file in files}
    assert cli.run(words) == 0  # which changes no result, so that the run goes on without
    assert not (out / "checkpoints").exists()
    (out / "results" / "random-0.json").unlink()
    (out / "selection.json").unlink()
    capsys.readouterr()
    assert cli.run(words) == 0
    assert "results/flexora: already finished" in capsys.readouterr().out
    del before[out / "config.json"]  # tells whether checkpoints are kept
    assert {file: file.read_bytes() for file in before} == before
    weights = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "adapter")
    assert cli.run(words) == 0
    assert "results/all-layers: already finished" in capsys.readouterr().out
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert {file: file.read_bytes() for file in before} == before

    # What was changed, and not deleted, is one sentence, and nothing is written.
    told = read(out / "finished.json")
    once = "is not what it was when the run was finished: put the old one back, or delete it to have it made again."
    odd = "does not tell which models the run has, and what their files hold: delete it to have it made again."
    cases = {
        "selection.json": {"{}": once, "[1]": once, "{": once},
        "results/pretrained.json": {"{}": once, "{": once},
        "finished.json": {
            "{": "is damaged",
            "[]": odd,
            "{}": odd,
            '{"arms": 3}': odd,
            '{"arms": [], "selection": false}': odd,
            json.dumps(told | {"arms": [], "selection": False}): odd,
            json.dumps(told | {"arms": told["arms"][:1]}): odd,
            json.dumps(told | {"arms": ["../results/pretrained"]}): odd,
            json.dumps(told | {"arms": "flexora"}): odd,
            json.dumps({"arms": [], "selection": False, "sha256": {}}): odd,
        },
    }
    page = (out / "report.md").read_bytes()
    for name, damages in cases.items():
        whole = (out / name).read_bytes()
        for text, sentence in damages.items():
            (out / name).write_text(text)
            capsys.readouterr()
            assert cli.run(words) == 2, (name, text)
            said = capsys.readouterr().err.strip()
            assert said.startswith(f"bilevel: {out / name} ") and sentence in said and "\n" not in said, (text, said)
            assert (out / name).read_text() == text and (out / "report.md").read_bytes() == page
        (out / name).write_bytes(whole)
    assert cli.run(words) == 0

    # The files that a result names likewise, finished or not, and what repeats the run.
    made = "is not what it was when results/flexora was made: put the old one back, or delete it to have it made again."
    configured = (out / "config.yaml").read_text()
    damages = [
        ("adapter/adapter_model.safetensors", b"x", made),
        ("adapter/adapter_config.json", (out / "adapter/adapter_config.json").read_bytes() + b" ", made),
        ("config.yaml", configured.replace("rank: 2", "rank: 3").encode(), "was made with, rank = 2: delete it"),
        ("config.yaml", configured.replace("command: flexora", "command: lora").encode(), "or of another command: "),
        ("config.yaml", b"[", "is damaged, or of another command: delete it"),
    ]
    for finished in (True, False):
        if not finished:
            (out / "finished.json").unlink()
        for name, changed, sentence in damages:
            whole = (out / name).read_bytes()
            assert whole != changed
            (out / name).write_bytes(changed)
            capsys.readouterr()
            assert cli.run(words) == 2, name
            said = capsys.readouterr().err.strip().splitlines()[-1]  # a search without its states is repeated
            assert said.startswith(f"bilevel: {out / name} ") and sentence in said, said
            assert (out / name).read_bytes() == changed
            (out / name).write_bytes(whole)
        (out / damages[0 if finished else 1][0]).unlink()  # the remedy
        (out / "config.yaml").unlink()
        assert cli.run(words) == 0 and "made:" in (out / "config.yaml").read_text()
        assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == weights
        assert {file: file.read_bytes() for file in before} == before

    # Of a run that is not finished all that its page needs of a result.
    (out / "finished.json").unlink()
    file = out / "results" / "flexora.json"
    whole = json.loads(file.read_text())
    odd = {
        "what it got right is no list of 0 and 1": {"right": "x"},
        "no list of 0 and 1": {"right": [2] * 6},
        "it does not tell what it got right": {"right": ...},
        "its accuracy is not that of what it got right": {"right": whole["right"][1:]},
        "accuracy is not that": {"accuracy": None},
        "its losses and tokens are not a number for each row": {"losses": ["a"] * 6, "tokens": [1] * 6},
        "losses and tokens": {"losses": [1.0], "tokens": [1]},
        "tokens are not": {"losses": [1.0] * 6},
        "it does not count the texts that were cut": {"cut": "x"},
        "tells of other metrics than pretrained.json: delete the one": {"metrics": {"exact": 1.0}},
        "tells of other test rows than pretrained.json": {"losses": [1.0] * 6, "tokens": [1] * 6},
    }
    for sentence, change in odd.items():
        row = {name: value for name, value in (whole | change).items() if value is not ...}
        file.write_text(json.dumps(row))
        capsys.readouterr()
        assert cli.run(words) == 2, sentence
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert sentence in said and said.endswith("to have it made again."), said
    file.write_text(json.dumps(whole))
    (out / "results" / "random-0.json").write_text('{"parameters": 3}')
    assert cli.run(words) == 2
    assert "random-0.json is no result of this program: it lacks its layers or its metrics; delete it" in (
        capsys.readouterr().err
    )


def test_dynamic_heterolora_keeps_its_share_of_the_modules(finished):
    out = finished("heterolora")
    row, selection = read(out / "results" / "heterolora.json"), read(out / "selection.json")
    page = (out / "report.md").read_text()
    assert "so had 4 training steps of Adam at 0.0005 before the 3 that the random allocations had" in page
    sites = ["block_hidden", "ffn_input", "q_proj", "residual_attention", "residual_ffn", "v_proj"]
    assert sorted(row["on"]) == sites
    assert sum(map(sum, row["on"].values())) == 2  # a quarter of four LoRA modules and seven shortcuts
    assert len(selection["history"]["lora.q_proj"]) == 2
    sizes = {"q_proj": 32, "v_proj": 24} | dict.fromkeys(sites[:2] + sites[3:5], 32)
    assert row["parameters"] == 32 + sum(2 * sizes[site] * sum(on) for site, on in row["on"].items())


def test_a_baseline_keeps_its_budget(finished):
    out = finished("baseline")
    row = read(out / "results" / "random-k.json")
    assert row["parameters"] <= 32 + 0.5 * 2 * 2 * (32 + 24)
    assert read(out / "adapter" / "adapter_config.json")["modules_to_save"] == ["score"]
    assert not (out / "scores.json").exists()  # a random choice has none


def test_finished_runs_side_by_side(finished, tmp_path):
    runs = [str(finished(name)) for name in ("heterolora", "baseline")]
    assert cli.run(["report", *runs, "--out", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "report.md").read_text()
    assert "| heterolora | heterolora |" in text and "| baseline | random-k |" in text


def test_static_heterolora_without_shortcuts_is_an_adapter_of_peft(tiny_model, tiny_data, tmp_path):
    out = tmp_path / "run"
    options = "--allocation static --proxy snip --shortcuts none --share 0.5 --interval 2 --random-baselines 0".split()
    assert cli.run(["heterolora", *arguments(tiny_model, tiny_data, out, *options)]) == 0
    on = read(out / "results" / "heterolora.json")["on"]
    assert sum(map(sum, on.values())) == 2 and set(on) == {"q_proj", "v_proj"}
    assert not (out / "adapter-shortcuts.safetensors").exists()
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert "| pretrained |" in (out / "report.md").read_text()


def test_flexora_chooses_modules_and_says_how_stable_the_choice_is(tiny_model, tiny_data, tmp_path):
    out = tmp_path / "run"
    options = "--per module --searches 2 --outer-decay 0.1 --search-rows 8 --top-k 2 --random-baselines 0".split()
    steps = "--inner-steps 2 --outer-steps 3".split()
    assert cli.run(["flexora", *arguments(tiny_model, tiny_data, out, *options, *steps)]) == 0
    selection = read(out / "selection.json")
    assert len(selection["modules"]) == 2 and len(selection["alpha"]) == 4 and len(selection["searches"]) == 2
    on = read(out / "results" / "flexora.json")["on"]
    flat = np.concatenate([on["q_proj"], on["v_proj"]])
    assert np.flatnonzero(flat).tolist() == selection["modules"]
    names = [f"model.layers.{layer}.self_attn.{site}" for site in ("q_proj", "v_proj") for layer in range(2)]
    assert selection["names"] == names
    page = " ".join((out / "report.md").read_text().split())
    assert "mean Jaccard index" in page
    assert all(f"{site} in layer" in page for site in {names[i].split(".")[-1] for i in selection["modules"]})


def test_a_search_with_weights_in_half_precision_is_near_that_in_single(tiny_model, tiny_data, tmp_path):
    """Weights of bfloat16 have 8 bits; what is trained, and the hypergradient, stay float32."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        assert cli.run(flexora_words(tiny_model, tiny_data, out, "--dtype", dtype)) == 0
        found[dtype] = rows(out, "search")
        assert read(out / "config.json")["dtype"] == dtype
    for one, half in zip(found["float32"], found["bfloat16"], strict=True):
        assert one["outer_loss"] != half["outer_loss"]
        np.testing.assert_allclose(half["outer_loss"], one["outer_loss"], rtol=2e-2)
        np.testing.assert_allclose(half["hypergradient_norm"], one["hypergradient_norm"], rtol=0.2)


def test_stability_is_the_mean_jaccard_index():
    found = flexora.stability([[0, 1], [1, 2], [0, 1]], 4)
    assert found["jaccard"] == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert found["random"] == pytest.approx((1 + 4 / 3) / 6)  # one of six pairs is the same, four share one of three
    with pytest.raises(ValueError, match="Stability compares two or more"):
        flexora.stability([[0]], 4)


def test_hiddenkey_learns_rates_beside_a_grid(finished):
    out = finished("hiddenkey")
    assert [row["step"] for row in rows(out, "search")] == [1, 2]
    found = read(out / "selection.json")
    assert set(found) == {"rate attention_logits", "rate ffn_hidden", "beta", "history", "grid"}
    assert found["rate ffn_hidden"] != pytest.approx(0.1, abs=1e-4)
    points = found["grid"]
    assert len(points) == 4 and all(np.isfinite(point["validation_loss"]) for point in points)
    best = read(out / "results" / "grid.json")
    assert best["validation_loss"] == pytest.approx(min(point["validation_loss"] for point in points), rel=1e-5)
    # What is left when training is over is LoRA, and goes to PEFT.
    bench = benches.prepare(settings_of(hiddenkey.HiddenKeySettings, out))
    config, lora, head = load_peft(out / "adapter", bench.pretrained.hf_names, bench.shapes, bench.num_layers)
    given = bench._replace(lora=config).given()
    bound = given.bind(given.weights, {"lora": lora, "head": head})
    loss = read(out / "results" / "hiddenkey.json")["validation_loss"]
    assert evaluation.validation_loss(bench, bound) == pytest.approx(loss, rel=1e-6)
    bare = evaluation.validation_loss(bench, given.bind(given.weights, {"lora": {}, "head": {}}))
    assert bare != pytest.approx(loss, rel=1e-4)


def test_finegates_leaves_a_smaller_model_that_runs(finished):
    out = finished("finegates")
    row = read(out / "results" / "sparsity-0.5.json")
    assert row["removed"] > 0 and row["sliced_differs_by"] < 1e-5
    model, weights = slicing.load(out / "sliced-0.5")
    held = 1 - slicing.parameters(weights) / slicing.whole(model.config)
    assert row["sliced_removed"] == pytest.approx(held) and held <= row["removed"]
    assert f"the sliced model has {100 * held:.1f} % fewer" in (out / "report.md").read_text()
    logits = model.apply({"params": weights}, jnp.ones((1, 4), jnp.int32))
    assert jnp.isfinite(logits).all()


def test_loratrf_trains_an_edit_beside_lora(finished):
    out = finished("loratrf")
    found = {name: read(out / "results" / f"{name}.json") for name in ("loratrf", "lora")}
    assert found["loratrf"]["parameters"] > found["lora"]["parameters"]
    assert "reconstruction" in (out / "report.md").read_text()
    bench = benches.prepare(settings_of(loratrf.LoRATRFSettings, out))
    saved = load_edit(out / "adapter", bench.shapes, bench.num_layers)
    given = bench._replace(lora=saved.config).given()
    bound = given.bind(given.weights, {"lora": saved.params, "head": saved.head}, before=saved.edit)
    again = evaluation.row(evaluation.evaluate(bench, bound))
    assert again["metrics"] == pytest.approx(found["loratrf"]["metrics"])
    assert all(leaves["d"].any() for leaves in saved.edit.params.values())


BAD = {
    "implicit with one pass": (["hiddenkey", "--hypergradient", "implicit"], "needs --backward both"),
    "hard masks in the search": (["hiddenkey", "--temperature", "0"], "--temperature 0 must be above 0"),
    "no beta": (["hiddenkey", "--beta", "0"], "--beta 0 must be above 0"),
    "dora beside an edit": (["loratrf", "--adapter", "dora"], "stands beside LoRA or rsLoRA"),
    "unknown rule": (["hiddenkey", "--rules", "attention_logits rows kl"], "unknown word 'rows'"),
    "sparsity": (["finegates", "--target-sparsity", "1.0"], "--target-sparsity 1 must be at least 0 and below 1"),
    "no outer steps": (["loratrf", "--outer-steps", "0"], "--outer-steps 0 must be at least 1"),
    "filter": (["loratrf", "--outer", "thresholds"], "needs a filter that has them"),
    "share": (["heterolora", "--share", "0"], "--share 0 must be above 0 and at most 1"),
    "shortcut": (["heterolora", "--shortcuts", "sideways"], "--shortcuts 'sideways' is none"),
    "interval": (["heterolora", "--interval", "0"], "--interval 0 must be at least 1"),
    "budget": (["baseline", "melora", "--share", "2"], "--share 2 must be above 0"),
    "dora": (["baseline", "uniform", "--adapter", "dora"], "the baselines are made for LoRA"),
    "search rows": (["flexora", "--search-rows", "3"], "--search-rows 3 must be between"),
    "patience": (["lora", "--patience", "3"], "--patience 3 counts validations, of which there are none: give --valid"),
    "accumulation of a baseline": (["baseline", "uniform", "--accumulate", "4"], "a baseline trains as published"),
    "searches": (["flexora", "--searches", "0"], "--searches 0 must be at least 1"),
    "questions": (["attribute", "--questions", "9"], "--questions 9 are more than --outer-rows 8"),
    "two subsets": (["attribute", "--questions", "3", "--subsets", "2"], "--subsets 2 have no rank correlation"),
    "a share of no subsets": (["attribute", "--subset-share", "0.3"], "--subset-share has no effect here"),
    "an unknown score": (["attribute", "--by", "guessing"], "--by"),
    "fewer rows than a batch": (["select-data", "--keep", "0.1"], "are 2 rows, fewer than --batch-size 4"),
}


def test_rows_of_a_search_are_compared_with_what_was_given_or_is_there(tiny_model, tmp_path, capsys):
    rows = [{"prompt": f"q {i} ", "completion": f"a {i}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["flexora", "--model", str(tiny_model), "--data", str(tmp_path / "rows.jsonl"), "--batch-size", "2"]
    words += ["--out", str(tmp_path / "run"), "--outer-batch-size", "2", "--length", "24"]
    for given, sentence in {
        "1": "--search-rows 1 must be at least --batch-size 2, or 0 for all training rows.",
        "99": "--search-rows 99 are more than the 18 training rows that there are: lower it, or give 0 for all of "
        "them.",
    }.items():
        assert cli.run([*words, "--search-rows", given]) == 2
        assert capsys.readouterr().err == f"bilevel: {sentence}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_sentence(name, tiny_model, tiny_data, tmp_path, capsys):
    (method, *more), sentence = BAD[name]
    words = [method, *more[:1], *arguments(tiny_model, tiny_data, tmp_path / "run"), *more[1:]]
    words = words if method == "baseline" else [method, *arguments(tiny_model, tiny_data, tmp_path / "run"), *more]
    assert cli.run(words) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_table_at_the_end_fits_the_window(tmp_path):
    from methods import closing

    def titles(said):
        (last,) = (line for line in said.split("\n") if line.split()[:1] == ["model"])
        return last.split()[3:]

    accuracy = {"value": 0.5, "low": 0.4, "high": 0.6, "correct": 5, "total": 10}
    plain = {"layers": [0, 1], "parameters": 123456, "metrics": {"accuracy": 0.5}, "accuracy": accuracy}
    texts = {"layers": [1], "parameters": 5, "metrics": {"loss": 1.2345, "perplexity": 3.4, "exact": 0.1}}
    (tmp_path / "report.md").write_text("")
    (tmp_path / "adapter").mkdir()
    for width in (60, 80, 100):
        said = closing.text(tmp_path, {"flexora": plain, "a name that is rather long for a table": plain}, width)
        assert max(map(len, said.splitlines()[:-2])) <= width
        assert "50.0" in said and "40.0 to 60.0" in said and "123,456" in said and str(tmp_path / "adapter") in said
        assert "config.yaml" not in said
    for width, columns in ((80, ["loss", "exact", "of", "exact"]), (60, ["loss"])):
        said = closing.text(tmp_path, {"flexora": texts | {"accuracy": accuracy}}, width)
        assert titles(said) == columns and ("40.0 to 60.0" in said) == ("exact" in said) == ("95 % interval" in said)
        assert "1.234" in said or "1.235" in said
        left_out = {80: "1 column", 60: "3 columns"}[width]
        assert f"\nLeft out here: {left_out}; every metric is in report.md.\n" in said
    said = closing.text(tmp_path, {"flexora": texts | {"metrics": {"loss": 1.2345, "perplexity": 3.4}}}, 80)
    assert titles(said) == ["loss", "perplexity"] and "Left out" not in said
    assert closing.text(tmp_path, {}, 80).startswith(str(tmp_path / "report.md"))
    # An interval stands right of the metric that it is of: CoLA's is of accuracy, and not of Matthews' correlation.
    said = closing.text(tmp_path, {"x": plain | {"metrics": {"matthews": 0.05}}}, 80)
    assert "matthews" in said and "5.0" in said and "interval" not in said and "40.0" not in said
    said = closing.text(tmp_path, {"x": plain | {"metrics": {"accuracy": 0.5, "f1": 0.7}}}, 80)
    assert titles(said) == ["accuracy", "of", "accuracy", "f1"]
    assert said.split("\n")[4].split()[3:] == ["50.0", "40.0", "to", "60.0", "70.0"]


OWN = "a_metric_of_ones_own_with_a_name_that_is_longer_than_any_column_of_a_table"
CASES = [(name,) for name in (*METRICS, *WRITTEN, OWN)] + [("accuracy per character", "accuracy per token")]
CASES += [("loss", "perplexity", "exact"), ("f1", "accuracy"), (OWN, "accuracy")]


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("metrics", CASES)
def test_no_number_of_the_table_at_the_end_is_cut(metrics, width, tmp_path):
    """Whatever the task is measured by, and however large its numbers are."""
    from methods import closing, units

    (tmp_path / "report.md").write_text("")
    accuracy = {"value": 1.0, "low": 0.965, "high": 1.0, "correct": 100, "total": 100}
    counts = [40, 30, 50]
    row = {"layers": [*range(100)], "parameters": 123_456_789_012, "accuracy": accuracy}
    row |= {"metrics": {name: 123456.78901 if name == "perplexity" else 1.0 for name in metrics}}
    row |= {"losses": [40.0, 30.0, 50.0], "tokens": counts} if "loss" in metrics else {}
    said = closing.text(tmp_path, {"pretrained": row, "a name that is rather long for a table": row}, width)
    *table, _ = said.split("\n")
    assert max(map(len, table)) <= width, said
    (shown,) = (line for line in table if line.split()[:1] == ["pretrained"])
    first = units.shown(metrics[0], row["metrics"][metrics[0]])
    assert shown.split()[:4] == ["pretrained", "100", "123,456,789,012", first], said
    assert all(word[:14] in said for word in metrics[0].split()), said
    beside = " ".join(shown.split()[4:])
    if metrics[0] == "loss":
        assert beside.startswith("1.000 to 1.000") or width < 80
    elif units.share_of(row) == metrics[0]:
        assert beside.startswith("96.5 to 100.0") or width < 80


def test_a_loss_that_leads_has_its_interval_where_it_is_known(tmp_path):
    from methods import closing

    (tmp_path / "report.md").write_text("")
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 20, 50)
    losses = rng.normal(1.2, 0.4, 50) * tokens
    loss = losses.sum() / tokens.sum()
    row = {"layers": [0], "parameters": 5, "metrics": {"loss": loss, "perplexity": np.exp(loss)}}
    known = row | {"losses": losses.tolist(), "tokens": tokens.tolist()}
    unknown = known | {"losses": [float("inf"), *losses.tolist()[1:]]}
    said = closing.text(tmp_path, {"x": known, "y": unknown}, 80)
    # By drawing the rows again and again, each with its tokens.
    drawn = rng.integers(0, 50, (4000, 50))
    low, high = np.percentile(losses[drawn].sum(axis=1) / tokens[drawn].sum(axis=1), [2.5, 97.5])
    (found,) = (line.split() for line in said.split("\n") if line.split()[:1] == ["x"])
    np.testing.assert_allclose([float(found[4]), float(found[6])], [low, high], atol=0.02)
    assert found[5] == "to" and "95 % interval" in said and "of loss" in said
    (other,) = (line.split() for line in said.split("\n") if line.split()[:1] == ["y"])
    assert other[4:6] == ["not", "known"]
    assert "interval" not in closing.text(tmp_path, {"x": row}, 80)


def test_layers_and_ranks_are_told_in_short():
    from methods.allocate import _shortly
    from methods.pages import layers

    assert [layers(each) for each in ([], [3], [1, 0], [5, 0, 1, 2, 7])] == [
        "no layer", "layer 3", "layers 0, 1", "layers 0 to 2, 5, 7"
    ]  # fmt: skip
    alike = _shortly({"q_proj": [2, 2, 2, 0], "v_proj": [2, 2, 2, 0], "k_proj": [0, 0, 0, 1]})
    assert alike.split("\n") == ["Ranks:", "  each of q_proj, v_proj: 2 in layers 0 to 2", "  k_proj: 1 in layer 3"]
    many = _shortly({f"linear_{i}_proj": [i % 3, *(j % 5 for j in range(63))] for i in range(3)})
    assert many.split("\n")[1] == "  linear_0_proj: 1 to 4, 123 in all, in 50 of 64 layers"
    sites = {f"linear_{i}_proj": [1] * i + [0] * (30 - i) for i in range(20)}
    few = _shortly(sites).split("\n")
    assert len(few) == 9 and few[-1] == "  and other ranks of 13 more: report.md"


@pytest.mark.parametrize(("name", "shown"), [("flexora", "Selected, by the rule alpha"), ("allocate", "Ranks:\n  ")])
def test_what_was_chosen_is_on_the_screen(name, shown, finished, command_line, capsys):
    finished(name)
    capsys.readouterr()
    assert cli.run(command_line(name)[0]) == 0
    said = capsys.readouterr().out
    assert shown in said and max(map(len, said[said.index(shown) :].split("\n\n")[0].split("\n"))) <= 80
    chosen = read(finished(name) / "selection.json")
    if name == "flexora":
        assert re.search(rf"> mean\(alpha\): layers? {', '.join(map(str, chosen['layers']))}\.", said), said


def test_one_step_is_no_steps():
    from methods import pages

    said = [pages.number(count, "outer step") for count in (0, 1, 2, 1200)]
    assert said == ["0 outer steps", "1 outer step", "2 outer steps", "1,200 outer steps"]


def test_a_metric_has_one_unit_wherever_it_is_told():
    from methods import pages, units

    values = {"accuracy": 0.5, "matthews": -0.2, "loss": 1.25, "cider": 2.5, "nist": 8.5, "perplexity": float("inf")}
    assert [units.shown(*each) for each in values.items()] == ["50.0", "-20.0", "1.250", "2.500", "8.500", "inf"]
    assert [units.of(name).alone(0.5) for name in ("accuracy", "pearson", "loss")] == ["50.0 %", "50.0", "0.500"]
    assert [units.axis(name) for name in ("accuracy", "spearman", "loss", "cider")] == [
        "accuracy, %", "spearman, times 100", "loss (less is better)", "cider"
    ]  # fmt: skip
    assert units.of("loss").better(2.0) < units.of("loss").better(1.0)
    assert units.of("bleu").better(float("nan")) < units.of("bleu").better(0.0)
    assert units.told(["accuracy"]) == "Metrics in per cent."
    assert units.told(["matthews"]) == "matthews: a correlation, times 100."
    assert units.told(["bleu", "cider"]) == "cider: from 0 to 10; bleu: in per cent."
    accuracy = {"value": 0.5, "low": 0.4, "high": 0.6, "correct": 5, "total": 10}
    row = {"layers": [0], "parameters": 5, "metrics": {"matthews": 0.05}, "accuracy": accuracy}
    page = pages.table({"x": row}).splitlines()
    assert page[0] == "| model | layers | trainable parameters | matthews | 95 % interval of accuracy | right |"
    assert page[2] == "| x | 1 | 5 | 5.0 | 40.0 to 60.0 | 5/10 |"
