"""Rows of one's own: formats, files, what is learned of a text, and what is held out."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import normalizers

from methods import bench as benches
from methods import cli, evaluation, lora, models, objective, tasks
from methods.models.hooks import identity
from methods.options import parse
from methods.tasks import FORMATS, LanguageModelling, Span
from methods.tasks.language import evaluate_spans, pad_spans, tokenize_spans
from methods.tasks.loss import answer_scores_at, answer_width, extents
from methods.tasks.own import recognised, renaming
from tests.methods.texts import tokenizer, write

CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n~\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""A template after the pattern of ChatML."""
RECORDS = {
    "chat": {"messages": [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Yes, two."}]},
    "alpaca": {"instruction": "Add.", "input": "1 and 1", "output": "2"},
    "choices": {"question": "Why?", "choices": ["so", "no"], "label": 1},
    "prompts": {"prompt": "Q: why? A:", "completion": " so"},
    "labels": {"text": "good", "label": "yes"},
    "text": {"text": "Once upon a time."},
}
"""A record of each format."""


def chatty(**more):
    made = tokenizer(**more)
    made.chat_template = CHATML
    return made


def records_file(folder, records, end=".jsonl"):
    """A file of records, of the kind that its end says."""
    file = folder / f"rows{end}"
    if end == ".jsonl":
        write(folder, records, file.name)
    elif end == ".json":
        file.write_text(json.dumps(records))
    elif end == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), file)
    else:
        with file.open("w", newline="") as out:
            lines = csv.DictWriter(out, list(records[0]), delimiter="\t" if end == ".tsv" else ",")
            lines.writeheader()
            lines.writerows(records)
    return file


def numbered(name, count=20):
    """Records of a format that differ in their subjects, and labels by turns."""
    made = []
    for i in range(count):
        record = json.loads(json.dumps(RECORDS[name]))
        first = next(iter(record))
        if name == "chat":
            record["messages"][0]["content"] += f" {i}"
        else:
            record[first] = f"{i} {record[first]}"
        if name == "labels":
            record["label"] = ("yes", "no")[i % 2]
        made.append(record)
    return made


# --- formats ---------------------------------------------------------------------------------------------------------


def test_every_format_has_a_record_here_and_is_told_by_its_columns():
    assert set(RECORDS) == set(FORMATS)
    for name, record in RECORDS.items():
        assert recognised(record, "here") == name


LISTS = "chat", "choices"
"""Formats of whose columns one is a list, which no cell of a CSV file holds."""


@pytest.mark.parametrize(
    ("name", "end"),
    [(name, end) for name in FORMATS for end in tasks.READERS if name not in LISTS or end not in (".csv", ".tsv")],
)
def test_a_format_is_the_same_whatever_file_it_is_in(name, end, tmp_path):
    records = numbered(name)
    found = tasks.read_source(None, str(records_file(tmp_path, records, end)), test=4)
    expected = tasks.read_source(None, str(records_file(tmp_path, records)), test=4)
    assert (found.train, found.test) == (expected.train, expected.test)
    assert len(found.train) == 16 and len(found.test) == 4 and found.task.name == name


def test_rows_of_the_formats():
    def row(name, record, others=()):
        format = FORMATS[name]
        raw = [format.row(each, "here") for each in (record, *others)]
        made = format.task(raw)
        return made, format.final(made, raw[0], "here")

    made, got = row("prompts", {"prompt": "Q", "answer": " a"})
    assert made.spans(got, None) == [Span("Q", False), Span(" a", True)]
    made, got = row("alpaca", {"instruction": "Add.", "output": "2"})
    prompt, answer = made.spans(got, None)
    assert "Input" not in prompt.text and prompt.text.endswith("### Response:\n") and answer == Span("2", True)
    made, got = row("alpaca", RECORDS["alpaca"])
    assert "### Input:\n1 and 1\n\n### Response:\n" in made.spans(got, None)[0].text

    for answer, label in ((1, 1), ("no", 1), ("A", 0)):
        made, got = row("choices", {"prompt": "Why?", "choices": ["so", "no"], "answer": answer})
        assert got["label"] == label and made.pairs(got)[1] == ("Question: Why?\nAnswer:", " no")
    made, got = row("choices", {"question": "Which?", "choices": ["B", "A"], "label": "A"})
    assert got["label"] == 1  # the text of a choice comes before its letter

    other = [{"text": "bad", "label": "no"}] * 3
    made, got = row("labels", RECORDS["labels"], other)
    assert made.classes == ("no", "yes") and got["label"] == 1 and made.metrics == ("accuracy",)
    made, got = row("labels", {"text": "a", "label": 10}, [{"text": "b", "label": 9}] * 3)
    assert made.classes == ("9", "10") and got["label"] == 1  # by size, not by spelling
    made, got = row("labels", {"text": "a", "pair": "b", "label": 0.5}, [{"text": "b", "pair": "c", "label": 2}])
    assert made.classes == () and made.fields == ("text", "pair") and got["label"] == 0.5


def test_columns_are_renamed():
    assert renaming("prompt=question,answer=response") == {"question": "prompt", "response": "answer"}


def test_renamed_columns_make_rows(tmp_path):
    file = records_file(tmp_path, [{"question": f"{i}?", "response": " so", "id": i} for i in range(10)])
    with pytest.warns(UserWarning, match=r"Columns of .*rows\.jsonl that are not read: id\. .* group= keeps them"):
        found = tasks.read_source(None, str(file), columns="prompt=question,answer=response", test=2)
    assert found.task.name == "prompts" and {"prompt": "3?", "completion": " so"} in found.train + found.test


def test_prompts_that_run_into_their_answers_are_told_of(tmp_path):
    file = records_file(tmp_path, [{"prompt": f"{i}", "completion": "x"} for i in range(10)])
    with pytest.warns(UserWarning, match=r"10 of 10 rows have neither space nor line break between prompt and"):
        tasks.read_source(None, str(file))


# --- damage ----------------------------------------------------------------------------------------------------------

GOOD = {name: json.dumps(record).encode() for name, record in RECORDS.items()}
DAMAGED = {
    "no JSON": ("text", b"{", r"line 2 is not a JSON row"),
    "no object": ("text", b"[1]", r"line 2 is not a JSON object but list"),
    "another column": ("text", b'{"words": "x"}', r"line 2 has no column 'text', which rows of the format text have"),
    "no text": ("text", b'{"text": 3}', r"line 2 has int as its 'text', which must be a text"),
    "null": ("text", b'{"text": null}', r"line 2 has no 'text'"),
    "empty": ("text", b'{"text": " "}', r"line 2 has an empty 'text'"),
    "half a character": ("text", b'{"text": "\\ud800"}', r"line 2 has a damaged character in 'text'"),
    "empty answer": ("prompts", b'{"prompt": "q", "completion": ""}', r"line 2 has an empty 'completion'"),
    "two answers": ("prompts", b'{"prompt": "q", "completion": "a", "answer": "b"}', "has both 'completion' and 'ans"),
    "empty output": ("alpaca", b'{"instruction": "q", "output": ""}', r"line 2 has an empty 'output'"),
    "no turns": ("chat", b'{"messages": []}', r"line 2 has no 'messages', a list of turns"),
    "no role": ("chat", b'{"messages": [{"content": "x"}]}', r"line 2: message 1 has no 'role'"),
    "unknown role": ("chat", b'{"messages": [{"role": "bot", "content": "x"}]}', r"message 1 has the role 'bot'"),
    "no content": ("chat", b'{"messages": [{"role": "user", "content": [1]}]}', r"message 1 has no text as its"),
    "more in a turn": (
        "chat",
        b'{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}',
        r"message 1 has 'weight', which is not read",
    ),
    "no answer": ("chat", b'{"messages": [{"role": "user", "content": "x"}]}', r"line 2 has no turn of the assistant"),
    "silent answer": ("chat", b'{"messages": [{"role": "assistant", "content": " "}]}', r"1 is an empty answer"),
    "no label": ("labels", b'{"text": "x", "label": null}', r"line 2 has the label None"),
    "NaN": ("labels", b'{"text": "x", "label": NaN}', r"line 2 has the label nan"),
    "one choice": ("choices", b'{"question": "x", "choices": ["a"], "label": 0}', r"2 has no 'choices', a list of"),
    "no such choice": ("choices", b'{"question": "x", "choices": ["a", "b"], "label": 2}', r"label 2, which is out of"),
    "no such letter": ("choices", b'{"question": "x", "choices": ["a", "b"], "label": "C"}', r"the answer 'C', which"),
    "right twice": ("choices", b'{"question": "x", "choices": ["a", "b", "a"], "label": 0}', r"the right answer 'a'"),
    "said twice": ("choices", b'{"question": "x", "choices": ["a", "b", "a"], "label": "a"}', r"right answer 'a'"),
    "right letter twice": ("choices", b'{"question": "x", "choices": ["a", "a"], "label": "B"}', r"right answer 'a'"),
    "true": ("choices", b'{"question": "x", "choices": ["a", "b"], "label": true}', r"the answer True, which is"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_named_with_file_and_line(kind, tmp_path):
    name, line, message = DAMAGED[kind]
    write(tmp_path, [GOOD[name], line, *numbered(name)], "rows.jsonl")
    with pytest.raises(ValueError, match=rf"rows\.jsonl.*{message}|rows\.jsonl {message}"):
        tasks.read_source(None, str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("end", "text", "message"),
    [
        (".json", '{"text": "x"}', r"is not a JSON array of rows but dict"),
        (".json", '{"text": "x"}\n{"text": "y"}', r"call it \.jsonl"),
        (".json", "[1]", r"row 1 is not a JSON object but int"),
        (".csv", "text,text\nx,y\n", r"two columns called 'text'"),
        (".csv", "text,label\nx\n", r"line 2 has 1 values for the 2 columns"),
        (".csv", 'text\n"x\n', r"line 2 cannot be read as a table"),
        (".csv", "text,\nx,y\n", r"line 1 has a column without a name"),
        (".tsv", 'text\tlabel\n"a\t1\nb"\t0\n', r"line 3 ends a value in quotation marks that began on line 2"),
        (".json", '[{"text": "x", "text": "y"}]', r"'text' is there twice"),
        (".parquet", "PAR1", r"is not a Parquet file, or it is damaged"),
        (".jsonl", "\n\n", r"is empty: there must be at least one row"),
        (".csv", "", r"is empty"),
        (".jsonl", '{"words": "x"}\n', r"line 1 has the columns words, which are of no format that is known: messages"),
    ],
)
def test_a_damaged_file_is_named(end, text, message, tmp_path):
    (tmp_path / f"rows{end}").write_text(text)
    with pytest.raises(ValueError, match=message):
        tasks.read_source(None, str(tmp_path / f"rows{end}"))


def test_blank_lines_and_a_mark_of_the_encoding_are_no_damage(tmp_path):
    lines = [b"\xef\xbb\xbf" + GOOD["text"], b"", *numbered("text", 9), b"  "]
    write(tmp_path, lines, "rows.jsonl")
    found = tasks.read_source(None, str(tmp_path / "rows.jsonl"))
    assert len(found.train) + len(found.test) == 10


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": 1}, {"text": "c", "label": "y"}],
            r"line 2 has the label 1, a whole number, where others have such as 'x', a text: write all",
        ),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": 1.5}], r"line 2 has the label 1\.5, a number with"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], r"Every row has the label 'x'"),
        ([{"text": str(i), "label": str(i)} for i in range(9)], r"9 rows have 9 different labels, too many"),
        (
            [{"text": "a", "label": 1}, {"text": "b", "pair": "c", "label": 2}],
            r"line 2 has a second text 'pair', where 1 of 2 rows have one: give all of them one, or none",
        ),
        (
            [{"text": "a", "label": 1}, *[{"text": "b", "pair": "c", "label": 2}] * 3],
            r"line 1 has no second text 'pair', where 3 of 4 rows have one",
        ),
        ([{"text": "a", "label": 1}, {"text": " \n", "label": 2}], r"line 2 has an empty 'text', of which nothing"),
        ([{"text": "a", "pair": "", "label": 1}, {"text": "b", "pair": "c", "label": 2}], r"line 1 has an empty 'pair"),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": 10**400}], r"line 2 has the label '1000.*no number that"),
    ],
)
def test_labels_that_make_no_task(records, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tasks.read_source(None, str(records_file(tmp_path, records)))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ({"pair": "p"}, {}, r"held\.jsonl line 1 has no second text 'pair', where the training rows have one"),
        ({}, {"pair": "p"}, r"held\.jsonl line 1 has a second text 'pair', where the training rows have none"),
        ({}, {"text": "  "}, r"held\.jsonl line 1 has an empty 'text'"),
    ],
)
def test_test_rows_have_the_texts_of_the_training_rows(train, test, message, tmp_path):
    write(tmp_path, [{"text": f"{i}", "label": i % 2} | train for i in range(8)], "rows.jsonl")
    write(tmp_path, [{"text": "held", "label": 1} | test], "held.jsonl")
    with pytest.raises(ValueError, match=message):
        tasks.read_source(None, str(tmp_path / "rows.jsonl"), test_data=str(tmp_path / "held.jsonl"))


def test_a_number_to_predict_is_written_alike_in_training_and_test(tmp_path):
    write(tmp_path, [{"text": f"{i}", "label": i + 0.5} for i in range(8)], "rows.jsonl")
    for label in ("1_0", "nan", "x", True):
        write(tmp_path, [{"text": "held", "label": label}], "held.jsonl")
        with pytest.raises(ValueError, match=r"held\.jsonl line 1 has the label"):
            tasks.read_source(None, str(tmp_path / "rows.jsonl"), test_data=str(tmp_path / "held.jsonl"))


def test_a_text_of_no_token_is_refused_before_anything_is_trained():
    """Of a tokenizer without a mark of the beginning; empty texts are refused by themselves, this one is not empty."""
    task = tasks.Classification(name="own", fields=("text",), classes=("no", "yes"), metrics=("accuracy",))
    reader = tokenizer()
    reader.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    rows = [{"text": "a", "label": 0}, {"text": "\u200b", "label": 1}]
    for encode in (tasks.check_tokens, lambda task, rows, reader: tasks.encode_labelled(task, rows, reader, 8)):
        with pytest.raises(ValueError, match=r"The text '.*' has a text of no token: leave it out"):
            encode(task, rows, reader)
    tasks.check_tokens(task, rows[:1], reader)


def test_a_class_of_a_task_of_ones_own_is_named_or_numbered(tmp_path):
    task = tasks.Classification(name="own", fields=("text",), classes=("no", "yes"), metrics=("accuracy",))
    (tmp_path / "own").mkdir()
    for label, number in (("yes", 1), ("no", 0), (1, 1)):
        write(tmp_path / "own", [{"text": "a", "label": label}], "train.jsonl")
        assert [row["label"] for row in tasks.load(task, "train", tmp_path)] == [number]
    for label in ("perhaps", "1", "Yes"):
        write(tmp_path / "own", [{"text": "a", "label": label}], "train.jsonl")
        with pytest.raises(ValueError, match=rf"line 1 has label '{label}', which is no class \(no, yes\)"):
            tasks.load(task, "train", tmp_path)


def test_a_label_that_only_the_test_has(tmp_path):
    train = records_file(tmp_path, numbered("labels"))
    write(tmp_path, [{"text": "x", "label": "perhaps"}], "held.jsonl")
    with pytest.raises(ValueError, match=r"held\.jsonl line 1 has the label 'perhaps', which no training row has: no"):
        tasks.read_source(None, str(train), test_data=str(tmp_path / "held.jsonl"))


@pytest.mark.usefixtures("float32_by_default")
def test_a_preset_demands_no_rows(tiny_model, tmp_path):
    file = records_file(tmp_path, [{"prompt": f"question {i}", "completion": f" a{i % 5}"} for i in range(40)])
    command = cli.import_module(cli.COMMANDS["attribute"].module).COMMAND
    words = ["--model", str(tiny_model), "--data", str(file), "--length", "32", "--out", str(tmp_path / "run")]
    settings = parse(command, "attribute", words)
    bench = command.prepare(settings)
    assert (len(bench.splits.train), len(bench.splits.outer), len(bench.splits.test)) == (24, 8, 8)
    used = benches.settled(settings, bench)
    assert (settings.train_rows, used.train_rows, used.outer_rows) == (64, 24, 8)
    assert benches.unsettled(settings) == ["task", "train_rows", "outer_rows", "test_rows"]
    with pytest.raises(ValueError, match=r"cannot give --train-rows 64: it must be between 1 and 32"):
        command.prepare(parse(command, "attribute", [*words, "--train-rows", "64"]))


def test_a_class_that_no_training_row_has_is_told(tiny_model, tmp_path):
    records = numbered("labels", 24)
    held = {row["text"] for row in tasks.read_source(None, str(records_file(tmp_path, records))).test}
    for record in records:
        record["label"] = "rare" if record["text"] in held else record["label"]
    words = ["lora", "--model", str(tiny_model), "--data", str(records_file(tmp_path, records)), "--quiet"]
    sizes = "--batch-size 2 --finetune-steps 2 --rank 2 --length 24".split()
    remark = "4 of 4 test rows have a class that no training row has, 'rare': nothing learns it; give more rows of it."
    with pytest.warns(UserWarning, match=remark):
        assert cli.run([*words, *sizes, "--out", str(tmp_path / "run")]) == 0
    assert remark in (tmp_path / "run" / "report.md").read_text()

    made = tasks.Classification(name="t", fields=("text",), classes=("a", "b", "c"), metrics=("accuracy",))
    of = lambda *labels: [{"text": f"{label}", "label": label} for label in labels]  # noqa: E731
    told = lambda *parts: tasks.untaught(made, tasks.Splits(*(of(*part) for part in parts), 0))  # noqa: E731
    assert told((0, 1, 2), (0, 1), (1, 2)) == ""
    assert told((0, 0), (0, 1, 2, 2), (0, 2)).startswith("1 of 2 test rows and 3 of 4 outer rows have a class that no")
    assert tasks.untaught(tasks.get("stsb"), tasks.Splits(of(0.5), of(1.0), of(2.0), 0)) == ""


def test_a_remedy_is_of_what_was_given_and_rows_that_are_not_tested_are_told(tiny_model, tmp_path, capsys):
    one, more = ([{"prompt": f"q {i % n} {n} ", "completion": f"a {i}"} for i in range(24)] for n in (1, 24))
    file, test, third = (tmp_path / f"{name}.jsonl" for name in ("one", "test", "third"))
    write(tmp_path, one, file.name)
    write(tmp_path, more, test.name)
    write(tmp_path, [{"prompt": f"p {i} ", "completion": f"b {i}"} for i in range(9)], third.name)
    words = ["lora", "--model", str(tiny_model), "--data", str(file), "--test-data", str(test), "--test-rows", "2"]
    words += ["--out", str(tmp_path / "run"), "--length", "24"]
    asked = ["--train-rows", "16", "--outer-rows", "8"]
    lower = "lower --train-rows and --outer-rows"  # all of them fit
    for given, remedy in (([], "give rows on more subjects"), (asked, lower)):
        assert cli.run([*words, *given]) == 2
        said = capsys.readouterr()
        assert "24 are left without those on subjects of the test, on one subject, and these stay together; 24 of" in (
            said.err
        )
        assert said.err.rstrip().endswith(f": {remedy}.")
    sizes = "--batch-size 2 --finetune-steps 2 --rank 2".split()
    assert cli.run([*words, *sizes, "--data", str(third)]) == 0
    assert "22 of 24 rows to test on are not used: no more were asked for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data nowhere.jsonl", r"There is no nowhere\.jsonl: name a file whose name ends in \.jsonl"),
        ("--data {file} --columns question", r"--columns 'question' must be such as prompt=question"),
        ("--data {file} --columns words=text", r"--columns names 'words', which no format has"),
        ("--data {file} --columns prompt=nothing", r"line 1 has no column 'nothing', which --columns names: text"),
        ("--data {file} --columns text=text,prompt=text", r"names 'text' twice"),
        ("--data {file} --task chat", r"line 1 has no column 'messages', which rows of the format chat have"),
        ("--data {file} --test-rows 30", r"cannot be cut into rows to train on and 30 to test on"),
        ("--data {file} --train-rows 30", r"cannot give --train-rows 30"),
        ("--data {folder}", r"empty has no file called train: call its file of training rows train\.jsonl"),
        ("--task chat", r"--task chat is about rows of your own"),
        ("--columns prompt=question", r"--columns is about rows of your own"),
        ("--test-data {file}", r"--test-data is about rows of your own"),
        ("--task nowhere.py:TASK", r"There is no file nowhere\.py, which --task names"),
        ("--task {module}", r"name the task in it too, as .*mine\.py:TASK"),
        ("--task {module}:OTHER", r"mine\.py has nothing called OTHER: it must be a task"),
        ("--task {module}:NUMBER", r"mine\.py has a int, and no task, called NUMBER"),
        ("--task {broken}:TASK", r"broken\.py, which --task names, fails .* \(ZeroDivisionError: .*, line 1\)"),
    ],
)
def test_options_that_name_no_rows(words, message, tiny_model, tmp_path, capsys):
    names = {"file": records_file(tmp_path, numbered("text")), "folder": tmp_path / "empty"}
    names |= {"module": tmp_path / "mine.py", "broken": tmp_path / "broken.py"}
    names["folder"].mkdir()
    names["module"].write_text("NUMBER = 3\n")
    names["broken"].write_text("1 / 0\n")
    given = ["lora", "--model", str(tiny_model), "--out", str(tmp_path / "run"), *words.format(**names).split()]
    assert cli.run(given) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1, said
    assert not (tmp_path / "run").exists()


# --- what is learned -------------------------------------------------------------------------------------------------


def learned_text(sequence, made):
    return made.decode([token for token, of in zip(sequence.ids, sequence.learned, strict=True) if of])


def task_of(name, records):
    format = FORMATS[name]
    raw = [format.row(record, "here") for record in records]
    made = format.task(raw)
    return made, [format.final(made, row, "here") for row in raw]


def test_the_assistants_turns_are_learned_and_nothing_else():
    record = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Two?"},
            {"role": "assistant", "content": "No."},
        ]
    }
    made, (row,) = task_of("chat", [record])
    reader = chatty()
    (sequence,) = tokenize_spans(made, [row], reader)
    whole = reader.apply_chat_template(record["messages"], tokenize=False)
    assert reader.decode(sequence.ids) == whole
    # One token a byte: where the answers and the template's own marks of their ends lie can be told by searching.
    expected = np.zeros(len(whole), bool)
    for answer in ("Yes.\n~", "No.\n~"):
        at = whole.index(answer)
        expected[at : at + len(answer)] = True
    assert sequence.learned == expected.tolist()


def test_a_template_that_rewrites_what_came_before_is_refused():
    made, rows = task_of("chat", [{"messages": [*RECORDS["chat"]["messages"]] * 2}])
    reader = tokenizer()
    # The reasoning of earlier turns is dropped once more follow, as some models' templates do it.
    reader.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + (m['content'] if loop.last or m['role'] == 'user' else '-') "
        "+ '\n' }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"writes what comes before and with 'Yes, two\.' differently once more"):
        tokenize_spans(made, rows, reader)
    made, rows = task_of("chat", [RECORDS["chat"]])
    (sequence,) = tokenize_spans(made, rows, reader)
    assert "Yes, two." in learned_text(sequence, reader)  # nothing before a single answer is rewritten


def test_chats_need_a_template():
    made, rows = task_of("chat", [RECORDS["chat"]])
    with pytest.raises(ValueError, match=r"has no chat template"):
        tokenize_spans(made, rows, tokenizer())
    reader = tokenizer()
    reader.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(ValueError, match=r"does not write the chat 'Two\?' \(no system turns\)"):
        tokenize_spans(made, rows, reader)


def test_completions_end_with_the_mark_and_texts_begin_with_one():
    made, rows = task_of("prompts", [RECORDS["prompts"]])
    (sequence,) = tokenize_spans(made, rows, tokenizer())
    assert learned_text(sequence, tokenizer()) == " so</s>" and not any(sequence.learned[:10])
    made, rows = task_of("text", [{"text": "ab"}])
    (sequence,) = tokenize_spans(made, rows, tokenizer())
    assert sequence.ids[0] == 0 and sequence.learned == [False, True, True, True]  # <s> a b </s>
    (sequence,) = tokenize_spans(made, rows, tokenizer(ends=True))
    assert sequence.ids == [0, *sequence.ids[1:3], 1] and sequence.learned == [False, True, True, True]


def test_a_token_across_a_border_is_learned():
    reader = tokenizer(merges=[("b", "c")])
    made = LanguageModelling(name="x", fields=("t",), spans=lambda row, of: [Span("ab", False), Span("cd", True)])
    (sequence,) = tokenize_spans(made, [{"t": ""}], reader)
    assert [reader.decode([i]) for i in sequence.ids] == ["a", "bc", "d", "</s>"]
    assert sequence.learned == [False, True, True, True]
    parts = [Span("a", False), Span("b", True), Span("cd", False)]
    made = LanguageModelling(name="x", fields=("t",), spans=lambda row, of: parts)
    (sequence,) = tokenize_spans(made, [{"t": ""}], reader)
    assert sequence.learned == [False, True, False]  # a, bc, d


def test_what_is_too_long_keeps_its_end():
    made, rows = task_of("prompts", [RECORDS["prompts"]])
    reader = tokenizer(ends=True)
    sequences = tokenize_spans(made, rows, reader)
    batch, cut = pad_spans(sequences, 6, [0])
    assert cut == 1 and reader.decode(batch.tokens[0]) == "<s>: so</s>" and batch.tokens[0, 0] == 0
    assert batch.answer_mask[0].tolist() == [False, True, True, True, True, False]
    with pytest.raises(ValueError, match="has no token to learn"):
        tokenize_spans(LanguageModelling(name="x", fields=("t",), spans=lambda r, t: [Span("a", False)]), [{}], reader)


def head_of(logits):
    """A head that gives these logits, `[B, T, V]`, from hidden states that are the positions."""
    import jax.numpy as jnp

    hidden = jnp.broadcast_to(jnp.arange(logits.shape[1])[None, :, None], (*logits.shape[:2], 1))
    rows = jnp.arange(len(logits))[:, None]
    return hidden, lambda h: jnp.asarray(logits)[rows, h[..., 0]]


@pytest.mark.parametrize("block", [2, 128])
def test_scores_of_answers_in_several_parts(block, monkeypatch):
    """Against the sums by hand, for masks with gaps, as the turns of a chat leave them."""
    from methods.tasks import loss
    from methods.tasks.encode import TokenBatch

    monkeypatch.setattr(loss, "LONGEST", block)
    rng = np.random.default_rng(0)
    tokens, logits = rng.integers(0, 5, (3, 8)).astype(np.int32), rng.normal(size=(3, 8, 5))
    mask = np.array([[0, 1, 0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0, 0]], bool)
    batch = TokenBatch(tokens, np.ones_like(mask), mask)
    assert extents(mask).tolist() == [5, 7, 1] and answer_width(batch) == 7
    hidden, head = head_of(logits)
    log_p, hits = answer_scores_at(head, hidden, batch, answer_width(batch))
    all_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for n in range(3):
        at = np.flatnonzero(mask[n])
        np.testing.assert_allclose(log_p[n], sum(all_p[n, t, tokens[n, t + 1]] for t in at), rtol=1e-12)
        assert int(hits[n]) == sum(logits[n, t].argmax() == tokens[n, t + 1] for t in at)
    narrow, _ = answer_scores_at(head, hidden, batch, 5)
    assert np.isnan(narrow).tolist() == [False, True, False]  # never a part of an answer


def test_the_loss_of_rows_and_their_exact_matches():
    made, rows = task_of("prompts", [{"prompt": "a ", "completion": "bb"}, {"prompt": "", "completion": "c"}])
    reader, seen = tokenizer(), []

    def score(batch):
        # Every learned token costs its own id in nats; of the first row all are hits.
        seen.append(batch.tokens.shape)
        targets = np.roll(batch.tokens, -1, axis=1)
        hits = batch.answer_mask.sum(axis=1) - (batch.tokens[:, 0] == 0)
        return -(targets * batch.answer_mask).sum(axis=1).astype(float), hits

    found = evaluate_spans(score, made, rows, reader, batch_size=4)
    ids = reader("bbc", add_special_tokens=False)["input_ids"]
    total = sum(ids) + 2 * reader.eos_token_id
    np.testing.assert_allclose(found.metrics["loss"], total / 5)
    np.testing.assert_allclose(found.metrics["perplexity"], np.exp(total / 5))
    assert found.right.tolist() == [True, False] and found.metrics["exact"] == 0.5 and found.counts.tolist() == [3, 2]
    assert seen == [(4, 32)]


# --- held out --------------------------------------------------------------------------------------------------------


def test_what_is_held_out_shares_no_subject_and_is_always_the_same(tmp_path):
    records = [{"prompt": f"Subject {i % 12}", "completion": f" {i}"} for i in range(60)]
    file = records_file(tmp_path, records)
    first, second = (tasks.read_source(None, str(file)) for _ in range(2))
    assert first.train == second.train and first.test == second.test
    # Of subjects of five rows each two are nearer to a fifth than three; of an exact number there are as many at least.
    assert len(first.test) == 10 and len(first.train) + len(first.test) == 60
    assert len(tasks.read_source(None, str(file), test=12).test) == 15
    assert not {row["prompt"] for row in first.train} & {row["prompt"] for row in first.test}
    assert first.tested_on == f"{file}, held out,"


def test_a_folder_brings_its_test(tmp_path):
    write(tmp_path, numbered("text"), "train.jsonl")
    write(tmp_path, [{"text": "validation"}], "validation.jsonl")
    assert tasks.read_source(None, str(tmp_path)).test == [{"text": "validation"}]
    write(tmp_path, [{"text": "test"}], "test.jsonl")
    assert tasks.read_source(None, str(tmp_path)).test == [{"text": "test"}]
    write(tmp_path, [{"text": "named"}], "other.jsonl")
    assert tasks.read_source(None, str(tmp_path), test_data=str(tmp_path / "other.jsonl")).test == [{"text": "named"}]
    (tmp_path / "train.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"several files called train, train\.csv and train\.jsonl: name one"):
        tasks.read_source(None, str(tmp_path))


# --- tasks of one's own ----------------------------------------------------------------------------------------------

MINE = '''
import dataclasses
from methods.tasks import MultipleChoice, Pair


@dataclasses.dataclass
class Words:
    """Looked for in its module."""

    prompt: str = "Question: {}\\nAnswer:"


def pairs(row):
    return tuple(Pair(Words().prompt.format(row["ask"]), " " + choice) for choice in row["choices"])


TASK = MultipleChoice(name="mine", fields=("ask",), pairs=pairs)
'''


def test_a_task_of_ones_own_reads_a_file_or_a_folder(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    named = f"{tmp_path / 'mine.py'}:TASK"
    rows = [{"ask": f"wash {i}", "choices": ["pot", "soap"], "label": i % 2} for i in range(20)]
    write(tmp_path, rows, "rows.jsonl")
    found = tasks.read_source(named, str(tmp_path / "rows.jsonl"))
    assert found.task.name == "mine" and len(found.train) == 16 and found.train[0].keys() == {"ask", "choices", "label"}
    write(tmp_path / "mine", rows, "train.jsonl")
    write(tmp_path / "mine", rows[:2], "validation.jsonl")
    assert tasks.read_source(named, str(tmp_path)).test == rows[:2]
    write(tmp_path, [*rows, {"ask": 1}], "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows\.jsonl line 21 has no text 'ask', which mine needs"):
        tasks.read_source(named, str(tmp_path / "rows.jsonl"))


def test_a_function_that_changes_its_row_sees_the_same_row_each_time():
    def spans(row, of):
        row["t"] += "?"
        return [Span(row["t"], False), Span(" ok", True)]

    made, rows = LanguageModelling(name="x", fields=("t",), spans=spans), [{"t": "a"}]
    first, again = (tokenize_spans(made, rows, tokenizer()) for _ in range(2))
    assert first == again and rows == [{"t": "a"}]

    def pairs(row):
        row["choices"].reverse()
        return tuple(tasks.Pair("q", choice) for choice in row["choices"])

    chosen, row = tasks.MultipleChoice(name="c", fields=("q",), pairs=pairs), {"q": "", "choices": ["a", "b"]}
    assert chosen.asked(row) == chosen.asked(row) and row["choices"] == ["a", "b"]


def test_registered_tasks_are_known_by_their_names(monkeypatch):
    from methods.tasks import registry

    monkeypatch.setattr(registry, "TASKS", dict(registry.TASKS))
    made = tasks.MultipleChoice(name="mine", fields=("ask",), pairs=lambda row: ())
    assert tasks.register(made) is made and tasks.get("mine") is made and tasks.register(made) is made
    with pytest.raises(ValueError, match=r"There is a task called 'mine' already"):
        tasks.register(tasks.MultipleChoice(name="mine", fields=("other",), pairs=lambda row: ()))
    with pytest.raises(ValueError, match=r"names no text field, so that it needs group="):
        tasks.MultipleChoice(name="mine", fields=(), pairs=lambda row: ())
    with pytest.raises(TypeError):
        tasks.MultipleChoice("mine", ("ask",))  # pyright: ignore


def of_mine(folder, kind, options):
    """`FILE.py:TASK` of a task of that kind, whose function `p` gives what it is given."""
    (folder / "mine.py").write_text(f"from methods.tasks import *\np = lambda *of: of\nTASK = {kind}({options})\n")
    return f"{folder / 'mine.py'}:TASK"


CHOICE = "name='m', fields=('q',), pairs=lambda row: tuple(Pair(row['q'], ' ' + c) for c in row['choices'])"
TEXTS = "name='g', fields=('q',), pair=lambda row: Pair(row['q'], ' a'), target=p, extract=p, metrics=('exact',)"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("MultipleChoice", CHOICE.replace("('q',)", "'q'"), r"'m' has fields='q', which must be .*: fields=\('q',\)"),
        ("MultipleChoice", CHOICE.replace("('q',)", "(1,)"), r"'m' has fields=\(1,\), which must be a tuple of texts"),
        ("MultipleChoice", CHOICE.replace("'m'", "None"), r"A task has name=None, which must be a text"),
        ("MultipleChoice", CHOICE + ", group='q'", r"'m' has group='q', which must be a function of a row"),
        ("MultipleChoice", CHOICE + ", unfold=3", r"'m' has unfold=3, which must be a function of a row"),
        ("MultipleChoice", "name='m', fields=('q',), pairs=()", r"'m' has pairs=\(\), which must be a function"),
        ("Classification", "name='c', fields=('q',), classes='no', metrics=('f1',)", r"classes=\('no',\)"),
        ("Classification", "name='c', fields=('q',), classes=('n', 'o'), metrics='f1'", r"metrics=\('f1',\)"),
        ("Classification", "name='c', fields=('q',), classes=(), metrics=('pearson',), bounds=5", "has bounds=5"),
        ("Generation", TEXTS.replace("target=p", "target='a'"), "has target='a', which must be a function"),
        ("Generation", TEXTS + ", stop='ab'", r"has stop='ab', which must be a tuple of texts: stop=\('ab',\)"),
        ("LanguageModelling", "name='l', fields=('q',), spans='q'", "has spans='q', which must be a function"),
        ("LanguageModelling", "name='l', fields=('q',), spans=p, pieces=4", "has pieces=4, which must be a function"),
    ],
)
def test_a_task_of_the_wrong_types_is_refused_when_it_is_made(kind, options, message, tmp_path):
    with pytest.raises(ValueError, match=rf"mine\.py, which --task names, .*{message}.*, line 3\)"):
        tasks.find(of_mine(tmp_path, kind, options))


ASKED = [{"q": f"wash {i}", "a": " pot", "choices": ["pot", "soap"], "label": i % 2, "n": i} for i in range(20)]
NAMED = r"rows\.jsonl line 1: {}= of the task t, in .*mine\.py line 3, gave {}"
CHOOSES, CLASSES = "MultipleChoice", "Classification classes=('x', 'y'), metrics=('f1',),"
GENERATES = "Generation target=p, extract=p, metrics=('exact',),"


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        (CHOOSES, "pairs=lambda row: None", NAMED.format("pairs", "None: it must give a Pair")),
        (CHOOSES, "pairs=lambda row: row['choices']", NAMED.format("pairs", "the list .'pot', 'soap'.")),
        (CHOOSES, "pairs=lambda row: (Pair('q', 3),) * 2", NAMED.format("pairs", "the tuple .Pair")),
        (CHOOSES, "pairs=lambda row: (Pair('q', ' a'),)", NAMED.format("pairs", "1 for 2 choices")),
        (CHOOSES, "pairs=lambda row: (Pair('q', ' a'),) * 3", NAMED.format("pairs", "3 for 2 choices")),
        (CHOOSES, "pairs=lambda row: 1 / 0", r"line 1 is no row of t \(ZeroDivisionError: .*py line 3\)"),
        (GENERATES, "pair=lambda row: 3", NAMED.format("pair", "the int 3")),
        (CLASSES, "group=lambda row: row['n']", NAMED.format("group", "the int 0: a subject must")),
        (CLASSES, "group=lambda row: None", NAMED.format("group", "None: a subject must be a text")),
        (CLASSES, "group=lambda row: row['no']", r"KeyError: 'no' in .*mine\.py line 3\): mend the"),
        (CLASSES, "unfold=lambda row: row", NAMED.format("unfold", "the dict .*: it must give a list")),
        (CLASSES, "unfold=lambda row: [5]", NAMED.format("unfold", "the list .5.: it must give a")),
    ],
)
def test_what_a_task_makes_of_a_row_is_looked_at_when_it_is_read(kind, option, message, tmp_path):
    write(tmp_path, ASKED, "rows.jsonl")
    kind, _, more = kind.partition(" ")
    named = of_mine(tmp_path, kind, f"name='t', fields=('q',), {more} {option}")
    with pytest.raises(ValueError, match=message):
        tasks.read_source(named, str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ("['ab']", r"line 1: spans= of the task t, in .*mine\.py line 3, gave Span\(text='a', learned='b'\)"),
        ("[(3, True)]", r"line 1: spans= of the task t, in .*mine\.py line 3, gave Span\(text=3, learned=True\)"),
        ("1 / 0", r"line 1 is no row of t \(ZeroDivisionError: division by zero in .*py line 3\): mend the row, or"),
    ],
)
def test_what_spans_give_is_looked_at(spans, message, tmp_path):
    write(tmp_path, ASKED, "rows.jsonl")
    named = of_mine(tmp_path, "LanguageModelling", f"name='t', fields=('q',), spans=lambda row, reader: {spans}")
    found = tasks.read_source(named, str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match=message):
        tokenize_spans(found.task, sorted(found.train, key=lambda row: row["n"]), tokenizer())


def test_tuples_of_two_texts_are_pairs():
    made = tasks.MultipleChoice(name="t", fields=("q",), pairs=lambda row: [(row["q"], " a"), (row["q"], " b")])
    assert made.asked({"q": "Q", "choices": ["a", "b"]}) == (tasks.Pair("Q", " a"), tasks.Pair("Q", " b"))


# --- whole commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chat_model(tiny_model, tmp_path_factory):
    """`tiny_model` with a chat template and a mark of the end."""
    import shutil

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model, folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "eos_token": "fast"}
    config["chat_template"] = "{% for m in messages %}{{ m['content'] + ' : ' }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize("name", FORMATS)
def test_a_command_trains_on_every_format(name, chat_model, tmp_path, capsys):
    file = records_file(tmp_path, [*numbered(name, 40)])
    sizes = "--finetune-steps 2 --length 60 --targets q_proj --batch-size 4".split()
    words = ["lora", "--model", str(chat_model), "--data", str(file), "--out", str(tmp_path / "run"), *sizes]
    assert cli.run(words) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    used = {key: config[key] for key in ("task", "train_rows", "outer_rows", "test_rows")}
    assert used == {"task": name, "train_rows": 24, "outer_rows": 8, "test_rows": 8}
    page = (tmp_path / "run" / "report.md").read_text()
    assert f"Test: 8 rows of {file}, held out, which no search or training saw." in page
    result = json.loads((tmp_path / "run" / "results" / "lora.json").read_text())
    metrics = {"choices": "accuracy per character", "labels": "accuracy"}.get(name, "loss")
    assert metrics in result["metrics"] and (metrics == "loss") == ("losses" in result)
    before = (tmp_path / "run" / "report.md").read_bytes()
    assert cli.run(words) == 0  # which continues it, though the numbers of rows are not said
    assert "already finished" in capsys.readouterr().out and (tmp_path / "run" / "report.md").read_bytes() == before


@pytest.mark.usefixtures("float32_by_default")
def test_exact_matches_are_what_the_model_writes(chat_model, tmp_path):
    """Against a second program: the model's first choice, appended and given to the model again."""
    import jax.numpy as jnp

    pretrained = models.load(chat_model)

    def written(prompt, count):
        ids = pretrained.tokenizer(prompt)["input_ids"]
        for _ in range(count):
            logits = pretrained.model.apply({"params": pretrained.weights}, jnp.asarray([ids]))
            ids = [*ids, int(logits[0, -1].argmax())]
        return ids[-count:]

    words = {index: word for word, index in pretrained.tokenizer.get_vocab().items()}
    prompts = [f"wash the pot {word}" for word in ("with", "now", "a", "soap", "it", "eat")]
    told = [" ".join(words[i] for i in written(prompt, 2)) for prompt in prompts]
    records = [{"prompt": p, "completion": f" {text}"} for p, text in zip(prompts, told, strict=True)]
    records += [{"prompt": f"{p} the", "completion": " soap soap"} for p in prompts]
    expected = [
        written(record["prompt"], 2) == pretrained.tokenizer(record["completion"])["input_ids"] for record in records
    ]
    made, rows = task_of("prompts", records)
    file = str(records_file(tmp_path, records * 3))
    settings = lora.LoRASettings(model=str(chat_model), data=file, length=30, batch_size=2, outer_batch_size=2)
    bench = benches.prepare(settings)
    ended = LanguageModelling(name=made.name, fields=made.fields, spans=made.spans, ended=False)
    bench = bench._replace(source=bench.source._replace(task=ended), splits=bench.splits._replace(test=rows))
    found = evaluation.evaluate(bench, objective.Bound(identity, {}))
    assert found.right.tolist() == expected and sum(expected) >= 3 and not all(expected)


def test_the_page_of_formats_names_every_column():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name, format in FORMATS.items():
        assert f"| `{name}` |" in page and all(f"`{column}`" in page for column in format.names), name
    lines = {name: next(line for line in page.splitlines() if f"`{name}`" in line) for name in tasks.TASKS}
    for name, task in tasks.TASKS.items():
        assert all(f"`{field}`" in lines[name] for field in task.fields), name
        if not isinstance(task, tasks.Generation):
            assert "`label`" in lines[name], name
        if isinstance(task, tasks.MultipleChoice):
            assert "`choices`" in lines[name], name
    for end in tasks.READERS:
        assert f"`{end}`" in page, end


def test_the_interval_of_a_difference_of_losses():
    """The interval of a paired difference of losses covers the truth at its rate."""
    from methods.pages import loss_difference

    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        counts = rng.integers(5, 20, 80)
        gap = rng.normal(0.3, 0.5, 80) * counts**0.5 + 0.1 * counts
        base = rng.normal(2, 1, 80) * counts
        mean, half = loss_difference(base + gap, base, counts)
        truth = 0.1 + 0.3 * np.mean(np.arange(5, 20) ** 0.5) / np.mean(np.arange(5, 20))
        covered += abs(mean - truth) <= half
    assert 0.91 <= covered / 400 <= 0.98
    assert loss_difference([2.0], [1.0], [2])[0] == 0.5


# --- found by breaking it --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize("sizes", ["", "--train-rows 5"])
def test_a_repeated_run_has_the_same_rows_where_few_fit(sizes, chat_model, tmp_path):
    """However many rows are said: all of one's own rows are looked at, so that the same ones are taken again."""
    from methods.options import parse

    long = "wash the pot with soap " * 12
    records = [{"prompt": f"wash {i} {long if i % 10 else ''}", "completion": " the pot"} for i in range(300)]
    file = str(records_file(tmp_path, records))
    command, fixed = lora.COMMAND, ["--model", str(chat_model), "--data", file, "--length", "20", "--batch-size", "2"]
    first = parse(command, "lora", [*fixed, "--out", str(tmp_path / "run"), *sizes.split()])
    bench = command.prepare(first)
    used = benches.settled(first, bench)
    again = command.prepare(used)
    assert again.splits == bench.splits and len(bench.splits.train) <= 24
    assert benches.settled(used, again) == used


@pytest.mark.usefixtures("float32_by_default")
def test_a_task_that_was_changed_is_another_run(chat_model, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    rows = [{"ask": f"wash {i}", "choices": ["pot", "soap"], "label": i % 2} for i in range(40)]
    write(tmp_path, rows, "rows.jsonl")
    words = ["lora", "--model", str(chat_model), "--task", f"{tmp_path / 'mine.py'}:TASK", "--quiet"]
    words += ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "run"), "--finetune-steps", "2"]
    assert cli.run([*words, "--batch-size", "2"]) == 0
    (tmp_path / "mine.py").write_text(MINE.replace("Looked for", "Searched"))  # nothing that a row shows
    assert cli.run([*words, "--batch-size", "2"]) == 2
    assert "holds a run of other rows: " in (said := capsys.readouterr().err) and "task file mine.py" in said


def test_only_tokens_that_reach_into_a_part_belong_to_it():
    """Against the characters of every token, where a border lies inside a word."""
    reader = tokenizer(merges=[("b", "c"), ("a", "b")])  # "abc" is a, bc; "ab" alone is one token
    made = LanguageModelling(name="x", fields=("t",), spans=lambda row, of: [Span("ab", False), Span("cd", True)])
    (sequence,) = tokenize_spans(made, [{"t": ""}], reader)
    assert learned_text(sequence, reader) == "bcd</s>"
    rng, letters = np.random.default_rng(0), "ab c"
    for _ in range(200):
        text = "x" + "".join(rng.choice(list(letters), 12))
        border = int(rng.integers(1, 12))
        parts = [Span(text[:border], False), Span(text[border:], True)]
        cut = LanguageModelling(name="x", fields=("t",), spans=lambda row, of, parts=parts: parts, ended=False)
        (sequence,) = tokenize_spans(cut, [{"t": ""}], reader)
        ends = np.cumsum([len(reader.decode([token])) for token in sequence.ids])
        assert sequence.learned == [bool(end > border) for end in ends]


def test_numbers_of_a_csv_file_are_numbers(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"t{i},{i}.5\n" for i in range(20)))
    found = tasks.read_source(None, str(tmp_path / "rows.csv"))
    assert found.task.classes == () and sorted(row["label"] for row in found.train + found.test) == [
        i + 0.5 for i in range(20)
    ]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(20)))
    assert tasks.read_source(None, str(tmp_path / "rows.csv")).task.classes == ("0", "1")
    # As spreadsheets write them, without the .0, and with an exponent.
    for labels in (["1", "1.5", "2", "2.5", "3"], ["1e-3", "0"], ["-1", "2."], [" 1 ", "+.5"]):
        lines = "".join(f"t{i},{labels[i % len(labels)]}\n" for i in range(20))
        (tmp_path / "rows.csv").write_text(f"text,label\n{lines}")
        found = tasks.read_source(None, str(tmp_path / "rows.csv"))
        assert found.task.classes == () and found.task.metrics == ("pearson", "spearman"), labels
        assert {row["label"] for row in found.train + found.test} == set(map(float, labels))
        write(tmp_path, [{"text": f"t{i}", "label": float(labels[i % len(labels)])} for i in range(20)], "rows.jsonl")
        assert tasks.read_source(None, str(tmp_path / "rows.jsonl")).task.classes == ()
    for labels in (["1", "2.x"], ["v1.5", "1.5"], ["1", "2"]):
        lines = "".join(f"t{i},{labels[i % 2]}\n" for i in range(20))
        (tmp_path / "rows.csv").write_text(f"text,label\n{lines}")
        assert set(tasks.read_source(None, str(tmp_path / "rows.csv")).task.classes) == set(labels)
    (tmp_path / "rows.csv").write_text("text,label\na,nan\nb,0.5\nc,1\nd,2\n")
    with pytest.raises(ValueError, match=r"^A row has the label 'nan', where others have numbers such as 0\.5: "):
        tasks.read_source(None, str(tmp_path / "rows.csv"))
    (tmp_path / "rows.csv").write_text("text,label\na,1e300\nb,0.5\nc,0.5\n".replace("1e300", "1.0e300"))
    with pytest.raises(ValueError, match=r"line 2 has the label '1\.0e300', which is no number that float32 holds"):
        tasks.read_source(None, str(tmp_path / "rows.csv"))


def test_labels_that_look_alike_are_one_class_or_told(tmp_path):
    def classes(*labels):
        write(tmp_path, [{"text": f"t{i}", "label": labels[i % len(labels)]} for i in range(24)], "rows.jsonl")
        return tasks.read_source(None, str(tmp_path / "rows.jsonl")).task.classes

    assert classes("a", " a", "b", "b\n") == ("a", "b") and classes("1", " 1", "2") == ("1", "2")
    with pytest.raises(ValueError, match=r"line 2 has the label '  ', which is no text and no number"):
        classes("a", "  ")
    with pytest.warns(UserWarning, match="^The labels 'No' and 'no' are two classes, though they differ in"):
        assert classes("No", "no", "yes") == ("No", "no", "yes")
    with pytest.warns(UserWarning, match=r"^Labels such as '1,5' are classes; a number to be predicted is written"):
        assert classes("1", "1,5") == ("1", "1,5")


def test_test_rows_that_do_not_fit_are_said_before_anything_is_trained(chat_model, tmp_path, capsys):
    long = "wash the pot with soap " * 30
    train = records_file(tmp_path, numbered("choices", 40))
    write(tmp_path, [{"question": "q", "choices": [long, "soap"], "label": 0}], "held.jsonl")
    words = ["lora", "--model", str(chat_model), "--data", str(train), "--length", "40", "--batch-size", "2"]
    words += ["--out", str(tmp_path / "run")]
    assert cli.run([*words, "--test-data", str(tmp_path / "held.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "held.jsonl line 1, a test row: An answer of 150 tokens does not fit into 64" in said
    assert not (tmp_path / "run").exists()


CHATS = {
    "the assistant begins": (CHATML, ["assistant", "user", "assistant"], ["hello\n~", "last\n~"]),
    "two answers in a row": (CHATML, ["user", "assistant", "assistant"], ["hello\n~", "last\n~"]),
    "no question to ask by": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n~\n' }}{% endfor %}",
        ["user", "assistant"],
        ["last\n~"],
    ),
    "reasoning before an answer that is asked for": (
        CHATML.replace("'<|assistant|>\n' }}{% endif", "'<|assistant|>\n<think>\n' }}{% endif"),
        ["user", "assistant"],
        ["last\n~"],
    ),
}


@pytest.mark.parametrize("kind", CHATS)
def test_chats_of_every_shape(kind):
    template, roles, answers = CHATS[kind]
    reader = tokenizer()
    reader.chat_template = template
    texts = ["hello" if role == "assistant" and i < len(roles) - 1 else "last" for i, role in enumerate(roles)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    made, rows = task_of("chat", [{"messages": messages}])
    (sequence,) = tokenize_spans(made, rows, reader)
    assert learned_text(sequence, reader) == "".join(answers)
    assert reader.decode(sequence.ids).endswith(reader.apply_chat_template(messages, tokenize=False))


def test_a_template_that_always_begins_another_answer_is_refused():
    reader = tokenizer()
    reader.chat_template = CHATML.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")
    made, rows = task_of("chat", [RECORDS["chat"]])
    with pytest.raises(ValueError, match=r"does not end 'Yes, two\.' as it does where more follows"):
        tokenize_spans(made, rows, reader)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("Generation(name='t', fields=('a',), pair=p, target=p, extract=p, metrics=('nope',))", "the metric 'nope'"),
        ("Generation(name='t', fields=('a',), pair=p, target=p, extract=p, metrics=())", "has no metric: choose from"),
        ("Generation(name='t', fields=('a',), pair=p, target=p, extract=p, metrics=('exact',), stop=())", "stop="),
        ("Classification(name='t', fields=('a',), classes=('x', 'y'), metrics=('nope',))", "the metric 'nope'"),
        ("__import__('sys').exit(3)", r"fails when it is run \(SystemExit: 3, line 3\)"),
    ],
)
def test_damaged_tasks_are_one_sentence(task, message, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(f"from methods.tasks import *\np = lambda *of: of\nTASK = {task}\n")
    words = ["lora", "--model", "m", "--task", f"{tmp_path / 'mine.py'}:TASK", "--out", str(tmp_path / "run")]
    assert cli.run(words) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1, said


def test_a_text_without_an_answer_counts_as_an_empty_one():
    made = tasks.Generation(
        name="t",
        fields=("a",),
        pair=lambda row: tasks.Pair(row["a"], " x"),
        target=lambda row: "x",
        extract=lambda text, row: None,
        metrics=("rouge_l", "exact"),
    )
    found = tasks.evaluate_written(lambda prompts: ["x"] * len(prompts), made, [{"a": "p"}])
    assert found.metrics == {"rouge_l": 0.0, "exact": 0.0} and found.predictions == [None]


def test_files_beside_each_other(tmp_path):
    write(tmp_path, numbered("text"), "train.jsonl")
    write(tmp_path, [{"text": "held"}], "test.jsonl")
    assert tasks.read_source(None, str(tmp_path / "train.jsonl")).test == [{"text": "held"}]
    write(tmp_path, numbered("text"), "mine.jsonl")
    assert len(tasks.read_source(None, str(tmp_path / "mine.jsonl")).test) == 4  # which belongs to train alone
    with pytest.raises(ValueError, match=r"--test-data .*mine\.jsonl is --data itself"):
        tasks.read_source(None, str(tmp_path / "mine.jsonl"), test_data=str(tmp_path / "mine.jsonl"))
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", numbered("text"), "rows.jsonl")
    (tmp_path / "empty").mkdir()
    for folder in ("other", "empty"):
        with pytest.raises(FileNotFoundError, match=folder + " has no file called train: call its file of training"):
            tasks.read_source(None, str(tmp_path / folder))
    write(tmp_path / "other", [{"text": "held"}], "validation.jsonl")
    found = tasks.read_source(None, str(tmp_path / "mine.jsonl"), test_data=str(tmp_path / "other"))
    assert found.test == [{"text": "held"}]


def test_a_row_without_its_label_is_no_text(tmp_path):
    write(tmp_path, [{"text": "x"}, *numbered("labels")], "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows\.jsonl line 1 has no column 'label', which rows of the format labels"):
        tasks.read_source(None, str(tmp_path / "rows.jsonl"))


def test_long_cells_are_read(tmp_path):
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f'"{i} {"x" * 200_000}"\n' for i in range(5)))
    assert len(tasks.read_source(None, str(tmp_path / "rows.csv")).train) == 4
