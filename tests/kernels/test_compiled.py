"""What the compiler makes of every pinned configuration, without a GPU."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import kernels.launch
from kernels.cases import Make, cases
from kernels.compile import code_hash, differences, markdown

ROOM = Path(kernels.launch.__file__).parent
TABLE = json.loads((ROOM / "compiled.json").read_text())
CODE = [(row, row[sm]) for row in TABLE["rows"] for sm in ("sm_80", "sm_90") if sm in row]


def test_every_pinned_configuration_is_in_the_table():
    kernels.launch.asked.clear()
    for dtype in (torch.bfloat16, torch.float32):
        for case in cases(dtype):
            with kernels.launch.recording():
                case.build(Make("meta", dtype))[0]()
    assert CODE and TABLE["traffic"]  # the tests below walk over them
    pinned = {(kernel, name) for kernel, classes in kernels.launch.CONFIGS.items() for name in classes}
    assert kernels.launch.asked == pinned
    compiled = [
        json.dumps([r["kernel"], r["tiles"], r["dtype"]], sort_keys=True) for r in TABLE["rows"] if "sm_80" in r
    ]
    assert all(json.dumps([r["kernel"], r["tiles"], r["dtype"]], sort_keys=True) in compiled for r in TABLE["rows"])


def test_nothing_spills_and_everything_fits():
    for row, code in CODE:
        where = f"{row['case']}, {row['dtype']}, {row['kernel']}"
        assert code["spill instructions"] == 0 and code["spilled bytes"] == 0, where
        assert code["shared fits"] and code["blocks per SM"] >= 1, where


def test_products_use_tensor_cores_where_the_dtype_is_narrow_and_never_tf32():
    products = {"_linear", "_shrink", "_outer", "_multi_linear", "_multi_shrink", "_four_bit", "_gradient", "_partial"}
    for row, code in CODE:
        assert code["tf32"] == 0, row["case"]
        if row["kernel"] in products:
            assert (code["mma"] > 0) == (row["dtype"] == "bfloat16"), row["case"]
            assert code["cp.async"] > 0, row["case"]


def test_no_atomics_and_wide_loads():
    """No atomics: sums have one order, so results have the same bits each run. 128-bit loads: what bandwidth needs."""
    for row, code in CODE:
        assert code["atomics"] == 0, row["case"]
        assert code["loads by bits"].get("128", 0) > 0, row["case"]


def test_fusing_never_moves_more_than_the_unfused_sequence():
    assert all(row["bytes"] < row["unfused bytes"] for row in TABLE["traffic"])


def test_the_table_is_of_this_code_and_the_page_is_of_the_table():
    assert TABLE["code"] == code_hash(), "a kernel or a configuration changed: run python -m kernels.compile"
    assert (ROOM / "compiled.md").read_text() == markdown(TABLE)


def test_a_changed_row_is_named():
    rows = [{k: v for k, v in row.items() if k != "sm_90"} for row in TABLE["rows"] if row["dtype"] == "float32"]
    table = {"rows": [dict(row) for row in rows], "traffic": TABLE["traffic"]}
    assert differences(TABLE, table, (torch.float32,)) == []
    table["rows"][3]["bytes"] += 1
    changed = differences(TABLE, table, (torch.float32,))
    assert len(changed) == 1 and rows[3]["case"] in changed[0]


@pytest.mark.slow
@pytest.mark.skipif(version("triton") != TABLE["triton"], reason=f"the table is of Triton {TABLE['triton']}")
def test_the_table_is_what_this_code_compiles_to(tmp_path):
    """Compiled afresh for sm_80, both dtypes at once, in processes where nothing is interpreted."""
    running = []
    for dtype in ("bfloat16", "float32"):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(tmp_path / dtype), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "kernels.compile", "--check", "--dtype", dtype]
        running.append(subprocess.Popen(command, cwd=ROOM.parent, env=environment, stdout=subprocess.PIPE, text=True))
    for process in running:
        said, _ = process.communicate()
        assert process.returncode == 0, said
