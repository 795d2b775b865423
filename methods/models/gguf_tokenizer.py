"""A GGUF file's tokenizer, rebuilt from its metadata with the `tokenizers` library.

Two models are known: byte-level BPE ("gpt2" in the metadata: tokens and merges, and in
`tokenizer.ggml.pre` the name of the rule that cuts text into words) and SentencePiece BPE ("llama": pieces
and scores, from which merges follow). Rules and defaults are those of the upstream tokenizer.json files and of
llama.cpp's llama-vocab.cpp.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from methods.models.checkpoints import explain

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Words(NamedTuple):
    """How a byte-level BPE cuts text first: `words` "" is GPT-2's rule."""

    words: str = ""
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_WORDS = {
    "gpt-2": _Words(),
    "smollm": _Words(digits=True),
    "llama-bpe": _Words(words=_GPT4_WORDS % r"\p{N}{1,3}", ignore_merges=True, add_bos=True),
    "qwen2": _Words(words=_GPT4_WORDS % r"\p{N}", nfc=True),
}
_LONGEST_PIECE = 256
"""Characters; every way to cut a piece in two is tried. The longest known have some 50."""
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def build(meta: Mapping[str, Any], where: str) -> "PreTrainedTokenizerFast":
    """The tokenizer that the metadata describes; `where` is the file, for messages.

    Raises ValueError if the file holds no tokenizer, or one of a kind that is not known.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    kind, tokens = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise ValueError(
            f"{where} holds {f'a tokenizer of kind {kind!r}' if kind else 'no tokenizer'}, but only "
            "'gpt2' and 'llama' tokenizers are read: use the model's Hugging Face folder."
        )
    named = _named(meta, tokens, where)
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(meta, tokens, where)
    else:
        tokenizer, add_bos = _sentencepiece(meta, tokens, where), True
    types = meta.get("tokenizer.ggml.token_type", ())
    for special, kinds in ((True, (_UNKNOWN, _CONTROL)), (False, (_USER_DEFINED,))):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, kind in zip(tokens, types, strict=False)
            if kind in kinds
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    _add_ends(tokenizer, meta, named, add_bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=meta.get(f"{meta['general.architecture']}.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=meta.get("tokenizer.chat_template"),
        **named,
    )


def _named(meta: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, str]:
    """The tokens that have a part of their own. Raises ValueError where the lists or ids do not fit the vocabulary."""
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"{where} has a token twice in tokenizer.ggml.tokens: fetch the file again.")
    for name in ("token_type", "scores"):
        if len(found := meta.get(f"tokenizer.ggml.{name}", tokens)) != len(tokens):
            raise ValueError(f"{where} has {len(tokens)} tokens, but {len(found)} entries in tokenizer.ggml.{name}.")
    for key, index in meta.items():
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and index >= len(tokens):
            raise ValueError(f"{where}: {key} is {index}, but there are only {len(tokens)} tokens.")
    ids = {name: meta.get(f"tokenizer.ggml.{key}_token_id") for name, key in _NAMES.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None}


def _byte_level(meta: Mapping[str, Any], tokens: list[str], where: str) -> tuple["Tokenizer", bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = meta.get("tokenizer.ggml.pre")
    if name not in _WORDS:
        raise ValueError(
            f"{where} cuts text by the rule {name!r}, which is not known ({', '.join(_WORDS)} are): "
            "use the model's Hugging Face folder."
        )
    if meta.get("tokenizer.ggml.add_space_prefix", False):
        raise ValueError(f"{where} puts a space before texts (tokenizer.ggml.add_space_prefix): that is not supported.")
    rule = _WORDS[name]
    vocab = {token: index for index, token in enumerate(tokens)}
    # The library raises bare Exceptions, for instance where a merge makes a token that is not in the vocabulary.
    with explain(f"the tokenizer of {where} contradicts itself: fetch the file again", Exception):
        merges = [tuple(merge.split(" ", 1)) for merge in meta.get("tokenizer.ggml.merges", ())]
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.ignore_merges))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
    if rule.words:
        steps.append(pre_tokenizers.Split(Regex(rule.words), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rule.words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, rule.add_bos


def _sentencepiece(meta: Mapping[str, Any], tokens: list[str], where: str) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(tokens)}
    if (scores := meta.get("tokenizer.ggml.scores")) is None:
        raise ValueError(f"{where} has no tokenizer.ggml.scores, which a 'llama' tokenizer needs.")
    if (longest := max(map(len, tokens))) > _LONGEST_PIECE:
        raise ValueError(f"{where} has a token of {longest} characters, more than the {_LONGEST_PIECE} that are read.")
    # SentencePiece always joins the pair whose union scores highest. As a list of merges: every way to put a
    # piece together, best piece first; ties go to the parts that come first in the vocabulary.
    merges = []
    for piece, index in vocab.items():
        parts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [
            (-scores[index], vocab[left], vocab[right], left, right)
            for left, right in parts
            if left in vocab and right in vocab
        ]
    merges.sort(key=lambda merge: merge[:3])
    unknown = tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)]
    pairs = [merge[3:] for merge in merges]
    with explain(f"the tokenizer of {where} contradicts itself: fetch the file again", Exception):
        tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    scheme = "first" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    after: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*after, decoders.Strip(" ", 1, 0)] if prefix else after)
    return tokenizer


def _add_ends(tokenizer: "Tokenizer", meta: Mapping[str, Any], named: dict[str, str], add_bos: bool) -> None:
    """Begin- and end-of-sequence tokens around what is encoded, where the file asks for them."""
    from tokenizers import processors

    bos, eos = named.get("bos_token"), named.get("eos_token")
    if not (bos and meta.get("tokenizer.ggml.add_bos_token", add_bos)):
        bos = None
    if not (eos and meta.get("tokenizer.ggml.add_eos_token", False)):
        eos = None
    ends = sorted({token for token in (bos, eos) if token})
    if ends:
        single, pair = ([bos] if bos else []), ([f"{bos}:1"] if bos else [])
        single += ["$A"] + ([eos] if eos else [])
        pair += ["$B:1"] + ([f"{eos}:1"] if eos else [])
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=single,
                    pair=single + pair,
                    special_tokens=[(token, tokenizer.token_to_id(token)) for token in ends],
                ),
            ]
        )
