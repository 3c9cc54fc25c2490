"""Triton kernels and their PyTorch definitions, as functions of tensors.

CUDA tensors run the kernel, CPU tensors the definition. A function is imported when it is first used, so that `import
kernels` is fast and needs no Triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# No module has the name of its function: importing it would replace the attribute kernels.NAME by the module.
_MODULE_OF = {
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "swiglu": "activation",
    "lora_linear": "linear",
    "rms_norm_lora_linear": "linear",
    "int4_linear": "int4",
    "repack_int4": "int4",
    "Int4Weight": "int4",
    "linear_cross_entropy": "cross_entropy",
    "tree_attention": "attention",
    "Level": "attention",
}
__all__ = [*_MODULE_OF]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(import_module(f"kernels.{_MODULE_OF[name]}"), name)
