"""Misuse of the command line: each ends in one sentence and code 2, before anything is loaded, written or compiled."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from methods import bench as benches
from methods import cli, ranges
from methods.baselines import BASELINES, LEAST_STEPS, WITHOUT_BUDGET
from methods.causes import BadInput, reading, sentence
from methods.driver import Method
from methods.models import loading
from tests.methods.small import arguments

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("float32_by_default")


def settings_of(name):
    return import_module(cli.COMMANDS[name].module).COMMAND.settings


def refused(words, capsys, out=None):
    """The one sentence that a command says."""
    capsys.readouterr()
    assert cli.run(words) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("bilevel: ") and len(said) < 900
    assert out is None or not out.exists()
    return said


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_number_has_a_range_and_its_presets_are_in_it(name):
    command, settings = import_module(cli.COMMANDS[name].module).COMMAND, settings_of(name)
    hints = ranges.hints(settings)
    assert [option for option, hint in hints.items() if ranges.numeric(hint) and not ranges.declared(hint)] == []
    for preset in command.presets.values():
        ranges.check(settings(**({"model": "x"} if "model" in hints else {}), **preset))


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "report"])
def test_what_is_no_number_for_an_option_is_refused_for_every_option(name):
    settings = settings_of(name)(model="x")
    checked = 0
    for option, hint in ranges.hints(type(settings)).items():
        kind = ranges.numeric(hint)
        several = isinstance(getattr(settings, option), tuple)
        bad = {int: [-1, 2**31, 10**400, 1.5, True, "3"]}
        bad[float] = [math.nan, math.inf, -math.inf, -0.5, 1e39, 1e-45, "x"]
        for value in bad.get(kind, []) if kind else []:
            given = dataclasses.replace(settings, **{option: (value,) if several else value})
            with pytest.raises(ValueError, match=rf"^--{option.replace('_', '-')} .*must be"):
                ranges.check(given)
            checked += 1
    assert checked > 60


OUT_OF_RANGE = {
    "nan": (["lora", "--finetune-lr", "nan"], "--finetune-lr nan must be above 0 and at most"),
    "one step": (["lora", "--finetune-steps", "1"], "--finetune-steps 1 must be at least 2"),
    "length": (["lora", "--length", "1"], "--length 1 must be at least 2"),
    "seed": (["lora", "--seed", "-1"], "--seed -1 must be at least 0"),
    "a seed that another equals in 32 bits": (["lora", "--seed", str(2**32)], "must be at least 0 and at most"),
    "rate": (["hiddenkey", "--rate", "1.5"], "--rate 1.5 must be above 0 and below 1"),
    "grid": (["hiddenkey", "--grid", "0.1", "inf"], "--grid inf must be at least 0 and below 1"),
    "points": (["hiddenkey", "--grid", *["0.1"] * 40], "--grid has 1,600 points"),
    "no betas": (["hiddenkey", "--grid", "0.1", "--grid-beta"], "--grid-beta names no number"),
    "random baselines": (["flexora", "--random-baselines", "1000000"], "must be at least 0 and at most 1,000"),
    "steps in all": (["lora", "--finetune-steps", "2000000", "--accumulate", "2000"], "is more than"),
    "one name for two targets": (["finegates", "--target-sparsity", "0.4", "0.4000001"], "0.4 twice"),
    "logarithm of 0": (["finegates", "--weight", "0", "--outer", "sparsity"], "searches its logarithm"),
    "parts": (["baseline", "rac-lora", "--finetune-steps", "3"], "rac-lora trains in 4 parts"),
    "not an integer": (["lora", "--rank", "1.5"], "--rank"),
    "too many digits": (["lora", "--rank", "9" * 5000], "--rank"),
    "unknown option": (["lora", "--nope"], "--nope"),
    "no value": (["lora", "--rank"], "--rank"),
    "regular expression": (["lora", "--targets", "("], "--targets '(' is no regular expression"),
    "brackets without end": (["lora", "--targets", "(" * 5000], "is no regular expression"),
    "no targets": (["lora", "--targets"], "--targets names no linear"),
    "no rules": (["hiddenkey", "--rules"], "--rules names none"),
    "an empty text": (["lora", "--data", ""], "--data is empty"),
    "nul": (["lora", "--task", "a\0b"], "--task has a NUL character"),
    "bytes": (["lora", "--out", "a\udc80"], "is not valid UTF-8"),
    "a long word": (["lora", "--task", "x" * 100_000], "Unknown task 'xxx"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_settings_are_refused_before_a_model_or_data_is_looked_for(name, capsys, tmp_path):
    method, *more = OUT_OF_RANGE[name][0]
    out = tmp_path / "run"
    first = more[:1] if method == "baseline" else []
    words = [method, *first, *arguments("./no-model", "./no-data", out), *more[len(first) :]]
    assert OUT_OF_RANGE[name][1] in refused(words, capsys, out)


UNUSED = {
    "static": (["heterolora", "--allocation", "static", "--reallocations", "9"], "--reallocations has no effect here"),
    "no shortcuts": (["heterolora", "--shortcuts", "none", "--shortcut-alpha", "3"], "--shortcut-alpha has no effect"),
    "blind": (["heterolora", "--proxy", "synflow", "--score-on", "outer"], "--score-on has no effect here"),
    "no search": (["finegates", "--inner-steps", "3"], "--inner-steps has no effect here, since --outer none"),
    "gates": (["finegates", "--outer", "gates", "--outer-lr", "0.3"], "--outer-lr has no effect here"),
    "no edit search": (["loratrf", "--outer", "none", "--outer-steps", "2"], "--outer-steps has no effect here"),
    "no vectors": (["loratrf", "--outer", "none", "--filter", "none", "--vectors", "random"], "--vectors has no"),
    "no term": (["hiddenkey", "--rules", "ffn_hidden element rescale", "--beta", "2"], "--beta has no effect here"),
    "no outer loss": (["lora", "--outer-batch-size", "3"], "--outer-batch-size has no effect here, since no outer"),
    "nor in a baseline": (["baseline", "uniform", "--outer-batch-size", "3"], "--outer-batch-size has no effect here"),
    "nor of questions": (["attribute", "--outer-batch-size", "3"], "--outer-batch-size has no effect here, since no"),
    "nor of gates": (["finegates", "--outer-batch-size", "3"], "--outer-batch-size has no effect here, since --outer"),
    "nor of edits": (["loratrf", "--outer", "none", "--outer-batch-size", "3"], "--outer-batch-size has no effect"),
    "nor if blind": (["heterolora", "--proxy", "constant", "--outer-batch-size", "3"], "--outer-batch-size has no"),
    "no adapter's rank": (["attribute", "--train", "full", "--rank", "4"], "--rank has no effect here, since --train"),
    "nor alpha": (["attribute", "--train", "full", "--rank", "8", "--lora-alpha", "4"], "--lora-alpha has no effect"),
    "nor targets": (["attribute", "--train", "full", "--rank", "8", "--targets", "k_proj"], "--targets has no effect"),
    "no square root": (["attribute", "--finetune-optimizer", "sgd", "--eps-root", "0.1"], "--eps-root has no effect"),
    "no grid": (["hiddenkey", "--grid-beta", "2"], "--grid-beta has no effect here, since there is no --grid"),
    "no budget": (["baseline", "lorta", "--share", "0.5"], "--share has no effect here, since lorta has no budget"),
}


@pytest.mark.parametrize("name", UNUSED)
def test_an_option_without_effect_is_refused_by_name(name, capsys, tmp_path):
    method, *more = UNUSED[name][0]
    first = more[:1] if method == "baseline" else []
    words = [method, *first, *arguments("./no-model", "./no-data", tmp_path / "run"), *more[len(first) :]]
    assert UNUSED[name][1] in refused(words, capsys, tmp_path / "run")


def test_the_baselines_without_a_budget_are_those_that_never_ask_for_one():
    def asks(find):
        text = Path(import_module(find.__module__).__file__).read_text().partition('"""\n')[2]
        return any(word in text for word in ("setting.share", "setting.budget(", "choose("))

    assert {name for name, find in BASELINES.items() if not asks(find)} == set(WITHOUT_BUDGET)
    assert set(LEAST_STEPS) < set(BASELINES)


MODEL = {
    "rank": (["lora", "--rank", "100000"], "--rank 100000 is more than the 16 of a whole matrix at q_proj, v_proj"),
    "edit rank": (["loratrf", "--edit-rank", "17"], "--edit-rank 17 is more than the 16 of"),
    "positions": (["lora", "--length", "65"], "--length 65 is more than the 64 positions"),
    "layers": (["flexora", "--top-k", "3"], "--top-k 3 must be between 1 and the model's 2 layers"),
    "modules": (["flexora", "--per", "module", "--top-k", "5"], "--top-k 5 must be between"),
    "share": (["heterolora", "--share", "0.01"], "is less than one"),
    "sites": (["lora", "--targets", "nope"], "which has q_proj"),
}


@pytest.mark.parametrize("name", MODEL)
def test_what_the_model_does_not_fit_is_said_before_its_weights_are_read(
    name, tiny_model, tiny_data, capsys, tmp_path, monkeypatch
):
    def opened(folder, open_folder=loading.open_folder):
        return dataclasses.replace(open_folder(folder), read=lambda name: pytest.fail("weights were read"))

    monkeypatch.setattr(loading, "open_folder", opened)
    (method, *more), expected = MODEL[name]
    words = [method, *arguments(tiny_model, tiny_data, tmp_path / "run"), *more]
    assert expected in refused(words, capsys, tmp_path / "run")


# --- places -------------------------------------------------------------------------------------------------------


def unwritable(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    run = tmp_path / "run"
    (run / "results").mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    below = [file, file / "run", Path("/proc/nowhere/run"), Path("/dev/null"), tmp_path / ("a" * 300), run]
    return [*below, tmp_path.joinpath(*["a"] * 3000)]


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path, capsys, monkeypatch):
    places = unwritable(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(benches, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    for place in places:
        said = refused(["lora", *arguments("./no-model", "./no-data", place)], capsys)
        assert "cannot be written" in said or "exists and holds no run" in said, said
        assert "name another folder" in said
    for place in places[:4]:
        assert "cannot be written" in refused(["report", str(places[-2]), "--out", str(place)], capsys)
    assert sorted(tmp_path.rglob("*")) == before
    assert "cannot be written (No space left on device)" in _on_a_full_disk(tmp_path, capsys, monkeypatch)
    assert sorted(tmp_path.rglob("*")) == before


def _on_a_full_disk(tmp_path, capsys, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    return refused(["lora", *arguments("./no-model", "./no-data", tmp_path / "new")], capsys)


def test_models_and_data_that_are_not_there_are_said_at_once(tiny_data, tiny_model, tmp_path, capsys, monkeypatch):
    import huggingface_hub

    def asked(*_, **__):
        pytest.fail("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("models/llama", "./models/llama", "~/no/llama", "/no/llama", "llama.gguf", "a/b/c"):
        said = refused(["lora", *arguments(name, tiny_data, tmp_path / "run")], capsys)
        assert f"there is no model at {name}" in said
    said = refused(["lora", *arguments(tiny_model, tiny_data / "piqa", tmp_path / "run")], capsys)
    assert f"name the folder that holds piqa/, {tiny_data}" in said
    said = refused(["lora", *arguments(tiny_model, tmp_path / "none", tmp_path / "run")], capsys)
    assert "none: name a file whose name ends in .jsonl" in said


# --- damaged files ------------------------------------------------------------------------------------------------

CONFIGS = {
    "a list": "[1, 2]",
    "null": "null",
    "brackets without end": "[" * 100_000,
    "bytes": b"\xff\xfe\x00",
    "a text for a number": {"hidden_size": "x"},
    "no heads": {"num_attention_heads": 0},
    "names that are numbers": {"architectures": [1]},
    "more memory than there is": {"vocab_size": 10**12},
}
ROWS = {
    "brackets without end": "[" * 200_000,
    "60 MB": '{"goal": "' + "a b " * 15_000_000 + '"}',
    "bytes": b"\xff\xfe",
    "nul": b"\0" * 100,
    "a list": "[1]",
    "too many digits": '{"a": ' + "9" * 10_000 + "}",
    "no text": '{"id": 1, "goal": null, "choices": ["a", "b"], "label": 0}',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_damaged_config_is_one_sentence(name, tiny_model, tiny_data, tmp_path, capsys):
    model, damage = shutil.copytree(tiny_model, tmp_path / "model"), CONFIGS[name]
    if isinstance(damage, dict):
        damage = json.dumps(json.loads((model / "config.json").read_text()) | damage)
    (model / "config.json").write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    said = refused(["lora", *arguments(model, tiny_data, tmp_path / "run")], capsys, tmp_path / "run")
    assert str(model) in said and "--batch-size" not in said


@pytest.mark.parametrize("name", ROWS)
def test_a_damaged_row_is_one_sentence_with_its_line(name, tiny_model, tiny_data, tmp_path, capsys):
    data, damage = shutil.copytree(tiny_data, tmp_path / "data"), ROWS[name]
    (data / "piqa" / "train.jsonl").write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    said = refused(["lora", *arguments(tiny_model, data, tmp_path / "run")], capsys, tmp_path / "run")
    assert "train.jsonl line 1 " in said


def test_a_lone_surrogate_in_a_text_is_one_sentence(tiny_model, tiny_data, tmp_path, capsys):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    row = '{"id": %d, "goal": "%d \\ud800 wash", "choices": ["a", "b"], "label": 0}'
    (data / "piqa" / "train.jsonl").write_text("\n".join(row % (i, i) for i in range(60)))
    said = refused(["lora", *arguments(tiny_model, data, tmp_path / "run")], capsys, tmp_path / "run")
    assert "row" in said or "line 1" in said


# --- causes -------------------------------------------------------------------------------------------------------


def caught(make):
    with pytest.raises(BaseException) as caught:
        make()
    return caught.value


def deliberate():
    raise_bad = ranges.Range(0, 1)
    ranges._check_number("--x", float, raise_bad, math.nan)


def said_of(make):
    return sentence(caught(make)) or ""


def test_our_sentences_are_told_from_errors_of_the_same_class():
    assert "--x nan must be" in said_of(deliberate)
    assert sentence(caught(lambda: np.zeros(3).reshape(2))) is None  # a ValueError out of a library
    assert sentence(caught(lambda: ranges.check(object()))) is None  # a TypeError out of an expression of ours
    assert sentence(caught(lambda: Path("/no/file").read_text())) == "No such file or directory: /no/file"
    assert "not enough memory" in said_of(lambda: (_ for _ in ()).throw(MemoryError()))
    missing = sentence(caught(lambda: import_module("no_such_package")), "lora")
    assert missing == "lora needs no_such_package, which is not installed: pip install it."
    assert 500 < len(sentence(BadInput("x" * 10_000_000)) or "") < 700


def test_what_fails_while_something_is_read_is_of_what_is_read():
    for error in (KeyError("x"), RecursionError(), OverflowError("big"), AttributeError("get"), MemoryError()):
        with pytest.raises(BadInput, match=rf"^The file cannot be read \({type(error).__name__}.*\): look at it\.$"):
            with reading("The file", "look at it"):
                raise error
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            with reading("The file", "look at it"):
                raise error


def test_a_fault_of_ours_shows_its_traceback_and_a_sentence(monkeypatch, capsys, tmp_path):
    def broken(method, settings):
        ranges.check(object())  # a TypeError out of an expression of ours

    monkeypatch.setattr(Method, "main", broken)
    assert cli.run(["lora", *arguments("./m", "./d", tmp_path / "run")]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[0].startswith("Traceback") and "TypeError is a fault of bilevel's" in said[-1]


FAULTS = {
    "import json\n\nNOTHING = dataclass\n": ("NameError", 3),
    "NOTHING = (\n": ("SyntaxError", 1),
    "import numpy as np\n\n\ndef made():\n    return np.zeros(3).reshape(2)\n\n\nCOMMAND = made()\n": ("ValueError", 5),
    "from methods.driver import Nothing\n": ("ImportError", 1),
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_in_a_method_of_the_users_is_told_as_that_files_fault(text, monkeypatch, capsys, tmp_path):
    file, (name, line) = tmp_path / f"own_method_{len(text)}.py", FAULTS[text]
    file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "own", cli.Row(file.stem, "an example"))
    assert cli.run(["own", "--help"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[0].startswith("Traceback")
    assert said[-1].startswith(f"bilevel: this {name} began in {file} line {line}, which is no file of bilevel's")


def test_a_fault_in_a_task_of_the_users_names_its_file_and_line(tmp_path, tiny_model, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from methods.tasks import MultipleChoice\n\n\ndef pairs(row):\n    return nothing\n\n\n"
        'TASK = MultipleChoice(name="mine", fields=("stem",), pairs=pairs)\n'
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"stem": "Why?", "choices": ["so", "no"], "label": 0}\n')
    words = ["lora", "--model", str(tiny_model), "--data", str(rows), "--task", f"{file}:TASK"]
    said = refused([*words, "--out", str(tmp_path / "run")], capsys)
    assert f"NameError: name 'nothing' is not defined in {file} line 5" in said


def test_an_interrupt_before_anything_is_written_promises_nothing(monkeypatch, capsys, tmp_path):
    def interrupted(method, settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(Method, "main", interrupted)
    assert cli.run(["lora", *arguments("./m", "./d", tmp_path / "run")]) == 130
    assert "nothing was written yet" in capsys.readouterr().err


def test_nobody_reading_the_output_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    code = "from methods.cli import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_help_is_code_0(capsys):
    assert cli.run(["lora", "--help"]) == 0
    assert "--finetune-lr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--lenght", "'--lenght': did you mean --length?"),
        ("--learning_rate=3", "'--learning-rate'"),
        ("--train-row", "did you mean --train-rows?"),
        ("--trainrows=3", "did you mean --train-rows?"),
        ("--adaptor", "did you mean --adapter?"),
        ("--preste", "did you mean --preset?"),
        ("--no-ramat", "did you mean --no-remat?"),
        ("--qqqqqqqq", "'--qqqqqqqq'. (bilevel lora --help lists"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(option, sentence, tmp_path, capsys):
    said = refused(["lora", *arguments("./m", "./d", tmp_path / "run"), option, "8"], capsys, tmp_path / "run")
    assert "Unrecognized options: " in said and sentence in said


def test_a_model_that_is_misspelt_as_an_option_is_found(tmp_path, capsys):
    said = refused(["lora", "--modle", "m", "--out", str(tmp_path / "run")], capsys, tmp_path / "run")
    assert "did you mean --model?" in said


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--train-rows", "--train-rows 41: it must be between 1 and 40; 40 of the 40 training rows"),
        ("--outer-rows", "--outer-rows 41: it must be between 1 and 40; 40 of the 40 training rows"),
        ("--test-rows", "--test-rows 41: it must be between 1 and 6."),
    ],
)
def test_more_rows_than_there_are_name_option_and_length(option, sentence, tiny_model, tiny_data, tmp_path, capsys):
    words = [*arguments(tiny_model, tiny_data, tmp_path / "run"), option, "41"]
    said = refused(["lora", *words], capsys, tmp_path / "run")
    assert sentence in said and "raise --length" not in said  # all of them fit
    assert ("fit into --length 24: lower --train-rows and --outer-rows" in said) == (option != "--test-rows")
