"""E2E: a restaurant described by attributes, to be told in a sentence; each has several references.

Novikova, Dusek, Rieser, "The E2E Dataset: New Challenges For End-to-End Generation", 2017. arXiv:1706.09254.
"""

from __future__ import annotations

from typing import Any

from methods.tasks.task import Generation, Hub, Pair, Row


def _pair(row: Row) -> Pair:
    return Pair(f"Meaning: {row['mr']}\nText:", f" {row['ref'].strip()}")


def _written(text: str, row: Row) -> str:
    del row
    return text.strip().partition("\n")[0].strip()


def _record(record: dict[str, Any]) -> Row:
    return {"mr": record["meaning_representation"], "ref": record["human_reference"]}


TASKS = (
    Generation(
        name="e2e_nlg",
        fields=("mr", "ref"),
        hub=Hub("GEM/e2e_nlg", None, _record),
        pair=_pair,
        target=lambda row: row["ref"].strip(),
        extract=_written,
        metrics=("bleu", "nist", "rouge_l", "meteor", "cider"),
        test="test",
        stop=("\n",),
    ),
)
