"""Adapters: LoRA, rsLoRA and DoRA as a pytree hook, and PEFT's folder format."""

from methods.adapters.hook import LoRA
from methods.adapters.lora import LoRAConfig
from methods.adapters.peft import save_peft
from methods.adapters.peft_import import Adapter, load_peft

__all__ = ["Adapter", "LoRA", "LoRAConfig", "load_peft", "save_peft"]
