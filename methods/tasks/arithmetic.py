"""Word problems, and multiple choice with a derivation: the model writes, and its answer is read out of the text.

Prompts are "Question: ...", "Answer:", as in the Language Model Evaluation Harness. A number is right if it differs
from the published one by no more than 1e-4 of it. What follows "####" counts, else what follows the last "answer is",
else the last number (or letter) there is.

GSM8K: arXiv:2110.14168. SVAMP: arXiv:2103.07191. MAWPS: doi:10.18653/v1/N16-1136. AQuA-RAT: arXiv:1705.04146.
"""

from __future__ import annotations

import re
from typing import Any

from methods.tasks.generation import same
from methods.tasks.task import Generation, Hub, Pair, Row

_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARKS = (re.compile(r"####\s*"), re.compile(r"answer is:?\s*", re.IGNORECASE))


def number(text: str, row: Row | None = None) -> float | None:
    """The number that a written text answers with; None if there is none."""
    del row
    for mark in _MARKS:
        if found := list(mark.finditer(text)):
            if match := _NUMBER.match(text, found[-1].end()):
                return _value(match[0])
    numbers = _NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def letter(text: str, row: Row) -> int | None:
    """The index of the choice that a written text answers with; None if there is none."""
    letters = "ABCDEFGH"[: len(row["choices"])]
    for pattern in (rf"answer is:?\s*\(?([{letters}])\b", rf"\(([{letters}])\)", rf"\b([{letters}])\b"):
        if found := re.findall(pattern, text):
            return letters.index(found[-1])
    return None


def _value(text: str) -> float:
    return float(text.replace(",", "").replace("$", ""))


def _stored(value: Any) -> float:
    """The number that a row holds, as one or as text. Raises ValueError or TypeError for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str):
        raise TypeError(f"the answer {value!r} is neither a number nor a text")
    if _NUMBER.fullmatch(value.strip()) is None:  # float() also reads "nan", "1_000" and "infinity"
        raise ValueError(f"the answer {value!r} is no number")
    return _value(value)


def _question(row: Row) -> str:
    return f"Question: {row['question'].strip()}\nAnswer:"


def _gsm8k(row: Row) -> Pair:
    # Without the marks <<48/2=24>> that call a calculator, which nobody answers here.
    pair = Pair(_question(row), " " + re.sub(r"<<.*?>>", "", row["answer"]).strip())
    if not same(number(pair.answer), [_stored(row["final"])]):  # what is trained on is what is compared with
        raise ValueError(f"the answer ends in {number(pair.answer)}, but its final number is {row['final']!r}")
    return pair


def _short(row: Row) -> Pair:
    return Pair(_question(row), f" {_stored(row['answer']):.10g}")


def _aqua(row: Row) -> Pair:
    if len(row["choices"]) > len("ABCDEFGH"):
        raise ValueError(f"{len(row['choices'])} choices are more than there are letters from A to H")
    choices = " ".join(f"({mark}) {choice}" for mark, choice in zip("ABCDEFGH", row["choices"], strict=False))
    answer = f" {row['rationale'].strip()}\nThe answer is ({'ABCDEFGH'[row['label']]})."
    return Pair(f"Question: {row['question'].strip()}\nAnswer choices: {choices}\nAnswer:", answer)


def _answer(row: Row) -> float:
    return _stored(row["answer"])


def _gsm8k_record(record: dict[str, Any]) -> Row:
    return {**record, "final": record["answer"].rpartition("####")[2].strip()}


def _svamp_record(record: dict[str, Any]) -> Row:
    return {"question": f"{record['Body'].rstrip('.')}. {record['Question']}", "answer": float(record["Answer"])}


def _aqua_record(record: dict[str, Any]) -> Row:
    choices = [option.partition(")")[2].strip() for option in record["options"]]
    row = {"question": record["question"], "choices": choices, "rationale": record["rationale"]}
    return row | {"label": "ABCDE".index(record["correct"])}


_NUMBERS = {"extract": number, "metrics": ("exact",), "test": "test"}

TASKS = (
    Generation(
        name="gsm8k",
        fields=("question", "answer", "final"),
        hub=Hub("openai/gsm8k", "main", _gsm8k_record),
        pair=_gsm8k,
        target=lambda row: _stored(row["final"]),
        **_NUMBERS,
    ),
    Generation(
        name="svamp",
        fields=("question",),
        hub=Hub("ChilleD/SVAMP", None, _svamp_record),
        pair=_short,
        target=_answer,
        **_NUMBERS,
    ),
    Generation(name="mawps", fields=("question",), pair=_short, target=_answer, **_NUMBERS),
    Generation(
        name="aqua",
        fields=("question", "rationale"),
        hub=Hub("deepmind/aqua_rat", "raw", _aqua_record),
        pair=_aqua,
        target=lambda row: row["label"],
        extract=letter,
        metrics=("exact",),
        test="test",
        folder="aqua_rat",
        choose=True,
    ),
)
