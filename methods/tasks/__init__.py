"""Tasks: rows of a data set, their prompts, disjoint splits, encoding, answer losses and scoring.

On the host all is numpy; `methods.tasks.loss` is what runs inside a model's loss and is imported by itself.
"""

from methods.tasks import arithmetic, e2e, glue, multiple_choice
from methods.tasks.batches import Buckets, Cycled
from methods.tasks.classify import Classified, LabelledBatch, encode_labelled, evaluate_labelled, fits
from methods.tasks.encode import Encoded, TokenBatch, encode
from methods.tasks.generation import Written, check_metrics, evaluate_written
from methods.tasks.metrics import METRICS
from methods.tasks.scoring import Accuracy, Evaluation, evaluate, wilson
from methods.tasks.splits import Splits, TooFew, check_disjoint, load_splits, split, units
from methods.tasks.task import (
    Classification,
    Generation,
    MultipleChoice,
    Pair,
    Row,
    Task,
    load,
    training_pairs,
)
from methods.tasks.tokens import tokenized

TASKS: dict[str, Task] = {
    task.name: task for task in (*multiple_choice.TASKS, *glue.TASKS, *arithmetic.TASKS, *e2e.TASKS)
}


def get(name: str) -> Task:
    """The task called `name`.

    Raises:
      ValueError: if there is none; the sentence lists those there are.
    """
    if name not in TASKS:
        raise ValueError(f"Unknown task {name!r}: known are {', '.join(sorted(TASKS))}.")
    return TASKS[name]


__all__ = [
    "METRICS",
    "TASKS",
    "Accuracy",
    "Buckets",
    "Classification",
    "Classified",
    "Cycled",
    "Encoded",
    "Evaluation",
    "Generation",
    "LabelledBatch",
    "MultipleChoice",
    "Pair",
    "Row",
    "Splits",
    "Task",
    "TokenBatch",
    "TooFew",
    "Written",
    "check_disjoint",
    "check_metrics",
    "encode",
    "encode_labelled",
    "evaluate",
    "evaluate_labelled",
    "evaluate_written",
    "fits",
    "get",
    "load",
    "load_splits",
    "split",
    "tokenized",
    "training_pairs",
    "units",
    "wilson",
]
