"""Encoding of prompts and answers, losses on answers, scoring of choices."""

import functools
import math
import sys

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from methods import tasks
from methods.models import gemma
from methods.tasks import Pair, TokenBatch, encode, evaluate, loss, tokens
from methods.tasks.loss import (
    answer_log_likelihood,
    answer_log_likelihood_at,
    answer_loss,
    answer_loss_at,
    answer_width,
)
from tests.methods.texts import PIQA, question, tokenizer

encode_module = sys.modules["methods.tasks.encode"]  # whose name in the package is that of its function


# --- encoding -----------------------------------------------------------------------------------------------------


def test_answer_mask_is_where_answer_tokens_are_predicted():
    tok = tokenizer()
    batch, cut = encode([Pair("ab:", " xyz"), Pair("a:", " q")], tok, 8)
    assert cut == 0 and batch.tokens.dtype == np.int32
    assert tok.decode(batch.tokens[0][:7]) == "ab: xyz" and batch.mask.sum(1).tolist() == [7, 4]
    assert np.flatnonzero(batch.answer_mask[0]).tolist() == [2, 3, 4, 5]
    predicted = batch.tokens[0][1:][batch.answer_mask[0][:-1]]
    assert tok.decode(predicted) == " xyz"
    assert np.flatnonzero(batch.answer_mask[1]).tolist() == [1, 2]
    assert not batch.answer_mask[:, -1].any()


def test_special_tokens_stay_in_front_and_not_behind():
    batch, _ = encode([Pair("ab:", " x")], tokenizer(ends=True), 8)
    assert batch.tokens[0].tolist()[:1] == [0] and 1 not in batch.tokens[0][batch.mask[0]]
    assert batch.mask.sum() == 6 and np.flatnonzero(batch.answer_mask[0]).tolist() == [3, 4]
    lone, _ = encode([Pair("", "x")], tokenizer(ends=True), 4)  # predicted from <s> alone
    assert np.flatnonzero(lone.answer_mask[0]).tolist() == [0]


def test_a_token_across_the_border_belongs_to_the_answer():
    tok = tokenizer(merges=[(":", "Ġ")])
    batch, _ = encode([Pair("ab:", " x")], tok, 8)
    assert batch.mask.sum() == 4 and np.flatnonzero(batch.answer_mask[0]).tolist() == [1, 2]


@pytest.mark.parametrize("ends", [False, True])
def test_truncation_takes_from_the_left_of_the_prompt(ends):
    tok = tokenizer(ends=ends)
    batch, cut = encode([Pair("abcdefgh:", " xyz"), Pair("a:", " q")], tok, 8)
    assert cut == 1 and batch.mask[0].all()
    assert tok.decode(batch.tokens[0], skip_special_tokens=True) == ("gh: xyz" if ends else "fgh: xyz")
    assert (batch.tokens[0][0] == 0) == ends
    assert np.flatnonzero(batch.answer_mask[0]).tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], r"There is nothing to encode: the list of prompts and answers is empty\."),
        ([Pair("abc", "")], r"The answer '' to 'abc' has no token to score\."),
        ([Pair("abc", " 3456789")], r"An answer of 8 tokens does not fit into 8, .*leave its row out"),
    ],
)
def test_encoding_errors_are_one_sentence(pairs, message):
    with pytest.raises(ValueError, match=message):
        encode(pairs, tokenizer(), 8)


def test_an_answer_that_nothing_comes_before_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match=r"The answer ' x' has no prompt to be predicted from\."):
        encode([Pair("", " x")], bare, 8)


def test_an_end_behind_the_answer_belongs_to_it():
    tok = tokenizer(ends=True)
    (ids, start), (long, _) = encode_module.tokenize([Pair("ab:", " x"), Pair("abcdefgh:", " x")], tok, [1])
    assert ids[-1] == 1 and start == 4 and len(ids) == 7 and len(long) == 13
    batch, cut = encode([Pair("ab:", " x"), Pair("abcdefgh:", " x")], tok, 8, [1])
    assert cut == 1 and np.flatnonzero(batch.answer_mask[0]).tolist() == [3, 4, 5]
    assert batch.tokens[1][-1] == 1 and batch.tokens[1][0] == 0 and batch.mask[1].all()


# --- special tokens, as the harness has them ----------------------------------------------------------------------


def as_the_harness(tok, prompt, answer):
    """What the Language Model Evaluation Harness feeds a causal model: context and continuation."""

    def ids(text):
        prefix = tok.bos_token_id if tok.bos_token_id is not None else tok.eos_token_id
        doubled = text.startswith(tok.decode([prefix]))
        return tok.encode(text, **({"add_special_tokens": False} if doubled else {}))

    if prompt == "":
        mark, answer = tok.bos_token_id or tok.eos_token_id, tok.encode(answer, add_special_tokens=False)
        return ([mark], answer) if answer[0] != mark else (answer[:1], answer[1:])
    spaces = len(prompt) - len(prompt.rstrip())
    prompt, answer = (prompt[:-spaces], prompt[-spaces:] + answer) if spaces else (prompt, answer)
    context = ids(prompt)
    return context, ids(prompt + answer)[len(context) :]


LETTERS = ["▁", *"abcdefghijklmnopqrstuvwxyz:<>/"]


def sentencepiece_like(kind, marks, **options):
    vocab = {token: i for i, token in enumerate([*marks, *LETTERS])}
    return getattr(transformers, kind)(vocab=vocab, merges=[], **options)


def byte_level_like(**options):
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    return transformers.GPT2Tokenizer(vocab=vocab, merges=[], **options)


TOKENIZERS = {
    "llama": lambda: sentencepiece_like("LlamaTokenizer", ["<unk>", "<s>", "</s>"], add_bos_token=True),
    "llama without": lambda: sentencepiece_like("LlamaTokenizer", ["<unk>", "<s>", "</s>"], add_bos_token=False),
    "gemma": lambda: sentencepiece_like(
        "GemmaTokenizer", ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], add_bos_token=True
    ),
    "gpt2": byte_level_like,
    "gpt2 with": lambda: byte_level_like(add_bos_token=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_are_those_of_the_harness(name):
    tok = TOKENIZERS[name]()
    adds = name in ("llama", "gemma", "gpt2 with")
    assert (tok("ab")["input_ids"][0] == tok.bos_token_id) == adds
    mark = tok.bos_token
    pairs = [Pair("ab:", " xy"), Pair("ab: ", "xy"), Pair(f"{mark}ab:", " xy"), Pair("", "xy"), Pair("", f"{mark}xy")]
    for pair, (ids, start) in zip(pairs, encode_module.tokenize(pairs, tok), strict=True):
        context, continuation = as_the_harness(tok, *pair)
        assert (ids[:start], ids[start:]) == (context, continuation), pair
        assert (ids[0] == tok.bos_token_id) == (adds or mark in pair.prompt or pair.prompt == "")
        assert ids.count(tok.bos_token_id) == (ids[0] == tok.bos_token_id)


@pytest.mark.parametrize("adds", [False, True])
def test_gemma_always_begins_with_its_mark(adds):
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tok = sentencepiece_like("GemmaTokenizer", marks, add_bos_token=adds)
    gemma.begin_with_bos(tok)
    assert tok("ab")["input_ids"] == [2, *tok("ab", add_special_tokens=False)["input_ids"]]
    (sequence,) = encode_module.tokenize([Pair("ab", "c")], tok)
    assert sequence.ids[0] == 2 and sequence.ids.count(2) == 1


def test_a_tokenizer_whose_marks_cannot_be_told_is_refused():
    def odd(text, add_special_tokens):
        return {"input_ids": [1, 5] if add_special_tokens else [4]}

    with pytest.raises(ValueError, match=r"encodes 'a' as \[4\] without special tokens and as \[1, 5\] with them"):
        encode_module.marks(odd)


@pytest.mark.parametrize("options", [{}, {"truncation": "longest_first", "max_length": 4}])
def test_many_texts_are_mapped_once_and_found_again(tmp_path, monkeypatch, options):
    monkeypatch.setattr(tokens, "MANY", 3)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    texts, pairs, calls = ["ab", "c", "defg"], ["x", "", "yz"], []

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, *args, **kwargs):
            calls.append(args)
            return super().__call__(*args, **kwargs)

    counting = Counting(tokenizer_object=tokenizer().backend_tokenizer)
    direct = dict(tokenizer()(texts, pairs, **options))
    assert tasks.tokenized(counting, texts, pairs, **options) == direct and calls
    calls.clear()
    counting.backend_tokenizer.enable_truncation(2)  # how it last cut is no part of what it is
    assert tasks.tokenized(counting, texts, pairs, **options) == direct and not calls
    others = [(counting, ["ab", "c", "def"], pairs), (tokenizer([("a", "b")]), texts, pairs), (counting, texts)]
    for arguments in others:
        assert dict(tasks.tokenized(*arguments, **options)) == dict(arguments[0](*arguments[1:], **options))
    assert len(list(tmp_path.rglob("tokens-*.arrow"))) == 1 + len(others)
    tasks.tokenized(counting, texts[:2], pairs[:2])
    assert len(list(tmp_path.rglob("tokens-*.arrow"))) == 1 + len(others)  # few texts are not kept


# --- losses -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored():
    """A batch, hidden states and a head."""
    batch, _ = encode([Pair("ab:", " xyz"), Pair("a:", " q"), Pair("abcdefgh:", " wv")], tokenizer(), 8)
    keys = jax.random.split(jax.random.key(0))
    kernel = jax.random.normal(keys[1], (6, 300), jnp.float64)
    return batch, jax.random.normal(keys[0], (3, 8, 6), jnp.float64), lambda hidden: hidden @ kernel


def by_hand(logits, batch):
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, length = batch.tokens.shape
    return np.array(
        [
            sum(log_p[n, t, batch.tokens[n, t + 1]] for t in range(length) if batch.answer_mask[n, t])
            for n in range(rows)
        ]
    )


def test_answer_loss_is_the_mean_over_answer_tokens(scored):
    batch, hidden, head = scored
    expected = by_hand(head(hidden), batch)
    np.testing.assert_allclose(answer_log_likelihood(head(hidden), batch), expected, rtol=1e-13)
    np.testing.assert_allclose(answer_loss(head(hidden), batch), -expected.sum() / batch.answer_mask.sum(), rtol=1e-13)
    assert answer_loss(head(hidden).astype(jnp.bfloat16), batch).dtype == jnp.float32


def test_loss_at_the_answers_is_the_same_and_so_are_its_derivatives(scored):
    batch, hidden, head = scored
    width = answer_width(batch)
    assert width == 4
    full = lambda hidden: answer_loss(head(hidden), batch)  # noqa: E731

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(loss, hidden):
        return jax.value_and_grad(loss)(hidden), jax.jvp(jax.grad(loss), (hidden,), (jnp.cos(hidden),))[1]

    for wide in (width, 7):
        kept = lambda hidden, wide=wide: answer_loss_at(head, hidden, batch, wide)  # noqa: E731
        for ours, theirs in zip(
            jax.tree.leaves(derivatives(kept, hidden)), jax.tree.leaves(derivatives(full, hidden)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-14)
    at = answer_log_likelihood_at(head, hidden, batch, width)
    np.testing.assert_allclose(at, answer_log_likelihood(head(hidden), batch), rtol=1e-13)


@pytest.mark.parametrize("longest", [2, 3, 4])
def test_answers_in_blocks_have_the_same_loss_and_derivatives(longest, scored, monkeypatch):
    batch, hidden, head = scored
    kept = lambda hidden: answer_loss_at(head, hidden, batch, 4)  # noqa: E731
    both = lambda hidden: (  # noqa: E731
        jax.value_and_grad(kept)(hidden),
        jax.jvp(jax.grad(kept), (hidden,), (jnp.cos(hidden),))[1],
    )
    whole = both(hidden)
    monkeypatch.setattr(loss, "LONGEST", longest)
    for ours, theirs in zip(jax.tree.leaves(both(hidden)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)
    assert jnp.isnan(answer_log_likelihood_at(head, hidden, batch, 3)).tolist() == [True, False, False]


def test_long_answers_need_the_memory_of_a_block_of_logits():
    rows, vocabulary = 2, 8192

    def temporary(length):
        batch = TokenBatch(*(jnp.ones((rows, length), kind) for kind in (jnp.int32, bool, bool)))
        shapes = jnp.ones((rows, length, 8)), jnp.ones((8, vocabulary))
        slope = jax.grad(lambda hidden, kernel: answer_loss_at(lambda h: h @ kernel, hidden, batch, length - 1))
        return jax.jit(slope).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    whole = rows * 1023 * vocabulary * 8
    assert temporary(1024) < 0.6 * whole and temporary(1024) < 1.1 * temporary(512)


def test_a_width_that_cuts_an_answer_gives_nan_and_never_a_part(scored):
    batch, hidden, head = scored
    assert jnp.isnan(answer_log_likelihood_at(head, hidden, batch, 3)).tolist() == [True, False, False]
    assert jnp.isnan(answer_loss_at(head, hidden, batch, 3))


# --- scoring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3.
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_values(correct, total, low, high):
    np.testing.assert_allclose(tasks.wilson(correct, total), (low, high), atol=5e-5)
    np.testing.assert_allclose(tasks.wilson(total - correct, total), (1 - high, 1 - low), atol=5e-5)


def test_wilson_of_nothing():
    assert tasks.wilson(7, 7)[1] == 1.0 and tasks.wilson(0, 7)[0] == 0.0
    with pytest.raises(ValueError, match=r"3 correct of 2 is not a share of anything\."):
        tasks.wilson(3, 2)


def fake_score(tok, score, shapes=None):
    """A score_fn that reads the answers back from the arrays, as a model would have to predict them."""

    def score_fn(tokens, mask, answer_mask):
        if shapes is not None:
            shapes.append(tokens.shape)
        following = np.roll(tokens, -1, axis=1)
        assert (answer_mask <= mask).all()
        return np.array([score(tok.decode(t[m])) for t, m in zip(following, answer_mask, strict=True)])

    return score_fn


def test_scoring_finds_the_right_choice_and_pads_to_few_shapes():
    tok, shapes = tokenizer(), []
    rng = np.random.default_rng(0)
    rows = []
    for i in range(37):
        choices = [f"{'right' if c == i % 3 else 'wrong'} {'z' * int(rng.integers(1, 60))}" for c in range(3)]
        rows.append(question(f"q{i} " + "y" * int(rng.integers(1, 70)), choices, i % 3))
    score = lambda answer: -float(len(answer)) * (1.0 if "right" in answer else 2.0)  # noqa: E731
    result = evaluate(fake_score(tok, score, shapes), PIQA, rows, tok, batch_size=8, max_length=128)
    assert result.accuracy[0] == result.per_token[0] == 1.0 and result.unnormalised.value < 1.0
    assert result.accuracy[3:] == (37, 37) and result.accuracy.low < 1.0 and result.accuracy.high == 1.0
    assert result.predictions.tolist() == [i % 3 for i in range(37)] and result.cut > 0
    for row, scores in zip(rows, result.log_likelihoods, strict=True):
        assert scores.tolist() == [score(" " + choice) for choice in row["choices"]]
    assert {rows for rows, _ in shapes} == {8} and {length for _, length in shapes} <= {32, 64, 96, 128}


def test_nothing_is_cut_unless_a_length_is_asked_for():
    rows = [question("y" * 700, ("one", "two"))]
    score = lambda answer: -float(len(answer))  # noqa: E731
    shapes = []
    assert evaluate(fake_score(tokenizer(), score, shapes), PIQA, rows, tokenizer(), batch_size=2).cut == 0
    assert shapes == [(2, 736)]  # 700 letters, "Question: ", "\nAnswer:" and " one", to the next multiple of 32
    asked = evaluate(fake_score(tokenizer(), score), PIQA, rows, tokenizer(), batch_size=2, max_length=512)
    assert asked.cut == 2


def test_the_three_normalisations():
    tok = tokenizer(merges=[("a", "b")])  # "abab" is four characters and two tokens
    rows = [question("q", ("abab", "xyz"), 0)]
    # Answer tokens: a space and 2, a space and 3. Characters without the space: 4 and 3.
    score = lambda answer: {" abab": -3.1, " xyz": -3.0}[answer]  # noqa: E731
    result = evaluate(fake_score(tok, score), PIQA, rows, tok, batch_size=2)
    assert result.unnormalised.correct == 0  # -3.1 < -3.0
    assert result.per_token.correct == 0  # -3.1/3 < -3.0/4
    assert result.accuracy.correct == 1  # -3.1/4 > -3.0/3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, r"A batch of 5 is not within 1 and the 4 choices there are to score\."),
        ({"batch_size": 0}, r"A batch of 0 is not within 1 and the 4 choices there are to score\."),
        ({"max_length": 0}, r"max_length=0 and multiple=32 must be at least 1\."),
        ({"score": lambda *arrays: 0.0}, r"score_fn returned shape \(\) for 2 sequences: one score each\."),
        ({"score": lambda t, *_: np.full(len(t), math.nan)}, r"The log-likelihood of choice ' one' is nan\."),
        ({"choices": ["one", "z" * 70]}, r"An answer of 71 tokens does not fit into 32, .*leave its row out"),
    ],
)
def test_scoring_errors_are_one_sentence(changes, message):
    settings = {"batch_size": 2, "max_length": 32} | changes
    score = settings.pop("score", lambda tokens, mask, answer_mask: np.zeros(len(tokens)))
    rows = [question("a"), question("b", settings.pop("choices", ("one", "two")))]
    with pytest.raises(ValueError, match=message):
        evaluate(score, PIQA, rows, tokenizer(), **settings)
