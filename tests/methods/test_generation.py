"""Tasks that a model writes answers to: rows, what is read out of a text, metrics."""

import dataclasses
import math
import sys

import numpy as np
import pytest

from methods import tasks
from methods.models import Decoder, DecoderConfig, HFNames, Pretrained, identity
from methods.objective import write as write_texts
from methods.tasks import evaluate_written, generation
from methods.tasks.arithmetic import letter, number
from tests.conftest import require
from tests.methods import helpers
from tests.methods.texts import tokenizer, write

MATHS = ("gsm8k", "svamp", "mawps", "aqua")


@pytest.mark.parametrize(
    ("name", "split", "count"),
    [
        ("gsm8k", "train", 7473),
        ("gsm8k", "test", 1319),
        ("svamp", "test", 1000),
        ("mawps", "train", 1898),
        ("mawps", "test", 238),
        ("aqua", "test", 254),
    ],
)
def test_the_answer_that_is_trained_on_is_the_answer_that_is_read(data_dir, name, split, count):
    task = tasks.get(name)
    rows = tasks.load(task, split, data_dir)
    assert len(rows) == count
    for row in rows:
        pair = task.pair(row)
        assert pair.prompt.endswith("\nAnswer:") and "<<" not in pair.answer
        assert generation.same(task.extract(pair.answer, row), [task.target(row)]), row


def test_what_is_read_out_of_a_text():
    assert number("9 eggs.\n#### 1,234 and 5") == 1234
    assert number("The answer is: $5.50, not 3.") == 5.5
    assert number("first 3, then -12.") == -12
    assert number("no number") is None
    row = {"choices": list("vwxyz")}
    assert letter(" a < b.\nThe answer is (C).", row) == 2
    assert letter(" It is (D), not A", row) == 3
    assert letter("B", row) == 1
    assert letter("neither of them", row) is None
    assert letter("F", row) is None


def test_numbers_are_right_up_to_one_in_ten_thousand():
    assert generation.same(0.33333, [1 / 3]) and not generation.same(0.333, [1 / 3])
    assert not generation.same(None, [0.0]) and generation.same(2, [1, 2])


def test_labels_out_of_range_are_named_with_file_and_line(tmp_path):
    row = {"question": "q", "rationale": "r", "choices": ["1", "2"], "label": 2}
    write(tmp_path / "aqua_rat", [{**row, "label": 1}, row], "test.jsonl")
    with pytest.raises(ValueError, match=r"test\.jsonl line 2 has label 2, which is out of range: 0 to 1\."):
        tasks.load(tasks.get("aqua"), "test", tmp_path)
    write(tmp_path / "gsm8k", [{"question": "q", "answer": "#### x", "final": "x"}], "test.jsonl")
    with pytest.raises(ValueError, match=r"line 1 is no row of gsm8k \(ValueError: the answer 'x' is no number"):
        tasks.load(tasks.get("gsm8k"), "test", tmp_path)


def test_a_task_without_a_copy_on_the_hub_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"No train rows of mawps found after .*: name a folder that holds mawps/"
    ):
        tasks.load(tasks.get("mawps"), "train")


def test_every_prompt_is_written_to_once_and_cut_where_the_answer_ends(data_dir):
    task = tasks.get("svamp")
    rows = tasks.load(task, "test", data_dir)[:20]
    asked = []

    def write(prompts):
        asked.extend(prompts)
        return [f" {task.target(row) + (i % 4 == 0):g}\n\nQuestion: 99" for i, row in enumerate(rows)]

    written = evaluate_written(write, task, rows)
    assert asked == [task.pair(row).prompt for row in rows]
    assert written.metrics == {"exact": 0.75} and written.right.sum() == 15
    with pytest.raises(ValueError, match=r"1 texts were written to the 20 prompts of svamp\."):
        evaluate_written(lambda prompts: ["x"], task, rows)


# --- texts against references -------------------------------------------------------------------------------------

REFERENCES = [["the cat sat on the mat", "a cat was on the mat"], ["dogs bark at night", "the dog barks"]]


def test_references_of_one_meaning_belong_together(data_dir):
    task = tasks.get("e2e_nlg")
    rows = tasks.load(task, "test", data_dir)
    meanings = {row["mr"] for row in rows}
    assert (len(rows), len(meanings)) == (4693, 630)
    few = [row for row in rows if row["mr"] in sorted(meanings)[:3]]
    known = dataclasses.replace(task, metrics=("cider",))
    written = evaluate_written(lambda prompts: [" one\ntwo"] * len(prompts), known, few)
    assert written.texts == ["one"] * 3 and written.right is None
    assert sorted(text for group in written.targets for text in group) == sorted(row["ref"] for row in few)


def test_a_human_text_is_as_good_on_a_sample_as_on_the_whole(data_dir):
    require("sacrebleu")
    task = tasks.get("e2e_nlg")
    rows = tasks.load(task, "test", data_dir)

    def human(rows):
        groups = [group for group in tasks.units(task, rows) if len(group) > 1]
        return generation.bleu([g[0]["ref"] for g in groups], [[row["ref"] for row in g[1:]] for g in groups])

    sample = tasks.split(task, tasks.load(task, "validation", data_dir), rows, outer=1, test=100).test
    assert len(sample) > 500 and len(tasks.units(task, sample)) == 100
    assert abs(human(sample) - human(rows)) < 0.03  # as rows, of which most prompts keep one, it was half of it


def test_a_metric_that_is_no_number_is_refused_by_name(monkeypatch):
    task = tasks.get("svamp")
    monkeypatch.setitem(generation.METRICS, "exact", lambda predictions, targets: float("nan"))
    with pytest.raises(ValueError, match=r"The metric exact of svamp is nan: the predictions or the labels are not"):
        evaluate_written(lambda prompts: ["1"], task, [{"question": "q", "answer": 1}])


# --- writing ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer():
    """A drawn decoder of 32 positions over the bytes."""
    config = DecoderConfig(
        vocab_size=300,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_positions=32,
    )
    model = Decoder(config)
    return lambda tok: Pretrained("drawn", model, config, helpers.draw(model), tok, HFNames("drawn", {}))


def test_a_prompt_without_room_behind_it_loses_its_left_end_and_is_counted(writer):
    for ends in (False, True):
        tok = tokenizer(ends=ends)
        model, left = writer(tok), 24 - ends
        text = "".join(chr(97 + i % 26) for i in range(40))
        texts, cut = write_texts(model, identity, [text, text[:left], text[-left:]], tokens=8)
        assert cut == 1 and texts[0] == texts[2] and texts[1] != texts[0]
    with pytest.raises(ValueError, match=r"An answer may have 31 tokens, which leaves no room for a prompt in the 32"):
        write_texts(model, identity, ["a"], tokens=31)


def test_an_empty_prompt_begins_with_the_first_token_mark(writer):
    model = writer(tokenizer())
    texts, cut = write_texts(model, identity, ["", "<s>", "b"], tokens=4)
    assert texts[0] == texts[1] and cut == 0


def test_cider_of_a_reference_itself_is_ten_and_of_strangers_nothing():
    single = [[group[0]] for group in REFERENCES]
    own = [group[0] for group in single]
    np.testing.assert_allclose(generation.cider(own, single), 10.0)
    assert generation.cider(["fish swim", "birds fly"], single) == 0.0
    # By hand: one word in common, seen in one of two sets; p = "cat", r = "a cat" with gap 1.
    value = generation.cider(["cat", "zebra"], [["a cat"], ["a dog"]])
    similarity = 1.0  # of one word: "a" is in every set and weighs 0
    expected = 10 * math.exp(-1 / 72) * similarity / 4 / 2
    np.testing.assert_allclose(value, expected)


def test_metrics_by_their_packages():
    require("sacrebleu"), require("nltk"), require("rouge_score")
    own = [group[0] for group in REFERENCES]
    for name in ("bleu", "rouge_l"):
        np.testing.assert_allclose(generation.METRICS[name](own, REFERENCES), 1.0)
        assert generation.METRICS[name](["x y z w", "u v w q"], REFERENCES) < 0.05
    np.testing.assert_allclose(generation.rouge_l(["the cat ran", "dogs"], REFERENCES), (4 / 9 + 0.4) / 2)
    assert generation.nist(own, REFERENCES) > generation.nist(["the cat", "the dog"], REFERENCES)


def write_wordnet(folder):
    """A WordNet, in the format of its database, that knows one thing: an auto is a car."""
    folder.mkdir(parents=True)
    (folder / "lexnames").write_text("00\tnoun.artifact\t1\n")
    (folder / "index.sense").write_text("")
    head = "  1 WordNet 3.0 Copyright  \n"
    synset = f"{len(head):08d} 00 n 02 auto 0 car 0 000 | a motor vehicle  \n"
    senses = [f"{word} n 1 0 1 0 {len(head):08d}  \n" for word in ("auto", "car")]
    for kind in ("adj", "adv", "noun", "verb"):
        (folder / f"{kind}.exc").write_text("")
        (folder / f"index.{kind}").write_text(head + "".join(senses) * (kind == "noun"))
        (folder / f"data.{kind}").write_text(head + synset * (kind == "noun"))


def test_meteor_by_hand(tmp_path, monkeypatch):
    data = require("nltk.data")
    monkeypatch.setattr(data, "path", [str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"METEOR needs WordNet, once: run .*, or name a folder .* NLTK_DATA\."):
        generation.check_metrics(tasks.get("e2e_nlg"))
    write_wordnet(tmp_path / "corpora" / "wordnet")
    generation.check_metrics(tasks.get("e2e_nlg"))

    def value(matches, chunks, words, reference):
        precision, recall = matches / words, matches / reference
        mean = 10 * precision * recall / (recall + 9 * precision)
        return mean * (1 - 0.5 * (chunks / matches) ** 3)

    for text, reference, expected in (
        ("the cat sat", "the cat sat", value(3, 1, 3, 3)),
        ("a b", "a b c d", value(2, 1, 2, 4)),  # recall counts nine times
        ("sat cat the", "the cat sat", value(3, 3, 3, 3)),
        ("dogs barked", "dog barks", value(2, 1, 2, 2)),  # stems
        ("The auto stops", "the car stops", value(3, 1, 3, 3)),  # synonyms
        ("the lorry stops", "the car stops", value(2, 2, 3, 3)),
        ("fish", "bird", 0.0),
    ):
        np.testing.assert_allclose(generation.meteor([text], [[reference]]), expected, rtol=1e-12, err_msg=text)
    best, other = value(3, 1, 3, 3), value(2, 1, 2, 4)  # of the references the best, of the texts the mean
    texts, references = ["the cat sat", "a b"], [["fish", "the cat sat"], ["a b c d", "b"]]
    np.testing.assert_allclose(generation.meteor(texts, references), (best + other) / 2, rtol=1e-12)


@pytest.mark.parametrize(("name", "package"), [("bleu", "sacrebleu"), ("nist", "nltk"), ("rouge_l", "rouge_score")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name, package):
    for module in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    expected = rf"{package.replace('_', '-')} is not installed, which this metric is of: pip install 'bilevel\[nlg\]'\."
    with pytest.raises(ModuleNotFoundError, match=expected):
        generation.METRICS[name](["a"], [["a"]])
