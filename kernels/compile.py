"""Every pinned configuration, compiled for sm_80 and sm_90 on a machine that needs no GPU, and what came out of it.

    python -m kernels.compile           compile and rewrite kernels/compiled.json and kernels/compiled.md
    python -m kernels.compile --check   compile for sm_80 and say what differs from them (exit 1 if anything does)

The public functions are called on meta tensors of a 7B model's shapes; `recording()` keeps each launch with its exact
signature, and Triton compiles that for the named architecture. All figures are read from the machine code (cuobjdump's
resource usage and disassembly, both shipped with Triton) or follow from the launch's tensors and grid; none is a time
that was measured. The roofline time is max(bytes / 2.0 TB/s, operations / peak) of an A100-80GB, with every tensor read
or written once: the time that a kernel cannot beat, not the time that it takes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import launch
from kernels.cases import EPS, QKV, WIDTH, Make, cases
from kernels.launch import Launch, divide_up, recording

HERE = Path(__file__).parent
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8",
}  # fmt: skip
SHARED_PER_BLOCK = {80: 163 * 1024, 90: 227 * 1024}  # CUDA programming guide, compute capabilities 8.0 and 9.0
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024}
A100 = {"bytes/s": 2.0e12, torch.bfloat16: 312e12, torch.float32: 19.5e12}


def signature(call: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list], dict[str, Any]]:
    """(types, constants, attributes, options) as the just-in-time compiler would derive them from this launch."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list] = {}
    for place, name in enumerate(call.kernel.arg_names):
        value = call.arguments.get(name, call.meta.get(name))
        if name in call.meta or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name] = TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]  # torch's allocations start at multiples of 512 bytes
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32"
    options = {k: v for k, v in call.meta.items() if k not in call.kernel.arg_names}
    return types, constants, attributes, options


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS) of compiled code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True)
        sass = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True)
    if usage.returncode or sass.returncode:
        raise RuntimeError(usage.stderr + sass.stderr)
    return usage.stdout, sass.stdout


def inspect(call: Launch, capability: int) -> dict[str, Any]:
    """What the compiled code of one launch uses and does."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes, options = signature(call)
    source = ASTSource(call.kernel, types, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, sass = disassemble(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE))
    count = lambda start: sum(n for op, n in opcodes.items() if op.split(".")[0] in start)  # noqa: E731
    registers, shared = int(found[1]), int(compiled.metadata.shared)
    warps = call.meta["num_warps"]
    return {
        "registers": registers,
        "spilled bytes": int(found[2]) if count(("LDL", "STL")) else 0,
        "spill instructions": count(("LDL", "STL")),
        "shared bytes": shared,
        "shared fits": shared <= SHARED_PER_BLOCK[capability],
        "blocks per SM": occupancy(registers, shared, warps, capability),
        "cp.async": count(("LDGSTS",)) - sum(n for op, n in opcodes.items() if op.startswith("LDGSTS") and "ARV" in op),
        "mma": count(("HMMA", "HGMMA")),
        "tf32": sum(n for op, n in opcodes.items() if "TF32" in op),
        "ldmatrix": count(("LDSM",)),
        "loads by bits": widths(opcodes, "LDG", "LDGSTS"),
        "stores by bits": widths(opcodes, "STG"),
        "atomics": count(("ATOM", "ATOMG", "RED")),
    }


def widths(opcodes: Counter, *kinds: str) -> dict[str, int]:
    """How many global accesses move 128, 64, 32, 16 or 8 bits a thread."""
    found: Counter = Counter()
    for op, n in opcodes.items():
        name, *parts = op.split(".")
        if name in kinds:
            bits = next((p.lstrip("US") for p in parts if p in ("128", "64", "U16", "S16", "U8", "S8")), "32")
            found[bits] += n
    return {bits: found[bits] for bits in sorted(found, key=int, reverse=True)}


def occupancy(registers: int, shared: int, warps: int, capability: int) -> int:
    """Blocks that fit one SM: 65,536 registers in 256s a warp, 64 warps, 32 blocks, shared memory + 1 KB each."""
    per_warp = divide_up(max(registers, 1) * 32, 256) * 256
    by_registers = 65536 // per_warp // warps
    return min(by_registers, 64 // warps, 32, SHARED_PER_SM[capability] // (shared + 1024))


def moved(call: Launch) -> int:
    """Bytes of the tensors of a launch, each counted once (a stand-in for an absent argument is another argument)."""
    tensors = {id(t._base if t._base is not None else t): t for t in call.arguments.values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def operations(call: Launch) -> int:
    """Multiplications and additions of the matrix products that the grid's programs carry out, padding included."""
    a, m = call.arguments, call.meta
    programs = 1
    for n in call.grid:
        programs *= n
    name = call.kernel.__name__
    deep = lambda size, step: divide_up(size, step) * step  # noqa: E731
    if name in ("_linear", "_multi_linear", "_four_bit"):
        rank = 0 if m.get("LORA") == "no" else m["RANK"]
        along = rank if m.get("LORA") == "here" else 0
        return 2 * programs * m["BN"] * (deep(a["D"], m["BD"]) * (m["BO"] + along) + rank * m["BO"])
    if name in ("_shrink", "_multi_shrink"):
        return 2 * programs * m["BN"] * m["RANK"] * deep(a["D"], m["BD"])
    if name == "_outer":
        return 2 * programs * m["RANK"] * m["BD"] * deep(divide_up(a["N"], a["SPLITS"]), m["BN"])
    if name == "_forward" and "BV" in m:
        return 2 * programs * m["BN"] * deep(a["SHARE"], m["BV"]) * deep(a["D"], m["BD"])
    if name == "_gradient":
        return 2 * programs * m["BN"] * m["BV"] * deep(a["D"], m["BD"])
    if name == "_partial":
        return 4 * programs * m["BM"] * m["BK"] * deep(a["SHARE"], m["BS"])
    return 0  # elementwise kernels; prefill's depends on what can be seen


def rows_of(dtype: torch.dtype, capabilities: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row for each different launch of each case; a configuration compiled before is not compiled again."""
    rows: list[dict[str, Any]] = []
    seen = set()
    for case in cases(dtype):
        with recording() as calls:
            case.build(Make("meta", dtype))[0]()
        for call in calls:
            types, constants, attributes, _ = signature(call)
            key = (call.kernel.__name__, str(types), str(constants), str(attributes), str(call.meta))
            bytes_, work = moved(call), operations(call)
            row: dict[str, Any] = {
                "case": case.name, "dtype": str(dtype).removeprefix("torch."), "kernel": call.kernel.__name__,
                "grid": list(call.grid), "tiles": {k: v for k, v in call.meta.items() if k != "enable_fp_fusion"},
                "bytes": bytes_, "operations": work,
                "roofline us on A100": round(max(bytes_ / A100["bytes/s"], work / A100[dtype]) * 1e6, 2),
            }  # fmt: skip
            if key not in seen:
                seen.add(key)
                row |= {f"sm_{capability}": inspect(call, capability) for capability in capabilities}
            elif any(row.items() <= old.items() for old in rows):
                continue
            rows.append(row)
    return rows


def unfused_bytes(rows: int, outputs: tuple[int, ...], rank: int, size: int = 2) -> int:
    """Bytes that the unfused sequence moves, each of its steps reading its inputs and writing its result once.

    norm: x in, n out (six passes in eager PyTorch; one pass is granted here, as if the norm alone were fused);
    for each output: n, W in, y out; n, A in, nA out; nA, B in, d out; d in, d out (scale); y, d in, y out.
    """
    total = 2 * rows * WIDTH + WIDTH
    for out in outputs:
        total += rows * WIDTH + out * WIDTH + rows * out
        if rank:
            total += rows * WIDTH + rank * WIDTH + rows * rank
            total += rows * rank + out * rank + rows * out + 2 * rows * out + 3 * rows * out
    return total * size


def traffic() -> list[dict[str, Any]]:
    """Fused against unfused: the launches and bytes of norm + q, k, v."""
    import kernels

    out = []
    for rows in (1, 16, 128, 2048):
        for rank in (0, 16, 64):
            make = Make("meta", torch.bfloat16)
            with recording() as calls, torch.no_grad():
                a = [make.normal(rank, WIDTH) if rank else None for _ in QKV]
                b = [make.normal(o, rank) if rank else None for o in QKV]
                weights = [make.normal(o, WIDTH) for o in QKV]
                kernels.rms_norm_lora_linear(make.normal(rows, WIDTH), make.normal(WIDTH), weights, a, b, 2.0, EPS)
            fused, plain = sum(map(moved, calls)), unfused_bytes(rows, QKV, rank)
            weights_bytes = 2 * sum(QKV) * WIDTH
            out.append({
                "rows": rows, "rank": rank, "launches": len(calls), "unfused launches": 1 + 3 * (5 if rank else 1),
                "bytes": fused, "unfused bytes": plain, "of which weights": weights_bytes,
                "share of the other bytes": round((fused - weights_bytes) / (plain - weights_bytes), 3),
            })  # fmt: skip
    return out


def code_hash() -> str:
    """A hash of every compiled function's text and of the pinned configurations: what the table is a table of."""
    parts = [(HERE / "configs.json").read_text()]
    for path in sorted(HERE.glob("*.py")):
        parts += re.findall(r"^@jit\n.*?(?=\n\n\n|\Z)", path.read_text(), re.MULTILINE | re.DOTALL)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def report(capabilities: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> dict[str, Any]:
    import triton

    rows = [row for dtype in dtypes for row in rows_of(dtype, capabilities)]
    return {"triton": triton.__version__, "code": code_hash(), "rows": rows, "traffic": traffic()}


def markdown(table: dict[str, Any]) -> str:
    lines = [
        "# What the compiler makes of the pinned configurations", "",
        f"Written by `python -m kernels.compile` with Triton {table['triton']}; read from the machine code, nothing",
        "here was timed. Columns are sm_80 / sm_90 where they differ. Bits: widest global load. How the roofline time",
        "follows from bytes and operations stands in kernels/compile.py. A launch that repeats a compiled",
        "configuration says so; repeats of a whole row are left out.", "",
        "| case | dtype | kernel | grid | warps, stages | registers | spills | shared KB | blocks/SM | cp.async | mma "
        "| ldmatrix | bits | MB | GFLOP | roofline µs |", "|" + " --- |" * 16,
    ]  # fmt: skip
    lines += [markdown_row(row) for row in table["rows"]]
    lines += [
        "", "## Traffic of norm + q, k, v, bf16: fused against the unfused sequence", "",
        "| rows | rank | launches | unfused launches | MB | unfused MB | of which weights "
        "| the rest, fused ÷ unfused |", "|" + " --- |" * 8,
    ]  # fmt: skip
    for row in table["traffic"]:
        sizes = " | ".join(f"{row[k] / 1e6:.2f}" for k in ("bytes", "unfused bytes", "of which weights"))
        counts = " | ".join(str(row[k]) for k in ("rows", "rank", "launches", "unfused launches"))
        lines.append(f"| {counts} | {sizes} | {row['share of the other bytes']:.2f} |")
    return "\n".join(lines) + "\n"


def markdown_row(row: dict[str, Any]) -> str:
    def both(key: str, show: Any = str) -> str:
        a, b = show(row["sm_80"][key]), show(row["sm_90"][key])
        return a if a == b else f"{a} / {b}"

    if "sm_80" in row:
        keys = ("registers", "spill instructions", "shared bytes", "blocks per SM", "cp.async", "mma", "ldmatrix")
        kilobytes = lambda n: f"{n / 1024:.0f}"  # noqa: E731
        code = [both(key, kilobytes if key == "shared bytes" else str) for key in keys]
        code.append(next(iter(row["sm_80"]["loads by bits"]), "–"))
    else:
        code = ["compiled above", *["〃"] * 7]
    tiles = row["tiles"]
    cells = [
        row["case"], row["dtype"], row["kernel"].lstrip("_"), " × ".join(map(str, row["grid"])),
        f"{tiles['num_warps']}, {tiles.get('num_stages', '–')}", *code, f"{row['bytes'] / 1e6:.2f}",
        f"{row['operations'] / 1e9:.2f}" if row["operations"] else "–", f"{row['roofline us on A100']:.1f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def differences(kept: dict[str, Any], table: dict[str, Any], dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """Rows of the committed table that this code no longer compiles to (sm_80)."""
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    old = [{k: v for k, v in row.items() if k != "sm_90"} for row in kept["rows"] if row["dtype"] in names]
    changed = [f"{b['case']} ({b['dtype']}, {b['kernel']})" for a, b in zip(old, table["rows"], strict=False) if a != b]
    if len(old) != len(table["rows"]):
        changed.append(f"{len(table['rows'])} rows instead of {len(old)}")
    return changed + (["the traffic"] if kept["traffic"] != table["traffic"] else [])


def replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    os.replace(beside, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.compile", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table instead of rewriting it")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="with --check: only configurations of this dtype (both if left out)",
    )
    options = parser.parse_args(argv)
    if launch.triton is None or launch.INTERPRETED:
        print("kernels.compile: needs Triton, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    dtypes = (torch.bfloat16, torch.float32)
    if not options.check:
        table = json.loads(json.dumps(report((80, 90), dtypes)))
        replace(HERE / "compiled.json", json.dumps(table, indent=1) + "\n")
        replace(HERE / "compiled.md", markdown(table))
        print(f"{len(table['rows'])} launches written to {HERE / 'compiled.json'} and compiled.md")
        return 0
    kept = json.loads((HERE / "compiled.json").read_text())
    if kept["triton"] != launch.triton.__version__:
        here = launch.triton.__version__
        print(f"compiled.json is of Triton {kept['triton']}, this is {here}: not comparable", file=sys.stderr)
        return 2
    dtypes = (getattr(torch, options.dtype),) if options.dtype else dtypes
    table = json.loads(json.dumps(report((80,), dtypes)))
    changed = differences(kept, table, dtypes)
    print("\n".join(["changed:", *changed]) if changed else "compiled.json is what this code compiles to")
    return 1 if changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
