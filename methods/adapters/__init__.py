"""Adapters: LoRA, rsLoRA and DoRA as a pytree hook, PEFT's folder format, and LoRATRF's own."""

from methods.adapters.edit_folder import Edited, load_edit, save_edit
from methods.adapters.hook import LoRA
from methods.adapters.lora import LoRAConfig
from methods.adapters.peft import save_peft
from methods.adapters.peft_import import Adapter, load_peft

__all__ = ["Adapter", "Edited", "LoRA", "LoRAConfig", "load_edit", "load_peft", "save_edit", "save_peft"]
