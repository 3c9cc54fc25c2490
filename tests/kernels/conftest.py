"""Kernels run in Triton's interpreter without a CUDA device, compiled with one.

Triton decides at import whether its functions are interpreted, and another test may already have imported it. So it is
imported again here with TRITON_INTERPRET set, and so is the benchmark that holds the kernels' cases; the variable is
removed afterwards for the tests of other folders.
"""

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    for name in [n for n in sys.modules if n.split(".")[0] in ("triton", "kernels")]:
        if "_C" not in name:
            del sys.modules[name]
    for name in ("gpu", "gpu_cases"):
        if sys.modules.pop(f"eval.bench.{name}", None):
            delattr(sys.modules["eval.bench"], name)
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        for path in sorted((Path(__file__).parents[2] / "kernels").rglob("*.py")):
            if path.stem != "__init__":
                __import__(".".join(path.relative_to(Path(__file__).parents[2]).with_suffix("").parts))
        with contextlib.suppress(ImportError):  # else imported at the first launch, without the variable
            __import__("triton.experimental.gluon")
    finally:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture(scope="session")
def device() -> str:
    """The device of the kernels. Skips without Triton, when definitions would be compared with themselves."""
    from kernels import launch

    if launch.triton is None:
        pytest.skip("needs Triton, which make test installs on Linux")
    assert DEVICE == "cuda" or launch.INTERPRETED
    return DEVICE


def errors(value, truth) -> tuple[float, float]:
    """(root mean square, largest) error against the fp64 result."""
    if not truth.numel():
        return 0.0, 0.0
    distance = (value.double() - truth).abs()
    return float(distance.pow(2).mean().sqrt()), float(distance.max())


@pytest.fixture(scope="session")
def as_good_as(device):
    """check(ours, plain, truth): our rms error against fp64 is at most twice that of the same PyTorch operation in the
    same dtype, and our largest error at most four times PyTorch's. Where PyTorch happens to be exact (one row of one
    value), unavoidable roundings are allowed: of the result, and four in fp32 (a root, a quotient, two products), each
    half an ulp of the largest value."""

    def check(ours, plain, truth) -> None:
        assert ours.shape == truth.shape and ours.dtype == plain.dtype
        assert torch.isfinite(ours).all() and torch.isfinite(plain).all()  # twice an infinite error bounds nothing
        final = torch.finfo(ours.dtype).eps / 2 if ours.dtype != torch.float32 else 0.0
        floor = (final + 4 * 2**-24) * (float(truth.abs().max()) if truth.numel() else 0.0)
        for name, factor, mine, theirs in zip(
            ("rms", "largest"), (2, 4), errors(ours, truth), errors(plain, truth), strict=True
        ):
            assert mine <= max(factor * theirs, floor), f"{name} error {mine:.3e}; PyTorch's {theirs:.3e}, {floor=:.3e}"

    return check
