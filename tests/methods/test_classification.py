"""Classification tasks: GLUE's rows and metrics, labelled arrays, batches by length."""

import datasets
import numpy as np
import pytest

from methods import tasks
from methods.tasks import METRICS, Buckets, encode_labelled, evaluate_labelled
from methods.tasks.batches import by_length
from tests.methods.texts import tokenizer, write

RTE, STSB = tasks.get("rte"), tasks.get("stsb")
GLUE = [task for task in tasks.TASKS.values() if isinstance(task, tasks.Classification)]


def entailment(first, second="b", label=0):
    return {"sentence1": first, "sentence2": second, "label": label}


@pytest.mark.parametrize(
    ("name", "train", "test", "dropped"),
    [
        ("cola", 8551, 1043, 16),
        ("sst2", 67349, 872, 0),
        ("mrpc", 3668, 408, 0),
        ("stsb", 5749, 1500, 152),
        ("qnli", 4463, 1000, 641),  # the copy's training rows are of the published validation set
        ("rte", 2490, 277, 30),
    ],
)
def test_published_rows_and_splits_that_do_not_meet(data_dir, name, train, test, dropped):
    task = tasks.get(name)
    rows = tasks.load(task, "train", data_dir), tasks.load(task, task.test, data_dir)
    assert [len(r) for r in rows] == [train, test]
    splits = tasks.split(task, *rows, outer=300, train=2000)
    assert ([len(r) for r in splits[:3]], splits.dropped) == ([2000, 300, test], dropped)
    texts = [{tuple(row[field].strip() for field in task.fields) for row in part} for part in splits[:3]]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    if task.classes:
        assert {row["label"] for row in splits.outer} == set(range(len(task.classes)))


def test_race_has_a_row_for_each_question(data_dir):
    task = tasks.get("race_middle")
    rows = tasks.load(task, "test", data_dir)
    assert len(rows) == 1436 and len({row["article"] for row in rows}) == 362
    assert task.pairs(rows[0])[1].answer == " Canada."
    assert task.pairs(rows[0])[0].prompt.endswith(
        '\n\nQuestion: In which country is the prom called a "formal"?\nAnswer:'
    )
    splits = tasks.split(task, rows[:700], rows[-50:], outer=40)
    assert not {row["article"] for row in splits.train} & {row["article"] for row in splits.outer}


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("rte", {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}),
        ("cola", {"sentence": "a", "label": 1, "idx": 0}),
        ("qnli", {"question": "a", "sentence": "b", "label": 1, "idx": 0}),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": 1.0, "idx": 0}),
        ("race_high", {"article": "a", "question": "b", "options": ["x", "y", "z", "w"], "answer": "B"}),
    ],
)
def test_hub_records_become_rows(tmp_path, monkeypatch, name, record):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, split: datasets.Dataset.from_list([record]))
    (row,) = tasks.load(tasks.get(name), "train")
    assert row["label"] == 1


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("rte", entailment("a", label=2), r"glue_rte/train\.jsonl line 2 has label 2, which is out of range: 0 to 1\."),
        ("rte", entailment("a", label=-1), r"line 2 has label -1, which is out of range: 0 to 1\."),
        ("rte", entailment("a", label=True), r"line 2 has label True, which is out of range: 0 to 1\."),
        ("rte", {"sentence1": "a", "label": 0}, r"line 2 has no text 'sentence2', which rte needs\."),
        ("stsb", entailment("a", label=5.5), r"line 2 has label 5\.5, which is out of range: 0 to 5\."),
        ("stsb", entailment("a", label=float("nan")), r"line 2 has label nan, which is out of range: 0 to 5\."),
    ],
)
def test_a_label_out_of_range_is_named_with_file_and_line(tmp_path, name, row, message):
    write(tmp_path / f"glue_{name}", [entailment("ok"), row])
    with pytest.raises(ValueError, match=message) as caught:
        tasks.load(tasks.get(name), "train", tmp_path)
    assert "\n" not in str(caught.value)


# --- metrics ------------------------------------------------------------------------------------------------------


def test_metrics_against_their_other_definitions():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    predictions[:120] = labels[:120]
    assert METRICS["accuracy"](predictions, labels) == (predictions == labels).sum() / 200
    precision, recall = labels[predictions == 1].mean(), predictions[labels == 1].mean()
    np.testing.assert_allclose(METRICS["f1"](predictions, labels), 2 / (1 / precision + 1 / recall))
    np.testing.assert_allclose(METRICS["matthews"](predictions, labels), np.corrcoef(predictions, labels)[0, 1])
    x, y = rng.normal(size=(2, 100))
    np.testing.assert_allclose(METRICS["pearson"](x, x + y), np.corrcoef(x, x + y)[0, 1])
    ranks = [np.argsort(np.argsort(v)) for v in (x, x + y)]
    np.testing.assert_allclose(METRICS["spearman"](x, x + y), np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_a_perfect_and_of_a_constant_answer(name):
    labels = np.array([0, 1, 1, 0, 1])
    np.testing.assert_allclose(METRICS[name](labels, labels), 1.0)
    assert METRICS[name](np.zeros(5), labels) == (0.4 if name == "accuracy" else 0.0)


# --- arrays -------------------------------------------------------------------------------------------------------


def test_labelled_arrays():
    rows = [entailment("abc", "de", 1), entailment("abcdefgh", "ij", 0)]
    batch = encode_labelled(RTE, rows, tokenizer(), 8)
    assert batch.tokens.shape == (2, 8) and batch.labels.tolist() == [1, 0] and batch.labels.dtype == np.int32
    assert batch.mask.sum(1).tolist() == [5, 8]  # ten letters lose two of the longer text
    assert tokenizer().decode(batch.tokens[1]) == "abcdefij"
    assert tasks.fits(RTE, rows, tokenizer(), 8) == [True, False]
    assert encode_labelled(STSB, [entailment("a", label=2.5)], tokenizer(), 8).labels.dtype == np.float32


def test_segments_of_a_pair(minilm_dir):
    from transformers import AutoTokenizer

    batch = encode_labelled(RTE, [entailment("one two", "three")], AutoTokenizer.from_pretrained(minilm_dir), 8)
    assert batch.types[0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0] and batch.mask[0].tolist() == [True] * 6 + [False] * 2


@pytest.mark.parametrize(
    ("rows", "length", "message"),
    [
        ([], 8, r"There is nothing to encode: the list of rows is empty\."),
        ([entailment("a")], 0, r"A length of 0 tokens leaves no room for text beside 0 special tokens\."),
    ],
)
def test_encoding_errors_are_one_sentence(rows, length, message):
    with pytest.raises(ValueError, match=message):
        encode_labelled(RTE, rows, tokenizer(), length)


def some_rows(count):
    rng = np.random.default_rng(0)
    return [entailment("x" * int(rng.integers(1, 90)), "y" * (i % 7 + 1), i % 2) for i in range(count)]


def test_evaluation_answers_every_row_once_in_few_shapes():
    rows, shapes = some_rows(37), []

    def answer(batch):
        shapes.append(batch.tokens.shape)
        return np.stack([1.0 - batch.labels, 1.5 * batch.labels], axis=1)

    result = evaluate_labelled(answer, RTE, rows, tokenizer(), batch_size=8, max_length=96)
    assert result.metrics == {"accuracy": 1.0} and result.predictions.tolist() == [i % 2 for i in range(37)]
    assert set(shapes) == {(8, 32), (8, 64), (8, 96)}
    scores = evaluate_labelled(lambda b: b.mask.sum(1, keepdims=True), STSB, rows, tokenizer(), batch_size=8)
    assert list(scores.metrics) == ["pearson", "spearman"]
    assert scores.predictions.tolist() == [len(row["sentence1"] + row["sentence2"]) for row in rows]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda b: np.zeros((8, 3)),
            r"The model answers rte with shape \(8, 3\), not \(8, 2\): its head is of another",
        ),
        (lambda b: np.full((8, 2), np.nan), r"The model's answer to rte row 0 is \[nan, nan\]\."),
    ],
)
def test_evaluation_errors_are_one_sentence(answer, message):
    with pytest.raises(ValueError, match=message):
        evaluate_labelled(answer, RTE, some_rows(9), tokenizer(), batch_size=8)


# --- batches ------------------------------------------------------------------------------------------------------


def test_buckets_give_every_row_once_an_epoch_and_resume_exactly():
    batch = encode_labelled(RTE, some_rows(403), tokenizer(), 96)
    stream = Buckets(batch, 4, seed=1)
    epoch = [stream.rows(number) for number in range(100)]
    assert len(np.unique(np.concatenate(epoch))) == 400
    assert not np.array_equal(stream.rows(0), stream.rows(100))
    assert not np.array_equal(stream.rows(0), Buckets(batch, 4, seed=2).rows(0))
    first = [next(stream) for _ in range(5)]
    position = stream.get_state()
    following = [next(stream) for _ in range(120)]
    again = Buckets(batch, 4, seed=1)
    again.set_state(position)
    for ours, theirs in zip([next(again) for _ in range(120)], following, strict=True):
        for left, right in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(left, right)
    assert {b.tokens.shape[1] for b in first + following} <= {32, 64, 96}
    # Alike: most of what is computed is text.
    padded = sum(b.mask.size for b in following)
    assert sum(b.mask.sum() for b in following) > 0.7 * padded
    assert all(b.mask.sum() == batch.mask[rows].sum() for b, rows in zip(first, epoch, strict=False))


def test_buckets_of_no_size():
    batch = encode_labelled(RTE, some_rows(3), tokenizer(), 96)
    for size in (0, 4):
        with pytest.raises(ValueError, match=rf"Buckets of {size} rows: a batch must have between 1 and the 3 rows\."):
            Buckets(batch, size)


def test_batches_by_length_hold_every_row_once():
    lengths = [3, 40, 33, 64, 65, 200]
    batches = by_length(lengths, 2, 32, 70)
    assert [(rows.tolist(), length) for rows, length in batches] == [([4, 5], 70), ([1, 2], 64), ([3], 64), ([0], 32)]
