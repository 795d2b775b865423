"""Tasks: rows and their sources, prompts, disjoint splits, encoding, answer losses, scoring."""

import functools
import json
import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from methods import tasks
from methods.tasks import Pair, encode, evaluate
from methods.tasks.loss import (
    answer_log_likelihood,
    answer_log_likelihood_at,
    answer_loss,
    answer_loss_at,
    answer_width,
)

PIQA = tasks.get("piqa")


def question(goal, choices=("one", "two"), label=0):
    return {"goal": goal, "choices": list(choices), "label": label}


def tokenizer(merges=(), ends=False):
    """A byte-level tokenizer, one token a byte but for `merges`; with `ends`, <s> and </s> around every text."""
    vocab = {"<s>": 0, "</s>": 1}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]:
        vocab[symbol] = len(vocab)
    inner = Tokenizer(models.BPE(vocab, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if ends:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


# --- rows and prompts ---------------------------------------------------------------------------------------------


def test_prompts_are_those_of_the_harness():
    pairs = lambda name, **row: tasks.get(name).pairs({"choices": ["x", "y"], "label": 1, **row})  # noqa: E731
    assert pairs("piqa", goal="Boil water") == (
        Pair("Question: Boil water\nAnswer:", " x"),
        Pair("Question: Boil water\nAnswer:", " y"),
    )
    assert pairs("hellaswag", context="Sailing: A man")[1] == ("Sailing: A man", " y")
    assert pairs("arc_easy", question="Why?")[0] == ("Question: Why?\nAnswer:", " x")
    assert pairs("arc_challenge", question="Why?")[0] == ("Question: Why?\nAnswer:", " x")
    assert pairs("openbookqa", question="The sun is")[0] == ("The sun is", " x")
    assert pairs("siqa", context="Bo ran.", question="Why?")[1] == ("Q: Bo ran. Why?\nA:", " y")
    for mark in ("", "?"):
        assert pairs("boolq", passage="P -- p.", question="is it so" + mark)[0] == (
            "P -- p.\nQuestion: is it so?\nAnswer:",
            " x",
        )
    assert pairs("winogrande", sentence="He fed _ a fish.") == (("He fed x", " a fish."), ("He fed y", " a fish."))
    assert tasks.training_pairs(PIQA, [question("Boil water", label=1)]) == [("Question: Boil water\nAnswer:", " two")]
    (pair,) = tasks.training_pairs(tasks.get("e2e_nlg"), [{"mr": "name[A]", "ref": "A is."}])
    assert pair == ("Meaning: name[A]\nText:", " A is.\n")  # behind which the model is to stop


def test_unknown_task_lists_the_known():
    with pytest.raises(ValueError, match=r"Unknown task 'pica': known are aqua, arc_challenge, .*, piqa, "):
        tasks.get("pica")


def test_importing_tasks_is_quick():
    slow = "{'jax', 'datasets', 'transformers', 'torch'}"
    code = f"import sys, methods.tasks; sys.exit(str({slow} & set(sys.modules)) if {slow} & set(sys.modules) else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "train", "test"), [("piqa", 16113, 1838), ("arc_easy", 2251, 2376), ("openbookqa", 4957, 500)]
)
def test_published_rows(data_dir, name, train, test):
    task = tasks.get(name)
    rows = tasks.load(task, "train", data_dir)
    assert len(rows) == train and len(tasks.load(task, task.test, data_dir)) == test
    assert all(pair.prompt and pair.answer.startswith(" ") for row in rows for pair in task.pairs(row))


def write(folder, rows, name="train.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))


def test_sources_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "given" / "piqa", [question("given")])
    write(tmp_path / "named" / "piqa", [question("named 0")], "train-00-of-02.jsonl")
    write(tmp_path / "named" / "piqa", [question("named 1")], "train-01-of-02.jsonl")
    write(tmp_path / "assets" / "data" / "piqa", [question("assets")])
    goals = lambda data=None: [row["goal"] for row in tasks.load(PIQA, "train", data)]  # noqa: E731
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path / "named"))
    assert goals(tmp_path / "given") == ["given"]
    assert goals() == ["named 0", "named 1"]
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path / "nowhere"))
    assert goals() == ["assets"]


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"There is no .*/piqa/train\.jsonl: is --data right\?"):
        tasks.load(PIQA, "train", tmp_path)
    write(tmp_path / "piqa", [question("only")], "train-01-of-02.jsonl")
    with pytest.raises(FileNotFoundError, match=r"piqa has 1 train shards, unlike train-01-of-02\.jsonl says\."):
        tasks.load(PIQA, "train", tmp_path)


def test_no_source_at_all(tmp_path, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    expected = (
        r"No train rows of piqa found after trying BILEVEL_DATA \(not set\), assets/data \(no piqa/train\.jsonl in "
        r"it\), the hub's baber/piqa \(ConnectionError\): name a folder that holds "
        r"piqa/train\.jsonl with --data or BILEVEL_DATA\."
    )
    with pytest.raises(FileNotFoundError, match=expected):
        tasks.load(PIQA, "train")


HUB = {
    "piqa": {"goal": "G", "sol1": "a", "sol2": "b", "label": 1},
    "hellaswag": {
        "activity_label": "Sailing",
        "ctx_a": "A man [step] sails.",
        "ctx_b": "he",
        "endings": ["a", "b [title] c [step] d"],
        "label": "1",
    },
    "winogrande": {"sentence": "He fed _ a fish.", "option1": "a", "option2": "b", "answer": "2"},
    "arc_easy": {"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
    "openbookqa": {"question_stem": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "siqa": {"context": "C", "question": "Q", "answerA": "x", "answerB": "b", "answerC": "y", "label": "2"},
    "boolq": {"passage": "P", "question": "q", "label": 0},
}


@pytest.mark.parametrize("name", HUB)
def test_hub_records_become_rows(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    fake = types.SimpleNamespace(load_dataset=lambda path, config, split: [HUB[name]])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (row,) = tasks.load(tasks.get(name), "train")
    answers = {"boolq": "no", "hellaswag": "b. c d"}
    assert row["choices"][row["label"]].strip() == answers.get(name, "b")
    if name == "hellaswag":
        assert row["context"] == "Sailing: A man sails. He"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("piqa", b'{"goal": "x", "choi', r"piqa/train\.jsonl line 2 is not a JSON row"),
        ("piqa", b"\xff\xfe", r"train\.jsonl line 2 is not a JSON row"),
        ("piqa", b"", r"train\.jsonl line 2 is not a JSON row"),
        ("piqa", [1, 2], r"train\.jsonl line 2 is not a JSON object but list\."),
        ("piqa", {"choices": ["a", "b"], "label": 0}, r"line 2 has no text 'goal', which piqa needs\."),
        ("piqa", question("x", ["a"]), r"line 2 has no 'choices', a list of at least two texts\."),
        ("piqa", question("x", ["a", ""]), r"line 2 has no 'choices', a list of at least two texts\."),
        ("piqa", question("x", label=2), r"line 2 has label 2, which is out of range: 0 to 1\."),
        ("piqa", question("x", label=-1), r"line 2 has label -1, which is out of range: 0 to 1\."),
        ("piqa", question("x", label="0"), r"line 2 has label '0', which is out of range: 0 to 1\."),
        (
            "winogrande",
            {"sentence": "No blank.", "choices": ["a", "b"], "label": 0},
            r"line 2: the sentence has no blank '_' with text after it\.",
        ),
    ],
)
def test_a_corrupt_row_is_named_with_file_and_line(tmp_path, name, row, message):
    good = {"sentence": "He _ so.", "choices": ["a", "b"], "label": 0} if name == "winogrande" else question("ok")
    write(tmp_path / name, [good, row])
    with pytest.raises(ValueError, match=message) as caught:
        tasks.load(tasks.get(name), "train", tmp_path)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_an_error(tmp_path):
    write(tmp_path / "piqa", [])
    with pytest.raises(ValueError, match=r"piqa/train\.jsonl is empty: piqa needs at least one row\."):
        tasks.load(PIQA, "train", tmp_path)


# --- splits -------------------------------------------------------------------------------------------------------


def published():
    """40 training rows on 20 subjects, two of which, in other letters and spaces, are tested on."""
    train = [question(f"Goal {i % 20}", (f"a{i}", f"b{i}")) for i in range(40)]
    test = [question("goal  3"), question(" GOAL 7")] + [question(f"test {i}") for i in range(6)]
    return train, test


def test_splits_are_disjoint_and_exact():
    train, test = published()
    splits = tasks.split(PIQA, train, test, outer=7, train=20)
    assert (len(splits.train), len(splits.outer), len(splits.test), splits.dropped) == (20, 7, 8, 4)
    subjects = [{row["goal"].casefold().strip() for row in rows} for rows in splits[:3]]
    assert not (subjects[0] & subjects[1]) and splits.test == test
    assert not {"goal 3", "goal 7"} & (subjects[0] | subjects[1])
    assert len(tasks.split(PIQA, train, test, outer=7).train) == 36 - 8  # 7 rows are of 4 subjects
    again = tasks.split(PIQA, train, test, outer=7, train=20)
    other = tasks.split(PIQA, train, test, outer=7, train=20, test=3, seed=1)
    assert again == splits and other.outer != splits.outer
    assert other.test == tasks.split(PIQA, train, test, outer=1, test=3, seed=2).test and len(other.test) == 3


def test_splits_of_published_piqa(data_dir):
    splits = tasks.load_splits(PIQA, outer=500, train=2000, data=data_dir)
    assert [len(rows) for rows in splits[:3]] == [2000, 500, 1838]
    assert splits.dropped == 579  # the published training set has that many rows on goals of the validation set
    texts = [{json.dumps([row["goal"], row["choices"]]) for row in rows} for rows in splits[:3]]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


WRITTEN_OR_CHOSEN = [name for name, task in tasks.TASKS.items() if not isinstance(task, tasks.Classification)]
NO_TRAINING_ROWS = {"svamp", "aqua", "race_high"}  # in the folder of the tests


@pytest.mark.parametrize("name", sorted({*WRITTEN_OR_CHOSEN} - NO_TRAINING_ROWS))
def test_no_prompt_is_in_two_splits(data_dir, name):
    task = tasks.get(name)
    splits = tasks.load_splits(task, outer=300, data=data_dir)

    def prompts(rows):
        pairs = task.pairs if isinstance(task, tasks.MultipleChoice) else lambda row: (task.pair(row),)
        return {" ".join(pair.prompt.casefold().split()) for row in rows for pair in pairs(row)}

    train, outer, test = (prompts(rows) for rows in splits[:3])
    assert min(map(len, (train, outer, test))) > 30
    assert not train & outer and not train & test and not outer & test


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"outer": 0}, r"piqa cannot give outer=0 rows: it must be between 1 and 40\."),
        ({"outer": 5, "train": 41}, r"piqa cannot give train=41 rows: it must be between 1 and 40\."),
        ({"outer": 5, "test": 9}, r"piqa cannot give test=9 rows: it must be between 1 and 8\."),
        ({"outer": 7, "train": 30}, r"piqa cannot give 7 outer and 30 training rows: 36 are left without those on"),
        ({"outer": 36}, r"piqa cannot give 36 outer and any training rows: 36 are left without those on"),
    ],
)
def test_sizes_beyond_the_data(sizes, message):
    with pytest.raises(ValueError, match=message):
        tasks.split(PIQA, *published(), **sizes)


def test_a_leak_is_found():
    splits = tasks.split(PIQA, *published(), outer=7)
    leaky = splits._replace(outer=[*splits.outer, question("GOAL 3 ")])
    with pytest.raises(ValueError, match=r"piqa leaks: outer and test share the subject 'goal 3'\."):
        tasks.check_disjoint(PIQA, leaky)


# --- encoding -----------------------------------------------------------------------------------------------------


def test_answer_mask_is_where_answer_tokens_are_predicted():
    tok = tokenizer()
    batch, cut = encode([Pair("ab:", " xyz"), Pair("a:", " q")], tok, 8)
    assert cut == 0 and batch.tokens.dtype == np.int32
    assert tok.decode(batch.tokens[0][:7]) == "ab: xyz" and batch.mask.sum(1).tolist() == [7, 4]
    assert np.flatnonzero(batch.answer_mask[0]).tolist() == [2, 3, 4, 5]
    predicted = batch.tokens[0][1:][batch.answer_mask[0][:-1]]
    assert tok.decode(predicted) == " xyz"
    assert np.flatnonzero(batch.answer_mask[1]).tolist() == [1, 2]
    assert not batch.answer_mask[:, -1].any()


def test_special_tokens_stay_in_front_and_not_behind():
    batch, _ = encode([Pair("ab:", " x")], tokenizer(ends=True), 8)
    assert batch.tokens[0].tolist()[:1] == [0] and 1 not in batch.tokens[0][batch.mask[0]]
    assert batch.mask.sum() == 6 and np.flatnonzero(batch.answer_mask[0]).tolist() == [3, 4]
    lone, _ = encode([Pair("", "x")], tokenizer(ends=True), 4)  # predicted from <s> alone
    assert np.flatnonzero(lone.answer_mask[0]).tolist() == [0]


def test_a_token_across_the_border_belongs_to_the_answer():
    tok = tokenizer(merges=[(":", "Ġ")])
    batch, _ = encode([Pair("ab:", " x")], tok, 8)
    assert batch.mask.sum() == 4 and np.flatnonzero(batch.answer_mask[0]).tolist() == [1, 2]


@pytest.mark.parametrize("ends", [False, True])
def test_truncation_takes_from_the_left_of_the_prompt(ends):
    tok = tokenizer(ends=ends)
    batch, cut = encode([Pair("abcdefgh:", " xyz"), Pair("a:", " q")], tok, 8)
    assert cut == 1 and batch.mask[0].all()
    assert tok.decode(batch.tokens[0], skip_special_tokens=True) == ("gh: xyz" if ends else "fgh: xyz")
    assert (batch.tokens[0][0] == 0) == ends
    assert np.flatnonzero(batch.answer_mask[0]).tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], r"There is nothing to encode: the list of prompts and answers is empty\."),
        ([Pair("abc", "")], r"The answer '' to 'abc' has no token to score\."),
        ([Pair("", " x")], r"The answer ' x' has no prompt to be predicted from\."),
        ([Pair("abc", " 3456789")], r"An answer of 8 tokens does not fit into 8: raise the length\."),
    ],
)
def test_encoding_errors_are_one_sentence(pairs, message):
    with pytest.raises(ValueError, match=message):
        encode(pairs, tokenizer(), 8)


# --- losses -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored():
    """A batch, hidden states and a head."""
    batch, _ = encode([Pair("ab:", " xyz"), Pair("a:", " q"), Pair("abcdefgh:", " wv")], tokenizer(), 8)
    keys = jax.random.split(jax.random.key(0))
    kernel = jax.random.normal(keys[1], (6, 300), jnp.float64)
    return batch, jax.random.normal(keys[0], (3, 8, 6), jnp.float64), lambda hidden: hidden @ kernel


def by_hand(logits, batch):
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, length = batch.tokens.shape
    return np.array(
        [
            sum(log_p[n, t, batch.tokens[n, t + 1]] for t in range(length) if batch.answer_mask[n, t])
            for n in range(rows)
        ]
    )


def test_answer_loss_is_the_mean_over_answer_tokens(scored):
    batch, hidden, head = scored
    expected = by_hand(head(hidden), batch)
    np.testing.assert_allclose(answer_log_likelihood(head(hidden), batch), expected, rtol=1e-13)
    np.testing.assert_allclose(answer_loss(head(hidden), batch), -expected.sum() / batch.answer_mask.sum(), rtol=1e-13)
    assert answer_loss(head(hidden).astype(jnp.bfloat16), batch).dtype == jnp.float32


def test_loss_at_the_answers_is_the_same_and_so_are_its_derivatives(scored):
    batch, hidden, head = scored
    width = answer_width(batch)
    assert width == 4
    full = lambda hidden: answer_loss(head(hidden), batch)  # noqa: E731

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(loss, hidden):
        return jax.value_and_grad(loss)(hidden), jax.jvp(jax.grad(loss), (hidden,), (jnp.cos(hidden),))[1]

    for wide in (width, 7):
        kept = lambda hidden, wide=wide: answer_loss_at(head, hidden, batch, wide)  # noqa: E731
        for ours, theirs in zip(
            jax.tree.leaves(derivatives(kept, hidden)), jax.tree.leaves(derivatives(full, hidden)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-14)
    at = answer_log_likelihood_at(head, hidden, batch, width)
    np.testing.assert_allclose(at, answer_log_likelihood(head(hidden), batch), rtol=1e-13)


def test_a_width_that_cuts_an_answer_gives_nan_and_never_a_part(scored):
    batch, hidden, head = scored
    assert jnp.isnan(answer_log_likelihood_at(head, hidden, batch, 3)).tolist() == [True, False, False]
    assert jnp.isnan(answer_loss_at(head, hidden, batch, 3))


# --- scoring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3.
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_values(correct, total, low, high):
    np.testing.assert_allclose(tasks.wilson(correct, total), (low, high), atol=5e-5)
    np.testing.assert_allclose(tasks.wilson(total - correct, total), (1 - high, 1 - low), atol=5e-5)


def test_wilson_of_nothing():
    assert tasks.wilson(7, 7)[1] == 1.0 and tasks.wilson(0, 7)[0] == 0.0
    with pytest.raises(ValueError, match=r"3 correct of 2 is not a share of anything\."):
        tasks.wilson(3, 2)


def fake_score(tok, score, shapes=None):
    """A score_fn that reads the answers back from the arrays, as a model would have to predict them."""

    def score_fn(tokens, mask, answer_mask):
        if shapes is not None:
            shapes.append(tokens.shape)
        following = np.roll(tokens, -1, axis=1)
        assert (answer_mask <= mask).all()
        return np.array([score(tok.decode(t[m])) for t, m in zip(following, answer_mask, strict=True)])

    return score_fn


def test_scoring_finds_the_right_choice_and_pads_to_few_shapes():
    tok, shapes = tokenizer(), []
    rng = np.random.default_rng(0)
    rows = []
    for i in range(37):
        choices = [f"{'right' if c == i % 3 else 'wrong'} {'z' * int(rng.integers(1, 60))}" for c in range(3)]
        rows.append(question(f"q{i} " + "y" * int(rng.integers(1, 70)), choices, i % 3))
    score = lambda answer: -float(len(answer)) * (1.0 if "right" in answer else 2.0)  # noqa: E731
    result = evaluate(fake_score(tok, score, shapes), PIQA, rows, tok, batch_size=8, max_length=128)
    assert result.accuracy[0] == result.per_token[0] == 1.0 and result.unnormalised.value < 1.0
    assert result.accuracy[3:] == (37, 37) and result.accuracy.low < 1.0 and result.accuracy.high == 1.0
    assert result.predictions.tolist() == [i % 3 for i in range(37)] and result.cut > 0
    for row, scores in zip(rows, result.log_likelihoods, strict=True):
        assert scores.tolist() == [score(" " + choice) for choice in row["choices"]]
    assert {rows for rows, _ in shapes} == {8} and {length for _, length in shapes} <= {32, 64, 96, 128}


def test_the_three_normalisations():
    tok = tokenizer(merges=[("a", "b")])  # "abab" is four characters and two tokens
    rows = [question("q", ("abab", "xyz"), 0)]
    # Answer tokens: a space and 2, a space and 3. Characters without the space: 4 and 3.
    score = lambda answer: {" abab": -3.1, " xyz": -3.0}[answer]  # noqa: E731
    result = evaluate(fake_score(tok, score), PIQA, rows, tok, batch_size=2)
    assert result.unnormalised.correct == 0  # -3.1 < -3.0
    assert result.per_token.correct == 0  # -3.1/3 < -3.0/4
    assert result.accuracy.correct == 1  # -3.1/4 > -3.0/3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, r"A batch of 5 is not within 1 and the 4 choices there are to score\."),
        ({"batch_size": 0}, r"A batch of 0 is not within 1 and the 4 choices there are to score\."),
        ({"max_length": 0}, r"max_length=0 and multiple=32 must be at least 1\."),
        ({"score": lambda *arrays: 0.0}, r"score_fn returned shape \(\) for 2 sequences: one score each\."),
        ({"score": lambda t, *_: np.full(len(t), math.nan)}, r"The log-likelihood of choice ' one' is nan\."),
        ({"choices": ["one", "z" * 70]}, r"An answer of 71 tokens does not fit into 32: raise the length\."),
    ],
)
def test_scoring_errors_are_one_sentence(changes, message):
    settings = {"batch_size": 2, "max_length": 32} | changes
    score = settings.pop("score", lambda tokens, mask, answer_mask: np.zeros(len(tokens)))
    rows = [question("a"), question("b", settings.pop("choices", ("one", "two")))]
    with pytest.raises(ValueError, match=message):
        evaluate(score, PIQA, rows, tokenizer(), **settings)
