"""What this machine can do, measured in about half a second: processors differ too much to assume anything.

fp32 and bf16 matrix products differ by a factor of 100 either way between processors with and without bf16
instructions, and memory bandwidth bounds decoding; programs choose their compute dtype and print their limits
from these three figures.
"""

from __future__ import annotations

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
    """{"fp32_gflops", "bf16_gflops", "read_gb_per_s"} with torch's present number of threads.

    Products are 512 × 576 by 576 × 1536 (a small model's MLP), best of several; reading is a sum over 256 MB.
    """
    return {
        "fp32_gflops": product_rate(torch.float32, device),
        "bf16_gflops": product_rate(torch.bfloat16, device),
        "read_gb_per_s": read_rate(device),
    }


def product_rate(dtype: torch.dtype, device: str = "cpu", seconds: float = 0.1) -> float:
    """GFLOP/s of a product that fits the caches, by the library that is faster here; best of as many as the time allows
    (at least two)."""
    rows, inner, columns = 512, 576, 1536
    if dtype == torch.bfloat16:
        rows = 64  # where bf16 is emulated, one such product already takes a tenth of a second
    a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, inner), (columns, inner)))
    best = min(timed(lambda: product(a, b), device, seconds))
    return 2 * rows * inner * columns / best / 1e9


def read_rate(device: str = "cpu", megabytes: int = 256) -> float:
    """GB/s of reading a tensor much larger than the caches: the better of a sum and a matrix-vector product (some
    libraries' products read slower than the processor does)."""
    weight = torch.ones(megabytes * 2**20 // 4 // 4096, 4096, device=device)
    vector = torch.ones(4096, device=device)
    best = min(*timed(lambda: weight @ vector, device, 0.1), *timed(lambda: weight.sum(), device, 0.1))
    return weight.numel() * 4 / best / 1e9


def onednn(x_ND: torch.Tensor, weight_OD: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x · Wᵀ + b in fp32 on a CPU by oneDNN, where torch's default is another library."""
    return torch.ops.mkldnn._linear_pointwise(x_ND, weight_OD, bias_O, "none", [], "")


def onednn_suits() -> bool:
    """Whether `onednn` is the faster product here: torch's default library is MKL, which keeps its AVX-512 code for
    Intel's processors, and the processor is another with AVX-512. A rule and not a measurement, which would fall
    otherwise on a busy machine and change the last bits."""
    global _onednn_suits  # not functools.cache, which torch.compile looks through
    if _onednn_suits is None:
        wide = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        found = wide and hasattr(torch.ops.mkldnn, "_linear_pointwise") and "GenuineIntel" not in processor()
        _onednn_suits = found
    return _onednn_suits


_onednn_suits: bool | None = None


def suits_onednn(x_ND: torch.Tensor, weight_OD: torch.Tensor | None) -> bool:
    """Whether `onednn` is the faster product of these two."""
    if weight_OD is None or weight_OD.device.type != "cpu":
        return False
    return weight_OD.dtype == torch.float32 == x_ND.dtype and onednn_suits()


def product(x_ND: torch.Tensor, weight_OD: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x · Wᵀ + b by the library that is faster here, without a gradient (oneDNN sums several rows' products in longer
    chains than the default: errors are one and a half times as large, tests/infer/engine/test_quantized_engine.py)."""
    if suits_onednn(x_ND, weight_OD):
        return onednn(x_ND, weight_OD, bias_O)
    return torch.nn.functional.linear(x_ND, weight_OD, bias_O)


def processor() -> str:
    """What the system says of the processor, its maker among it."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()


def host() -> dict[str, Any]:
    """What figures were measured on: processor, threads, product rates and read bandwidth."""
    names = (line.split(":", 1)[1].strip() for line in processor().splitlines() if line.startswith("model name"))
    return {
        "cpu": next(names, platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **probe(),
    }


def max_resident_mb(usage: Any) -> float:
    """The peak resident memory in a `resource` usage, in MB: macOS counts it in bytes, Linux in kilobytes."""
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def free_memory(device: str = "cpu") -> float:
    """Bytes that a device has free; of a host's memory what could be had without swapping."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):  # no Linux
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def timed(call, device: str, seconds: float) -> list[float]:
    """Seconds of each of at least three calls, for as long as `seconds` allows; the first is left out."""
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken[1:]


NO_INT8_PRODUCTS = (
    "this machine has no fast exact products of 8-bit integers "
    "(VNNI or AMX on a processor, compute capability 7.5 on a GPU)"
)
"""What is said where `int8_products` is false."""


def int8_products(device: str = "cpu", flags_text: str | None = None) -> bool:
    """Whether 8-bit integers are multiplied fast and exactly here: by a processor with VNNI or AMX (`flags_text`: its
    description; None: this one's), or by a CUDA device from Turing on. Without VNNI, sums of pairs saturate at 16 bits,
    or are computed by slow reference code."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (7, 5)
    flags = set((processor() if flags_text is None else flags_text).split())
    return bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})


@cache
def compute_dtype(device: str = "cpu") -> torch.dtype:
    """The dtype in which products are fastest here: bf16 on GPUs and on processors that have it, else fp32."""
    if device != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if product_rate(torch.bfloat16) > 1.2 * product_rate(torch.float32) else torch.float32


@cache
def fastest_dtype(calls: tuple[tuple[int, int], ...], device: str = "cpu") -> torch.dtype:
    """The dtype in which a job's products are fastest: `calls` are (rows, how many products of so many rows). bf16 if
    it takes nine tenths of fp32's time. (Some processors have fast bf16 products of many rows, and very slow ones of
    one.) Weights are read from memory, as a step reads them."""
    if device != "cpu":
        return torch.bfloat16
    if max(rows for rows, _ in calls) >= 64 and compute_dtype() == torch.float32:
        return torch.float32  # emulated bf16 products of many rows would take seconds to measure

    def taken(dtype: torch.dtype, rows: int) -> float:
        x_ND = torch.ones(rows, 2048, dtype=dtype)
        weights = [torch.ones(4096, 2048, dtype=dtype) for _ in range(2)]  # more than most caches hold
        best = onednn if dtype == torch.float32 and onednn_suits() else torch.nn.functional.linear
        return min(timed(lambda: [best(x_ND, each) for each in weights], "cpu", 0.05))

    narrow, wide = (sum(n * taken(dtype, rows) for rows, n in calls) for dtype in (torch.bfloat16, torch.float32))
    return torch.bfloat16 if narrow < 0.9 * wide else torch.float32
