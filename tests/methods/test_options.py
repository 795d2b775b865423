"""Options: the help, configurations, and what the options of the final training compute."""

import dataclasses
import json
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from methods import cli, configuration, flexora, ranges, settings
from methods.adapters.hook import InputDropout
from methods.adapters.lora import LoRAConfig
from methods.flexora_variants import RELEASED, final_recipe
from methods.logs import listening
from methods.options import parse
from methods.tasks import FORMATS, TASKS
from methods.training import OPTIMIZERS, SCHEDULES, Recipe
from tests.methods import commands
from tests.methods.small import arguments

# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_fits_80_columns_and_names_everything(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    command = cli.import_module(cli.COMMANDS[name].module).COMMAND
    for field in dataclasses.fields(command.settings):
        option = f"--{field.name.replace('_', '-')}"
        assert option in shown or field.name in ("name", "runs"), option
    flat = re.sub(r"[│╭╮╰╯─\s]+", " ", shown)
    for inside in ("(default: )", "[[", "`methods.", "that are None"):  # words of the code, not of a user
        assert inside not in flat, inside
    if name == "report":
        assert flat.startswith("usage: bilevel report [-h] RUN [RUN ...] [--out PATH]")
        return
    flat = re.sub(r"[│╭╮╰╯─\s]+", " ", shown)
    for group in (*settings.GROUPS, name):
        assert f"{group} options" in flat or name == "lora", group
    assert all(task in flat for task in (*TASKS, *FORMATS))
    for preset, values in command.presets.items():
        shown_of = flat.partition(f" {preset}: ")[2]
        assert all(f"{option.replace('_', '-')} " in shown_of for option in values), preset
    assert "(default: None)" not in flat, flat[flat.find("(default: None)") - 200 :][:220]


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - {"report"}))
def test_the_help_of_an_option_tells_one_default(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for preset in cli.import_module(cli.COMMANDS[name].module).COMMAND.presets:
        assert cli.run([name, "--preset", preset, "--help"]) == 0
        flat = re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().out)
        options = re.split(r" (?=--[a-z])", flat)
        both = [told for told in options if "by default" in told and "(default: " in told]
        assert not both, both


def test_every_option_has_words_of_help():
    for command in cli.COMMANDS.values():
        cls = cli.import_module(command.module).COMMAND.settings
        from methods.options import _helps

        assert all(len(text) > 3 for text in _helps(cls).values()), cls


def test_the_version(capsys):
    import bilevel

    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"bilevel {bilevel.__version__}\n"


# --- configurations --------------------------------------------------------------------------------------------------


NEEDED = {"baseline": ["random-k"], "allocate": ["--budget-params", "200k"]}
"""Words without which a command is none."""


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize("name", ["flexora", "baseline"])
def test_a_configuration_repeats_its_run_bit_for_bit(name, finished, tmp_path):
    out = finished(name)
    again = tmp_path / "again"
    assert cli.run([name, "--config", str(out / "config.yaml"), "--out", str(again)]) == 0
    made = [file for file in out.rglob("*") if file.suffix in (".json", ".jsonl", ".safetensors", ".md")]
    assert len(made) > 5
    for file in made:
        if "checkpoints" not in file.parts:
            assert file.read_bytes() == (again / file.relative_to(out)).read_bytes(), file
    first, second = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (out, again))
    assert first["settings"] | {"out": ""} == second["settings"] | {"out": ""} and first["command"] == name
    assert set(first["made"]) == {"date", "device", "folder", "git", "versions"}
    assert None not in (first["settings"][name] for name in ("task", "train_rows", "outer_rows", "test_rows"))


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "report"])
def test_the_values_that_are_used_can_be_said_again(name, tmp_path):
    """For every preset: what a run writes is read as the same settings, also where they were filled in."""
    command = cli.import_module(cli.COMMANDS[name].module).COMMAND
    for preset in command.presets:
        first = parse(command, name, [*NEEDED.get(name, []), "--model", "some/model", "--preset", preset])
        used = command.used(first)
        (tmp_path / "config.yaml").write_text(configuration.text(name, used, command.settings))
        again = parse(command, name, ["--config", str(tmp_path / "config.yaml")])
        assert command.used(again) == used, preset


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (".yaml", "rank: 3\nfinetune-lr: 1e-3\ntargets: [k_proj]\nremat: false\ntask: rte\n"),
        (".yml", "command: lora\nsettings: {rank: 3, finetune_lr: 0.001, targets: [k_proj], remat: false, task: rte}"),
        (".toml", 'rank = 3\nfinetune_lr = 1e-3\ntargets = ["k_proj"]\nremat = false\ntask = "rte"\n'),
        (".json", '{"rank": 3, "finetune_lr": 1e-3, "targets": ["k_proj"], "remat": false, "task": "rte"}'),
    ],
)
def test_kinds_of_configurations(end, text, tmp_path):
    file = tmp_path / f"mine{end}"
    file.write_text(text)
    command = cli.import_module(cli.COMMANDS["lora"].module).COMMAND
    found = parse(command, "lora", ["--model", "m", f"--config={file}"])
    assert (found.rank, found.finetune_lr, found.targets) == (3, 1e-3, ("k_proj",))
    assert (found.remat, found.task) == (False, "rte")
    found = parse(command, "lora", ["--model", "m", "--config", str(file), "--rank", "5", "--remat"])
    assert (found.rank, found.remat, found.finetune_lr) == (5, True, 1e-3)  # a word counts more


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"There is no file '.*mine\.yaml', which --config names"),
        ("rank: [", r"The configuration .*mine\.yaml cannot be read"),
        ("- rank", r"holds no options, but list"),
        ("rnak: 3", r"has the option 'rnak', which is unknown: is it rank\?"),
        ("rank: eight", r"invalid choice|--rank|parsing"),
        ("rank: {a: 1}", r"rank is dict, which no option is"),
        ("targets: [[q]]", r"targets is \[\['q'\]\], which is no list of texts or numbers"),
        ("rank: 0", r"--rank 0 must be at least 1"),
        ("command: flexora\nsettings: {}", r"is of the command 'flexora', and not of 'lora': run bilevel flexora --c"),
        ("settings: {rank: 3}\nrank: 4", r"has 'rank' beside its settings"),
        ("preset: nothing", r"Unknown preset 'nothing'"),
        ("remat: 3", r"remat is 3, but it takes true or false"),
        ("rank: 3\nrank: 4", r"A configuration has 'rank' twice"),
        ("lora-alpha: 3\nlora_alpha: 4", r"has the option 'lora_alpha' twice"),
        ("rank: true", r"rank is True, but it takes no True"),
        *(
            (f"{option}: {null}", rf"mine\.yaml: {option} is null, or left empty, which is no value of it: give")
            for option in ("out", "targets", "rank", "dtype", "remat", "preset")
            for null in ("null", "~", "")
        ),
        ("seed: --quiet", r"mine\.yaml: Error parsing --seed: .*: '--quiet' \("),
        ("dtype: --quiet", r"mine\.yaml: invalid choice '--quiet' for argument '--dtype'"),
        ("seed: -5", r"--seed -5 must be at least 0"),
        ("finetune_lr: -1e-3", r"--finetune-lr -0\.001 must be above 0"),
        *((f"rank: {text}", f"--rank.*'{text}'") for text in ("1:30", "0x10", "0b11")),
        (r'targets: ["\0-x"]', r"--targets has a NUL character in it"),
    ],
)
def test_bad_configurations_are_one_sentence(text, message, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    assert cli.run(["lora", "--model", "m", "--out", str(tmp_path / "run"), "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1, said


def read_by(name, text, file):
    """The options of a command, by a configuration alone."""
    file.write_text(text)
    return parse(cli.import_module(cli.COMMANDS[name].module).COMMAND, name, ["--config", str(file)])


def test_null_is_none_where_an_option_may_be_none(tmp_path):
    found = read_by("lora", "model: m\ntask: null\ndata: ~\ntrack:\ntrain_rows: null\n", tmp_path / "a.yaml")
    assert (found.task, found.data, found.track, found.train_rows) == (None, None, None, None)


def test_a_number_of_yaml_is_read_as_on_the_command_line(tmp_path):
    text = "model: 007\ndata: 1.10\nseed: 010\nrank: 1_0\nfinetune_lr: 1.0e-4\nfinetune_steps: +20\n"
    found = read_by("lora", text, tmp_path / "a.yaml")
    assert (found.model, found.data, found.seed, found.rank) == ("007", "1.10", 10, 10)
    assert (found.finetune_lr, found.finetune_steps) == (1e-4, 20)


def test_a_text_of_a_configuration_is_a_value_however_it_begins(tmp_path):
    texts = ["--rank", "9", "-x", "--", "-1e-3", "--model=x", "-5"]
    found = read_by("lora", yaml.safe_dump({"model": "--quiet", "targets": texts}), tmp_path / "a.yaml")
    assert (found.model, found.targets, found.rank, found.quiet) == ("--quiet", tuple(texts), 8, False)
    found = read_by("lora", yaml.safe_dump({"model": "m", "targets": "--rank", "out": "--quiet"}), tmp_path / "a.yaml")
    assert (found.targets, found.out) == (("--rank",), Path("--quiet"))
    with pytest.raises(ValueError, match=r"invalid choice '--quiet' for argument 'baseline\.name'"):
        read_by("baseline", 'model: m\nname: "--quiet"\n', tmp_path / "a.yaml")
    with pytest.raises(ValueError, match=r"Error parsing --grid: .*'--quiet'"):
        read_by("hiddenkey", 'model: m\ngrid: ["--quiet"]\n', tmp_path / "a.yaml")


@pytest.mark.parametrize("indent", [None, "\t"])
@pytest.mark.parametrize("ascii", [True, False])
def test_a_configuration_in_json_is_read_as_json(indent, ascii, tmp_path):
    given = {"model": "m\U0001f600\x7f\xe9", "targets": ["q_proj"], "finetune_lr": 5e-05}
    text = json.dumps({"settings": given}, indent=indent, ensure_ascii=ascii)
    found = read_by("lora", text, tmp_path / "mine.json")
    assert (found.model, found.targets, found.finetune_lr) == (given["model"], ("q_proj",), 5e-05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rank": 3, "rank": 4}', "A configuration has 'rank' twice: give it once"),
        ('{"settings": {"rank": 3, "rank": 4}}', "A configuration has 'rank' twice: give it once"),
        ('{"rank": 3,}', r"mine\.json cannot be read \(JSONDecodeError: "),
        ("[" * 100_000, r"mine\.json cannot be read \(RecursionError: "),
        ("rank: 3", r"mine\.json cannot be read \(JSONDecodeError: "),
        ("[]", "holds no options, but list"),
        ('{"model": "\\ud83d"}', r"--model '\\ud83d' is not valid UTF-8"),
        ('{"model": "m", "finetune_lr": NaN}', "--finetune-lr nan must be above 0"),
    ],
)
def test_bad_configurations_in_json_are_one_sentence(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_by("lora", text, tmp_path / "mine.json")


@pytest.mark.parametrize("line", ["rank: 0", "rank: many", "seed: -1"])
def test_a_mistake_in_a_configuration_is_told_by_its_name_and_one_of_the_words_is_not(line, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(f"{line}\nfinetune_lr: 0.1\n")
    assert cli.run(["lora", "--model", "m", "--config", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"bilevel: {file}: ")
    file.write_text("finetune_lr: 0.1\n")
    assert cli.run(["lora", "--model", "m", "--config", str(file), "--rank", "0"]) == 2
    assert str(file) not in capsys.readouterr().err
    # What is missing in the file may be said beside it.
    assert cli.run(["lora", "--config", str(file)]) == 2
    assert re.search(r"--model", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["model", "data", "test_data", "task"])
def test_a_path_that_is_seen_from_the_folder_of_the_run_alone_is_told(name, tmp_path, monkeypatch):
    """`made: folder` says where a relative path of a run's configuration is seen from."""
    made, here = tmp_path / "made", tmp_path / "here"
    made.mkdir(), here.mkdir()
    (made / "mine.py").write_text("")
    value = "mine.py:TASK" if name == "task" else "mine.py"
    whole = {"command": "lora", "settings": {"model": "org/model", name: value}, "made": {"folder": str(made)}}
    (made / "config.yaml").write_text(yaml.safe_dump(whole))
    words, option = ["--config", str(made / "config.yaml")], "--" + name.replace("_", "-")
    command = cli.import_module(cli.COMMANDS["lora"].module).COMMAND
    monkeypatch.chdir(made)
    assert getattr(parse(command, "lora", words), name) == value
    monkeypatch.chdir(here)
    with pytest.raises(ValueError, match=f"made in .*made, from where its {name} {value} is seen.*or give {option}"):
        parse(command, "lora", words)
    assert getattr(parse(command, "lora", [*words, option, "other.py:X"]), name) == "other.py:X"
    (here / "mine.py").write_text("")
    assert getattr(parse(command, "lora", words), name) == value


def test_a_warning_for_the_user_is_a_sentence_and_others_are_not_touched():
    with listening():
        mine, other = (warnings.formatwarning("a b", kind, "x.py", 3) for kind in (UserWarning, RuntimeWarning))
    assert mine == "warning: a b\n" and other.startswith("x.py:3: RuntimeWarning: a b")
    assert warnings.formatwarning("a b", UserWarning, "x.py", 3).startswith("x.py:3: UserWarning: a b")


def test_other_files_are_no_configurations(tmp_path, capsys):
    (tmp_path / "mine.ini").write_text("")
    assert cli.run(["lora", "--model", "m", "--config", str(tmp_path / "mine.ini")]) == 2
    assert "of no kind that is read: its name must end in .yaml" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("a" * 2**21)
    assert cli.run(["lora", "--model", "m", "--config", str(tmp_path / "mine.yaml")]) == 2
    assert "larger than a configuration can be" in capsys.readouterr().err


# --- the final training ----------------------------------------------------------------------------------------------


def steps_of(optimizer, params, grads):
    """The parameters after each of the gradients."""
    state, found = optimizer.init(params), []
    for grad in grads:
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return jnp.stack(found)


def rates(peak, steps, warming, after):
    falls = lambda t: peak * after((t - warming) / (steps - warming))  # noqa: E731
    return [peak * t / warming if t < warming else falls(t) for t in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("cosine", lambda s: 0.5 * (1 + np.cos(np.pi * s))),
        ("linear", lambda s: 1 - s),
        ("constant", lambda s: 1.0),
    ],
)
@pytest.mark.parametrize("warming", [0, 3])
def test_schedules(schedule, after, warming):
    recipe = Recipe(10, 0.4, warmup=warming, schedule=schedule)
    found = [float(recipe.rate()(t)) for t in range(10)]
    np.testing.assert_allclose(found, rates(0.4, 10, warming, after), atol=1e-7)
    assert set(SCHEDULES) == {"cosine", "linear", "constant"}


def test_optimizers_by_hand():
    """Clipping, scaling, decay apart from the gradient, rate: each against the formula, written out."""
    rng = np.random.default_rng(0)
    params, grads = rng.normal(size=4), rng.normal(size=(5, 4)) * np.array([[0.1], [10.0], [1.0], [0.2], [5.0]])
    shared = {"warmup": 0, "schedule": "constant", "clip": 1.5, "weight_decay": 0.3}
    p, first, m, v = params.copy(), params.copy(), np.zeros(4), np.zeros(4)
    momentum, trace = params.copy(), np.zeros(4)
    plain, adam, heavy = [], [], []
    for t, raw in enumerate(grads, 1):
        grad = raw * min(1.0, 1.5 / np.linalg.norm(raw))
        p = p - 0.1 * (grad + 0.3 * p)
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        scaled = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t) + 0.02) + 1e-8)
        first = first - 0.1 * (scaled + 0.3 * first)
        trace = grad + 0.9 * trace
        momentum = momentum - 0.1 * (trace + 0.3 * momentum)
        plain.append(p), adam.append(first), heavy.append(momentum)
    for name, expected in {"sgd": plain, "adamw": adam, "momentum": heavy}.items():
        recipe = Recipe(5, 0.1, optimizer_name=name, eps_root=0.02, **shared)
        with jax.numpy_dtype_promotion("standard"):  # optax
            found = steps_of(recipe.optimizer(), jnp.asarray(params), jnp.asarray(grads))
        np.testing.assert_allclose(found, np.stack(expected), rtol=1e-6)
    assert set(OPTIMIZERS) == {"sgd", "adamw", "momentum"}


def test_recipes_are_refused_by_name():
    for name, value in (("optimizer_name", "adam"), ("schedule", "step")):
        with pytest.raises(ValueError, match=rf"Fine-tuning with {name}='{value}': choose from "):
            Recipe(5, 0.1, **{name: value})
    with pytest.raises(ValueError, match=r"Fine-tuning with weight_decay=-1"):
        Recipe(5, 0.1, weight_decay=-1.0)


def test_options_reach_the_recipe():
    words = "--finetune-optimizer sgd --schedule linear --warmup 0.25 --weight-decay 0.1 --clip 2 --finetune-steps 8"
    command = cli.import_module(cli.COMMANDS["flexora"].module).COMMAND
    found = command.used(parse(command, "flexora", ["--model", "m", *words.split()]))
    plan = final_recipe(found, found.variant)
    assert (plan.optimizer_name, plan.schedule, plan.warming) == ("sgd", "linear", 2)
    assert (plan.weight_decay, plan.clip) == (0.1, 2)
    assert final_recipe(dataclasses.replace(found, warmup=0.0), found.variant).warming == 0
    assert final_recipe(dataclasses.replace(found, warmup=0.1, finetune_steps=70), found.variant).warming == 7


@pytest.mark.parametrize("words", ["--clip 2", "--clip 0", "--warmup 0.5"])
def test_released_has_a_clip_and_a_warmup_of_its_own(words, capsys, tmp_path):
    assert cli.run(["flexora", "--model", "m", "--released", *words.split(), "--out", str(tmp_path / "run")]) == 2
    assert "--released is --" in capsys.readouterr().err
    released = flexora.used(flexora.FlexoraSettings(model="m", released=True, finetune_steps=41))
    assert final_recipe(released, RELEASED).warming == 5 and final_recipe(released, RELEASED).clip == 1.0


@pytest.mark.usefixtures("float32_by_default")
def test_epochs_are_steps(tiny_model, tiny_data, tmp_path, capsys):
    words = arguments(tiny_model, tiny_data, tmp_path / "run", "--task", "piqa", "--finetune-epochs", "1.5", "--quiet")
    assert cli.run(["lora", *words]) == 2
    assert "--finetune-steps has no effect here, since --finetune-epochs says how many" in capsys.readouterr().err
    at = words.index("--finetune-steps")
    del words[at : at + 2]
    assert cli.run(["lora", *words]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["finetune_steps"] == 6  # 1.5 times 16 rows, 4 in a batch
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 6
    said = capsys.readouterr()
    assert "fine-tuning" not in said.err and said.out.endswith(f"Done: {tmp_path / 'run' / 'report.md'}\n")
    assert cli.run(["lora", *words]) == 0  # which continues it, though the steps are not said
    words[words.index("1.5")] = "0.1"
    words[words.index(str(tmp_path / "run"))] = str(tmp_path / "short")
    assert cli.run(["lora", *words]) == 2
    assert "--finetune-epochs 0.1 of 16 rows are 1 steps of 4 rows: there must be at least 2" in capsys.readouterr().err


DROPPING = "lora", "flexora", "select-data", "allocate"
"""Commands whose final training is LoRA's, with its dropout."""

# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_by_hand():
    config = LoRAConfig(rank=2, alpha=3.0, targets=("q_proj",), dropout=0.4)
    params = config.init(jax.random.key(0), {"q_proj": (5, 4)}, 1, jnp.float64)
    params["q_proj"]["b"] += jax.random.normal(jax.random.key(1), (1, 2, 4), jnp.float64)
    layer = jax.tree.map(lambda x: x[0], config.bind(params))
    x, y = (jax.random.normal(jax.random.key(i), (6, 3, d), jnp.float64) for i, d in ((2, 5), (3, 4)))
    hook = InputDropout(layer, jax.random.key(4), config.dropout)
    update = np.asarray(hook("q_proj", x, y) - y)
    # Which entries were kept is read off the hook itself, by an adapter that hands its input on.
    eye = LoRAConfig(rank=5, alpha=5.0, targets=("q_proj",), dropout=0.4)
    same = {"q_proj": {"a": jnp.eye(5)[None], "b": jnp.eye(5)[None]}}
    through = InputDropout(jax.tree.map(lambda x: x[0], eye.bind(same)), jax.random.key(4), 0.4)
    kept = np.asarray(through("q_proj", x, jnp.zeros_like(x)))
    assert set(np.round(kept / x, 9).ravel().tolist()) == {0.0, round(1 / 0.6, 9)}
    a, b = (np.asarray(params["q_proj"][name][0]) for name in ("a", "b"))
    np.testing.assert_allclose(update, 1.5 * kept @ a @ b, rtol=1e-12)
    assert hook("k_proj", x, y) is y


def test_the_dropped_share_and_its_mean():
    eye = LoRAConfig(rank=5, alpha=5.0, targets=("q_proj",))
    same = {"q_proj": {"a": jnp.eye(5)[None], "b": jnp.eye(5)[None]}}
    layer = jax.tree.map(lambda x: x[0], eye.bind(same))
    x = jnp.ones((400, 100, 5))
    for rate in (0.1, 0.5, 0.9):
        found = np.asarray(InputDropout(layer, jax.random.key(0), rate)("q_proj", x, jnp.zeros_like(x)))
        spread = 5 * np.sqrt(rate * (1 - rate) / x.size)
        assert abs((found == 0).mean() - rate) < spread and abs(found.mean() - 1) < spread / (1 - rate)
    with pytest.raises(ValueError, match=r"LoRA dropout 1 must be at least 0 and below 1"):
        LoRAConfig(dropout=1)


@pytest.mark.usefixtures("float32_by_default")
def test_dropout_acts_in_training_alone_and_is_told_to_peft(tiny_model, tiny_data, tmp_path):
    losses = {}
    for rate in ("0.0", "0.5"):
        out = tmp_path / rate
        assert cli.run(["lora", *arguments(tiny_model, tiny_data, out, "--lora-dropout", rate, "--quiet")]) == 0
        exported = json.loads((out / "adapter" / "adapter_config.json").read_text())
        assert exported["lora_dropout"] == float(rate)
        losses[rate] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, second = losses["0.0"], losses["0.5"]
    assert first[0]["inner_loss"] == second[0]["inner_loss"]  # B = 0: nothing to drop yet
    assert first[-1]["inner_loss"] != second[-1]["inner_loss"]


@pytest.mark.parametrize("name", [name for name in commands.TABLE if name not in DROPPING])
def test_commands_without_dropout_say_so(name, tiny_model, tmp_path, capsys):
    words = [*NEEDED.get(name, []), "--model", str(tiny_model), "--lora-dropout", "0.1", "--out", str(tmp_path / "run")]
    assert cli.run([name, *words]) == 2
    assert "--lora-dropout has no effect here, since " in capsys.readouterr().err


def test_names_that_are_listed_are_read_each_time():
    registry = {"one": 1}
    hint = ranges.Listed(registry)
    registry["two"] = 2
    assert str(hint) == "one, two"
