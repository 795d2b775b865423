"""How other trainers are told of an adapter that is to be trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def snippets(
    folder: Path | str, config: Mapping[str, Any], modules: Sequence[str], outputs: int = 0
) -> list[tuple[str, str, str]]:
    """How other trainers are told of an adapter: `(title, language, text)`.

    axolotl and LLaMA-Factory take one rank for all modules, and an alpha that is a whole number; where there are
    several, theirs is the commonest, and where it is none, the nearest, which the title says.

    Args:
      folder: where PEFT finds the configuration.
      config: that configuration.
      modules: the full names of the adapted modules.
      outputs: of a head of classes, or 0.
    """
    targets, layers = list(config["target_modules"]), config.get("layers_to_transform")
    alpha, remarks = round(config["lora_alpha"]), []
    if config["rank_pattern"]:
        remarks.append("it takes one rank for all modules: this is the commonest")
    if alpha != config["lora_alpha"]:
        remarks.append(f"it takes whole numbers as alpha: this was {config['lora_alpha']:.4g}")
    remark = f" ({'; '.join(remarks)})" if remarks else ""
    axolotl = ["adapter: lora", f"lora_r: {config['r']}", f"lora_alpha: {alpha}"]
    axolotl += [f"lora_target_modules: {json.dumps(targets)}"]
    if layers is not None:
        pattern = config["layers_pattern"]
        axolotl += [f"peft_layers_to_transform: {json.dumps(layers)}", f"peft_layers_pattern: {json.dumps([pattern])}"]
    factory = [
        "finetuning_type: lora",
        f"lora_rank: {config['r']}",
        f"lora_alpha: {alpha}",
        # It has no option for layers, so that these are named one by one.
        f"lora_target: {','.join(targets if layers is None else modules)}",
    ]
    if dropout := config.get("lora_dropout"):
        axolotl.append(f"lora_dropout: {dropout:g}")
        factory.append(f"lora_dropout: {dropout:g}")
    for kind in ("rslora", "dora"):
        if config.get(f"use_{kind}"):
            axolotl.append(f"peft_use_{kind}: true")
            factory.append(f"use_{kind}: true")
    return [
        ("peft", "python", _peft(folder, config, outputs)),
        (f"axolotl{remark}", "yaml", "\n".join(axolotl)),
        (f"LLaMA-Factory{remark}", "yaml", "\n".join(factory)),
    ]


_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}
"""Of transformers, by the kind of model in PEFT's configuration; it has none for multiple choice."""


def _peft(folder: Path | str, config: Mapping[str, Any], outputs: int) -> str:
    """Lines of Python that load the model and put the adapter into it."""
    model, kind = Path(config["base_model_name_or_path"]), config.get("task_type")
    name = _CLASSES.get(str(kind), "AutoModelForMultipleChoice")
    where = f"{str(model.parent)!r}, gguf_file={model.name!r}" if model.suffix == ".gguf" else repr(str(model))
    labels = f", num_labels={outputs}" if kind == "SEQ_CLS" else ""
    return f"""from peft import LoraConfig, get_peft_model
from transformers import {name}

model = {name}.from_pretrained({where}{labels})
config = LoraConfig.from_pretrained({str(folder)!r})
model = get_peft_model(model, config)"""
