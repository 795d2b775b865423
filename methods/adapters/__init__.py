"""Adapters: LoRA parameters as a pytree hook, and PEFT's folder format."""

from methods.adapters.lora import LoRA, LoRAConfig

__all__ = ["LoRA", "LoRAConfig"]
