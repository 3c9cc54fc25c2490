"""Low-rank adapters on linear layers."""

from lora.adapter import LoRAConfig, add_lora, no_adapter, set_adapter
from lora.dropout import DropoutPlan
from lora.fold import merge_lora, unmerge_lora
from lora.layer import LoRALinear
from lora.peft import load_adapter, save_adapter

__all__ = [
    "DropoutPlan",
    "LoRAConfig",
    "LoRALinear",
    "add_lora",
    "load_adapter",
    "merge_lora",
    "no_adapter",
    "save_adapter",
    "set_adapter",
    "unmerge_lora",
]
