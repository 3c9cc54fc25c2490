"""Tensors in, tensors out: Triton kernels, each beside its PyTorch definition.

Nothing is imported until a name is asked for, so that `import kernels` costs nothing and needs no Triton. A CPU
tensor gets the PyTorch definition, a CUDA tensor the kernel.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# no file is called as what it defines: importing it would put the module in the function's place
_HOME = {
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
__all__ = [*_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(import_module(f"kernels.{_HOME[name]}"), name)
