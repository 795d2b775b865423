"""What a key of a config.json or of a GGUF file may say: it is used, known to change nothing, or refused by name.

A file from a stranger may describe a model that ours is not. So a family lists every key it understands in one table,
and `read` refuses what is not in it: a key that is passed over in silence is a wrong number that looks right. A number
that anything is counted or allocated by is compared with the tensors first.
"""

import reprlib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class Sizes(NamedTuple):
    """What bounds the numbers of a file: how many tensors it holds, and the largest dimension of any of them."""

    tensors: int
    longest: int


class Key(NamedTuple):
    """One key. wanted: which values there are for it, "" if the one given is. used: the model depends on it.

    why: what it means, where it changes nothing.
    """

    wanted: Callable[[Any, Sizes], str]
    used: bool = True
    why: str = ""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60

Table = Mapping[str, Key]
"""Keys by name, or by pattern, as "general.base_model.*"."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _between(low: int, high: int, value: Any, bound: str = "") -> str:
    return "" if _whole(value) and low <= value <= high else f"a whole number from {low} to {high}{bound}"


def only(*values: Any) -> Key:
    """These values mean what the model computes; any other means something else."""

    def wanted(value: Any, sizes: Sizes) -> str:
        del sizes
        fits = any(type(value) is type(known) and value == known for known in values)
        return "" if fits else " or ".join(map(repr, values))

    return Key(wanted)


def optional(key: Key) -> Key:
    """`key`, or null."""

    def wanted(value: Any, sizes: Sizes) -> str:
        problem = "" if value is None else key.wanted(value, sizes)
        return problem and f"{problem}, or null"

    return key._replace(wanted=wanted)


def inert(why: str, *names: str) -> dict[str, Key]:
    """Keys that change nothing that is computed here, whatever they say, and why."""
    return dict.fromkeys(names, Key(lambda value, sizes: "", used=False, why=why))


_LARGEST = 1e38  # about what float32 holds

LAYERS = Key(lambda v, s: _between(1, s.tensors, v, ", the number of tensors in the file"))
SIZE = Key(lambda v, s: _between(1, s.longest, v, ", the largest dimension of a tensor in the file"))
WHOLE = Key(lambda v, s: _between(0, 2**31 - 1, v))
COUNT = Key(lambda v, s: _between(1, 2**31 - 1, v))
REAL = Key(lambda v, s: "" if _number(v) and 0 <= v < _LARGEST else f"a number from 0 to {_LARGEST:g}")
POSITIVE = Key(lambda v, s: "" if _number(v) and 0 < v < _LARGEST else f"a number above 0, up to {_LARGEST:g}")
FLAG = Key(lambda v, s: "" if isinstance(v, bool) else "true or false")
TEXT = Key(lambda v, s: "" if isinstance(v, str) else "a text")
TEXTS = Key(
    lambda v, s: "" if isinstance(v, list) and all(isinstance(one, str) for one in v) else "a list of texts"
)
NUMBERS = Key(lambda v, s: "" if isinstance(v, list) and all(map(_number, v)) else "a list of numbers")
DICT = Key(lambda v, s: "" if isinstance(v, dict) else "an object of keys and values")


def every(*values: str) -> Key:
    """A list of these texts."""
    fits = set(values)

    def wanted(value: Any, sizes: Sizes) -> str:
        del sizes
        known = isinstance(value, list) and all(isinstance(one, str) and one in fits for one in value)
        return "" if known else f"a list of {' and '.join(map(repr, values))}"

    return Key(wanted)


def read(settings: Mapping[str, Any], table: Table, sizes: Sizes, where: str, model: str) -> dict[str, Any]:
    """The settings that the model depends on, each of a kind and a size that it may have.

    where: the file; model: what it is to become; for messages. Raises ValueError on a key that is not in the table, and
    on a value that means another computation than ours, or none.
    """
    patterns = [name for name in table if "*" in name]
    used: dict[str, Any] = {}
    for name, value in settings.items():
        key = table.get(name) or next((table[rule] for rule in patterns if fnmatchcase(name, rule)), None)
        if key is None:
            raise ValueError(
                f"{where} has the key {shown(name)} ({shown(value)}), which is not known for a {model} model and may "
                "change what it computes: take it out of the file if you know that it does not."
            )
        if problem := key.wanted(value, sizes):
            raise ValueError(f"{where}: {name} is {shown(value)}, but a {model} model here needs {problem}.")
        if key.used:
            used[name] = value
    return used


def shown(value: Any) -> str:
    """`value` as a message shows it: short, and in one line, however large it is."""
    return _SHORT.repr(value)[:100]


COMMON: Table = {
    **inert("which class and which version wrote the file", "architectures", "model_type", "transformers_version"),
    **inert("a name", "_name_or_path", "name_or_path", "tokenizer_class", "finetuning_task", "task_specific_params"),
    **inert("code that is never run here: what is computed is what model_type names", "auto_map"),
    **inert("the dtype is the one that `load` is asked for", "torch_dtype", "dtype", "use_bfloat16"),
    **inert("names of a head's outputs, compared with its rows, or its loss", "id2label", "label2id", "problem_type"),
    **inert("what is returned beside the result", "output_attentions", "output_hidden_states", "return_dict"),
    **inert("what is returned beside the result", "use_return_dict", "output_scores", "return_dict_in_generate"),
    **inert("how torch computes the same", "torchscript", "attn_implementation", "_attn_implementation"),
    **inert("how torch computes the same", "_attn_implementation_internal", "_attn_implementation_autoset"),
    **inert("how torch computes the same", "_flash_attn_2_enabled", "experts_implementation", "use_cache"),
    **inert("how torch computes the same", "cache_implementation", "chunk_size_feed_forward", "output_past"),
    **inert("how torch computes the same", "gradient_checkpointing", "pretraining_tp", "reorder_and_upcast_attn"),
    **inert("how training draws its start", "initializer_range", "init_std", "initializer_factor"),
    **inert("dropout of training", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    **inert("dropout of training", "dropout", "activation_dropout", "layerdrop", "classifier_dropout"),
    **inert("dropout of training", "hidden_dropout_prob", "attention_probs_dropout_prob", "summary_first_dropout"),
    **inert("what a tokenizer has", "bos_token_id", "eos_token_id", "eos_token_ids", "pad_token_id", "sep_token_id"),
    **inert("what a tokenizer has", "unk_token_id", "mask_token_id", "cls_token_id", "pad_token", "prefix"),
    **inert("what a tokenizer has", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
    **inert("what texts were cut to in training", "model_max_length", "max_sequence_length"),
    **inert("how text is generated", "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "top_k"),
    **inert("how text is generated", "num_beam_groups", "diversity_penalty", "temperature", "top_p", "typical_p"),
    **inert("how text is generated", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids"),
    **inert("how text is generated", "encoder_no_repeat_ngram_size", "num_return_sequences", "remove_invalid_values"),
    **inert("how text is generated", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    **inert("which tool trained or packed it", "unsloth_version", "unsloth_fixed", "transformers.js_config"),
    **inert("which tool trained or packed it", "neftune_noise_alpha", "tf_legacy_loss", "xla_device"),
    "_num_labels": optional(SIZE)._replace(used=False),
    "num_labels": optional(SIZE)._replace(used=False),
    "is_encoder_decoder": only(False),
    "add_cross_attention": only(False),
    "cross_attention_hidden_size": only(None),
    "tie_encoder_decoder": only(False),
    "pruned_heads": only({}, None),
    "tie_word_embeddings": FLAG,
}
"""Keys of config.json that transformers' configs share, as they bear on a model with one stack of layers."""

_GGUF_NAMES = ("name", "author", "version", "organization", "finetune", "basename", "description", "quantized_by")
_GGUF_LINKS = ("size_label", "license", "license.*", "url", "doi", "uuid", "repo_url", "source.*", "base_model.*")
GGUF: Table = {
    **inert("who made the file, and of what", *(f"general.{name}" for name in (*_GGUF_NAMES, *_GGUF_LINKS))),
    **inert("who made the file, and of what", "general.dataset.*", "general.datasets", "general.tags"),
    **inert("who made the file, and of what", "general.languages", "general.parameter_count", "quantize.imatrix.*"),
    **inert("each tensor says its own type", "general.file_type", "general.quantization_version"),
    **inert("how text is generated", "general.sampling.*"),
    **inert("how the header is read, and it is", "general.alignment", "split.tensors.count"),
    "general.architecture": TEXT,
    "general.type": only("model"),
    "split.no": only(0),
    "split.count": only(0, 1),
    "tokenizer.ggml.model": TEXT,
    "tokenizer.ggml.pre": TEXT,
    "tokenizer.ggml.tokens": TEXTS,
    "tokenizer.ggml.token_type": NUMBERS,
    "tokenizer.ggml.scores": NUMBERS,
    "tokenizer.ggml.merges": TEXTS,
    "tokenizer.ggml.add_bos_token": FLAG,
    "tokenizer.ggml.add_eos_token": FLAG,
    "tokenizer.ggml.add_space_prefix": FLAG,
    "tokenizer.ggml.add_sep_token": only(False),
    "tokenizer.ggml.remove_extra_whitespaces": only(False),
    "tokenizer.ggml.*_token_id": WHOLE,
    "tokenizer.chat_template": TEXT,
    **inert("templates beside the one that is used", "tokenizer.chat_template.*", "tokenizer.chat_templates"),
}
"""Keys of GGUF files that do not begin with the architecture's name."""
