"""How other trainers are told of an adapter that is to be trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def snippets(folder: Path, config: Mapping[str, Any], modules: Sequence[str]) -> list[tuple[str, str, str]]:
    """How other trainers are told of an adapter: `(title, language, text)`.

    axolotl and LLaMA-Factory take one rank for all modules; where there are several, theirs is the commonest, which the
    title says.

    Args:
      folder: where PEFT finds the configuration.
      config: that configuration.
      modules: the full names of the adapted modules.
    """
    targets, layers = list(config["target_modules"]), config.get("layers_to_transform")
    one = " (it takes one rank for all modules: this is the commonest)" if config["rank_pattern"] else ""
    peft = f"""from peft import LoraConfig, get_peft_model

config = LoraConfig.from_pretrained({str(folder)!r})
model = get_peft_model(model, config)"""
    axolotl = ["adapter: lora", f"lora_r: {config['r']}", f"lora_alpha: {config['lora_alpha']}"]
    axolotl += [f"lora_target_modules: {json.dumps(targets)}"]
    if layers is not None:
        pattern = config["layers_pattern"]
        axolotl += [f"peft_layers_to_transform: {json.dumps(layers)}", f"peft_layers_pattern: {json.dumps([pattern])}"]
    factory = [
        "finetuning_type: lora",
        f"lora_rank: {config['r']}",
        f"lora_alpha: {config['lora_alpha']}",
        # It has no option for layers, so that these are named one by one.
        f"lora_target: {','.join(targets if layers is None else modules)}",
    ]
    return [
        ("peft", "python", peft),
        (f"axolotl{one}", "yaml", "\n".join(axolotl)),
        (f"LLaMA-Factory{one}", "yaml", "\n".join(factory)),
    ]
