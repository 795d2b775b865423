"""Tasks: rows and their sources, prompts, disjoint splits."""

import json
import subprocess
import sys

import datasets
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from methods import tasks
from methods.tasks import Pair
from methods.tasks.splits import check_held_out
from tests.methods.texts import PIQA, question, write

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
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = (
        r"No train rows of piqa found after trying BILEVEL_DATA \(not set\), assets/data \(no piqa/train\.jsonl in "
        r"it\), the hub's baber/piqa \(ConnectionError\): name a folder that holds "
        r"piqa/train\.jsonl with --data or BILEVEL_DATA\."
    )
    with pytest.raises(FileNotFoundError, match=expected):
        tasks.load(PIQA, "train")


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, monkeypatch):
    """`datasets` alone would try again for half a minute; what it has in its cache is loaded all the same."""
    asked = []

    def dataset_info(self, path, timeout):
        asked.append(path)
        raise ConnectionError("no route")

    def load_dataset(path, name, split):
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
        raise ConnectionError("not in the cache")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"the hub's baber/piqa \(ConnectionError\)"):
        tasks.load(PIQA, "train")
    assert asked == ["baber/piqa"]
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE  # as it was


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
    (tmp_path / "hub.json").write_text(json.dumps(HUB[name]))
    stored = datasets.Dataset.from_json(str(tmp_path / "hub.json"), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, split: stored)
    (row,) = tasks.load(tasks.get(name), "train")
    assert [row] == tasks.load(tasks.get(name), "train")
    assert len(list(tmp_path.rglob("cache-*.arrow"))) == 1  # mapped once, and read from there the second time
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
    (tmp_path / "piqa" / "train.jsonl").unlink()
    write(tmp_path / "piqa", [question("one")], "train-00-of-02.jsonl")
    write(tmp_path / "piqa", [], "train-01-of-02.jsonl")  # a shard, too
    with pytest.raises(ValueError, match=r"train-01-of-02\.jsonl is empty"):
        tasks.load(PIQA, "train", tmp_path)


ROWS = {
    "rte": {"sentence1": "a", "sentence2": "b", "label": 0},
    "stsb": {"sentence1": "a", "sentence2": "b", "label": 2.5},
    "gsm8k": {"question": "q", "answer": "4 + 1\n#### 5", "final": "5"},
    "svamp": {"question": "q", "answer": 3.0},
    "aqua": {"question": "q", "rationale": "r", "choices": ["1", "2"], "label": 1},
    "e2e_nlg": {"mr": "name[A]", "ref": "A is."},
    "race_middle": {"article": "a", "questions": ["q"], "options": [["x", "y"]], "labels": [0]},
}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"choices": ["a", "  "]}, r"has no 'choices', a list of at least two texts\."),
        ("piqa", {"choices": "ab"}, r"has no 'choices', a list of at least two texts\."),
        ("piqa", {"goal": "half \ud800"}, r"has a damaged character in 'goal' \(surrogates not allowed\)\."),
        ("piqa", {"label": True}, r"has label True, which is out of range: 0 to 1\."),
        ("rte", {"label": 1.0}, r"has label 1\.0, which is out of range: 0 to 1\."),
        ("rte", {"label": None}, r"has label None, which is out of range: 0 to 1\."),
        ("rte", {"sentence2": 3}, r"has no text 'sentence2', which rte needs\."),
        ("stsb", {"label": float("nan")}, r"has label nan, which is out of range: 0 to 5\."),
        ("stsb", {"label": 5.5}, r"has label 5\.5, which is out of range: 0 to 5\."),
        ("gsm8k", {"final": "6"}, r"the answer ends in 5\.0, but its final number is '6'\)\."),
        ("gsm8k", {"final": "nan"}, r"the answer 'nan' is no number\)\."),
        ("gsm8k", {"final": "1_000"}, r"the answer '1_000' is no number\)\."),
        ("gsm8k", {"answer": " "}, r"but its final number is '5'\)\."),
        ("svamp", {"answer": True}, r"the answer True is neither a number nor a text\)\."),
        ("svamp", {"answer": None}, r"the answer None is neither a number nor a text\)\."),
        ("svamp", {"answer": float("inf")}, r"has the answer inf, which is no finite number\."),
        ("svamp", {"answer": 10**400}, r"is no row of svamp \(OverflowError"),
        ("aqua", {"label": -1}, r"has label -1, which is out of range: 0 to 1\."),
        ("aqua", {"label": 2}, r"has label 2, which is out of range: 0 to 1\."),
        ("aqua", {"choices": [1, 2]}, r"has no 'choices', a list of at least two texts\."),
        ("aqua", {"choices": list("abcdefghi")}, r"9 choices are more than there are letters from A to H\)\."),
        ("e2e_nlg", {"ref": " "}, r"has an empty answer, which nothing can be trained on or compared with\."),
        ("race_middle", {"questions": []}, r"line 2 is no row of race_middle \(ValueError: zip\(\)"),
        ("race_middle", {"questions": [], "options": [], "labels": []}, r"line 2 holds no question: race_middle needs"),
        ("race_middle", {"questions": 5}, r"line 2 is no row of race_middle \(TypeError"),
        ("race_middle", {"labels": [2]}, r"line 2 has label 2, which is out of range: 0 to 1\."),
    ],
)
def test_a_damaged_field_is_named_with_file_and_line(tmp_path, name, change, message):
    task, good = tasks.get(name), ROWS.get(name, question("ok"))
    folder = tmp_path / (task.folder or name)
    write(folder, [good, good | change])
    with pytest.raises(ValueError, match=message) as caught:
        tasks.load(task, "train", tmp_path)
    assert "train.jsonl line 2" in str(caught.value) and "\n" not in str(caught.value)
    write(folder, [good])
    assert tasks.load(task, "train", tmp_path)


def test_brackets_without_end_are_no_row(tmp_path):
    write(tmp_path / "piqa", [b"[" * 100_000])
    with pytest.raises(ValueError, match=r"train\.jsonl line 1 is not a JSON row"):
        tasks.load(PIQA, "train", tmp_path)


def test_a_record_of_another_form_on_the_hub_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    stored = datasets.Dataset.from_list([{"goal": "G", "first": "a"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, split: stored)
    with pytest.raises(ValueError, match=r"train record of the hub's baber/piqa is no row of piqa \(KeyError: 'sol1'"):
        tasks.load(PIQA, "train")


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


def meanings(prefix, count, references):
    return [{"mr": f"{prefix}[{i}]", "ref": f"{i} is {j}."} for j in range(references) for i in range(count)]


def test_a_sample_is_drawn_of_prompts_with_all_their_references():
    task = tasks.get("e2e_nlg")
    train, test = meanings("train", 9, 4), meanings("test", 7, 3)
    splits = tasks.split(task, train, test, outer=2, train=10, test=3)
    for rows, count, references in ((splits.outer, 2, 4), (splits.test, 3, 3)):
        found = tasks.units(task, rows)
        assert [len(unit) for unit in found] == [references] * count
        assert all(len({row["mr"] for row in unit}) == 1 for unit in found)
        assert len({row["ref"] for row in rows}) == references * count
    assert len(splits.train) == 10
    assert len(tasks.split(task, train, test, outer=2).test) == len(test)
    with pytest.raises(ValueError, match=r"e2e_nlg cannot give test=8 prompts: it must be between 1 and 7\."):
        tasks.split(task, train, test, outer=2, test=8)
    with pytest.raises(ValueError, match=r"e2e_nlg cannot give 9 outer prompts and any training rows: 36 are left"):
        tasks.split(task, train, test, outer=9)


def test_rows_of_their_own_subjects_are_cut_as_they_always_were():
    """Runs are resumed on the rows that they began with."""
    train, test = [question(f"Goal {i}") for i in range(50)], [question(f"test {i}") for i in range(6)]
    for seed in range(20):
        shuffled = [train[i] for i in np.random.default_rng(seed).permutation(50)]
        for about in (False, True):
            splits = tasks.split(PIQA, train, test, outer=12, train=30, seed=seed, about=about)
            assert (splits.outer, splits.train, splits.unasked) == (shuffled[:12], shuffled[12:42], 8)


def sizes_drawn(rng):
    """How many rows each subject has: mostly a few, now and then one with most of them."""
    return [int(rng.choice([1, 1, 2, 3, 7, 40, 300], p=[0.3, 0.3, 0.1, 0.1, 0.1, 0.05, 0.05])) for _ in range(12)]


TEXTS = tasks.FORMATS["text"].task([])


def rows_drawn(kind, rng):
    sizes = [1] * 3 + sizes_drawn(rng)
    if kind == "pieces":
        of = lambda i, j: {"text": f"{i} {j}", "of": f"text {i}", "piece": j}  # noqa: E731
        rows = [of(i, j) if n > 1 else {"text": f"text {i}"} for i, n in enumerate(sizes) for j in range(n)]
        test = [{"text": "text 0"}, {"text": "test"}]
    elif kind == "prompts":
        rows = [{"mr": f"[{i}]", "ref": f"{j}"} for i, n in enumerate(sizes) for j in range(n)]
        test = [{"mr": "[0]", "ref": "a"}, {"mr": "test", "ref": "b"}]
    else:
        rows = [question(f"goal {i}", (f"{j}", "no")) for i, n in enumerate(sizes) for j in range(n)]
        test = [question("GOAL 0"), question("test")]
    return [rows[i] for i in rng.permutation(len(rows))], test


KINDS = {"pieces": TEXTS, "subjects": PIQA, "prompts": tasks.get("e2e_nlg")}


@pytest.mark.parametrize("about", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_row_vanishes_untold(kind, about):
    task, cut, refused = KINDS[kind], 0, 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        rows, test = rows_drawn(kind, rng)
        most = len(tasks.units(task, rows))
        outer, train = int(rng.integers(1, max(2, most // 3))), int(rng.integers(1, 6)) if seed % 3 == 0 else None
        given = {"outer": outer, "train": train, "seed": seed, "about": about}
        try:
            splits = tasks.split(task, rows, test, **given)
        except tasks.TooFew:
            refused += 1
            continue
        assert splits == tasks.split(task, rows, test, **given)
        used = [json.dumps(row) for part in (splits.train, splits.outer) for row in part]
        assert len(set(used)) == len(used)
        assert len(used) + splits.dropped + splits.torn + splits.unasked == len(rows)
        assert splits.dropped == 1 and (train is not None or splits.unasked == 0)
        found = len(tasks.units(task, splits.outer))
        if about:
            assert splits.torn == 0
            assert outer / 2 <= found or not splits.cut
            # `config.yaml` has the number that was used, and repeats the run.
            assert splits == tasks.split(task, rows, test, **given | {"outer": found, "about": False})
        else:
            assert found == outer
        shared = {task.subject(row) for row in splits.train} & {task.subject(row) for row in splits.outer}
        assert bool(shared) <= bool(splits.cut) and len(shared) <= 1
        for subject in shared:
            before, last = (
                [row["piece"] for row in part if task.subject(row) == subject] for part in (splits.train, splits.outer)
            )
            assert max(before) < min(last) and len(last) == splits.cut
        cut += bool(splits.cut)
    assert (cut > 5) == (kind == "pieces") and refused < 15


def book(short, pieces):
    """Texts of one piece, and one of many."""
    return [{"text": f"short {i}"} for i in range(short)] + [
        {"text": f"{i}", "of": "book", "piece": i} for i in range(pieces)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_a_text_larger_than_the_outer_rows_is_cut_at_one_border(seed):
    rows = book(9, 469)
    splits = tasks.split(TEXTS, rows, [{"text": "test"}], outer=119, seed=seed, about=True)
    assert splits[3:] == (0, 0, 0, 110) and len(splits.outer) == 119 and len(splits.train) == 359
    assert [row["piece"] for row in splits.outer if "of" in row] == list(range(359, 469))
    assert sorted(row["piece"] for row in splits.train) == list(range(359))
    with pytest.raises(ValueError, match=r"text leaks: train and outer share the subject 'book'"):
        tasks.check_disjoint(TEXTS, splits._replace(train=rows[9:]))
    with pytest.raises(ValueError, match=r"text leaks: train and outer share the subject 'book'"):
        tasks.check_disjoint(TEXTS, splits._replace(cut=0))


def test_a_text_is_cut_only_where_its_beginning_is_trained_on():
    # Of a text that is there many times, and has one piece, all lie on one side of the border.
    rows, cuts = book(9, 40) + [{"text": "0", "of": "tome", "piece": 0}] * 40, set()
    for seed in range(6):
        splits = tasks.split(TEXTS, rows, [{"text": "test"}], outer=12, train=3, seed=seed)
        (cut,) = {row["of"] for row in splits.outer if "of" in row}
        in_both = any(row["of"] == cut for row in splits.train)
        assert splits.cut == (3 if in_both else 0)
        assert len(splits.train) + len(splits.outer) + splits.torn + splits.unasked == len(rows)
        cuts.add(splits.cut)
    assert 0 in cuts and len(cuts) > 1


def test_a_text_that_is_there_twice_is_cut_between_its_pieces():
    rows = book(0, 20) * 2
    splits = tasks.split(TEXTS, rows, [{"text": "test"}], outer=5)
    assert [row["piece"] for row in splits.outer] == [17, 18, 18, 19, 19]
    assert (len(splits.train), splits.torn, splits.cut) == (34, 1, 5)


def test_other_rows_on_one_large_subject_are_not_cut():
    rows = [question("goal", (f"{i}", "no")) for i in range(300)] + [question(f"other {i}") for i in range(9)]
    splits = tasks.split(PIQA, rows, [question("test")], outer=80)
    assert (len(splits.outer), len(splits.train), splits.torn, splits.cut) == (80, 9, 220, 0)
    splits = tasks.split(PIQA, rows, [question("test")], outer=80, about=True)
    assert (len(splits.outer), len(splits.train), splits.torn) == (9, 300, 0)


@pytest.mark.parametrize("wanted", [None, 1, 5, 20])
@pytest.mark.parametrize("kind", ["subjects", "prompts"])
def test_held_out_rows_are_as_few_as_subjects_allow(kind, wanted):
    task = KINDS[kind]
    for seed in range(60):
        rows, _ = rows_drawn(kind, np.random.default_rng(seed))
        groups = {}
        for row in rows:
            groups.setdefault(task.subject(row), []).append(row)
        sizes = sorted(len(tasks.units(task, group)) for group in groups.values())
        if wanted and wanted >= sum(sizes):
            with pytest.raises(tasks.TooFew):
                tasks.hold_out(task, rows, wanted)
            continue
        kept, held = tasks.hold_out(task, rows, wanted)
        assert sorted(map(json.dumps, kept + held)) == sorted(map(json.dumps, rows))
        assert not {task.subject(row) for row in kept} & {task.subject(row) for row in held}
        found = len(tasks.units(task, held))
        if wanted:
            assert wanted <= found <= max(2 * wanted, *sizes) and (found == 1 or wanted > 1)
        if set(sizes) == {1}:
            assert found == (wanted or max(1, sum(sizes) // 5))


def on_one_subject(many, single):
    """So many rows on one subject, and others each on its own."""
    return [question("goal", (f"{i}", "no")) for i in range(many)] + [question(f"other {i}") for i in range(single)]


def test_held_out_rows_leave_something_to_train_and_to_validate_on():
    def held_out(rows, wanted=None, task=PIQA):
        kept, held = tasks.hold_out(task, rows, wanted)
        check_held_out(task, kept, held, wanted)
        return len(kept), len(held)

    rows = on_one_subject(90, 10)
    assert held_out(rows) == (95, 5) and held_out(rows, 5) == (95, 5) and held_out(rows, 9) == (91, 9)
    alone = r"^Of 100 rows 10 are to test on, and the other 90 are on one subject, .*: lower --test-rows, give more"
    with pytest.raises(tasks.TooFew, match=alone):
        held_out(rows, 10)
    for wanted in (11, 12, 45, 89):  # rows that nobody tests must not be most of those that would train
        turned = f"^--test-rows {wanted} of 100 rows would leave 10 to train on: .* 90 rows would be kept from it"
        with pytest.raises(tasks.TooFew, match=turned):
            held_out(rows, wanted)
    assert held_out(rows, 90) == (10, 90) and held_out(rows, 92) == (8, 92)  # as many as were asked for
    assert held_out(on_one_subject(20, 1) + [question("third", (f"{i}", "no")) for i in range(25)], 5) == (26, 20)
    more = r"on one subject.*: give more rows, or a file to test on \(--test-data\)\.$"
    for few in (on_one_subject(90, 1), on_one_subject(1, 1)):
        with pytest.raises(tasks.TooFew, match=more):
            held_out(few)
    assert held_out([{"text": "one"}, {"text": "other"}], task=TEXTS) == (1, 1)  # which is then cut in pieces


@pytest.mark.parametrize("name", ["piqa", "rte"])
def test_elsewhere_a_unit_is_a_row_also_where_rows_are_alike(name):
    task, row = tasks.get(name), ROWS.get(name, question("ok"))
    assert tasks.units(task, [row, row]) == [[row], [row]]


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
