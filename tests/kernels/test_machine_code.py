"""Bounds on the kernels' machine code that follow from their tile sizes; no GPU is needed."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from kernels import launch
from kernels.launch import CONFIGS, assume_card, recording, tiles_of
from kernels.linear import FEW_ROWS
from kernels.proof.cases import Make, cases
from kernels.proof.machine_code import HERE, code_hash

FACTS = json.loads((HERE / "facts.json").read_text())
ROWS = FACTS["rows"]
NARROW = [row for row in ROWS if row["dtype"] == "bfloat16"]
MMA = 16 * 8 * 16  # multiplications of one m16n8k16
NEEDED_IN_FLIGHT = {
    80: 1.4e6 / 108,
    90: 2.7e6 / 132,
}  # bytes an SM: bandwidth × latency (2.0 TB/s, 3.35 TB/s; 0.7, 0.8 µs)


def where(row) -> str:
    return f"{row['case']}, {row['dtype']}, {row['kernel']}, sm_{row['sm']}"


def test_the_facts_belong_to_this_code():
    assert FACTS["code"] == code_hash(), "a kernel or configuration changed: run python -m kernels.proof.machine_code"


def test_every_pinned_configuration_has_a_case():
    launch.used_configs.clear()
    for dtype in (torch.bfloat16, torch.float32):
        for case in cases(dtype):
            with recording():
                case.build(Make("meta", dtype))[0]()
    pinned = {(kernel, name) for kernel, classes in CONFIGS.items() for name in classes if "sm_" not in name}
    assert pinned == launch.used_configs


def test_a_tuned_configuration_is_used_on_its_gpu(monkeypatch):
    """Every kernel with configurations takes the one for the GPU's compute capability and number of SMs."""
    for classes in CONFIGS.values():
        for name in [name for name in classes if "sm_" not in name]:
            monkeypatch.setitem(classes, f"{name} sm_90 132", {**classes[name], "num_warps": 16})
    with assume_card(90, 132), recording() as calls:
        for case in cases(torch.bfloat16):
            case.build(Make("meta", case.dtype))[0]()
    assert {call.kernel.__name__ for call in calls if call.meta["num_warps"] != 16} == {"_epilogue", "_merge"}


def test_no_spills_no_atomics_and_shared_memory_fits():
    for row in ROWS:
        assert row["spills"] == 0 and row["fits"] and row["blocks"] >= 1, where(row)
        assert row["atomics"] == 0 and row["tf32"] == 0, where(row)


def test_no_warp_repeats_another_warps_products():
    """The mma instructions per thread are exactly the tile's multiplications divided among its warps. With a second,
    dependent product Triton puts all warps along the 16 rows, and each computes everything (once 49 instead of 8)."""
    seen = 0
    for row in NARROW:
        tiles = row["tiles"]
        if row["kernel"] in ("_products", "_int4_products"):
            needed = FEW_ROWS * tiles["BO"] * tiles["BD"] // MMA // tiles["num_warps"]
            if row["kernel"] == "_int4_products" and "rank 0" not in row["case"]:
                needed += FEW_ROWS * tiles["BO"] * 64 // MMA // tiles["num_warps"]  # the loop over A's tiles
        elif row["kernel"] == "_epilogue":
            depth = tiles["RANK"] + 4 * tiles["BG"] * bool(tiles["GROUP"])  # int4: two sums in two terms
            needed = FEW_ROWS * tiles["BO"] * depth // MMA // tiles["num_warps"] * (1 + tiles["GATED"])
        elif row["kernel"] == "_partial" and row["sm"] == 80:  # sm_90 has wider instructions for 64 rows
            needed = 2 * tiles["BM"] * tiles["BS"] * 128 // MMA // tiles["num_warps"]
        else:
            continue
        seen += 1
        assert row["mma"] == needed, where(row)
    assert seen >= 60


def test_conversions_are_bounded():
    """No conversions in the products, int4's included. Elsewhere at most one per rounded value, and a few divisions by
    lengths, once per program."""
    for row in ROWS:
        tiles, rounded, once = row["tiles"], 0, 24
        if row["kernel"] in ("_products", "_int4_products"):
            once = 0
        elif row["kernel"] == "_epilogue" and tiles["GROUP"]:  # two sums, each in two terms; every warp has all rows
            rounded = 4 * FEW_ROWS * tiles["BG"] // 32 * (1 + tiles["GATED"])
        elif row["kernel"] == "_backward":  # n, as the forward pass rounded it
            rounded = tiles["BLOCK"] // (32 * tiles["num_warps"])
        assert row["conversions"] <= rounded + once, where(row)


def test_weights_are_loaded_by_wide_asynchronous_copies_with_enough_bytes_in_flight():
    rows = [row for row in NARROW if row["kernel"] in ("_products", "_int4_products", "_partial")]
    for row in rows:
        assert row["copies"]["128"] > 0, where(row)
        assert row["flying"] >= NEEDED_IN_FLIGHT[row["sm"]], where(row)
    for row in ROWS:
        if row["kernel"] in ("_forward", "_backward", "_softmax_loss"):
            assert row["loads"].get("128", 0) > 0, where(row)


@pytest.mark.parametrize(("sm", "sms"), [(80, 108), (90, 132)])
def test_as_many_programs_fit_an_sm_as_the_split_assumes(sm, sms):
    names = {"_products": "linear", "_int4_products": "int4"}
    rows = [row for row in NARROW if row["sm"] == sm and row["kernel"] in names]
    for row in rows:
        kernel = names[row["kernel"]]
        shape_class = "16" if kernel == "linear" else str(row["tiles"]["BD"])
        assert row["blocks"] >= tiles_of(kernel, shape_class, (sm, sms))["RESIDENT"], where(row)
    assert rows


SIGNATURES = """
import torch
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from kernels.proof.machine_code import launches, signature
backend, count = make_backend(GPUTarget("cuda", 80, 32)), 0
for name, call in launches(torch.bfloat16):
    bind = create_function_from_signature(call.kernel.signature, call.kernel.params, backend)
    bound, found, _ = bind(**call.arguments, **call.meta, debug=False)
    kinds, notes = [kind for kind, _ in found], [note for _, note in found]
    constants = find_paths_if(kinds, lambda _, kind: kind == "constexpr")
    attributes = {path: backend.parse_attr(get_iterable_path(notes, path)) for path in find_paths_if(notes, lambda _, note: isinstance(note, str))}
    types, our_constants, our_attributes, _ = signature(call)
    assert list(types.values()) == kinds, name
    assert our_constants == {path: get_iterable_path(list(bound.values()), path) for path in constants}, name
    assert our_attributes == {path: value for path, value in attributes.items() if value}, name
    count += 1
print(count)
"""  # noqa: E501
FRESH = """
import json, torch
from kernels.proof.machine_code import launches, row
for name, call in launches(torch.bfloat16):
    if "q, k, v, rank 16" in name or name == "attention, 1 row, 4096 keys":
        for sm in (80, 90):
            print(json.dumps(row(name, torch.bfloat16, call, sm)))
"""


def compiled(code: str, **changes: str) -> list[str]:
    """Output lines of `code` in a process where Triton compiles and does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | changes
    root = Path(launch.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_signatures_equal_those_of_tritons_just_in_time_compiler():
    """Types, constants and alignments of the recorded launches."""
    assert int(compiled(SIGNATURES)[0]) >= 40


@pytest.mark.slow
@pytest.mark.skipif(version("triton") != FACTS["triton"], reason=f"the facts are of Triton {FACTS['triton']}")
def test_the_decode_kernels_compile_to_the_committed_facts(tmp_path):
    fresh = [json.loads(line) for line in compiled(FRESH, TRITON_CACHE_DIR=str(tmp_path), OMP_NUM_THREADS="1")]
    assert len(fresh) == 12 and all(row in ROWS for row in fresh)
