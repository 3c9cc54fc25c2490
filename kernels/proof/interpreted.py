"""Hardware-like bf16 in Triton's interpreter.

The interpreter stores bf16 as uint16. Up to Triton 3.9 it truncates instead of rounding when it casts fp32 to bf16, and
its `dot` multiplies the raw bits. Both would make a correct kernel fail (or a wrong one pass), so both are replaced:
casts round to nearest even, and a bf16 product converts its operands to fp32, which is exact.

The interpreter's fp32 products are NumPy's, whose rounding is that of the host's BLAS: it differs between processors
and says nothing about a GPU. They are therefore summed in fp64 and rounded to fp32 once, so that the tests judge the
kernel's own arithmetic and get the same result on every host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair_bf16() -> None:
    """Replace casts and products in the interpreter's class. A second call has no effect."""
    if getattr(InterpreterBuilder, "_exact_bf16", False):
        return
    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bf16(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(to_fp32(source.data), tl.float32)
        return plain_cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (TensorHandle(to_fp32(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        if a.dtype.scalar == tl.float32 and b.dtype.scalar == tl.float32 and d.dtype.scalar == tl.float32:
            exact = np.matmul(a.data, b.data, dtype=np.float64) + d.data
            return TensorHandle(exact.astype(np.float32), tl.float32)
        return plain_dot(self, a, b, d, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder._exact_bf16 = True


def to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
