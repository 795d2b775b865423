"""Encoders on multiple choice: a head scores each choice, as in transformers' multiple-choice models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tokenizers import processors

from methods import models, tasks
from methods.adapters import LoRAConfig, load_peft, save_peft
from methods.cli import run
from methods.integrity import read_json
from methods.objective import Bound, mean_loss, outputs, single_texts
from tests.conftest import require
from tests.methods.lora_files import old_name
from tests.methods.small import arguments
from tests.methods.texts import PIQA, question, tokenizer, write

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = [("<s>", 0), ("</s>", 1)]


def pairs_tokenizer():
    """Byte by byte, `<s> prompt </s> choice </s>`, the second text of type 1."""
    found = tokenizer()
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=SPECIAL
    )
    found.pad_token = "</s>"
    return found


def saved(folder, kind, seed=0):
    """A random multiple-choice model of transformers in a folder, with a tokenizer."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(vocab_size=260, max_position_embeddings=66, **SIZES)
    config.initializer_range = 0.2
    model = getattr(transformers, f"{kind}ForMultipleChoice")(config)
    getattr(model, kind.lower()).save_pretrained(folder)
    pairs_tokenizer().save_pretrained(folder)
    return model.eval()


ROWS = [
    question("Which is warm?", ("ice", "the sun", "snow"), 1),
    question("Cut it", ("with a knife", "no"), 0),
    question("A longer goal than these", ("one", "two"), 1),
]


def test_every_choice_is_a_pair_of_texts():
    tokens = pairs_tokenizer()
    batch = tasks.encode_choices(PIQA, ROWS, tokens, 64)
    assert batch.tokens.shape == batch.mask.shape == batch.types.shape == (3, 3, 64)
    assert batch.labels.tolist() == [1, 0, 1]
    for row, each, mask, types in zip(ROWS, batch.tokens, batch.mask, batch.types, strict=True):
        for choice, text in enumerate(row["choices"]):
            ids = each[choice][mask[choice]]
            assert tokens.decode(ids) == f"<s>Question: {row['goal']}\nAnswer:</s>{text}</s>"
            assert tokens.decode(ids[types[choice][mask[choice]] == 1]) == f"{text}</s>"
        assert not mask[len(row["choices"]) :].any()
    lengths = [len("Question: \nAnswer:") + 3 + len(r["goal"]) + max(map(len, r["choices"])) for r in ROWS]
    for most in (lengths[0] - 1, lengths[0], max(lengths)):
        assert tasks.choices_fit(PIQA, ROWS, tokens, most) == [length <= most for length in lengths]
    with pytest.raises(ValueError, match="A length of 3 tokens leaves no room for text beside 3 special tokens"):
        tasks.encode_choices(PIQA, ROWS, tokens, 3)
    with pytest.raises(ValueError, match="the list of rows is empty"):
        tasks.encode_choices(PIQA, [], tokens, 30)


@old_name
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "MPNet"])
def test_scores_losses_and_adapters_are_those_of_transformers_and_peft(tmp_path, kind):
    """An adapter and a head of ours, written for PEFT, give the same scores there, and the same loss."""
    torch, transformers, peft = require("torch"), require("transformers"), require("peft")
    saved(tmp_path / "base", kind)
    ours = models.load(tmp_path / "base")
    config = LoRAConfig(4, 6.0, ["q_proj", "up_proj"])
    params = config.init(jax.random.key(0), ours.config.site_shapes(), 2)
    classifier = ours.classifier(1)
    head = classifier.init(jax.random.key(2), jnp.zeros((1, 32)))["params"]
    noise = lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape, leaf.dtype)  # noqa: E731
    params, head = jax.tree.map(noise, (params, head))
    names = ours.hf_names.multiple_choice()
    save_peft(tmp_path / "adapter", config, params, names, head=head, task_type=None)

    rows = [row | {"choices": row["choices"][:2], "label": row["label"] % 2} for row in ROWS]
    batch = tasks.encode_choices(PIQA, rows, ours.tokenizer, 64)
    # transformers counts positions by the tokens that are not its padding token, 1, which ends texts here.
    batch = batch._replace(tokens=np.where(batch.mask, np.where(batch.tokens == 1, 7, batch.tokens), 1))
    bound = Bound(config.bind(params, base=ours.weights["blocks"]), head)
    scores = np.asarray(outputs(ours.model, classifier, ours.weights, bound, batch))
    loss = mean_loss(ours.model, classifier, 0, ours.weights, bound, batch)

    plain = transformers.AutoModelForMultipleChoice.from_pretrained(tmp_path / "base").eval()
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask, "token_type_ids": batch.types}
    if not ours.config.token_types:
        del inputs["token_type_ids"]
    inputs = {name: torch.tensor(np.asarray(each)).long() for name, each in inputs.items()}
    with torch.no_grad():
        found = theirs(**inputs, labels=torch.tensor(batch.labels).long())
    np.testing.assert_allclose(scores, found.logits.numpy(), atol=2e-4)
    np.testing.assert_allclose(loss, found.loss.numpy(), rtol=1e-4)
    assert np.ptp(scores) > 0.1

    back = load_peft(tmp_path / "adapter", names, ours.config.site_shapes(), 2)
    jax.tree.map(np.testing.assert_array_equal, back.head, head)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    saved(folder, "Bert")
    return folder


@pytest.mark.filterwarnings("default")
def test_a_choice_that_is_not_there_changes_nothing(encoder):
    """Questions of two choices beside one of three have the scores, losses and gradients that they have alone."""
    ours = models.load(encoder)
    classifier = ours.classifier(1)
    head = classifier.init(jax.random.key(2), jnp.zeros((1, 32)))["params"]

    def losses(head, rows):
        batch = tasks.encode_choices(PIQA, rows, ours.tokenizer, 64)
        bound = Bound(models.identity, head)
        scores = outputs(ours.model, classifier, ours.weights, bound, batch)
        return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.asarray(batch.labels))

    both = losses(head, ROWS)
    alone = jnp.concatenate([losses(head, ROWS[:1]), losses(head, ROWS[1:])])
    np.testing.assert_allclose(both, alone, rtol=1e-5)
    slopes = [jax.grad(lambda h, rows=rows: losses(h, rows).sum())(head) for rows in (ROWS, ROWS[:1], ROWS[1:])]
    summed = jax.tree.map(jnp.add, *slopes[1:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), slopes[0], summed)

    batch = tasks.encode_choices(PIQA, ROWS, ours.tokenizer, 64)
    single = single_texts(batch)
    assert single.tokens.shape == (9, 64) and single.labels.tolist() == [0, 1, 0, 1, 0, 0, 0, 1, 0]
    assert single.mask.any(axis=1).tolist() == [True] * 5 + [False, True, True, False]


def test_accuracy_is_the_share_of_right_choices():
    """By scores that are known: the number of tokens of a choice."""
    rows = [question("a", ("x", "xxx", "xx"), 1), question("b", ("xxxx", "x"), 1), question("c", ("x", "xx"), 1)]
    answer = lambda batch: batch.mask.sum(axis=-1).astype(float) - 100.0  # noqa: E731
    found = tasks.evaluate_choices(answer, PIQA, rows, pairs_tokenizer(), batch_size=2)
    assert found.predictions.tolist() == [1, 0, 1] and found.right.tolist() == [True, False, True]
    assert found.metrics == {"accuracy": 2 / 3} and found.cut == 0
    assert np.isneginf(found.outputs).tolist() == [[False] * 3, [False, False, True], [False, False, True]]
    shorter = tasks.evaluate_choices(answer, PIQA, rows, pairs_tokenizer(), batch_size=2, max_length=25)
    assert shorter.cut == 1
    with pytest.raises(ValueError, match=r"answers piqa with shape \(2, 1\), not \(2, 3\)"):
        tasks.evaluate_choices(lambda batch: np.zeros((2, 1)), PIQA, rows, pairs_tokenizer(), batch_size=2)


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize(
    ("words", "row"),
    [
        ("loratrf --inner-steps 2 --outer-steps 2 --edit-rank 2", "loratrf"),
        ("finegates --inner-steps 2 --outer-steps 2 --outer sparsity --target-sparsity 0.5", "sparsity-0.5"),
    ],
)
def test_methods_that_read_the_rows_themselves_take_choices(encoder, tmp_path, words, row):
    """LoRATRF starts from right choices against wrong ones, FineGates compares a sliced model with a gated one."""
    write(tmp_path / "piqa", [question(f"number {i}", ("a", "b", "c")[: 2 + i % 2], i % 2) for i in range(40)])
    write(tmp_path / "piqa", [question(f"test {i}") for i in range(6)], "validation.jsonl")
    sizes = arguments(encoder, tmp_path, tmp_path / "run", "--length", "48", "--task", "piqa")
    assert run([*words.split(), *sizes]) == 0
    found = read_json(tmp_path / f"run/results/{row}.json")
    assert found["accuracy"]["total"] == 6 and found.get("sliced_differs_by", 0) < 1e-4


@pytest.mark.filterwarnings("default")
def test_an_encoder_learns_to_choose_and_peft_loads_it(encoder, tmp_path):
    """The right choice is the one with a z; two or three choices a question."""
    torch, transformers, peft = require("torch"), require("transformers"), require("peft")
    rng = np.random.default_rng(0)

    def row(i):
        choices = ["".join(rng.choice(list("abcdef"), 4)) for _ in range(2 + i % 2)]
        label = int(rng.integers(len(choices)))
        choices[label] = choices[label][:2] + "z" + choices[label][2:]
        return {"question": f"number {i}", "choices": choices, "label": label}

    write(tmp_path / "data", [row(i) for i in range(160)])
    write(tmp_path / "data", [row(i) for i in range(160, 200)], "validation.jsonl")
    words = f"lora --model {encoder} --data {tmp_path / 'data'} --out {tmp_path / 'run'} --targets q_proj up_proj"
    words += " --length 48 --batch-size 16 --finetune-steps 60 --finetune-lr 0.01 --quiet"
    assert run(words.split()) == 0
    result = read_json(tmp_path / "run/results/lora.json")
    assert result["accuracy"]["correct"] >= 36 and result["accuracy"]["total"] == 40  # by chance 17

    plain = transformers.AutoModelForMultipleChoice.from_pretrained(encoder).eval()
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "run/adapter").eval()
    tokens, right = pairs_tokenizer(), []
    for each in map(json.loads, (tmp_path / "data/validation.jsonl").read_text().splitlines()):
        texts = [f"Question: {each['question']}\nAnswer:"] * len(each["choices"])
        encoded = tokens(texts, each["choices"], padding=True, return_tensors="pt", return_token_type_ids=True)
        with torch.no_grad():
            scores = theirs(**{name: value[None] for name, value in encoded.items()}).logits
        right.append(int(scores.argmax() == each["label"]))
    assert right == result["right"]
