"""When a kernel runs, with which tile sizes, and how it is launched.

Three kinds of tensors reach a kernel: CUDA tensors (compiled), CPU tensors when TRITON_INTERPRET=1 was set before
Triton was imported (interpreted, for tests and debuggers), and meta tensors inside `recording()` (nothing runs; the
launch is recorded, which is how `kernels.proof` compiles the exact signatures of a 7B model without a GPU or 15 GB of
memory). Everything else gets the PyTorch definition.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:  # no Triton on this platform: every function computes its definition
    triton = tl = None
    INTERPRETED = False

if INTERPRETED:
    from kernels.proof import interpreted

    interpreted.repair_bf16()

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEFAULT_CARD = (80, 108)  # compute capability and SMs that are assumed where there is no card: an A100
CONFIGS: dict[str, dict[str, dict[str, int]]] = json.loads((Path(__file__).parent / "configs.json").read_text())


def jit(*lengths: str) -> Callable[[Callable[..., None]], Any]:
    """`triton.jit`. `lengths` are integers that grow during a generation (cached tokens, rows): Triton would compile
    another variant whenever one becomes, or stops being, a multiple of 16."""

    def decorate(function: Callable[..., None]) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=list(lengths))

    return decorate


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as it would be made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    meta: dict[str, Any]


_recorded: list[Launch] | None = None
asked: set[tuple[str, str]] = set()  # (kernel, shape class) pairs that were looked up: what a run has covered


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches on meta tensors instead of making them."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def runs_here(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES) -> bool:
    """Whether these tensors (one dtype, one device) get the kernel; if not, the caller computes the definition."""
    present = [t for t in tensors if t is not None]
    first = present[0]
    if triton is None or first.dtype not in dtypes:
        return False
    if any(t.dtype != first.dtype or t.device != first.device for t in present):
        return False
    return first.is_cuda or (first.is_cpu and INTERPRETED) or (first.is_meta and _recorded is not None)


@cache
def card(device: torch.device) -> tuple[int, int]:
    """(compute capability × 10, number of SMs) of a device."""
    if device.type != "cuda":
        return DEFAULT_CARD
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def config(kernel: str, shape_class: str, device: torch.device) -> dict[str, int]:
    """Tile sizes, warps and stages of a kernel for a class of shapes: tuned for this card, for its architecture, or the
    default."""
    asked.add((kernel, shape_class))
    return tiles_of(kernel, shape_class, card(device))


def tiles_of(kernel: str, shape_class: str, card: tuple[int, int]) -> dict[str, int]:
    classes, architecture = CONFIGS[kernel], f"{shape_class} sm_{card[0]}"
    return dict(classes.get(f"{architecture} {card[1]}", classes.get(architecture, classes[shape_class])))


def width(dtype: torch.dtype) -> str:
    """The part of a shape class that names the operands' size: "16" for bf16 and fp16, "32" for fp32."""
    return "32" if dtype == torch.float32 else "16"


def splits_that_fill(tiles: int, steps: int, slots: int, most: int = 16) -> int:
    """Into how many parts to split a sum of `steps` steps, so that `tiles` × parts programs fill `slots` slots.

    Minimizes waves × (steps a program + 2), the 2 for filling the pipeline. 96 tiles of 32 steps on 216 slots: two
    parts take one wave of 16 + 2 steps, four parts two waves of 8 + 2, nine parts four waves of 4 + 2: two it is.
    """

    def cost(parts: int) -> tuple[int, int]:
        return divide_up(tiles * parts, slots) * (divide_up(steps, parts) + 2), parts

    return min(range(1, max(1, min(most, steps)) + 1), key=cost)


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
