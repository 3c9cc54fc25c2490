"""bf16 as the hardware does it, in Triton's interpreter.

The interpreter keeps bf16 as uint16. Up to Triton 3.9 it cuts instead of rounding when it narrows fp32 to bf16, and its
`dot` multiplies the raw bits. Both would make a correct kernel fail (or a wrong one pass), so both are replaced:
narrowing rounds to nearest even, and a bf16 product widens its operands, which is exact.

An fp32 product is NumPy's there, so its rounding would be that of the host's BLAS and differ between processors; it
says nothing about a GPU's. Products are therefore summed in fp64 and rounded to fp32 once: what the tests then judge
is the kernel's own arithmetic, the same on every host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair_bf16() -> None:
    """Replace the two operations (casts and products) on the interpreter's class; doing so twice changes nothing."""
    if getattr(InterpreterBuilder, "_exact_bf16", False):
        return
    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(widen(source.data), tl.float32)
        return plain_cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (TensorHandle(widen(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        if a.dtype.scalar == tl.float32 and b.dtype.scalar == tl.float32 and d.dtype.scalar == tl.float32:
            exact = np.matmul(a.data, b.data, dtype=np.float64) + d.data
            return TensorHandle(exact.astype(np.float32), tl.float32)
        return plain_dot(self, a, b, d, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder._exact_bf16 = True


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
