"""Load a model in NF4, add LoRA, run it with fastkit's kernels."""

from fastkit.models.load import load
from fastkit.models.lora import add_lora, load_adapter

__all__ = ["add_lora", "load", "load_adapter"]
