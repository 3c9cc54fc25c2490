"""The GPU benchmark without a GPU: it starts in a bare image, loses nothing to an error, and says what it lacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval.bench import gpu
from eval.bench.gpu_cases import Setup
from eval.bench.row import Row

ROOT = Path(gpu.__file__).parents[2]
BARE = """
import sys
from importlib.machinery import PathFinder

class Bare:
    needed = {"torch", "triton", "numpy", "safetensors"}
    of_torch = {"torchgen", "functorch", "sympy", "mpmath", "typing_extensions", "filelock", "fsspec", "networkx"}

    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        installed = path is None and spec is not None and "site-packages" in (spec.origin or "")
        return None if installed and name not in Bare.needed | Bare.of_torch else spec

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""
MODELS = """
import torch
from eval.bench import gpu
from eval.bench.gpu_cases import Ids, Setup, random_model
from infer.engine.compiled import decode_step, slots
from infer.engine.fuse import fuse
from infer.engine.generate import Generator

setup = Setup(device="meta")
names = [name for name, _ in gpu.sections(setup, {"bytes/s": 1.0, "operations/s": 1.0})]
model = fuse(random_model(setup, 16))
with torch.no_grad():
    engine = Generator(model, Ids(), lookup=False).engine
    zeros = torch.zeros(2, dtype=torch.int64, device="meta")
    logits = engine.logits(decode_step(engine, 32)(zeros, zeros, *slots(engine, 2, 32)))
print(names[0], len(names), tuple(logits.shape), sum(p.numel() for p in model.parameters()) // 10**8)
"""


def bare(*command: str, **changes: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | changes
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_it_starts_with_torch_triton_numpy_and_safetensors_alone():
    """Everything up to the first launch, on the meta device: the sections, the 7B model with adapters, its step."""
    done = bare("-c", BARE + MODELS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("whole model, rank 0, bf16, batch 1 ") and "(2, 32000) 72" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: the benchmark would run")
def test_it_says_in_one_line_that_it_needs_a_gpu():
    done = bare("-m", "eval.bench", "gpu")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "no CUDA device" in done.stderr


def test_it_names_a_missing_compiler_or_header(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C compiler" in gpu.missing_build_tool()
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(gpu.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in gpu.missing_build_tool()
    (tmp_path / "Python.h").write_text("")
    assert gpu.missing_build_tool() is None


def test_an_error_is_a_row_and_the_file_is_written_after_each_case(tmp_path):
    out, seen = tmp_path / "f.json", []
    row = Row("a", 2.0, 4.0, "peer", "us", "here", 1.0)

    def fails():
        seen.append(json.loads(out.read_text()))
        raise RuntimeError("out of resource")

    def proof():
        seen.append(json.loads(out.read_text()))
        return {"case": "c", "right": False}

    start = {"host": {}, "rows": [], "correct": [], "notes": []}
    sections = iter([("a", lambda: [row]), ("b", fails), ("c", proof)])
    result = gpu.run(sections, 1.0, out, start)
    assert [len(s["rows"]) for s in seen] == [1, 2]
    assert result["rows"][0]["ratio"] == 2.0 and result["rows"][0]["share_of_limit"] == 0.5
    assert result["rows"][1] == {"name": "b", "error": "RuntimeError: out of resource"}
    assert json.loads(out.read_text()) == result and "Wrong: c." in gpu.summary(result)


def test_a_broken_device_is_an_error_row_of_each_case_after_it(tmp_path, monkeypatch):
    """After an illegal address every call into CUDA raises, the one that frees memory between cases too."""

    def broken():
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    start = {"host": {}, "rows": [], "correct": [], "notes": []}
    out = tmp_path / "f.json"
    gpu.run(iter([("a", list), ("b", list)]), 1.0, out, start)
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["a", "b"]


def test_compiled_code_is_dropped_before_each_case(monkeypatch):
    resets = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    start = {"host": {}, "rows": [], "correct": [], "notes": []}
    gpu.run(iter([("a", list), ("b", list)]), 1.0, None, start)
    assert len(resets) == 2


def test_the_order_is_what_a_reader_wants_first():
    names = [name for name, _ in gpu.sections(Setup(), {"bytes/s": 1.0, "operations/s": 1.0})]
    begins = ("whole model", "q, k, v", "extraction", "training", "correct")
    firsts = [next(i for i, name in enumerate(names) if name.startswith(begin)) for begin in begins]
    assert firsts == sorted(firsts) and firsts[0] == 0
    assert names[-1].startswith("correct")


def test_the_time_ends_the_run_between_cases():
    start = {"host": {}, "rows": [], "correct": [], "notes": []}
    result = gpu.run(iter([("a", lambda: 1 / 0)]), 0.0, None, start)
    assert result["rows"] == [] and "stopped after 0 minutes" in result["notes"][0]


def test_a_ratio_above_one_is_ours_whatever_the_unit():
    assert Row("a", 2.0, 4.0, "peer", "us", "").ratio == Row("a", 4.0, 2.0, "peer", "tok/s", "").ratio == 2.0


def test_the_tuned_file_is_laid_out_as_it_is_committed():
    assert gpu.layout(json.loads(gpu.CONFIGS.read_text())) == gpu.CONFIGS.read_text()
