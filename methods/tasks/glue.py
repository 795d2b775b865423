"""GLUE: sentences and pairs of sentences to classify, and one to score.

The published validation set is what is tested on, as the methods' papers do: the test labels of most of these tasks
were never published. Labels are numbered as on the hub.

Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding", 2018.
arXiv:1804.07461.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from methods.tasks.task import Classification, Hub, Row

PAIR = ("sentence1", "sentence2")


def _task(name: str, fields: Sequence[str], classes: Sequence[str], metrics: Sequence[str], **more: Any):
    """A row of `TASKS`. Rows that share their first text are on one subject, unless `group` says otherwise."""
    group = more.pop("group", None)

    def row(record: dict[str, Any]) -> Row:
        return {field: record[field] for field in (*fields, "label")}

    hub = Hub("nyu-mll/glue", name, row)
    return Classification(
        name=name,
        fields=tuple(fields),
        group=None if group is None else lambda row: row[group],
        hub=hub,
        classes=tuple(classes),
        metrics=tuple(metrics),
        folder=f"glue_{name}",
        **more,
    )


_ENTAILMENT = ("entailment", "not_entailment")

TASKS = (
    _task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    _task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
    _task("mrpc", PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    _task("stsb", PAIR, (), ("pearson", "spearman"), bounds=(0.0, 5.0)),
    _task("qnli", ("question", "sentence"), _ENTAILMENT, ("accuracy",), group="sentence"),
    _task("rte", PAIR, _ENTAILMENT, ("accuracy",)),
)
