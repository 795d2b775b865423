"""Adapters: LoRA parameters as a pytree hook, and PEFT's folder format."""

from methods.adapters.lora import LoRA, LoRAConfig
from methods.adapters.peft import load_peft, save_peft

__all__ = ["LoRA", "LoRAConfig", "load_peft", "save_peft"]
