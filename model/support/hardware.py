"""Hardware probe: GEMM rates, memory bandwidth, instruction sets, free memory. Measuring takes about half a second.

Between processors with and without bf16 instructions, the ratio of fp32 to bf16 GEMM rates differs by a factor of 100
either way. Programs therefore choose their compute dtype from measured rates, and report their limits from the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def probe(device: str = "cpu") -> dict[str, float]:
    """{"fp32_gflops", "bf16_gflops", "read_gb_per_s"} with torch's current number of threads."""
    return {
        "fp32_gflops": product_rate(torch.float32, device),
        "bf16_gflops": product_rate(torch.bfloat16, device),
        "read_gb_per_s": read_rate(device),
    }


def product_rate(dtype: torch.dtype, device: str = "cpu", seconds: float = 0.1) -> float:
    """GFLOP/s of a GEMM that fits the caches, a small model's MLP (64 rows for bf16, else 512): best of at least two
    runs within `seconds`."""
    rows, inner, columns = 512, 576, 1536
    if dtype == torch.bfloat16:
        rows = 64  # emulated bf16 takes 0.1 s for this already
    a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, inner), (columns, inner)))
    best = min(timed(lambda: product(a, b), device, seconds))
    return 2 * rows * inner * columns / best / 1e9


def read_rate(device: str = "cpu", megabytes: int = 256) -> float:
    """GB/s of reading a tensor much larger than the caches: the better of a sum and a matrix-vector product, because
    some libraries' GEMV does not reach the memory bandwidth."""
    weight = torch.ones(megabytes * 2**20 // 4 // 4096, 4096, device=device)
    vector = torch.ones(4096, device=device)
    best = min(*timed(lambda: weight @ vector, device, 0.1), *timed(lambda: weight.sum(), device, 0.1))
    return weight.numel() * 4 / best / 1e9


def onednn(x_ND: torch.Tensor, weight_OD: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x · Wᵀ + b in fp32 on a CPU by oneDNN's GEMM, whichever GEMM library torch uses by default."""
    return torch.ops.mkldnn._linear_pointwise(x_ND, weight_OD, bias_O, "none", [], "")


def prefers_onednn() -> bool:
    """True if oneDNN's GEMM should replace torch's default: MKL uses AVX-512 on Intel processors only, so on other
    AVX-512 processors oneDNN is faster. Decided by CPU vendor, not timing, so that results are reproducible bit for
    bit."""
    global _prefers_onednn  # not functools.cache, which torch.compile traces through
    if _prefers_onednn is None:
        has_mkl, has_onednn = torch.backends.mkl.is_available(), hasattr(torch.ops.mkldnn, "_linear_pointwise")
        has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        _prefers_onednn = has_mkl and has_onednn and has_avx512 and "GenuineIntel" not in processor()
    return _prefers_onednn


_prefers_onednn: bool | None = None


def use_onednn(x_ND: torch.Tensor, weight_OD: torch.Tensor | None) -> bool:
    """True if `onednn` should compute x · Wᵀ: both are fp32 on a CPU that prefers it."""
    if weight_OD is None or weight_OD.device.type != "cpu":
        return False
    return weight_OD.dtype == torch.float32 == x_ND.dtype and prefers_onednn()


def product(x_ND: torch.Tensor, weight_OD: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x · Wᵀ + b without autograd, by `onednn` where it is faster. For several rows oneDNN's rounding error is 1.5
    times MKL's, because it sums in longer chains (tests/infer/engine/test_quantized_engine.py)."""
    if use_onednn(x_ND, weight_OD):
        return onednn(x_ND, weight_OD, bias_O)
    return torch.nn.functional.linear(x_ND, weight_OD, bias_O)


def processor() -> str:
    """The operating system's description of the processor, including vendor and instruction sets."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()


def host() -> dict[str, Any]:
    """Description of this machine for reports: processor, instruction sets, threads, versions and `probe`'s rates."""
    names = (line.split(":", 1)[1].strip() for line in processor().splitlines() if line.startswith("model name"))
    return {
        "cpu": next(names, platform.processor() or platform.machine()),
        "instruction_sets": instruction_sets(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **probe(),
    }


INSTRUCTION_SETS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def instruction_sets(description: str | None = None) -> list[str]:
    """Those of INSTRUCTION_SETS, on which GEMM rates depend, that a processor has, by its description (None: this
    machine's)."""
    flags = set((processor() if description is None else description).split())
    return [name for name in INSTRUCTION_SETS if name in flags]


@cache
def has_amx() -> bool:
    """True if this processor multiplies bf16 matrices in tiles (AMX), as torch's GEMMs and attention then do."""
    return "amx_bf16" in instruction_sets()


def max_resident_mb(usage: Any) -> float:
    """Peak resident memory in MB, from `resource.getrusage` (bytes on macOS, kilobytes on Linux)."""
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def free_memory(device: str = "cpu") -> float:
    """Free bytes of a device's memory; for "cpu", what is available without swapping."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):  # not Linux
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc): 110 MB after loading 8 layers of a 7B in
    int4."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def timed(call, device: str, seconds: float) -> list[float]:
    """Call repeatedly for `seconds`, at least three times. Returns the seconds of each call but the first (warm-up)."""
    durations: list[float] = []
    began = time.perf_counter()
    while len(durations) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - start)
    return durations[1:]


NO_INT8_PRODUCTS = (  # the message if `int8_products` is False
    "this machine has no fast exact int8 GEMM (VNNI or AMX on a processor, compute capability 7.5 on a GPU)"
)


def int8_products(device: str = "cpu", description: str | None = None) -> bool:
    """True if the device has a fast and exact int8 GEMM: a processor with VNNI or AMX (by its `description`; None: this
    one's), or a CUDA device from Turing on. Without VNNI, sums of two products saturate at 16 bits, or slow
    reference code computes them."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (7, 5)
    return bool({"avx512_vnni", "avx_vnni", "amx_int8"}.intersection(instruction_sets(description)))


@cache
def compute_dtype(device: str = "cpu") -> torch.dtype:
    """The dtype with the fastest large GEMMs: bf16 on GPUs and on processors with bf16 instructions, else fp32."""
    if device != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if product_rate(torch.bfloat16) > 1.2 * product_rate(torch.float32) else torch.float32


@cache
def fastest_dtype(calls: tuple[tuple[int, int], ...], device: str = "cpu") -> tuple[torch.dtype, dict[str, float]]:
    """(dtype, {"float32": ms, "bfloat16": ms}): bf16 if a job's GEMMs take less than 0.9 of their time in fp32, else
    fp32; no times if it is known unmeasured. `calls`: (rows, number of GEMMs with this many rows); some processors are
    fast in bf16 for many rows and very slow for one. Weights are read from memory, as in a decode step."""
    if device != "cpu":
        return torch.bfloat16, {}
    if max(rows for rows, _ in calls) >= 64 and compute_dtype() == torch.float32:
        return torch.float32, {}  # emulated bf16 GEMMs of many rows would take seconds to measure

    def seconds(dtype: torch.dtype, rows: int) -> float:
        x_ND = torch.ones(rows, 2048, dtype=dtype)
        weights = [torch.ones(4096, 2048, dtype=dtype) for _ in range(2)]  # larger than most caches
        return min(timed(lambda: [product(x_ND, weight_OD) for weight_OD in weights], "cpu", 0.05))

    fp32, bf16 = (1e3 * sum(n * seconds(dtype, rows) for rows, n in calls) for dtype in (torch.float32, torch.bfloat16))
    return torch.bfloat16 if bf16 < 0.9 * fp32 else torch.float32, {"float32": fp32, "bfloat16": bf16}
