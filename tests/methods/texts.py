"""Rows of tasks, their files, and a byte-level tokenizer."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from methods import tasks

PIQA = tasks.get("piqa")


def question(goal, choices=("one", "two"), label=0):
    return {"goal": goal, "choices": list(choices), "label": label}


def write(folder, rows, name="train.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))


def tokenizer(merges=(), ends=False):
    """A byte-level tokenizer, one token a byte but for `merges`; with `ends`, <s> and </s> around every text."""
    vocab = {"<s>": 0, "</s>": 1}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]:
        vocab[symbol] = len(vocab)
    inner = Tokenizer(models.BPE(vocab, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if ends:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
