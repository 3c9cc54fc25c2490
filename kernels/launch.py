"""When a kernel runs, with which tile sizes, and its launch.

Kernels take three kinds of tensors: CUDA tensors (compiled); CPU tensors if TRITON_INTERPRET=1 was set before Triton
was imported (interpreted, for tests and debuggers); and meta tensors inside `recording()`: nothing runs and the launch
is recorded, which is how `kernels.proof` compiles the exact signatures of a 7B model without a GPU or 15 GB of memory.
All other tensors use the PyTorch definition.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
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
except ImportError:  # no Triton on this platform: the PyTorch definitions run
    triton = tl = None
    INTERPRETED = False

if INTERPRETED:
    from kernels.proof import interpreted

    interpreted.repair_bf16()

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEFAULT_CARD = (80, 108)  # (compute capability × 10, SMs) of an A100, assumed without a GPU
CONFIGS: dict[str, dict[str, dict[str, int]]] = json.loads((Path(__file__).parent / "configs.json").read_text())


def jit(*lengths: str) -> Callable[[Callable[..., None]], Any]:
    """`triton.jit`, or the plain function without Triton. `lengths` are integer parameters that change during
    generation (cached tokens, rows): not specialized, or Triton would compile another variant for multiples of 16."""

    def decorate(function: Callable[..., None]) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=list(lengths))

    return decorate


@dataclass(frozen=True)
class Launch:
    """A recorded kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    meta: dict[str, Any]


_recorded: list[Launch] | None = None
_assumed_card: tuple[int, int] | None = None
used_configs: set[tuple[str, str]] = set()  # (kernel, shape class) pairs looked up so far: what a run has covered


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Context in which launches on meta tensors are recorded in the yielded list instead of run."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def runs_here(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES) -> bool:
    """True if the kernel runs on these tensors, False if the caller must use the definition.

    The kernel needs Triton, one dtype out of `dtypes` and one device of the three kinds above. None is ignored."""
    present = [t for t in tensors if t is not None]
    first = present[0]
    if triton is None or first.dtype not in dtypes:
        return False
    if any(t.dtype != first.dtype or t.device != first.device for t in present):
        return False
    return first.is_cuda or (first.is_cpu and INTERPRETED) or (first.is_meta and _recorded is not None)


@contextlib.contextmanager
def assume_card(capability: int, sms: int) -> Iterator[None]:
    """Context in which launches are planned for another GPU, of this compute capability (× 10) and number of SMs."""
    global _assumed_card
    before, _assumed_card = _assumed_card, (capability, sms)
    try:
        yield
    finally:
        _assumed_card = before


def card(device: torch.device) -> tuple[int, int]:
    """(compute capability × 10, number of SMs) of a device."""
    if _assumed_card is not None:
        return _assumed_card
    return _cuda_card(device) if device.type == "cuda" else DEFAULT_CARD


@cache
def _cuda_card(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def config(kernel: str, shape_class: str, device: torch.device) -> dict[str, int]:
    """Tile sizes, warps and stages of a kernel for a class of shapes on a device (configs.json)."""
    used_configs.add((kernel, shape_class))
    return tiles_of(kernel, shape_class, card(device))


def tiles_of(kernel: str, shape_class: str, card: tuple[int, int]) -> dict[str, int]:
    """The configuration tuned for this GPU, else for its architecture, else the default."""
    classes, architecture = CONFIGS[kernel], f"{shape_class} sm_{card[0]}"
    return dict(classes.get(f"{architecture} {card[1]}", classes.get(architecture, classes[shape_class])))


def width(dtype: torch.dtype) -> str:
    """The dtype's part of a shape class: "16" (bits) for bf16 and fp16, "32" for fp32."""
    return "32" if dtype == torch.float32 else "16"


def splits_that_fill(tiles: int, steps: int, slots: int, most: int = 16) -> int:
    """Number of parts (split-K) for a sum of `steps` steps in each of `tiles` tiles, when `slots` programs fit the GPU.

    Minimizes waves × (steps per program + 2), the 2 for filling the pipeline. Example: 96 tiles of 32 steps on 216
    slots. Two parts take one wave of 16 + 2 steps, four parts two waves of 8 + 2, nine parts four waves of 4 + 2, so
    the result is 2.
    """

    def cost(parts: int) -> tuple[int, int]:
        return divide_up(tiles * parts, slots) * (divide_up(steps, parts) + 2), parts

    return min(range(1, max(1, min(most, steps)) + 1), key=cost)


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **meta: Any) -> None:
    """Launch `kernel` on its tensors' device. An empty grid (a batch of no rows) launches nothing."""
    if 0 in grid:
        return
    meta = {"enable_fp_fusion": True, **meta}  # fused multiply-add: explicit, because results depend on it
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, meta))
        return
    first = next(a for a in arguments.values() if isinstance(a, Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[grid](**arguments, **meta)


def captured(functions: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of these calls in sequence, after a warm-up on a side stream that compiles them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for function in [*functions[:2]] * 2:
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    return graph


def rows(x: Tensor) -> Tensor:
    """(…, D) as (N, D) with last stride 1: a view if the strides allow it, else a copy."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(-1) == 1 else x_ND.contiguous()


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def divide_up(a: int, b: int) -> int:
    return -(-a // b)
