"""What a trained model is worth: its loss over the validation rows, and the task's metrics on the test rows."""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import numpy as np

from methods import processes, tasks
from methods.bench import WRITTEN, Bench
from methods.objective import Bound, jitted_answer_scores, jitted_outputs, jitted_row_losses, write
from methods.tasks import Accuracy, Classified, Evaluation, Modelled, Written
from methods.tasks.batches import by_length, cut, row_lengths
from methods.tasks.loss import answer_width


def validation_loss(bench: Bench, bound: Bound, batch_size: int = 16) -> float:
    """The loss over all outer rows, so many at a time.

    Raises:
      FloatingPointError: if it is not finite.
    """
    weights, rows = bench.pretrained.weights, jax.tree.map(np.asarray, bench.outer)
    total, count = 0.0, 0
    for index, length in by_length(row_lengths(rows.mask), batch_size, 32, rows.mask.shape[-1]):
        batch = cut(rows, np.resize(index, batch_size), length)
        losses, counts = jitted_row_losses(bench.pretrained.model, bench.head, bench.width, weights, bound, batch)
        losses, counts = processes.whole(losses)[: len(index)], processes.whole(counts)[: len(index)]
        if bench.row_means:
            losses, counts = losses / counts, np.ones_like(counts)
        total, count = total + float(losses.sum()), count + int(counts.sum())
    if not np.isfinite(total):
        raise FloatingPointError(f"The loss over the {len(rows.mask)} validation rows of {bench.task.name} is {total}.")
    return total / count


def evaluate(bench: Bench, bound: Bound) -> Evaluation | Classified | Written | Modelled:
    """The task's metrics on the test rows, of a hook and a head."""
    weights, rows, tokenizer = bench.pretrained.weights, bench.splits.test, bench.pretrained.tokenizer
    task: Any = bench.task
    longest = bench.pretrained.config.max_positions
    watch: Any = partial(processes.watched, "testing", program=itemgetter(1))  # a program for each length
    if bench.head is not None:

        def answer(batch):
            return processes.whole(jitted_outputs(bench.pretrained.model, bench.head, weights, bound, batch))

        answered: Any = tasks.evaluate_choices if bench.chooses else tasks.evaluate_labelled
        found: Any = answered(answer, task, rows, tokenizer, max_length=longest, watch=watch)
    elif isinstance(task, tasks.Generation):
        shortened = 0

        def written(prompts):
            nonlocal shortened
            texts, shortened = write(bench.pretrained, bound.adapt, prompts, tokens=WRITTEN, watch=watch)
            return texts

        found = tasks.evaluate_written(written, task, rows)
        found = dataclasses.replace(found, cut=shortened)
        longest -= WRITTEN
    elif isinstance(task, tasks.LanguageModelling):

        def scored(batch):
            width = -(-answer_width(batch) // 32) * 32
            log_p, hits = jitted_answer_scores(bench.pretrained.model, width, weights, bound, batch)
            return processes.whole(log_p), processes.whole(hits)

        found = tasks.evaluate_spans(scored, task, rows, tokenizer, max_length=longest, watch=watch)
    else:
        score = partial(_score, bench.pretrained.model, weights, bound.adapt)
        size = min(8, 2 * len(rows))
        options = {"batch_size": size, "max_length": longest, "watch": watch}
        found = tasks.evaluate(score, task, rows, tokenizer, **options)
    if found.cut:
        warnings.warn(cut_sentence(task.name, found.cut, longest), stacklevel=2)
    return found


def row(evaluation: Evaluation | Classified | Written | Modelled) -> dict[str, Any]:
    """How well a model does, as a row of the results holds it."""
    found = {
        "predictions": evaluation.predictions,
        "right": None if evaluation.right is None else evaluation.right.astype(int),
        "cut": evaluation.cut,
    }
    if not isinstance(evaluation, Evaluation):
        found["metrics"] = evaluation.metrics
        if evaluation.right is not None:
            found["accuracy"] = Accuracy.of(evaluation.right)._asdict()
        if isinstance(evaluation, Modelled):
            found |= {"losses": evaluation.losses, "tokens": evaluation.counts}
        return found
    return found | {
        "metrics": {
            "accuracy per character": evaluation.accuracy.value,
            "accuracy per token": evaluation.per_token.value,
        },
        "accuracy": evaluation.accuracy._asdict(),
        "accuracy_per_token": evaluation.per_token._asdict(),
        "accuracy_unnormalised": evaluation.unnormalised._asdict(),
    }


def cut_sentence(task: str, cut: int, longest: int) -> str:
    """What is said of test texts that did not fit into the model."""
    return (
        f"{cut} texts of {task}'s test have more than the {longest} tokens that the model leaves for them, and were "
        "cut: prompts at their beginning, texts to classify at their end."
    )


def _score(model, weights, adapt, tokens, mask, answer_mask):
    bound, batch = Bound(adapt, {}), tasks.TokenBatch(tokens, mask, answer_mask)
    width = -(-answer_width(batch) // 32) * 32  # few widths, so few compilations
    losses, _ = jitted_row_losses(model, None, width, weights, bound, batch)
    return -processes.whole(losses)
