"""When a kernel runs, with which tile sizes, and how it is started.

Three kinds of tensors reach a kernel: CUDA tensors (compiled), CPU tensors when TRITON_INTERPRET=1 was set before
Triton was imported (interpreted, for tests and for stepping through with a debugger), and meta tensors inside
`recording()` (nothing runs; the launch is written down, which is how `kernels.compile` learns the exact signature that
a 7B model would use without a GPU or 15 GB of memory). Everything else gets the PyTorch definition.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:  # no Triton on this platform: the definitions are all there is
    triton = tl = None
    INTERPRETED = False

    def jit(function: Callable[..., None]) -> Callable[..., None]:
        return function


if INTERPRETED:
    from kernels import interpreted

    interpreted.repair_bf16()

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONFIGS: dict[str, dict[str, dict[str, int]]] = json.loads((Path(__file__).parent / "configs.json").read_text())


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as it would be made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    meta: dict[str, Any]


_recorded: list[Launch] | None = None
asked: set[tuple[str, str]] = set()  # (kernel, shape class) pairs looked up so far: what a run has covered


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Write launches on meta tensors down instead of making them."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def runs_here(*tensors: Tensor | None) -> bool:
    """Whether these tensors (one dtype, one device) get the kernel; if not, the caller computes the definition."""
    present = [t for t in tensors if t is not None]
    first = present[0]
    if triton is None or first.dtype not in KERNEL_DTYPES:
        return False
    if any(t.dtype != first.dtype or t.device != first.device for t in present):
        return False
    return first.is_cuda or (first.is_cpu and INTERPRETED) or (first.is_meta and _recorded is not None)


def config(kernel: str, shape_class: str) -> dict[str, int]:
    """The pinned tile sizes, warps and stages of a kernel for a class of shapes."""
    asked.add((kernel, shape_class))
    return CONFIGS[kernel][shape_class]


def width(dtype: torch.dtype) -> str:
    """The part of a shape class that names the operands' size: "16" for bf16 and fp16, "32" for fp32."""
    return "32" if dtype == torch.float32 else "16"


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **meta: Any) -> None:
    """Start `kernel` on its tensors' device. An empty grid is no launch: a batch of no rows has nothing to do."""
    if 0 in grid:
        return
    meta = {"enable_fp_fusion": True, **meta}  # a·b + c in one rounding: stated, since results depend on it
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, meta))
        return
    first = next(a for a in arguments.values() if isinstance(a, Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[grid](**arguments, **meta)


def rows(x: Tensor) -> Tensor:
    """(…, D) as (N, D) whose last stride is 1: a view where the strides allow, else a copy."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(-1) == 1 else x_ND.contiguous()


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def divide_up(a: int, b: int) -> int:
    return -(-a // b)
