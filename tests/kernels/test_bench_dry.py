"""The whole of `eval.bench gpu` at small sizes without a GPU: what Python alone can get wrong is wrong here.

The kernels are interpreted, and `torch.cuda`'s graphs, events and figures are stood in for: what is captured runs once,
and nothing is timed. That a step reads nothing back is tested on the meta device, at a 7B's sizes.
"""

import contextlib
import json
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from answering_models import write_model

from eval.bench import gpu, gpu_cases
from kernels import launch
from kernels.proof import cases as work
from model import Transformer
from model.support.init import init_weights

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: run the benchmark itself")
SIZES = {"WIDTH": 128, "FFN": 128, "VOCAB": 64, "HEADS": 4, "GROUPS": 2, "HEAD": 32, "QKV": (128, 64, 64)}
FEWER = {"rows": 3, "width": 128, "own": 40, "prefix": 20}  # a case's sizes, where it has them
SMALL = {
    "DEPTH": 1,
    "BATCHES": (3,),
    "REPEATS": 1,
    "HELD": 8,
    "SLOTS": 16,
    "NOTES": 2,
    "NOTE_TOKENS": 9,
    "QUESTION_TOKENS": 4,
    "NEW_TOKENS": 2,
}


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    def replay(self):
        pass


class Event:
    def __init__(self, enable_timing):
        self.record = self.synchronize = lambda: None

    def elapsed_time(self, other):
        return 1000.0  # the least repetitions


@pytest.fixture
def small(monkeypatch):
    """The benchmark's model and cases, a few numbers wide."""
    for name, value in SIZES.items():
        monkeypatch.setattr(work, name, value)
        if hasattr(gpu_cases, name):
            monkeypatch.setattr(gpu_cases, name, value)
    for name, value in {**SMALL, "ROW_TOKENS": 12}.items():
        monkeypatch.setattr(gpu_cases, name, value)
    layers = {"q, k, v": ((128, 64, 64), 128), "o": ((128,), 128), "gate, up": ((128, 128), 128), "down": ((128,), 128)}
    monkeypatch.setattr(gpu_cases, "LAYERS", layers)

    def few(dtype):
        for case in work.cases(dtype):
            if "rank 64" in case.name or case.name.endswith(", 8 rows"):  # the same Python as rank 16 and one row
                continue
            given = case.build.keywords
            fewer = {key: FEWER[key] for key in given if key in FEWER}
            sizes = {"sizes": tuple(min(o, 128) for o in given["sizes"])} if "sizes" in given else {}
            two = {"rows": 2} if "prefix" in given else {}  # half of the rows below each prefix
            yield work.Case(
                case.name, case.kernel, dtype, partial(case.build.func, **{**given, **fewer, **sizes, **two})
            )

    for module in (gpu, gpu_cases):
        monkeypatch.setattr(module, "cases", lambda dtype: list(few(dtype)))


@pytest.fixture
def stand_in(small, monkeypatch):
    """torch.cuda as far as the benchmark calls it; the CPU in the device's place, a card of one SM."""
    nothing = contextlib.nullcontext
    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nothing(),
        "CUDAGraph": Graph,
        "graph": lambda graph: nothing(),
        "Event": Event,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1000),
        "get_device_name": lambda: "a processor",
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 2**30,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda codes, tiles: codes)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", lambda x, words, group, steps: x[:, :1])
    monkeypatch.setattr(gpu_cases, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "what_is_missing", lambda: None)
    monkeypatch.setattr(gpu, "reached", lambda: {"bytes/s": 1e9, "operations/s": 1e9})
    with launch.assume_card(80, 1):
        yield


@pytest.mark.slow
def test_every_case_runs_and_is_right(stand_in, tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft", reason="needs peft: make test installs it")
    inputs = tmp_path / "inputs"
    monkeypatch.setattr(gpu_cases, "INPUTS", inputs)
    init_weights(gpu_cases.random_7b(), 1).save_pretrained(inputs)
    (inputs / "tokens.json").write_text(json.dumps({"notes": [[5, 6, 7], [5, 6, 8]], "questions": [[9], [10, 11]]}))
    out = tmp_path / "f.json"
    code = gpu.main(["--json", str(out), "--minutes", "60"])
    result = json.loads(out.read_text())
    assert [row for row in result["rows"] if "error" in row] == []
    assert [proof for proof in result["correct"] if not proof["right"]] == []
    assert code == 0 and not result["notes"]
    names = [row["name"] for row in result["rows"]]
    for part in ("decode, int4, LoRA r 16 unmerged, batch 3", "extraction, the prepared base", "blocks recomputed"):
        assert any(part in name for name in names), part
    assert {row["peer_name"].split(" (")[0] for row in result["rows"] if row["peer_name"]} >= {"peft", "torch.compile"}
    assert "extraction" in capsys.readouterr().out


def test_what_is_prepared_is_what_the_extraction_case_reads(tmp_path, monkeypatch):
    base = write_model(tmp_path / "base")
    monkeypatch.setattr(gpu_cases, "INPUTS", tmp_path / "inputs")
    monkeypatch.setattr(gpu_cases, "NOTES", 2)
    assert gpu.main(["--prepare", str(base)]) == 0
    inputs = json.loads((tmp_path / "inputs" / "tokens.json").read_text())
    model = Transformer.from_pretrained(tmp_path / "inputs", dtype=torch.bfloat16)
    assert (len(inputs["notes"]), len(inputs["questions"])) == (2, gpu_cases.QUESTIONS)
    assert all(0 <= token < model.config.vocab_size for ids in sum(inputs.values(), []) for token in ids)


def test_tuning_writes_after_each_class_and_leaves_the_layout_of_int4(stand_in, tmp_path, monkeypatch):
    """Three classes of sizes, of which smaller tiles are taken where they are sooner."""
    kept = {kernel: deepcopy(launch.CONFIGS[kernel]) for kernel in ("swiglu", "int4", "softmax")}
    monkeypatch.setattr(launch, "CONFIGS", {**launch.CONFIGS, **kept})
    monkeypatch.setattr(gpu, "CONFIGS", tmp_path / "configs.json")
    written = []
    monkeypatch.setattr(gpu, "write_text", lambda path, text: written.append(json.loads(text)))
    monkeypatch.setattr(
        gpu, "cost", lambda some: float(sum(launch.CONFIGS["swiglu"].get("any sm_80 1", {"BLOCK": 1024}).values()))
    )
    assert gpu.main(["--tune"]) == 0
    assert len(written) >= 6
    assert written[0]["rms_norm"] and "any sm_80 1" in written[-1]["swiglu"]
    assert launch.CONFIGS["int4"]["128 sm_80 1"]["BD"] == 128 and written[-1]["swiglu"]["any sm_80 1"]["BLOCK"] == 512


def test_tuning_times_graphs_and_refuses_what_is_wrong_or_fails(stand_in, monkeypatch):
    """A launch takes less time than the Python before it, which a graph leaves out."""
    replayed = []
    monkeypatch.setattr(Graph, "replay", lambda self: replayed.append(1))
    one = [case for case in gpu.cases(torch.bfloat16) if case.kernel == "swiglu"]
    assert 0 < gpu.cost(one) < float("inf") and replayed
    monkeypatch.setattr(gpu, "verify", lambda case: {"right": False})
    assert gpu.cost(one) == float("inf")
    monkeypatch.setattr(gpu, "verify", lambda case: 1 / 0)
    assert gpu.cost(one) == float("inf")


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_7bs_step_reads_nothing_back_and_launches_what_is_counted(four_bit, monkeypatch):
    """All of Mistral-7B on the meta device, its launches recorded: an operation that reads a tensor's value raises."""
    from infer.engine.fuse import DecodeStep, fuse

    monkeypatch.setattr(gpu_cases, "DEVICE", "meta")
    with launch.recording() as launches, torch.inference_mode():
        step = DecodeStep(fuse(gpu_cases.random_7b(16), four_bit), 8, 1024)
        tokens = torch.zeros(8, dtype=torch.int64, device="meta")
        logits = step(tokens, tokens + 512)
    assert logits.shape == (8, 32000) and logits.device.type == "meta"
    a_layer = ["_partial", "_merge"] + ["_int4_products" if four_bit else "_products", "_epilogue"] * 4
    names = sorted(one.kernel.__name__ for one in launches)
    assert names == sorted(a_layer * 32 + ["_products", "_epilogue"])


def test_a_training_step_reads_nothing_back_but_the_positions(monkeypatch):
    """Forward and backward of one block of a 7B with adapters on every layer; the launches are recorded."""
    from infer.engine.fuse import fuse
    from kernels import linear_cross_entropy

    monkeypatch.setattr(gpu_cases, "DEVICE", "meta")
    monkeypatch.setattr(gpu_cases, "DEPTH", 1)
    monkeypatch.setattr("model.fast_attention.contiguous", lambda visible: True)  # reads positions, once a pass
    with launch.recording() as launches:
        model = gpu_cases.random_7b(16)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        tokens = torch.zeros(1, 2048, dtype=torch.int64, device="meta")

        def loss(x_BTD, head):
            return linear_cross_entropy(x_BTD[0, :-1], model.lm_head.weight, tokens[0, 1:])

        fuse(model.train())(tokens, readout=loss).backward()
        grads = [parameter.grad.device.type for name, parameter in model.named_parameters() if "lora_" in name]
    assert grads == ["meta"] * 14
    assert {"_forward", "_backward", "_softmax_loss"} == {one.kernel.__name__ for one in launches}
