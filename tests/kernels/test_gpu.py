"""On a GPU: the compiled kernels are right at a 7B model's shapes, and two runs give the same bits.

The other tests of this folder also run compiled on a CUDA device. Needs torch, triton, numpy, safetensors and pytest:
`python -m pytest -m gpu tests/kernels/test_gpu.py`.
"""

import pytest
import torch

from eval.bench.gpu_cases import flat, verify
from kernels.proof.cases import Make, cases

CASES = [case for dtype in (torch.bfloat16, torch.float16, torch.float32) for case in cases(dtype)]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def label(case) -> str:
    return f"{case.name}, {case.dtype}"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_right_at_the_shapes_of_a_7b_model(case):
    found = verify(case)
    assert found["right"], found


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == torch.bfloat16], ids=label)
def test_the_same_bits_each_run(case):
    torch.manual_seed(0)
    ours = case.build(Make("cuda", case.dtype))[0]
    first, second = ([t.clone() for t in flat(ours())] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
