"""Multiple-choice tasks, a row of `TASKS` and a prompt function each.

Prompts are those of the Language Model Evaluation Harness (Gao et al., 2021, doi:10.5281/zenodo.5371628), so
that accuracies can be compared with published ones; every answer is a space and the text of the choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from methods.tasks.task import Hub, MultipleChoice, Pair, Row


def _answers(prompt: Callable[[Row], str]) -> Callable[[Row], tuple[Pair, ...]]:
    """The same prompt for every choice."""
    return lambda row: tuple(Pair(prompt(row), f" {choice}") for choice in row["choices"])


def piqa(row: Row) -> str:
    return f"Question: {row['goal']}\nAnswer:"


def hellaswag(row: Row) -> str:
    return row["context"]


def arc(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer:"


def openbookqa(row: Row) -> str:
    return row["question"]


def siqa(row: Row) -> str:
    return f"Q: {row['context']} {row['question']}\nA:"


def boolq(row: Row) -> str:
    # Some copies end every question with its mark, others none.
    return f"{row['passage']}\nQuestion: {row['question'].rstrip('?')}?\nAnswer:"


def race(row: Row) -> str:
    """The question alone: the harness shows a passage's earlier questions, answered, before the last one."""
    return f"Article: {row['article']}\n\nQuestion: {row['question']}\nAnswer:"


def winogrande(row: Row) -> tuple[Pair, ...]:
    """Partial evaluation (Trinh and Le, 2018): the choice ends the prompt, the answer is what follows it."""
    before, blank, after = row["sentence"].partition("_")
    if not blank or not after.strip():
        raise ValueError("the sentence has no blank '_' with text after it.")
    return tuple(Pair(before + choice, f" {after.strip()}") for choice in row["choices"])


def _lettered(question: str) -> Callable[[dict[str, Any]], Row]:
    """A record of ARC or OpenBookQA, whose answer key is a letter or a digit."""

    def row(record: dict[str, Any]) -> Row:
        choices = record["choices"]
        label = list(choices["label"]).index(record["answerKey"].strip())
        return {"question": record[question], "choices": list(choices["text"]), "label": label}

    return row


def _piqa_record(record: dict[str, Any]) -> Row:
    return {"goal": record["goal"], "choices": [record["sol1"], record["sol2"]], "label": record["label"]}


def _hellaswag_record(record: dict[str, Any]) -> Row:
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    choices = [_plain(ending) for ending in record["endings"]]
    return {"context": _plain(context), "choices": choices, "label": int(record["label"])}


def _plain(text: str) -> str:
    """Without WikiHow's bracketed marks, as the harness has it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande_record(record: dict[str, Any]) -> Row:
    choices = [record["option1"], record["option2"]]
    return {"sentence": record["sentence"], "choices": choices, "label": int(record["answer"]) - 1}


def _siqa_record(record: dict[str, Any]) -> Row:
    row = {"context": record["context"], "question": record["question"], "label": int(record["label"]) - 1}
    return row | {"choices": [record["answerA"], record["answerB"], record["answerC"]]}


def _boolq_record(record: dict[str, Any]) -> Row:
    row = {"passage": record["passage"], "question": record["question"], "choices": ["yes", "no"]}
    return row | {"label": 1 - int(record["label"])}  # the hub's 1 is yes


def _race_record(record: dict[str, Any]) -> Row:
    row = {"article": record["article"], "question": record["question"], "choices": list(record["options"])}
    return row | {"label": "ABCD".index(record["answer"])}


def _questions(passage: Row) -> list[Row]:
    """The rows of a RACE passage that is stored with all its questions."""
    asked = zip(passage["questions"], passage["options"], passage["labels"], strict=True)
    return [{"article": passage["article"], "question": q, "choices": o, "label": a} for q, o, a in asked]


def _unfold_race(stored: Row) -> list[Row]:
    return _questions(stored) if "questions" in stored else [stored]


_ARC = {"fields": ("question",), "pairs": _answers(arc), "test": "test"}
_RACE = {"fields": ("article", "question"), "pairs": _answers(race), "test": "test"}

TASKS = (
    MultipleChoice(
        name="piqa", fields=("goal",), hub=Hub("baber/piqa", None, _piqa_record), pairs=_answers(piqa)
    ),
    MultipleChoice(
        name="hellaswag",
        fields=("context",),
        hub=Hub("Rowan/hellaswag", None, _hellaswag_record),
        pairs=_answers(hellaswag),
    ),
    MultipleChoice(
        name="winogrande",
        fields=("sentence",),
        group=lambda row: row["sentence"].partition("_")[0],  # twin sentences mostly share their beginning
        hub=Hub("allenai/winogrande", "winogrande_xl", _winogrande_record),
        pairs=winogrande,
    ),
    MultipleChoice(name="arc_easy", hub=Hub("allenai/ai2_arc", "ARC-Easy", _lettered("question")), **_ARC),
    MultipleChoice(name="arc_challenge", hub=Hub("allenai/ai2_arc", "ARC-Challenge", _lettered("question")), **_ARC),
    MultipleChoice(
        name="openbookqa",
        fields=("question",),
        hub=Hub("allenai/openbookqa", "main", _lettered("question_stem")),
        pairs=_answers(openbookqa),
        test="test",
    ),
    MultipleChoice(
        name="siqa",
        fields=("context", "question"),
        hub=Hub("lighteval/siqa", None, _siqa_record),
        pairs=_answers(siqa),
    ),
    MultipleChoice(
        name="boolq",
        fields=("passage", "question"),
        hub=Hub("aps/super_glue", "boolq", _boolq_record),
        pairs=_answers(boolq),
    ),
    MultipleChoice(name="race_middle", hub=Hub("ehovy/race", "middle", _race_record), unfold=_unfold_race, **_RACE),
    MultipleChoice(name="race_high", hub=Hub("ehovy/race", "high", _race_record), unfold=_unfold_race, **_RACE),
)
