"""Every field of PEFT's `LoraConfig`: what it means to us, and which values of it are understood.

A field is *used*, or *inert* (at these values the loaded adapter computes the same whatever it is), or *off* (at the
one value that leaves out what our LoRA does not do). Other values, and other fields unless they are empty, are refused:
an adapter that is read by half computes something else without a word. A field that a later PEFT adds is off where it
is null, false or empty, as those of all versions up to now are.

Fields as of peft 0.21, and `enable_lora` and `merge_weights` of 0.2. What was looked up there is in each reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from methods.adapters.patterns import compiled, ending, shortened

MERGE = "merge the adapter in PEFT (merge_and_unload) and load the merged model"
CONVERT = "save the adapter in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
STARTS = {"pissa": "pissa", "olora": "olora"}
"""Starts that PEFT takes from the base matrix when it loads the adapter again, and from the matrix at once."""
_CLASSIFIERS = ("classifier", "score")  # what PEFT adds to modules_to_save for SEQ_CLS


class Field(NamedTuple):
    """What a value must be (`allowed`), why it may be that, and what to do where it is not."""

    kind: str  # "used", "inert" or "off"
    allowed: Callable[[Any], bool]
    reason: str
    otherwise: str = "which is no value that PEFT gives it"


def _none(value: Any) -> bool:
    return value is None


def _empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _table(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _alpha(value: Any) -> bool:
    # Bounded, so that alpha / r is a finite float32.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _optional(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or of(value)


def _values(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(of(entry) for entry in value.values()))


def _start(value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return True
    return isinstance(value, str) and (
        value in ("eva", "orthogonal") or value.lower() in ("gaussian", "mica", "olora") or value == "pissa"
    )


_NOT_OURS = f"which our LoRA does not do: {MERGE}"

FIELDS: dict[str, Field] = {
    "peft_type": Field("used", lambda v: v == "LORA", "", "which is no LoRA: only LORA is read"),
    "r": Field("used", _rank, "", "which is no rank: a whole number from 1 up"),
    "lora_alpha": Field("used", _alpha, "", "which is no scale: a positive number"),
    "rank_pattern": Field("used", _values(_rank), "", "which is no table of ranks, whole numbers from 1 up"),
    "alpha_pattern": Field("used", _values(_alpha), "", "which is no table of scales, positive numbers"),
    "use_rslora": Field("used", _flag, ""),
    "use_dora": Field("used", _flag, ""),
    "target_modules": Field(
        "used",
        lambda v: bool(v) and (isinstance(v, str) or _names(v)),
        "",
        "which names no module: write the names of the adapted modules",
    ),
    "exclude_modules": Field("used", lambda v: v is None or isinstance(v, str) or _names(v), ""),
    "layers_to_transform": Field(
        "used", lambda v: v is None or _index(v) or (isinstance(v, list) and all(map(_index, v))), ""
    ),
    "layers_pattern": Field("used", lambda v: v is None or isinstance(v, str) or _names(v), ""),
    "modules_to_save": Field("used", _optional(_names), ""),
    "task_type": Field(
        "used",
        lambda v: v in (None, "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"),
        "",
        "whose head is none of ours: CAUSAL_LM, SEQ_CLS and FEATURE_EXTRACTION are read",
    ),
    "init_lora_weights": Field(
        "used", _start, "", f"a start that changes the base model and cannot be made again at loading: {CONVERT}"
    ),
    # Where it comes from.
    "peft_version": Field("inert", _text, "says who wrote the file"),
    "base_model_name_or_path": Field("inert", _text, "the base model is given"),
    "revision": Field("inert", _text, "the base model is given"),
    "auto_mapping": Field("inert", _table, "chooses the class that loads the base model"),
    "inference_mode": Field("inert", _optional(_flag), "says whether gradients are wanted"),
    "runtime_config": Field("inert", _table, "where arrays lie"),
    # What was so in training alone.
    "lora_dropout": Field(
        "inert",
        lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v <= 1,
        "acts in training alone",
        "which is no rate: a number from 0 to 1",
    ),
    "merge_weights": Field("inert", _flag, "the same function, merged or not"),
    "eva_config": Field("inert", _table, "read before training alone; a start B = 0 that leaves the base as it is"),
    # Read with a start that is refused.
    "corda_config": Field("inert", _table, "read with init_lora_weights='corda' alone"),
    "lora_ga_config": Field("inert", _table, "read with init_lora_weights='lora_ga' alone"),
    "loftq_config": Field("inert", _table, "read with init_lora_weights='loftq' alone"),
    "qalora_group_size": Field("inert", lambda v: v is None or _index(v), "read with use_qalora alone"),
    "megatron_core": Field("inert", _text, "read with megatron_config alone"),
    # PEFT sets both right by the class of the module.
    "fan_in_fan_out": Field("inert", _optional(_flag), "PEFT sets it by the class of the linear"),
    "ensure_weight_tying": Field("inert", _flag, "of embeddings alone, whose adapters are refused by their tensors"),
    # What our LoRA does not do.
    "bias": Field("off", lambda v: v == "none", "", f"and so other biases than the base model's: {MERGE}"),
    "lora_bias": Field("off", lambda v: v is False or v is None, "", f"a bias behind B, {_NOT_OURS}"),
    "alora_invocation_tokens": Field(
        "off",
        _none,
        "",
        "an adapter that acts after these tokens alone (aLoRA), which merges into none: use it in PEFT",
    ),
    "layer_replication": Field("off", _empty, "", f"a model of other layers than ours: {MERGE}"),
    "trainable_token_indices": Field("off", _none, "", f"trained rows of the embedding, {_NOT_OURS}"),
    "target_parameters": Field("off", _empty, "", f"an adapter of parameters that are in no linear, {_NOT_OURS}"),
    "megatron_config": Field("off", _none, "", f"linears of Megatron, {_NOT_OURS}"),
    "use_qalora": Field("off", lambda v: v is False or v is None, "", f"pooled inputs, {_NOT_OURS}"),
    "velora_config": Field("off", _none, "", f"VeLoRA, {_NOT_OURS}"),
    "monteclora_config": Field("off", _none, "", f"sampled weights, {_NOT_OURS}"),
    "use_bdlora": Field("off", _none, "", f"block-diagonal factors, {_NOT_OURS}"),
    "arrow_config": Field("off", _none, "", "a router between adapters, which ours has not: use it in PEFT"),
    "kasa_config": Field("off", _none, "", f"a base without its smallest singular values, {_NOT_OURS}"),
    "enable_lora": Field("off", _none, "", f"an adapter of parts of a joint linear, {_NOT_OURS}"),
}


class Fields(NamedTuple):
    """An `adapter_config.json` that is understood.

    Attributes:
      rank, alpha: of modules that no pattern names.
      rank_pattern, alpha_pattern: `{pattern: value}`.
      rslora, dora: kind.
      targets, excluded: names, or one regular expression.
      layers: `layers_to_transform`, or None.
      layers_pattern: names of the list of layers.
      saved: `modules_to_save`, with what PEFT adds for the task.
      task: `task_type`.
      start: a value of `STARTS`, or "".
      where: the file, for messages.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    task: str | None
    start: str
    where: str

    def rank_of(self, module: str) -> int:
        """PEFT's look-up: the first key that, as a regular expression, matches the end of the module's name."""
        return self._first("rank_pattern", module, self.rank)

    def alpha_of(self, module: str) -> float:
        """As `rank_of`."""
        return self._first("alpha_pattern", module, self.alpha)

    def adapts(self, module: str) -> bool:
        """Whether PEFT puts an adapter on a linear of this name (its `check_target_module_exists`)."""
        if isinstance(self.excluded, str):
            if self._match("exclude_modules", self.excluded, module):
                return False
        elif _ends(module, self.excluded):
            return False
        if any(self._match("modules_to_save", saved, module, r"(^|.*\.){}($|\..*)") for saved in self.saved):
            return False
        if isinstance(self.targets, str):
            return self.targets.lower() == "all-linear" or bool(self._match("target_modules", self.targets, module))
        if module in self.targets:
            return True
        return _ends(module, self.targets) and (self.layers is None or self._layer(module) in self.layers)

    def _layer(self, module: str) -> int | None:
        """The index that PEFT counts as the layer's."""
        around = [(pattern, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.") for pattern in self.layers_pattern]
        for pattern, expression in around or [("", r".*?\.[^.]*\.(?P<idx>\d+)\.")]:
            if found := self._match("layers_pattern", pattern, module, expression):
                return int(found.group("idx"))
        return None

    def _first(self, table: str, module: str, default: Any) -> Any:
        patterns = getattr(self, table)
        return next((v for p, v in patterns.items() if self._match(table, p, module, ending("{}"))), default)

    def _match(self, field: str, pattern: str, module: str, within: str = "") -> Any:
        """A match of all of the module's name; or of its beginning, with the expression that PEFT puts around."""
        try:
            expression = compiled(within.replace("{}", pattern, 1) if within else pattern)
        except ValueError as error:
            raise ValueError(f"{self.where} sets {field} to {shortened(pattern)}, which {error}.") from None
        return expression.match(module) if within else expression.fullmatch(module)


def understood(settings: Any, where: str) -> Fields:
    """The fields of an `adapter_config.json`, each of them understood.

    Raises:
      ValueError: names the first field that is not, or that PEFT itself refuses.
    """
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise ValueError(f"{where} is damaged or no adapter config: it is no table with a peft_type.")
    if settings.get("target_modules") is None:
        raise ValueError(f"{where} has no target_modules: write the names of the adapted modules there.")
    for name, value in sorted(settings.items(), key=lambda item: item[0] != "peft_type"):
        field = FIELDS.get(name)
        if field is None and not _empty(value):
            raise ValueError(
                f"{where} sets {shortened(name)} to {shortened(value)}, a field that is not known (PEFT 0.21 has "
                "none of this name): what it changes would be lost, so load the adapter in PEFT and merge it, or take "
                "the field out if it changes nothing."
            )
        if field is not None and not field.allowed(value):
            raise ValueError(f"{where} sets {name} to {shortened(value)}, {field.otherwise}.")
    targets, layers = settings["target_modules"], settings.get("layers_to_transform")
    if isinstance(targets, str) and layers is not None:
        raise ValueError(
            f"{where} sets layers_to_transform beside a target_modules that is one expression, which PEFT refuses: "
            "write the layers into the expression."
        )
    if settings.get("layers_pattern") and layers is None:
        raise ValueError(f"{where} sets layers_pattern without layers_to_transform, which PEFT refuses: give both.")
    start = settings.get("init_lora_weights", True)
    task = settings.get("task_type")
    return Fields(
        rank=settings.get("r", 8),
        alpha=settings.get("lora_alpha", 8),
        rank_pattern=settings.get("rank_pattern") or {},
        alpha_pattern=settings.get("alpha_pattern") or {},
        rslora=settings.get("use_rslora", False),
        dora=settings.get("use_dora", False),
        targets=targets if isinstance(targets, str) else tuple(targets),
        excluded=_tuple(settings.get("exclude_modules"), keep=str),
        layers=_tuple(layers) or None,
        layers_pattern=_tuple(settings.get("layers_pattern")),
        saved=_tuple(settings.get("modules_to_save")) + (_CLASSIFIERS if task == "SEQ_CLS" else ()),
        task=task,
        start=STARTS.get(start.lower() if isinstance(start, str) else "", ""),
        where=where,
    )


def _tuple(value: Any, keep: type | None = None) -> Any:
    """One entry or a list of them as a tuple; what is of the type `keep` as it is."""
    if value is None or value == "":
        return ()
    if keep is not None and isinstance(value, keep):
        return value
    return tuple(value) if isinstance(value, list) else (value,)


def _ends(module: str, names: tuple[str, ...]) -> bool:
    return module in names or any(module.endswith(f".{name}") for name in names)
