"""Machine code statistics of each kernel at a 7B model's shapes, for sm_80 and sm_90, without a GPU.

    python -m kernels.proof.machine_code        compile every case, rewrite kernels/proof/facts.json

The public functions run on meta tensors; `recording()` keeps each launch with its exact signature, and Triton compiles
it for the architecture. All figures are read from the machine code (cuobjdump's resource usage and nvdisasm's listing,
both shipped with Triton) or follow from the launch's tensors and grid. Nothing is timed.
"""

from __future__ import annotations

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
from kernels.launch import Launch, divide_up, recording
from kernels.proof.cases import Make, cases

HERE = Path(__file__).parent
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
SHARED_PER_BLOCK = {80: 163 * 1024, 90: 227 * 1024}  # CUDA programming guide, compute capabilities 8.0 and 9.0
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024}
CONVERSIONS = ("I2F", "I2FP", "F2I", "F2F")


def signature(call: Launch) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], list], dict]:
    """(types, constants, attributes, options) as Triton's just-in-time compiler derives them from this launch."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def typed(value: Any, path: tuple[int, ...], specialize: bool) -> Any:
        """The type of an argument (a tuple's: of its parts); fills `constants` and `attributes` at its path."""
        if isinstance(value, tuple):
            return tuple(typed(part, (*path, i), specialize) for i, part in enumerate(value))
        if value is None or (isinstance(value, int) and value == 1 and specialize):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, Tensor) or (value % 16 == 0 and specialize):  # torch aligns allocations to 512 bytes
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return TYPES[value.dtype]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    types = {}
    for index, parameter in enumerate(call.kernel.params):
        name = parameter.name
        if name in call.meta:
            types[name], constants[(index,)] = "constexpr", call.meta[name]
        else:
            types[name] = typed(call.arguments[name], (index,), not parameter.do_not_specialize)
    return types, constants, attributes, {key: value for key, value in call.meta.items() if key not in types}


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS) of compiled code."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(str(tools / "cuobjdump"), "--dump-resource-usage", file.name)
        return usage, run(str(tools / "nvdisasm"), "-c", file.name)


def inspect(call: Launch, capability: int) -> dict[str, Any]:
    """Statistics of a launch's compiled code. Instruction counts are per thread, with a loop's body counted once."""
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
    count = lambda *names: sum(n for op, n in opcodes.items() if op.split(".")[0] in names)  # noqa: E731
    registers, shared, warps = int(found[1]), int(compiled.metadata.shared), call.meta["num_warps"]
    copies = access_widths(opcodes, "LDGSTS")
    stages = call.meta.get("num_stages", 1)
    in_flight = sum(int(bits) // 8 * n for bits, n in copies.items()) * 32 * warps * (stages - 1) // stages
    blocks = occupancy(registers, shared, warps, capability)
    return {
        "registers": registers,
        "spills": count("LDL", "STL"),
        "shared": shared,
        "fits": shared <= SHARED_PER_BLOCK[capability],
        "blocks": blocks,
        "mma": count("HMMA", "HGMMA"),
        "conversions": count(*CONVERSIONS),
        "instructions": sum(opcodes.values()),
        "tf32": sum(n for op, n in opcodes.items() if "TF32" in op),
        "loads": access_widths(opcodes, "LDG", "LDGSTS"),
        "copies": copies,
        "flying": in_flight * blocks,
        "atomics": count("ATOM", "ATOMG", "RED"),
    }


def access_widths(opcodes: Counter, *kinds: str) -> dict[str, int]:
    """Number of global memory accesses by width, 128, 64, 32, 16 or 8 bits per thread."""
    found: Counter = Counter()
    for op, n in opcodes.items():
        name, *parts = op.split(".")
        if name in kinds and "ARVCNT" not in op:
            bits = next((p.lstrip("US") for p in parts if p in ("128", "64", "U16", "S16", "U8", "S8")), "32")
            found[bits] += n
    return {bits: found[bits] for bits in sorted(found, key=int, reverse=True)}


def occupancy(registers: int, shared: int, warps: int, capability: int) -> int:
    """Blocks that fit an SM: 65,536 registers (allocated per warp in units of 256), 64 warps, 32 blocks, and shared
    memory + 1 KB each."""
    per_warp = divide_up(max(registers, 1) * 32, 256) * 256
    by_registers = 65536 // per_warp // warps
    return min(by_registers, 64 // warps, 32, SHARED_PER_SM[capability] // (shared + 1024))


def launches(dtype: torch.dtype) -> list[tuple[str, Launch]]:
    """(case name, launch) of every launch with a new kernel or signature."""
    found, seen = [], set()
    for case in cases(dtype):
        with recording() as calls:
            case.build(Make("meta", dtype))[0]()
        for call in calls:
            key = (call.kernel.__name__, call.kernel.__module__, str(signature(call)))
            if key not in seen:
                seen.add(key)
                found.append((case.name, call))
    return found


def row(name: str, dtype: torch.dtype, call: Launch, capability: int) -> dict[str, Any]:
    which = {"case": name, "dtype": str(dtype)[6:], "kernel": call.kernel.__name__, "sm": capability}
    named = ("BM", "BO", "BD", "BS", "BG", "BLOCK", "GROUP", "RANK", "GATED", "num_warps")
    tiles = {key: value for key, value in call.meta.items() if key in named}
    return which | {"grid": list(call.grid), "tiles": tiles} | inspect(call, capability)


def code_hash() -> str:
    """Hash of the source of all `@jit` functions (ignoring whitespace) and of configs.json: the facts' inputs."""
    parts = [(HERE.parent / "configs.json").read_text()]
    for path in sorted(HERE.parent.glob("*.py")):
        parts += re.findall(r"^@jit\(.*?(?=\n\n\n|\Z)", path.read_text(), re.MULTILINE | re.DOTALL)
    return hashlib.sha256(" ".join("\0".join(parts).split()).encode()).hexdigest()


def main() -> int:
    if launch.triton is None or launch.INTERPRETED:
        print("kernels.proof.machine_code: needs Triton, with TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, call in launches(dtype):
            for capability in (80, 90):
                rows.append(row(name, dtype, call, capability))
                print(json.dumps(rows[-1]))
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{{"triton": "{launch.triton.__version__}", "code": "{code_hash()}", "rows": [\n{lines}\n]}}\n'
    temporary = HERE / ".facts.json.part"
    temporary.write_text(text)
    os.replace(temporary, HERE / "facts.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
