"""Texts that are longer than a training row: cut into pieces, nothing of them lost and nothing twice."""

import re

import numpy as np
import pytest

from methods import cli, tasks
from methods.integrity import read_json
from methods.tasks import FORMATS
from methods.tasks.language import span_lengths, text_pieces, tokenize_spans
from tests.methods.small import arguments
from tests.methods.texts import tokenizer, write

MADE = FORMATS["text"].task([])
BYTES, ENDING = tokenizer(merges=[("a", "b"), ("ab", "c")]), tokenizer(ends=True)


@pytest.mark.parametrize("reader", [BYTES, ENDING], ids=["merges", "ends"])
@pytest.mark.parametrize("seed", range(75))
def test_pieces_are_the_text_and_fit(seed, reader):
    rng = np.random.default_rng(seed)
    text = "a" + "".join(rng.choice(list("abc de\n\u00e9\u4e16\U0001f600"), rng.integers(0, 90)))
    row, length = {"text": text}, int(rng.integers(8, 41))
    pieces = tasks.in_pieces(MADE, [row], reader, length)
    assert "".join(piece["text"] for piece in pieces) == text
    assert all(count <= length for count in span_lengths(MADE, pieces, reader))
    assert {MADE.subject(piece) for piece in pieces} == {text}  # so that they are never on two sides of a split
    whole = tokenize_spans(MADE, pieces, reader)
    assert [sequence.ids[-1] == reader.eos_token_id for sequence in whole] == [False] * (len(pieces) - 1) + [True]
    if len(pieces) == 1:
        assert pieces == [row]
    else:
        assert [piece["piece"] for piece in pieces] == list(range(len(pieces)))


def test_a_piece_ends_in_front_of_a_space_where_it_can():
    text = "one two three four five six"
    pieces = text_pieces({"text": text}, tokenizer(), 15)  # twelve bytes each
    assert [piece["text"] for piece in pieces] == ["one two", " three four", " five six"]
    assert [piece.get("ends", True) for piece in pieces] == [False, False, True]
    unbroken = text_pieces({"text": "x" * 30}, tokenizer(), 15)
    assert [len(piece["text"]) for piece in unbroken] == [12, 12, 6]
    assert text_pieces({"text": "\U0001f600" * 4}, tokenizer(), 4) == [{"text": "\U0001f600" * 4}]  # no room for one


def test_rows_of_other_formats_are_not_cut():
    prompts = FORMATS["prompts"].task([])
    row = {"prompt": "a" * 50, "completion": " b"}
    assert tasks.in_pieces(prompts, [row], tokenizer(), 10) == [row]


def test_every_token_of_a_long_text_is_learned_once():
    """But the first of a piece, which the mark of the beginning comes before."""
    reader, row = tokenizer(), {"text": "the quick brown fox jumps over the lazy dog"}
    pieces = tasks.in_pieces(MADE, [row], reader, 16)
    found = tokenize_spans(MADE, pieces, reader)
    learned = [reader.decode([i for i, is_learned in zip(*each, strict=True) if is_learned]) for each in found]
    assert "".join(learned) == row["text"] + "</s>" and len(learned) > 3


@pytest.mark.usefixtures("float32_by_default")
def test_a_command_trains_on_all_of_long_texts(tiny_model, tmp_path):
    texts = [f"text {i} " + "word " * (i % 7 * 5) for i in range(30)]
    write(tmp_path / "data", [{"text": text} for text in texts])
    words = arguments(tiny_model, tmp_path / "data" / "train.jsonl", tmp_path / "run", "--quiet")
    assert cli.run(["lora", *words]) == 0
    page = " ".join((tmp_path / "run" / "report.md").read_text().split())
    told = r"\((\d+) of its rows were not considered: (\d+) beyond what was asked for; its 24 texts are (\d+)"
    found = re.search(told, page)
    left, unasked, pieces = map(int, found.groups())
    assert left == unasked == pieces - 16 - 8  # the sizes that `arguments` asks for
    assert read_json(tmp_path / "run" / "results" / "lora.json")["cut"] == 0


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize("sizes", ["", "--outer-rows 12 --train-rows 15"])
def test_of_short_texts_and_a_book_the_page_tells_of_every_piece(sizes, tiny_model, tmp_path, capsys):
    texts = [f"text {i}" for i in range(9)] + ["book " + "word " * 1500]
    write(tmp_path, [{"text": text} for text in texts])
    write(tmp_path, [{"text": "a text to test"}], "test.jsonl")
    fixed = ["--model", str(tiny_model), "--data", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "run")]
    words = "--batch-size 4 --length 24 --finetune-steps 2 --rank 2"
    assert cli.run(["lora", *fixed, *words.split(), *sizes.split()]) == 0
    page = " ".join((tmp_path / "run" / "report.md").read_text().split())
    found = re.search(r"Trained on (\d+) rows; .* on (\d+) other rows of .* \(([\d,]+) of its rows were not", page)
    train, outer, left = (int(number.replace(",", "")) for number in found.groups())
    said = capsys.readouterr().out
    pieces = int(re.search(r"its 10 texts are (\d+) pieces, which are the rows here", page)[1])
    assert train + outer + left == pieces and "; 0 share a subject with the test" in page
    cut = outer - 9
    assert f"one text is longer than all outer rows, and its last {cut} pieces are among these" in page
    assert f"its last {cut} pieces are among these" in said
    if sizes:
        assert (train, outer) == (15, 12) and f"not considered: {left} beyond what was asked for;" in page
        assert f"{left} of {pieces} training rows (texts in pieces) are not used: {left} beyond what" in said
    else:
        assert left == 0 and outer == pieces // 4 and "are not used" not in said
