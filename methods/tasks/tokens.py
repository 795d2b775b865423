"""Texts to token ids; many texts by `datasets`, which maps them in batches and keeps the result on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MANY = 10_000
"""Texts from which on they are kept: about what a fast tokenizer does while `datasets` is imported."""


def tokenized(tokenizer: Any, *texts: Sequence[str], **options: Any) -> Mapping[str, list[list[int]]]:
    """`tokenizer(*texts, **options)`.

    From `MANY` texts on, `datasets` maps them, shows how far it is, and keeps what it gets in the folder `bilevel` of
    its cache (`HF_DATASETS_CACHE`), where the same texts, tokenizer and options find it again.

    Args:
      tokenizer: a `transformers.PreTrainedTokenizerFast`.
      *texts: texts, or texts and what each is paired with.
      **options: of the call.
    """
    if len(texts[0]) < MANY:
        return tokenizer(*texts, **options)
    from datasets import Dataset, config  # most of a second, and of no use for few texts

    # A fast tokenizer remembers how it last cut and padded, which the next call replaces.
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [state | {"truncation": None, "padding": None}, sorted(options.items()), [list(column) for column in texts]]
    key = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:32]
    folder = Path(config.HF_DATASETS_CACHE, "bilevel")
    folder.mkdir(parents=True, exist_ok=True)
    columns = {f"text{i}": list(column) for i, column in enumerate(texts)}
    mapped = Dataset.from_dict(columns).map(
        lambda batch: dict(tokenizer(*(batch[name] for name in columns), **options)),
        batched=True,
        remove_columns=list(columns),
        cache_file_name=str(folder / f"tokens-{key}.arrow"),
        new_fingerprint=key,
        desc="Tokenising",
    )
    return mapped.to_dict()  # pyright: ignore[reportReturnType]
