"""`bilevel allocate`: scores, budgets, ranks, and what other trainers are told."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from methods import allocate, budget, cli, histories, trainers
from methods.adapters.lora import LoRAConfig
from methods.objective import of_hook
from methods.options import parse
from methods.runfolder import RunFolder
from tests.conftest import require
from tests.methods import small
from tests.methods.small import arguments


def setup(per="rank", budget=100, **more):
    """Settings of which nothing is left open, for the small decoder."""
    defaults = {"score": "hypergradient", "rank": 2, "max_rank": 2, "inner_steps": 3, "outer_steps": 2}
    defaults |= {"batch_size": 2, "outer_batch_size": 2}
    return allocate.Used(model="", per=per, budget=budget, **defaults | more)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        *("--random-baselines 3", "--test-rows 5 --data a.jsonl --test-data b.jsonl", "--finetune-steps 9"),
        *("--finetune-optimizer sgd", "--warmup 0.5", "--schedule linear", "--weight-decay 0.1", "--clip 1"),
        *("--validate-every 3", "--patience 2", "--finetune-epochs 2", "--finetune-lr 0.1"),
    ],
)
def test_search_only_takes_no_option_of_a_training(words, tmp_path, capsys):
    given = ["allocate", "--model", "m", "--top-k", "1", "--search-only", "--out", str(tmp_path / "run")]
    assert cli.run([*given, *words.split()]) == 2
    said = f"bilevel: {words.split()[0]} has no effect here, since --search-only trains nothing: leave it out.\n"
    assert capsys.readouterr().err == said


def test_what_a_search_reads_is_not_refused_and_what_its_score_does_not_is():
    given = ["--model", "m", "--top-k", "1", "--search-only", "--data", "rows.jsonl", "--test-rows", "5"]
    assert parse(allocate.COMMAND, "allocate", [*given, "--accumulate", "2", "--batch-size", "3"]).test_rows == 5
    given = ["--model", "m", "--top-k", "1", "--score", "singular-values", "--outer-batch-size", "3"]
    with pytest.raises(ValueError, match="--outer-batch-size has no effect here, since --score singular-values takes"):
        parse(allocate.COMMAND, "allocate", given)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_rotated_updates_are_the_same_in_the_basis_of_their_singular_vectors():
    rng = np.random.default_rng(0)
    params = {"q_proj": {"a": jnp.asarray(rng.normal(size=(3, 7, 4))), "b": jnp.asarray(rng.normal(size=(3, 4, 5)))}}
    found = allocate.rotated(params)["q_proj"]
    before = np.einsum("lir,lro->lio", params["q_proj"]["a"], params["q_proj"]["b"])
    np.testing.assert_allclose(np.einsum("lir,lro->lio", found["a"], found["b"]), before, atol=1e-12)
    for layer in range(3):
        singular = np.linalg.svd(before[layer], compute_uv=False)[:4]
        a, b = np.asarray(found["a"][layer]), np.asarray(found["b"][layer])
        np.testing.assert_allclose(a.T @ a, np.diag(singular), atol=1e-12)
        np.testing.assert_allclose(b @ b.T, np.diag(singular), atol=1e-12)


def test_a_rank_above_the_smaller_side_of_a_matrix_is_nothing():
    rng = np.random.default_rng(0)
    params = {"v_proj": {"a": jnp.asarray(rng.normal(size=(2, 6, 5))), "b": jnp.asarray(rng.normal(size=(2, 5, 3)))}}
    found = allocate.rotated(params)["v_proj"]
    assert found["a"].shape == (2, 6, 5) and found["b"].shape == (2, 5, 3)
    before = np.einsum("lir,lro->lio", params["v_proj"]["a"], params["v_proj"]["b"])
    np.testing.assert_allclose(np.einsum("lir,lro->lio", found["a"], found["b"]), before, atol=1e-12)
    prices = budget.costs(setup(max_rank=5), {"v_proj": (6, 3)}, ["v_proj"], 2)["v_proj"]
    assert np.isfinite(prices).sum(axis=1).tolist() == [3, 3]


@pytest.mark.parametrize("per", ["rank", "module", "layer"])
def test_scores_are_the_sum_of_hypergradients(per):
    """Against central differences of the validation loss after training, in float64."""
    weights, loss, train, validation = small.setting()
    given = of_hook(loss, weights, small.LORA, small.CONFIG, small.adapter)
    start = small.trained(by=0.05)
    setting = setup(per, outer_lr=1e-4, group=1)
    data = bilevel.FullBatch(train), bilevel.FullBatch(validation)
    solver = allocate.solver(setting, given, start)
    key = jax.random.key(0)
    found = bilevel.run(solver, inner_data=data[0], outer_data=data[1], steps=1, key=key, progress=False).outer
    optimizer = optax.adam(0.1 * setting.inner_lr)

    def trained_loss(scores):
        """The same training, written out."""
        params, state = start, optimizer.init(start)
        bound = lambda p: given.bind(weights, p, gate=allocate.gates(setting, scores))  # noqa: E731
        for _ in range(setting.inner_steps):
            grads = jax.grad(lambda p: given.loss(weights, bound(p), train))(params)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return given.loss(weights, bound(params), validation)

    like = {name: np.zeros(value.shape) for name, value in found.items()}
    rng, step = np.random.default_rng(0), 1e-5
    for _ in range(4):
        direction = {name: rng.normal(size=value.shape) for name, value in like.items()}
        moved = [trained_loss({n: jnp.asarray(s * step * d) for n, d in direction.items()}) for s in (1, -1)]
        slope = float(moved[0] - moved[1]) / (2 * step)
        along = sum(float((np.asarray(found[name]) * d).sum()) for name, d in direction.items())
        np.testing.assert_allclose(along / -setting.outer_lr, slope, rtol=2e-5)


@pytest.mark.parametrize("per", ["rank", "module", "layer"])
def test_energies_are_squared_singular_values(per):
    rng = np.random.default_rng(0)
    params = {
        site: {"a": jnp.asarray(rng.normal(size=(3, 7, 4))), "b": jnp.asarray(rng.normal(size=(3, 4, 5)))}
        for site in ("q_proj", "v_proj")
    }
    values = {
        site: np.linalg.svd(np.einsum("lir,lro->lio", of["a"], of["b"]), compute_uv=False)[:, :4] ** 2
        for site, of in params.items()
    }
    found = allocate.energies(setup(per, max_rank=4, group=2), allocate.rotated(params))
    if per == "layer":
        np.testing.assert_allclose(found["layers"], sum(v.sum(axis=1) for v in values.values()), rtol=1e-10)
        return
    for site, value in values.items():
        expected = value.sum(axis=1) if per == "module" else value[:, ::2] + value[:, 1::2]
        np.testing.assert_allclose(found[site], expected, rtol=1e-10)


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_a_budget_is_held_exactly(seed):
    """Never more than the budget, and what is left of it pays for nothing else."""
    rng = np.random.default_rng(seed)
    layers, most, group = int(rng.integers(1, 6)), int(rng.integers(1, 5)), int(rng.integers(1, 3))
    # One site can have every rank; of the others some are beyond what their matrices have.
    least = {"q_proj": 8, "v_proj": 2, "up_proj": 2}
    shapes = {site: tuple(rng.integers(low, 40, 2).tolist()) for site, low in least.items()}
    setting = setup(max_rank=most * group, group=group)
    prices = budget.costs(setting, shapes, list(shapes), layers)
    total = sum(p[np.isfinite(p)].sum() for p in prices.values())
    cheapest = min(price.min() for price in prices.values())
    setting = setup(max_rank=most * group, group=group, budget=int(rng.integers(cheapest, total + 1)), seed=seed)
    scores = {site: rng.normal(size=price.shape) for site, price in prices.items()}
    if seed % 3 == 0:
        scores = {site: np.zeros(price.shape) for site, price in prices.items()}
    chosen = budget.bought(setting, scores, prices)
    spent = budget.spent(chosen, prices)
    left = setting.budget - spent
    assert left >= 0
    assert all((price[~chosen[site]] > left).all() for site, price in prices.items())
    ranks = budget.ranks_of(setting, chosen, list(shapes), layers)
    assert sum(r * sum(shapes[site]) for site, each in ranks.items() for r in each) == spent
    assert all(0 <= r <= min(setting.max_rank, *shapes[site]) for site, each in ranks.items() for r in each)


def test_the_best_units_are_bought():
    setting = setup("module", budget=2)
    scores = {"q_proj": [0.1, -2.0], "v_proj": [0.3, 0.2]}
    chosen = budget.bought(setting, scores, {site: np.ones(2) for site in scores})
    assert {site: on.tolist() for site, on in chosen.items()} == {"q_proj": [False, False], "v_proj": [True, True]}
    assert budget.ranks_of(setting, chosen, ("q_proj", "v_proj"), 2) == {"q_proj": [0, 0], "v_proj": [2, 2]}
    layers = budget.bought(setup("layer", budget=1), {"layers": [0.1, 0.2]}, {"layers": np.ones(2)})
    assert budget.ranks_of(setup("layer"), layers, ("q_proj",), 2) == {"q_proj": [0, 2]}


@pytest.mark.parametrize("rslora", [False, True])
def test_every_rank_has_the_scale_of_the_settings(rslora):
    base = LoRAConfig(rank=4, alpha=12.0, rslora=rslora)
    ranks = {"q_proj": [0, 3, 3], "v_proj": [1, 3, 0]}
    config, mask = budget.adapter(base, ranks)
    assert {site: each.tolist() for site, each in mask.items()} == {"q_proj": [0, 1, 1], "v_proj": [1, 1, 0]}
    assert config.rank == 3
    for site, each in ranks.items():
        for layer, rank in enumerate(each):
            if rank:
                assert config.module(site, layer)[0] == rank
                np.testing.assert_allclose(config.module_scale(site, layer), base.scale, rtol=1e-12)
    with pytest.raises(ValueError, match="No module has a rank"):
        budget.adapter(base, {"q_proj": [0]})


@pytest.mark.parametrize(
    ("text", "value"),
    [("200000", 200_000), ("200k", 200_000), ("1.5M", 1_500_000), ("2m", 2_000_000), ("1_000", 1000), ("1G", 10**9)],
)
def test_amounts(text, value):
    assert budget.amount(text) == value


def test_a_random_choice_does_not_prefer_what_is_cheap():
    rng, shapes = np.random.default_rng(0), {"q_proj": (20, 10), "v_proj": (12, 8)}
    setting = setup(max_rank=8, budget=500)
    prices = budget.costs(setting, shapes, list(shapes), 3)
    drawn = [budget.bought(setting, allocate._drawn(rng, prices), prices) for _ in range(300)]
    counts = {site: np.mean([on[site].sum() for on in drawn]) for site in shapes}
    # Half and half, but for the last few parameters, which may pay for v and not for q.
    assert 0 < counts["v_proj"] - counts["q_proj"] < 1.0 and counts["q_proj"] > 8, counts
    assert all(budget.spent(on, prices) > 480 for on in drawn)
    assert {int(on["q_proj"].sum()) for on in drawn} > {8, 9, 10}


@pytest.mark.parametrize("text", ["", "two", "-1", "0", "1e6", "2 M!", "9G", "k", "1.5.2"])
def test_other_amounts_are_refused(text):
    with pytest.raises(ValueError, match=r"--budget-params"):
        budget.amount(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", r"Give one budget, --budget-params, --budget-modules or --top-k, such as --budget-params 200k"),
        ("--top-k 1 --budget-modules 1", r"and not several of them"),
        ("--budget-params 5", r"--budget-params 5 pays for no rank: the cheapest costs 24"),
        ("--budget-params 1M", r"--budget-params 1,000,000 pays for all there are, which cost"),
        ("--top-k 2", r"--top-k 2 pays for all there are, which cost 2: there is nothing to choose"),
        ("--budget-modules 4", r"--budget-modules 4 pays for all there are, which cost 4"),
        ("--budget-params 100 --adapter dora", r"--adapter dora: a budget is spent on LoRA or rsLoRA"),
        ("--budget-params 100 --max-rank 3 --group 2", r"--max-rank 3 is no multiple of --group 2"),
        ("--budget-params 100 --max-rank 20", r"--max-rank 20 is more than the 16 of a whole matrix"),
        ("--top-k 1 --accumulate 9", r"--accumulate 9 batches of --batch-size 4 are more than the 16 rows"),
        ("--top-k 1 --max-rank 3", r"--max-rank has no effect here, since without --budget-params"),
        ("--budget-params 100 --score singular-values --outer-steps 3", r"--outer-steps has no effect here, since"),
        ("--top-k 1 --search-only --random-baselines 2", r"has no effect here, since --search-only trains nothing"),
    ],
)
def test_bad_budgets_are_one_sentence(words, message, tiny_model, tiny_data, tmp_path, capsys):
    given = arguments(tiny_model, tiny_data, tmp_path / "run", "--task", "piqa", *words.split())
    assert cli.run(["allocate", *given]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1, said
    assert not (tmp_path / "run").exists()


def test_random_choices_are_of_what_is_for_sale():
    of = setup(group=1)
    prices = {"q": np.ones((2, 2)), "v": np.array([[1.0, np.inf]] * 2)}
    alone = [{"q": np.eye(2) > 0, "v": np.zeros((2, 2), bool)}, {"q": np.ones((2, 2)) > 0, "v": np.zeros((2, 2), bool)}]
    found = allocate.agreement(of, alone, prices, ("q", "v"), 2)
    assert found["jaccard"] == 0.5 and found["random"] == pytest.approx(histories.by_chance(2, 4, 6))


# --- commands --------------------------------------------------------------------------------------------------------

SHORT = "--inner-steps 2 --outer-steps 2 --random-baselines 0 --quiet".split()


def read(file):
    return json.loads(file.read_text())


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize(
    ("words", "counted"),
    [("--top-k 1", [[0, 2], [2, 0]]), ("--budget-modules 3 --score singular-values --warmup-steps 2", None)],
)
def test_layers_and_modules(words, counted, tiny_model, tiny_data, tmp_path):
    short = SHORT[4:] if "singular" in words else SHORT
    given = arguments(tiny_model, tiny_data, tmp_path / "run", "--task", "piqa", *short, *words.split())
    assert cli.run(["allocate", *given]) == 0
    selection = read(tmp_path / "run" / "selection.json")
    ranks = selection["ranks"]
    if counted:
        assert ranks["q_proj"] == ranks["v_proj"] and ranks["q_proj"] in counted
        assert selection["peft"]["layers_to_transform"] == [ranks["q_proj"].index(2)]
    else:
        assert sum(rank > 0 for each in ranks.values() for rank in each) == 3 == selection["spent"]
    assert 0 <= selection["agreement"]["jaccard"] <= 1
    result = read(tmp_path / "run" / "results" / "allocate.json")
    assert result["ranks"] == ranks and "uniform" not in {p.stem for p in (tmp_path / "run" / "results").iterdir()}


@pytest.mark.usefixtures("float32_by_default")
def test_ranks_are_trained_and_exported_as_they_were_bought(finished):
    out = finished("allocate")
    selection = read(out / "selection.json")
    shapes = {"q_proj": 32, "v_proj": 24}
    logged = [json.loads(line)["stage"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert logged.count("warm-up of search") == read(out / "config.json")["warmup_steps"]
    spent = sum(shapes[site] * rank for site, each in selection["ranks"].items() for rank in each)
    assert spent == selection["spent"] <= selection["budget"] == 400
    result = read(out / "results" / "allocate.json")
    assert result["parameters"] == spent and result["ranks"] == selection["ranks"]
    from safetensors.numpy import load_file

    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    stored = {}
    for name, tensor in weights.items():
        if found := re.search(r"layers\.(\d+)\.self_attn\.(\w+)\.lora_A", name):
            stored[found[2], int(found[1])] = tensor.shape[0]
    expected = {(s, i): r for s, each in selection["ranks"].items() for i, r in enumerate(each) if r}
    assert stored == expected
    page = (out / "report.md").read_text()
    assert "## For other programs" in page and "lora_target: " in page and "get_peft_model(model, config)" in page
    assert "rank correlation" in page
    costs = {"q_proj": 32 * 2, "v_proj": 24 * 2}  # two layers
    is_there = "uniform" in {file.stem for file in (out / "results").iterdir()}
    assert is_there == (sum(costs.values()) <= 400) == ("One rank in every module costs more" not in page)
    assert is_there == ("Uniform LoRA has the largest rank for all modules that fits: " in page)
    assert "each module of the rank above" in page and "LoRA rank 8" not in page


def test_amounts_are_read_to_the_last_parameter():
    for hundredths in range(1, 2000):
        for end, times in (("k", 10**3), ("M", 10**6)):
            assert budget.amount(f"{hundredths // 100}.{hundredths % 100:02d}{end}") == hundredths * times // 100
    assert budget.amount("1_000") == budget.amount("1,000") == 1000


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls it by an old name
@pytest.mark.parametrize("words", ["--budget-params 200", "--top-k 1"])
def test_the_printed_snippet_makes_the_adapter_in_peft(words, tiny_model, tiny_data, tmp_path, capsys):
    """It is run as it is, on the model in torch: PEFT then trains what the budget says, and nothing else."""
    peft = require("peft")
    given = arguments(tiny_model, tiny_data, tmp_path / "run", "--task", "piqa", "--search-only", *words.split())
    at = given.index("--finetune-steps")
    del given[at : at + 2]
    assert cli.run(["allocate", *given]) == 0
    said = capsys.readouterr().out
    assert not list((tmp_path / "run").glob("results/*"))
    snippet = re.search(r"peft:\n\n(.*?)\n\naxolotl", said, re.S)[1]
    assert snippet in (tmp_path / "run" / "report.md").read_text()
    space: dict = {}
    exec(snippet, space)
    assert isinstance(space["model"], peft.PeftModel)
    trainable = sum(p.numel() for p in space["model"].parameters() if p.requires_grad)
    selection = read(tmp_path / "run" / "selection.json")
    sizes = {"q_proj": 32, "v_proj": 24}
    assert trainable == sum(sizes[site] * rank for site, each in selection["ranks"].items() for rank in each)
    for name, module in space["model"].named_modules():
        if isinstance(getattr(module, "scaling", None), dict) and "default" in module.scaling:
            assert module.scaling["default"] == pytest.approx(16 / 2), name  # alpha / r of the settings


def test_layers_are_told_to_trainers_that_take_no_list_of_them():
    config = {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers", "rank_pattern": {}}
    config |= {"r": 4, "lora_alpha": 8, "base_model_name_or_path": "models/tiny.gguf", "task_type": "CAUSAL_LM"}
    told = dict((title, text) for title, _, text in trainers.snippets("folder", config, ["model.layers.1.attn.q_proj"]))
    assert 'peft_layers_to_transform: [1]\npeft_layers_pattern: ["layers"]' in told["axolotl"]
    assert "lora_target: model.layers.1.attn.q_proj" in told["LLaMA-Factory"]
    told = [title for title, _, _ in trainers.snippets("folder", config | {"rank_pattern": {"a": 1}}, [])]
    one = " (it takes one rank for all modules: this is the commonest)"
    assert told == ["peft", f"axolotl{one}", f"LLaMA-Factory{one}"]


def test_another_budget_is_told_by_its_option(tmp_path):
    settings = allocate.AllocateSettings(model="m", budget_params="1k", out=tmp_path)
    RunFolder(tmp_path, allocate.used(settings))
    with pytest.raises(ValueError, match=r"other settings \(budget_params\): budget_params was '1k' and is '2k'"):
        RunFolder(tmp_path, allocate.used(dataclasses.replace(settings, budget_params="2k")))


def test_trainers_are_told_all_that_the_scale_and_the_training_of_an_adapter_depend_on():
    config = {"target_modules": ["q_proj"], "rank_pattern": {}, "r": 3, "lora_alpha": 8 * 3**0.5}
    config |= {"base_model_name_or_path": "org/name", "task_type": "SEQ_CLS", "use_rslora": True, "lora_dropout": 0.1}
    (_, _, peft_lines), (axolotl_title, _, axolotl), (factory_title, _, factory) = trainers.snippets("f", config, [], 3)
    assert "AutoModelForSequenceClassification.from_pretrained('org/name', num_labels=3)" in peft_lines
    assert {"peft_use_rslora: true", "lora_dropout: 0.1", "lora_alpha: 14", "lora_r: 3"} <= set(axolotl.splitlines())
    assert {"use_rslora: true", "lora_dropout: 0.1", "lora_alpha: 14", "lora_rank: 3"} <= set(factory.splitlines())
    for title in (axolotl_title, factory_title):
        assert title.endswith(" (it takes whole numbers as alpha: this was 13.86)")
    plain = config | {"use_rslora": False, "lora_dropout": 0.0, "lora_alpha": 16.0}
    for title, _, lines in trainers.snippets("f", plain, [])[1:]:
        assert "rslora" not in lines and "dropout" not in lines and "lora_alpha: 16" in lines and "(" not in title
    local = config | {"base_model_name_or_path": "models/tiny.gguf", "task_type": "CAUSAL_LM"}
    lines = trainers.snippets("f", local, [])[0][2]
    assert "AutoModelForCausalLM.from_pretrained('models', gguf_file='tiny.gguf')" in lines
