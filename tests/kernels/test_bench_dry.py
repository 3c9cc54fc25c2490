"""The whole of `eval.bench gpu` at small sizes without a GPU: what Python alone can get wrong is wrong here.

The kernels are interpreted, and `torch.cuda`'s graphs, events and figures are stood in for: what is captured runs once,
and nothing is timed. That a step reads nothing back is tested on the meta device, at a 7B's sizes.
"""

import contextlib
import inspect
import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from answering_models import write_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval.bench import gpu
from eval.bench.gpu_cases import Setup, random_model
from kernels import launch
from kernels.proof.cases import Case, cases
from model import Transformer
from model.support.init import init_weights

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: run the benchmark itself")
SHAPE = {"width": 128, "vocab": 64, "heads": 4, "groups": 2, "head": 32}
FEWER = {"rows": 3, "own": 40, "prefix": 20}  # a case's sizes, where it has them


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    replays = 0

    def replay(self):
        Graph.replays += 1


class Event:
    def __init__(self, enable_timing):
        self.record = self.synchronize = lambda: None

    def elapsed_time(self, other):
        return 1000.0  # the least repetitions


def small_cases(dtype):
    """The cases, a few numbers wide."""
    found = []
    for case in cases(dtype):
        if "rank 64" in case.name or case.name.endswith(", 8 rows"):  # the same Python as rank 16 and one row
            continue
        given, taken = case.build.keywords, inspect.signature(case.build.func).parameters
        fewer = {key: FEWER[key] for key in given if key in FEWER}
        shape = {key: size for key, size in SHAPE.items() if key in taken}
        sizes = {"sizes": tuple(min(o, 128) for o in given["sizes"])} if "sizes" in given else {}
        two = {"rows": 2} if "prefix" in given else {}  # half of the rows below each prefix
        small = partial(case.build.func, **{**given, **fewer, **shape, **sizes, **two})
        found.append(Case(case.name, case.kernel, dtype, small))
    return found


SMALL = Setup(
    device="cpu",
    ffn=128,
    depth=1,
    batches=(3,),
    held=8,
    slots=16,
    notes=2,
    note_tokens=9,
    question_tokens=4,
    new_tokens=2,
    row_tokens=12,
    repeats=1,
    read_numbers=1000,
    gemm_size=16,
    kernel_cases=small_cases,
    **SHAPE,
)


@pytest.fixture
def stand_in(monkeypatch):
    """torch.cuda as far as the benchmark calls it: a card of one SM."""
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
    with launch.assume_card(80, 1):
        yield


@pytest.fixture
def kept_configs():
    """The tuned configurations are put back afterwards."""
    before = deepcopy(launch.CONFIGS)
    yield
    launch.CONFIGS.clear()
    launch.CONFIGS.update(before)


@pytest.mark.slow
def test_every_case_runs_and_is_right(stand_in, tmp_path, capsys):
    pytest.importorskip("peft", reason="needs peft: make test installs it")
    setup = replace(SMALL, inputs=tmp_path / "inputs")
    init_weights(random_model(setup), 1).save_pretrained(setup.inputs)
    ids = {"notes": [[5, 6, 7], [5, 6, 8]], "questions": [[9], [10, 11]]}
    (setup.inputs / "tokens.json").write_text(json.dumps(ids))
    out = tmp_path / "f.json"
    code = gpu.measure(60, out, setup)
    result = json.loads(out.read_text())
    assert [row for row in result["rows"] if "error" in row] == []
    assert [proof for proof in result["correct"] if not proof["right"]] == []
    assert code == 0 and not result["notes"]
    names = [row["name"] for row in result["rows"]]
    for part in (
        "decode, int4, LoRA r 16 unmerged, batch 3",
        "extraction, the prepared base",
        "blocks recomputed",
        "train/fast",
    ):
        assert any(part in name for name in names), part
    assert {row["peer_name"].split(" (")[0] for row in result["rows"] if row["peer_name"]} >= {"peft", "torch.compile"}
    assert "extraction" in capsys.readouterr().out


def test_what_is_prepared_is_what_the_extraction_case_reads(tmp_path):
    setup = replace(SMALL, inputs=tmp_path / "inputs")
    assert gpu.prepare(str(write_model(tmp_path / "base")), setup) == 0
    inputs = json.loads((setup.inputs / "tokens.json").read_text())
    model = Transformer.from_pretrained(setup.inputs, dtype=torch.bfloat16)
    assert (len(inputs["notes"]), len(inputs["questions"])) == (2, setup.questions)
    assert all(0 <= token < model.config.vocab_size for ids in sum(inputs.values(), []) for token in ids)


def test_tuning_writes_after_each_class_and_leaves_the_layout_of_int4(stand_in, kept_configs, tmp_path):
    """At a cost that falls with swiglu's tile, smaller tiles are kept."""
    path, written = tmp_path / "configs.json", []

    def cost_of(some):
        if path.exists() and (text := path.read_text()) not in written:
            written.append(text)
        return float(sum(launch.CONFIGS["swiglu"].get("any sm_80 1", {"BLOCK": 1024}).values()))

    assert gpu.tune(4, SMALL, path, cost_of) == 0
    assert len(written) >= 5
    first, last = json.loads(written[0]), json.loads(path.read_text())
    assert "any sm_80 1" not in first["swiglu"] and last["swiglu"]["any sm_80 1"]["BLOCK"] == 512
    assert last["int4"]["128 sm_80 1"]["BD"] == 128


def test_tuning_times_graphs_and_refuses_what_is_wrong_or_fails(stand_in):
    """A launch takes less time than the Python before it, which a graph leaves out."""
    (right,) = (case for case in small_cases(torch.bfloat16) if case.kernel == "swiglu")

    def wrong(make):
        ours, plain, truth = right.build(make)
        return lambda: [2 * part for part in ours()], plain, truth

    def fails(make):
        raise RuntimeError("out of resource")

    before = Graph.replays
    assert 0 < gpu.cost(SMALL, [right]) < float("inf") and Graph.replays > before
    assert gpu.cost(SMALL, [replace(right, build=wrong)]) == float("inf")
    assert gpu.cost(SMALL, [replace(right, build=fails)]) == float("inf")


class OnDevice(TorchDispatchMode):
    """Fails at an operation on a tensor of the host: a CUDA graph cannot capture a copy from pageable memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        assert all(each.is_meta for each in tensors), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_7bs_step_reads_nothing_back_and_launches_what_is_counted(four_bit):
    """All of Mistral-7B on the meta device, its launches recorded: an operation that reads a tensor's value raises."""
    from infer.engine.compiled import decode_step, slots
    from infer.engine.forward import Engine
    from infer.engine.fuse import fuse

    with launch.recording() as launches, torch.inference_mode():
        engine = Engine(fuse(random_model(Setup(device="meta"), 16), four_bit))
        tokens = torch.zeros(8, dtype=torch.int64, device="meta")
        step, cache = decode_step(engine, 1024), slots(engine, 8, 1024)
        with OnDevice():
            logits = engine.logits(step(tokens, tokens + 512, *cache))
    assert logits.shape == (8, 32000) and logits.device.type == "meta"
    a_layer = ["_partial", "_merge"] + ["_int4_products" if four_bit else "_products", "_epilogue"] * 4
    names = sorted(one.kernel.__name__ for one in launches)
    assert names == sorted(a_layer * 32)


class TrueWhereRead(TorchFunctionMode):
    """Answers bool(tensor) with True, which a meta tensor cannot, and counts it."""

    reads = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__bool__:
            self.reads += 1
            return True
        return function(*args, **(kwargs or {}))


def test_a_training_step_reads_nothing_back_but_the_positions():
    """Forward and backward of one block of a 7B with adapters on every layer; the launches are recorded."""
    from infer.engine.fuse import fuse
    from kernels import linear_cross_entropy

    with launch.recording() as launches:
        model = random_model(Setup(device="meta", depth=1), 16)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        tokens = torch.zeros(1, 2048, dtype=torch.int64, device="meta")

        def loss(x_BTD, head):
            return linear_cross_entropy(x_BTD[0, :-1], model.lm_head.weight, tokens[0, 1:])

        with TrueWhereRead() as read:
            fuse(model.train())(tokens, readout=loss).backward()
        grads = [parameter.grad.device.type for name, parameter in model.named_parameters() if "lora_" in name]
    assert grads == ["meta"] * 14 and read.reads == 1
    assert {"_forward", "_backward", "_softmax_loss"} == {one.kernel.__name__ for one in launches}
