"""The fine-tuning loop: what it computes, what it keeps, when it stops, and that a killed run is none the worse."""

import dataclasses
import json
import math
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import binomtest

import bilevel
from bilevel.running.chunks import compiled as chunk
from methods import bench as benches
from methods import cli, evaluation, pages
from methods.lora import LoRASettings
from methods.runfolder import RunFolder
from methods.tasks import Buckets, LabelledBatch, generation
from methods.training import Recipe, train

ROWS = 24
LABELS = np.random.default_rng(0).normal(size=ROWS).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Nothing:
    """Settings of a run folder."""

    out: str = ""


def stream(size=4):
    lengths = np.random.default_rng(1).integers(1, 60, ROWS)
    mask = np.arange(64) < lengths[:, None]
    return Buckets(LabelledBatch(mask.astype(np.int32), mask, mask.astype(np.int32), LABELS), size, seed=3)


def loss(params, outer, batch, key):
    text = batch.mask.sum(axis=1).astype(params["w"].dtype) / 64
    return ((text * params["w"] + params["b"] * outer - batch.labels.astype(text.dtype)) ** 2).mean()


PROBLEM = bilevel.Problem(
    loss, loss, lambda key, outer: {"w": jnp.ones(()), "b": jnp.zeros(())}, lambda key: jnp.ones(())
)


def trained(path, recipe, validate=None, size=4):
    folder = RunFolder(path, Nothing())
    key = jax.random.key(0)
    return train(PROBLEM, jnp.ones(()), stream(size), recipe, folder, "x", key=key, validate=validate)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_is_adamw_on_the_mean_gradient_of_the_accumulated_batches(tmp_path, accumulate):
    recipe = Recipe(10, 0.05, accumulate)
    params = {"w": jnp.ones(()), "b": jnp.zeros(())}
    schedule = lambda step: 0.05 * (step if step < 1 else 0.5 * (1 + np.cos(np.pi * (step - 1) / 9)))  # noqa: E731
    batches, optimizer = stream(), optax.adamw(schedule, weight_decay=0.0)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        for _ in range(10):
            gradients = [jax.grad(loss)(params, jnp.ones(()), next(batches), None) for _ in range(accumulate)]
            mean = jax.tree.map(lambda *g: sum(g) / accumulate, *gradients)
            updates, state = optimizer.update(mean, state, params)
            params = optax.apply_updates(params, updates)
    result = trained(tmp_path / "run", recipe)
    for name, value in params.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-6)


def test_clipping_and_a_given_warm_up_are_those_of_torch(tmp_path):
    # As torch.nn.utils.clip_grad_norm_, torch's AdamW and transformers' schedule have it, by hand.
    params, first, second = np.array([1.0, 0.0]), np.zeros(2), np.zeros(2)
    batches, norms = stream(size=2), []
    by_hand = jax.jit(jax.grad(lambda p, batch: loss({"w": p[0], "b": p[1]}, jnp.ones(()), batch, None)))
    for step in range(8):
        batch = next(batches)
        grad = np.asarray(by_hand(params, batch))
        norms.append(np.sqrt((grad**2).sum()))
        grad = grad * min(1.0, 0.5 / (norms[-1] + 1e-6))
        rate = 0.05 * (step / 3 if step < 3 else 0.5 * (1 + np.cos(np.pi * (step - 3) / 5)))
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        root = np.sqrt(second / (1 - 0.999 ** (step + 1)))
        params = params - rate * (first / (1 - 0.9 ** (step + 1))) / (root + 1e-8)
    assert min(norms) < 0.5 < max(norms)
    result = trained(tmp_path / "run", Recipe(8, 0.05, warmup=3, clip=0.5), size=2)
    # torch divides by the norm and a millionth.
    np.testing.assert_allclose([result["w"], result["b"]], params, rtol=5e-6)


def test_a_validation_loss_that_is_no_number_is_never_the_best(tmp_path):
    losses = iter([3.0, float("nan"), 2.0])
    with pytest.raises(FloatingPointError, match=r"The validation loss after 10 steps of x is nan: no parameters are"):
        trained(tmp_path / "run", Recipe(20, 0.05, validate_every=5), lambda params: next(losses))
    assert [row["loss"] for row in json.loads((tmp_path / "run" / "validation" / "x.json").read_text())] == [3.0]


def test_random_batches_are_a_permutation_of_the_rows():
    batches = Buckets(stream().arrays, 4, seed=3, pool=1)
    rows = np.concatenate([batches.rows(number) for number in range(ROWS // 4)])
    assert sorted(rows.tolist()) == list(range(ROWS))
    lengths = batches.lengths[rows].reshape(-1, 4)
    alike = stream()
    sorted_lengths = alike.lengths[np.concatenate([alike.rows(number) for number in range(ROWS // 4)])].reshape(-1, 4)
    spread = lambda x: (x.max(axis=1) - x.min(axis=1)).mean()  # noqa: E731
    assert spread(sorted_lengths) < 15 < 25 < spread(lengths)


def test_a_second_training_by_the_same_recipe_is_not_compiled_again(tmp_path):
    compiled = []
    for number, steps in enumerate((5, 5, 6)):
        folder, outer = RunFolder(tmp_path / str(number), Nothing()), jnp.full((), 1.0 + number)
        train(PROBLEM, outer, stream(), Recipe(steps, 0.07), folder, "x", key=jax.random.key(number))
        compiled.append(chunk._cache_size())
    assert compiled[0] == compiled[1] < compiled[2]  # a longer one has another schedule


def test_the_best_parameters_are_kept_and_patience_ends_the_training(tmp_path):
    seen = []
    curve = [3.0, 2.0, 1.0, 1.5, 1.0, 5.0, 0.0]  # 1.0 again is no new best

    def validate(params):
        seen.append(params)
        return curve[len(seen) - 1]

    recipe = Recipe(100, 0.05, 2, validate_every=5, patience=3)
    result = trained(tmp_path / "run", recipe, validate)
    rows = json.loads((tmp_path / "run" / "validation" / "x.json").read_text())
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 3), (20, 2), (30, 1), (40, 1.5), (50, 1), (60, 5)]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 60
    assert result == seen[2] != seen[4]
    # Asked again, it is done: nothing is trained on.
    assert trained(tmp_path / "run", recipe, validate) == result and len(seen) == 6


DELETED = "validation/x.json", "validation/x.safetensors"
"""What sentences say can be deleted, to have it made again."""


def test_killed_and_continued_is_never_killed(tmp_path, monkeypatch):
    recipe = Recipe(40, 0.05, 2, validate_every=4, patience=2)

    def validate(params):
        return float(loss(params, jnp.ones(()), stream().arrays, None)) * (1 + 0.3 * float(params["w"]) ** 2)

    def files(path):
        names = "metrics.jsonl", "validation/x.json", "validation/x.safetensors"
        return [(path / name).read_bytes() for name in names]

    whole = trained(tmp_path / "whole", recipe, validate)
    log = RunFolder.log
    for stop in (7, 16, 17):

        def interrupting(self, stage, stop=stop):
            def callback(step, state, metrics):
                log(self, stage)(step, state, metrics)
                if step == stop:
                    raise KeyboardInterrupt

            return callback

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "log", interrupting)
            with pytest.raises(KeyboardInterrupt):
                trained(tmp_path / "killed", recipe, validate)
    copies = [shutil.copytree(tmp_path / "killed", tmp_path / Path(name).name) for name in DELETED]
    for copy, name in zip(copies, DELETED, strict=True):  # of what was known at the interruption, and of all in the end
        (copy / name).unlink()
        trained(copy, recipe, validate)
        (copy / name).unlink()
    for path in (tmp_path / "killed", *copies):
        result = trained(path, recipe, validate)
        assert files(path) == files(tmp_path / "whole")
        assert result["w"] == whole["w"] and result["b"] == whole["b"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(0, 0.1), r"Fine-tuning with steps=0: it must be at least 1\."),
        (lambda: Recipe(1, 0.1), r"steps=1: 1 of them are its warm-up, of which the first has rate 0; it must be at "),
        (lambda: Recipe(5, 0.1, warmup=5), r"steps=5: 5 of them are its warm-up, .* it must be at least 6\."),
        (lambda: Recipe(5, float("nan")), r"Fine-tuning with learning_rate=nan: it must be a number from 0 on\."),
        (lambda: Recipe(5, -0.1), r"Fine-tuning with learning_rate=-0\.1: it must be a number from 0 on\."),
        (lambda: Recipe(5, 0.1, clip=float("inf")), r"Fine-tuning with clip=inf: it must be a number from 0 on\."),
        (lambda: Recipe(5, 0.1, 0), r"Fine-tuning with accumulate=0: it must be at least 1\."),
        (lambda: Recipe(5, 0.1, patience=2), r"patience=2 counts validations, of which there are none: validate_ever"),
    ],
)
def test_recipe_errors_are_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- on a task ----------------------------------------------------------------------------------------------------


def arguments(model, data, out, *more):
    sizes = "--train-rows 16 --outer-rows 8 --test-rows 0 --batch-size 4 --length 24".split()
    steps = "--finetune-steps 4 --rank 2 --validate-every 2".split()
    return ["--model", str(model), "--data", str(data), "--out", str(out), *sizes, *steps, *more]


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize(("task", "adapter"), [("rte", "dora"), ("stsb", "rslora")])
def test_plain_lora_with_a_head_leaves_a_whole_run_folder(tiny_model, tiny_glue, tmp_path, task, adapter):
    out = tmp_path / "run"
    words = ["lora", *arguments(tiny_model, tiny_glue, out, "--task", task, "--adapter", adapter)]
    assert cli.run(words) == 0
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert (settings["use_dora"], settings["use_rslora"]) == (adapter == "dora", adapter == "rslora")
    result = json.loads((out / "results" / f"{adapter}.json").read_text())
    assert list(result["metrics"]) == {"rte": ["accuracy"], "stsb": ["pearson", "spearman"]}[task]
    # q: 16 + 16, v: 16 + 8, two layers of rank 2, the lengths of DoRA, the head.
    lengths = 2 * (16 + 8) if adapter == "dora" else 0
    assert result["parameters"] == 2 * 2 * (32 + 24) + lengths + 16 * {"rte": 2, "stsb": 1}[task]
    for name in ("figures/training.png", "validation/" + adapter + ".json"):
        assert (out / name).stat().st_size > 0
    report = (out / "report.md").read_text()
    assert f"| {adapter} | 2 | " in report and ("/6 |" in report) == (task == "rte")
    assert cli.run(words) == 0 and (out / "report.md").read_text() == report


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_flexora_with_a_head(tiny_model, tiny_glue, tmp_path, task):
    search = "--inner-steps 2 --outer-steps 2 --random-baselines 0".split()
    words = arguments(tiny_model, tiny_glue, tmp_path / "run", "--task", task, *search)
    assert cli.run(["flexora", *words]) == 0
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["modules_to_save"] == ["score"]
    page = (tmp_path / "run" / "report.md").read_text()
    results = {
        name: json.loads((tmp_path / "run" / "results" / f"{name}.json").read_text())["right"]
        for name in ("flexora", "all-layers", "pretrained")
    }
    if task == "stsb":  # a regression is neither right nor wrong
        assert results == dict.fromkeys(results) and "- against " not in page
        return
    for name in ("all-layers", "pretrained"):
        pairs = list(zip(results["flexora"], results[name], strict=True))
        wins, losses = pairs.count((1, 0)), pairs.count((0, 1))
        p = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert (
            f"- against {name}: {wins} question{'s' * (wins != 1)} only flexora got right, {losses} only the other; "
            f"p = {p:.2f} " in page
        )


def test_paired_difference_is_the_two_sided_exact_sign_test():
    rng = np.random.default_rng(0)
    for size, share in ((1, 0.5), (7, 0.5), (40, 0.8), (400, 0.6)):
        first, second = rng.random(size) < share, rng.random(size) < 0.4
        wins = sum(bool(a and not b) for a, b in zip(first, second, strict=True))
        losses = sum(bool(b and not a) for a, b in zip(first, second, strict=True))
        found = pages.paired_difference(first.astype(int).tolist(), second)
        assert found[:2] == (wins, losses)
        # Twice the smaller tail of n tosses of a fair coin, in whole numbers.
        n, k = wins + losses, min(wins, losses)
        wanted = min(1.0, float(2 * Fraction(sum(math.comb(n, i) for i in range(k + 1)), 2**n)))
        np.testing.assert_allclose(found[2], wanted, rtol=1e-12)
    # By hand: 5 heads of 5 are as rare as 5 tails; nothing in dispute says nothing; a draw says nothing either.
    assert pages.paired_difference([1] * 5 + [0], [0] * 5 + [0]) == (5, 0, 2 / 32)
    assert pages.paired_difference([1, 0], [1, 0]) == (0, 0, 1.0)
    assert pages.paired_difference([1, 0], [0, 1]) == (1, 1, 1.0)


@pytest.fixture(scope="module")
def tiny_writing(tmp_path_factory):
    """A GSM8K and an E2E over the words of `tiny_model`."""
    folder = tmp_path_factory.mktemp("writing")
    problem = lambda text: {"question": text, "answer": "wash it #### 3", "final": "3"}  # noqa: E731
    meaning = lambda text: {"mr": text, "ref": "wash the pot"}  # noqa: E731
    for name, row in (("gsm8k", problem), ("e2e_nlg", meaning)):
        (folder / name).mkdir()
        for split, count in (("train", 40), ("test", 6)):
            lines = [json.dumps(row(f"{split} {i} the pot")) for i in range(count)]
            (folder / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize(
    ("task", "metrics"), [("gsm8k", ["exact"]), ("e2e_nlg", ["bleu", "nist", "rouge_l", "meteor", "cider"])]
)
def test_plain_lora_on_a_task_that_writes(tiny_model, tiny_writing, tmp_path, monkeypatch, task, metrics):
    monkeypatch.setitem(generation.METRICS, "meteor", lambda predictions, targets: 0.0)  # which needs WordNet
    model, out = Path(shutil.copytree(tiny_model, tmp_path / "model")), tmp_path / "run"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 320}))
    words = ["lora", *arguments(model, tiny_writing, out, "--task", task)]
    assert cli.run(words) == 0
    for arm in ("pretrained", "lora"):
        assert list(json.loads((out / "results" / f"{arm}.json").read_text())["metrics"]) == metrics
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    report = (out / "report.md").read_text()
    assert cli.run(words) == 0 and (out / "report.md").read_text() == report


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize("task", ["piqa", "rte", "gsm8k"])
def test_what_the_model_does_not_take_is_counted_and_said(tiny_model, tmp_path, monkeypatch, task):
    rows = {
        "piqa": lambda text: {"goal": text, "choices": ["wash it", "eat it"], "label": 0},
        "rte": lambda text: {"sentence1": text, "sentence2": "it", "label": 1},
        "gsm8k": lambda text: {"question": text, "answer": "#### 3", "final": "3"},
    }
    folder = {"rte": "glue_rte"}.get(task, task)
    (tmp_path / folder).mkdir()
    for split, texts in (
        ("train", [f"train {i} the pot" for i in range(8)]),
        ("validation", ["the pot", "the " * 90]),
        ("test", ["the pot", "the " * 90]),
    ):
        lines = [json.dumps(rows[task](text)) for text in texts]
        (tmp_path / folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    for module in (benches, evaluation):
        monkeypatch.setattr(module, "WRITTEN", 2)
    sizes = {"train_rows": 4, "outer_rows": 2, "outer_batch_size": 2, "test_rows": 0, "length": 24}
    bench = benches.prepare(LoRASettings(model=str(tiny_model), task=task, data=str(tmp_path), **sizes))
    cut = 2 if task == "piqa" else 1  # a question is read once a choice
    longest = 62 if task == "gsm8k" else 64
    with pytest.warns(UserWarning, match=f"{cut} texts of {task}'s test have more than the {longest} tokens"):
        given = bench.given()
        found = evaluation.evaluate(bench, given.bind(given.weights, given.start(jax.random.key(0))))
    assert found.cut == cut
    row = {"layers": [], "parameters": 0} | evaluation.row(found)
    assert row["cut"] == cut
    said = f"**{cut} test texts were longer than the model takes and were cut.**"
    assert said in pages.table({"pretrained": row})
    assert said not in pages.table({"pretrained": row | {"cut": 0}})


@pytest.fixture
def copies(tiny_model, tiny_glue, tiny_writing, tmp_path):
    """A model and data to damage."""
    for folder in (tiny_glue, tiny_writing):
        shutil.copytree(folder, tmp_path / "data", dirs_exist_ok=True)
    return Path(shutil.copytree(tiny_model, tmp_path / "model")), tmp_path / "data"


def other_tokenizer(model, data):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["stranger"] = 14
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def cut_weights(model, data):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def label_of_no_class(model, data):
    row = json.dumps({"sentence1": "wash", "sentence2": "eat", "label": 2})
    (data / "glue_rte" / "train.jsonl").write_text(f"{row}\n")


def nothing(model, data):
    pass


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize(
    ("task", "damage", "sentence"),
    [
        ("rte", other_tokenizer, "has ids up to 14, but the embedding has 14 rows: tokenizer and weights are of diff"),
        ("rte", cut_weights, "model.safetensors is truncated or no safetensors file: fetch it again"),
        ("rte", label_of_no_class, "train.jsonl line 1 has label 2, which is out of range: 0 to 1."),
        ("gsm8k", nothing, "An answer may have 256 tokens, which leaves no room for a prompt in the 64 positions of"),
        ("aqua", nothing, "aqua_rat/train.jsonl: is --data right?"),
        ("e2e_nlg", nothing, "sacrebleu is not installed, which this metric is of: pip install 'bilevel[nlg]'."),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(task, damage, sentence, copies, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    damage(*copies)
    assert cli.run(["lora", *arguments(*copies, tmp_path / "run", "--task", task)]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("bilevel: ") and sentence in said, said
    assert not (tmp_path / "run").exists()
