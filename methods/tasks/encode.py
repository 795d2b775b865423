"""Prompts and answers to fixed-length arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from methods.tasks.task import Pair
from methods.tasks.tokens import tokenized


class TokenBatch(NamedTuple):
    """N sequences of T tokens, padded on the right.

    Attributes:
      tokens: int32 `[N, T]`.
      mask: bool `[N, T]`, True at a token, False at padding.
      answer_mask: bool `[N, T]`, True at the positions whose *next* token belongs to the answer, which are
        those whose logits the answer is scored with; never the last position.
    """

    tokens: Any
    mask: Any
    answer_mask: Any


class Encoded(NamedTuple):
    """A `TokenBatch`, and how many of its prompts were cut to fit."""

    batch: TokenBatch
    cut: int


class TokenSequence(NamedTuple):
    """One pair's tokens: `ids[:start]` are special tokens and prompt, `ids[start:]` the answer."""

    ids: list[int]
    start: int


def encode(pairs: Sequence[Pair], tokenizer: Any, length: int, end: Sequence[int] = ()) -> Encoded:
    """Arrays of `length` tokens for each prompt and answer, tokenised as one text.

    Special tokens are those of the Language Model Evaluation Harness. What the tokenizer itself puts in front of a text
    (the first-token mark of many models) stays, unless the text brings it; where neither it nor a prompt is there, the
    tokenizer's first-token mark, or else its mark of the end, is what the answer is predicted from. What the tokenizer
    puts behind a text does not stay: an answer is followed by `end` alone. What does not fit loses the left end of its
    prompt, never a token of its answer nor the mark in front (which the harness cuts away with the rest).

    Args:
      pairs: prompts with their answers.
      tokenizer: a `transformers.PreTrainedTokenizerFast`.
      length: T.
      end: tokens behind every answer, which belong to it.

    Raises:
      ValueError: for no pairs, an answer without tokens or longer than fits, or one that nothing comes
        before.
    """
    return pad(tokenize(pairs, tokenizer, end), length, *marks(tokenizer))


def tokenize(pairs: Sequence[Pair], tokenizer: Any, end: Sequence[int] = ()) -> list[TokenSequence]:
    """Each pair's tokens, at their natural lengths. Arguments and errors as of `encode`."""
    if not pairs:
        raise ValueError("There is nothing to encode: the list of prompts and answers is empty.")
    first, _ = marks(tokenizer)
    texts = [prompt + answer for prompt, answer in pairs]
    found: Any = tokenized(tokenizer, texts, add_special_tokens=False, return_offsets_mapping=True)
    sequences = []
    for pair, whole, places in zip(pairs, found["input_ids"], found["offset_mapping"], strict=True):
        # A space that ends a prompt belongs to the answer's first token in most vocabularies. Where a token spans the
        # border between prompt and answer, the answer starts with it.
        border = len(pair.prompt.rstrip())
        start = next((i for i, (_, end) in enumerate(places) if end > border), len(whole))
        whole = list(whole)
        if start >= len(whole):
            raise ValueError(f"The answer {pair.answer!r} to {pair.prompt[-60:]!r} has no token to score.")
        mark = opening(first, whole)
        if start + len(mark) == 0:
            mark = prefix(tokenizer)
            if not mark:
                raise ValueError(f"The answer {pair.answer[:60]!r} has no prompt to be predicted from.")
            if mark == whole[:1] and len(whole) > 1:
                mark, start = [], 1
        sequences.append(TokenSequence([*mark, *whole, *end], len(mark) + start))
    return sequences


def opening(first: Sequence[int], ids: Sequence[int]) -> list[int]:
    """The special tokens `first`, or none where `ids` begin with them: a mark that a text brings is not doubled."""
    return [] if list(ids[: len(first)]) == list(first) else list(first)


def prefix(tokenizer: Any) -> list[int]:
    """What an answer without a prompt is predicted from: the first-token mark, else the mark of the end, else none."""
    mark = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [] if mark is None else [mark]


def pad(sequences: Sequence[TokenSequence], length: int, first: Sequence[int] = (), fill: int = 0) -> Encoded:
    """Sequences as arrays `[N, length]`, filled up with `fill`, cut behind the special tokens `first`.

    Raises:
      ValueError: if an answer, the special tokens and one token to predict from are more than `length`.
    """
    tokens = np.full((len(sequences), length), fill, np.int32)
    mask = np.zeros((len(sequences), length), bool)
    answer_mask = np.zeros((len(sequences), length), bool)
    cut = 0
    for row, (ids, start) in enumerate(sequences):
        excess = len(ids) - length
        if excess > 0:
            if start - excess < max(len(first), 1):
                raise ValueError(
                    f"An answer of {len(ids) - start} tokens does not fit into {length}, which is --length where texts "
                    "are trained on and the positions of the model where they are tested: leave its row out, or take a "
                    "model with more positions."
                )
            ids, start, cut = [*first, *ids[len(first) + excess :]], start - excess, cut + 1
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
        answer_mask[row, start - 1 : len(ids) - 1] = True
    return Encoded(TokenBatch(tokens, mask, answer_mask), cut)


def marks(tokenizer: Any) -> tuple[list[int], int]:
    """The special tokens in front of a text, and the padding token (any will do, since it is masked).

    Raises:
      ValueError: if the tokenizer writes a text differently between its special tokens, so that these are not known.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked = tokenizer("a", add_special_tokens=True)["input_ids"]
    first = next((i for i in range(len(marked)) if marked[i : i + len(bare)] == bare), None)
    if first is None:
        raise ValueError(
            f"The tokenizer {type(tokenizer).__name__} encodes 'a' as {bare} without special tokens and as {marked} "
            "with them: which of them are special cannot be told."
        )
    return list(marked[:first]), tokenizer.pad_token_id or 0
