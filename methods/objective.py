"""What training minimises: losses of a frozen model, a hook and a head, on answers or on labels; and what it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from methods.adapters.hook import InputDropout
from methods.adapters.lora import LoRAConfig, PerLayer
from methods.models.hooks import Chain, Hook, identity
from methods.models.loading import Pretrained
from methods.tasks.batches import Watch, by_length
from methods.tasks.classify import LabelledBatch
from methods.tasks.encode import marks, opening, prefix
from methods.tasks.loss import (
    Prediction,
    answer_log_likelihood_at,
    answer_prediction,
    answer_scores_at,
    label_losses,
    log_likelihood_each,
)


class Bound(NamedTuple):
    """What a loss is given of what is trained: the hook and the head's parameters ({} without a head)."""

    adapt: Hook
    head: Any


class Given(NamedTuple):
    """What a method is given of a model and a task; the losses of every method are made of it.

    What is trained is `params`, `{"lora": adapter, "head": head}`: the head is a `Classifier`'s parameters where texts
    are labelled or an encoder chooses, and {} where the model's own head answers; the adapter is {} where there is
    none. The frozen weights are an argument of every loss: a program that closed over them would hold them as
    constants.

    Attributes:
      weights: the frozen model's.
      lora: the adapter's fixed part.
      config: the model's, of which `num_layers`, `hidden_size` and `site_shapes()` are read.
      loss: `loss(weights, bound, batch) -> scalar`, in nats.
      predict: `predict(weights, bound, batch) -> Prediction`; None for a regression, which has no classes.
      start: `start(key) -> params`, fresh ones.
    """

    weights: Any
    lora: LoRAConfig
    config: Any
    loss: Callable[[Any, Bound, Any], jax.Array]
    predict: Callable[[Any, Bound, Any], Prediction] | None
    start: Callable[[jax.Array], Any]

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @property
    def sites(self) -> tuple[str, ...]:
        """The linears that LoRA adapts."""
        return self.lora.sites(self.config.site_shapes())

    def bind(
        self,
        weights: Any,
        params: Any,
        *,
        gate: PerLayer | None = None,
        mask: PerLayer | None = None,
        before: Hook = identity,
        after: Hook = identity,
        key: jax.Array | None = None,
    ) -> Bound:
        """What a loss is given of `params`.

        Args:
          weights: the frozen model's, as the loss is given them.
          params: what is trained.
          gate: what LoRA's update is multiplied by, `[L]` or `{site: [L]}`.
          mask: where LoRA is at all, bool, likewise.
          before, after: hooks that come before and after LoRA's.
          key: of a training step, in which LoRA's dropout acts; None: it does not.
        """
        lora: Any = identity
        if params["lora"]:
            lora = self.lora.bind(params["lora"], gate, mask, base=weights["blocks"])
            if key is not None and self.lora.dropout:
                lora = InputDropout(lora, jax.random.split(key, self.num_layers), self.lora.dropout)
        return Bound(Chain((before, lora, after)), params["head"])


def of_hook(
    loss: Any, weights: Any, lora: LoRAConfig, config: Any, start: Any = None, *, predict: Any = None
) -> Given:
    """A `Given` of a loss of the hook alone, without a head.

    Args:
      loss: `loss(weights, hook, batch) -> scalar`.
      weights, lora, config: as of `Given`.
      start: `start(key)`, LoRA's parameters; by default fresh ones in float32.
      predict: `predict(weights, hook, batch) -> Prediction`, for a method that compares two passes.
    """
    fresh = lambda key: lora.init(key, config.site_shapes(), config.num_layers)  # noqa: E731
    drawn = fresh if start is None else start
    bound_loss = lambda weights, bound, batch: loss(weights, bound.adapt, batch)  # noqa: E731
    bound_predict = None if predict is None else lambda weights, bound, batch: predict(weights, bound.adapt, batch)
    return Given(weights, lora, config, bound_loss, bound_predict, lambda key: {"lora": drawn(key), "head": {}})


def mean_loss(model: Any, head: Any, width: int, weights: Any, bound: Bound, batch: Any) -> jax.Array:
    """The mean of `row_losses` over answer tokens, or over labelled rows: a scalar."""
    losses, counts = row_losses(model, head, width, weights, bound, batch)
    return losses.sum() / counts.sum().astype(losses.dtype)


def mean_of_row_means(model: Any, head: Any, width: int, weights: Any, bound: Bound, batch: Any) -> jax.Array:
    """The mean over rows of each row's own mean over its answer tokens: a scalar.

    What batches of one row give whose gradients are accumulated. `mean_loss` weighs a row by its answer's length; the
    two are equal where all answers have the same. Arguments as of `row_losses`.
    """
    losses, counts = row_losses(model, head, width, weights, bound, batch)
    return (losses / counts.astype(losses.dtype)).mean()


def row_losses(
    model: Any, head: Any, width: int, weights: Any, bound: Bound, batch: Any
) -> tuple[jax.Array, jax.Array]:
    """The loss of each row and what it is counted as, `[B]` both.

    With a head the row's `label_losses` (of choices the cross-entropy of the right one), and 1; without, the negative
    log-likelihood of its answer in nats, and the answer's tokens.

    Args:
      model: a module of `methods.models`.
      head: a `Classifier`, or None where the model's own head answers.
      width: most answer tokens that a row has; not read with a head.
      weights: the model's.
      bound: hook and head parameters.
      batch: a `LabelledBatch` or a `ChoiceBatch` with a head, a `TokenBatch` without.
    """
    if head is not None:
        losses = label_losses(outputs(model, head, weights, bound, batch), batch.labels)
        return losses, jnp.ones(losses.shape, jnp.int32)
    variables = {"params": weights}
    hidden = model.apply(variables, batch.tokens, batch.mask, bound.adapt, method="hidden")
    values = answer_log_likelihood_at(lambda h: model.apply(variables, h, method="head"), hidden, batch, width)
    return -values, jnp.asarray(batch.answer_mask).sum(axis=1)


def answer_scores(model: Any, width: int, weights: Any, bound: Bound, batch: Any) -> tuple[jax.Array, jax.Array]:
    """log p of each row's answer in nats, and how many of its tokens are the most likely ones; `[B]` both."""
    variables = {"params": weights}
    hidden = model.apply(variables, batch.tokens, batch.mask, bound.adapt, method="hidden")
    return answer_scores_at(lambda h: model.apply(variables, h, method="head"), hidden, batch, width)


def token_losses(
    model: Any, head: None, width: int, weights: Any, bound: Bound, batch: Any
) -> tuple[jax.Array, jax.Array]:
    """The loss of each answer token and what it is counted as, 1 or 0 where there is none, `[B, width]` both.

    Arguments as of `row_losses`, without a head.
    """
    found = prediction(model, head, width, weights, bound, batch)
    values = -log_likelihood_each(found.logits, found.targets)
    return jnp.where(found.mask, values, jnp.zeros_like(values)), found.mask.astype(jnp.int32)


def prediction(model: Any, head: Any, width: int, weights: Any, bound: Bound, batch: Any) -> Prediction:
    """The logits of the answers to a batch, and what is right. Arguments as of `row_losses`; not for a regression."""
    if head is not None:
        answers = outputs(model, head, weights, bound, batch)
        return Prediction(answers, batch.labels, jnp.ones_like(batch.labels, bool))
    variables = {"params": weights}
    hidden = model.apply(variables, batch.tokens, batch.mask, bound.adapt, method="hidden")
    return answer_prediction(lambda h: model.apply(variables, h, method="head"), hidden, batch, width)


def outputs(model: Any, head: Any, weights: Any, bound: Bound, batch: Any) -> jax.Array:
    """The head's answers: `[B, outputs]` of a `LabelledBatch`; of a `ChoiceBatch` the score of each choice, `[B, C]`.

    A choice that is not there has a score so low that its softmax is exactly 0.
    """
    if batch.tokens.ndim == 3:
        scores = outputs(model, head, weights, bound, single_texts(batch))[:, 0].reshape(batch.tokens.shape[:2])
        return jnp.where(jnp.asarray(batch.mask).any(axis=-1), scores, jnp.finfo(scores.dtype).min / 2)
    types, variables = token_types(model, batch), {"params": weights}
    features = model.apply(variables, batch.tokens, batch.mask, bound.adapt, method="features", **types)
    return head.apply({"params": bound.head}, features)


def single_texts(batch: Any) -> LabelledBatch:
    """A `LabelledBatch` as it is; of a `ChoiceBatch` every choice as a text of its own, labelled 1 if it is right."""
    if batch.tokens.ndim == 2:
        return batch
    rows, choices, length = batch.tokens.shape
    labels = jnp.asarray(batch.labels)[:, None]
    right = labels == jnp.arange(choices, dtype=labels.dtype)[None, :]
    flat = [each.reshape(rows * choices, length) for each in (batch.tokens, batch.mask, batch.types)]
    tokens, mask, types = flat
    return LabelledBatch(tokens, mask, types, right.reshape(-1).astype(jnp.int32))


def token_types(model: Any, batch: Any) -> dict[str, Any]:
    """The argument that tells a model the token types of a `LabelledBatch`; none where it has no such types."""
    return {"token_types": batch.types} if getattr(model.config, "token_types", 0) else {}


class Texts(NamedTuple):
    """What was written, one text a prompt, and how many prompts were cut on the left to leave room for it."""

    texts: list[str]
    cut: int


def room(pretrained: Pretrained, tokens: int) -> int:
    """Most tokens of a prompt, marks included, that `tokens` more can be written after.

    Raises:
      ValueError: if that is none beside the mark in front.
    """
    positions = pretrained.config.max_positions
    if positions - tokens <= len(marks(pretrained.tokenizer)[0]):
        raise ValueError(
            f"An answer may have {tokens} tokens, which leaves no room for a prompt in the {positions} positions of "
            f"{pretrained.name}."
        )
    return positions - tokens


def write(
    pretrained: Pretrained,
    adapt: Hook,
    prompts: Sequence[str],
    *,
    tokens: int,
    batch_size: int = 8,
    watch: Watch = iter,
) -> Texts:
    """What the model writes after each prompt, greedily, at most `tokens` tokens, up to its mark of the end.

    A prompt begins with the tokenizer's own first-token mark. One that leaves no room for `tokens` tokens behind it
    loses its left end, the mark aside, as in the Language Model Evaluation Harness (which loses the mark too).

    Raises:
      ValueError: if the model has no room for a prompt at all; and as `methods.models.generate.greedy`.
    """
    from methods.models.generate import greedy

    tokenizer: Any = pretrained.tokenizer
    first, fill = marks(tokenizer)
    space = room(pretrained, tokens)
    stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    sequences, cut = [], 0
    for prompt, ids in zip(prompts, tokenizer(list(prompts), add_special_tokens=False)["input_ids"], strict=True):
        ids = [*opening(first, ids), *ids] or prefix(tokenizer)
        if not ids:
            raise ValueError(f"The prompt {prompt!r} has no token to be continued.")
        if len(ids) > space:
            ids, cut = [*first, *ids[len(ids) - space + len(first) :]], cut + 1
        sequences.append(ids)
    texts = [""] * len(sequences)
    lengths = [len(ids) for ids in sequences]
    for index, length in watch(by_length(lengths, batch_size, 32, max(lengths))):
        rows = np.resize(index, batch_size)
        array, mask = np.full((batch_size, length), fill, np.int32), np.zeros((batch_size, length), bool)
        for row, i in enumerate(rows):
            array[row, : lengths[i]], mask[row, : lengths[i]] = sequences[i], True
        found = greedy(pretrained, array, mask, tokens, stop, adapt)
        for row, i in enumerate(index):
            texts[i] = tokenizer.decode(found.tokens[row][found.mask[row]], skip_special_tokens=True)
    return Texts(texts, cut)


jitted_outputs = partial(jax.jit, static_argnums=(0, 1))(outputs)
jitted_answer_scores = partial(jax.jit, static_argnums=(0, 1))(answer_scores)
jitted_row_losses = partial(jax.jit, static_argnums=(0, 1, 2))(row_losses)
