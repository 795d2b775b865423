"""Tasks: rows of a data set, their prompts, disjoint splits, encoding, answer losses and scoring.

On the host all is numpy; `methods.tasks.loss` is what runs inside a model's loss and is imported by itself.
"""

from methods.tasks.batches import Buckets, Cycled
from methods.tasks.classify import (
    ChoiceBatch,
    Classified,
    LabelledBatch,
    check_tokens,
    choices_fit,
    encode_choices,
    encode_labelled,
    evaluate_choices,
    evaluate_labelled,
    fits,
)
from methods.tasks.encode import Encoded, TokenBatch, encode
from methods.tasks.generation import Written, check_metrics, evaluate_written
from methods.tasks.language import Modelled, encode_spans, evaluate_spans, in_pieces, span_lengths
from methods.tasks.metrics import METRICS
from methods.tasks.own import FORMATS
from methods.tasks.places import is_own
from methods.tasks.records import READERS
from methods.tasks.registry import TASKS, get, register
from methods.tasks.scoring import Accuracy, Evaluation, evaluate, wilson
from methods.tasks.source import Source, check_test, file_of, find, read_source
from methods.tasks.splits import Splits, TooFew, check_disjoint, hold_out, load_splits, split, units, untaught
from methods.tasks.stored import load
from methods.tasks.task import (
    Classification,
    Generation,
    Hub,
    LanguageModelling,
    MultipleChoice,
    Pair,
    Row,
    Span,
    Task,
    training_pairs,
)
from methods.tasks.tokens import tokenized

__all__ = [
    "FORMATS",
    "METRICS",
    "READERS",
    "TASKS",
    "Accuracy",
    "Buckets",
    "ChoiceBatch",
    "Classification",
    "Classified",
    "Cycled",
    "Encoded",
    "Evaluation",
    "Generation",
    "Hub",
    "LabelledBatch",
    "LanguageModelling",
    "Modelled",
    "MultipleChoice",
    "Pair",
    "Row",
    "Source",
    "Span",
    "Splits",
    "Task",
    "TokenBatch",
    "TooFew",
    "Written",
    "check_disjoint",
    "check_metrics",
    "check_test",
    "check_tokens",
    "choices_fit",
    "encode",
    "encode_choices",
    "encode_labelled",
    "encode_spans",
    "evaluate",
    "evaluate_choices",
    "evaluate_labelled",
    "evaluate_spans",
    "evaluate_written",
    "file_of",
    "find",
    "fits",
    "get",
    "hold_out",
    "in_pieces",
    "is_own",
    "load",
    "load_splits",
    "read_source",
    "register",
    "span_lengths",
    "split",
    "tokenized",
    "training_pairs",
    "units",
    "untaught",
    "wilson",
]
