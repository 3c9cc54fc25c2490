"""The Triton kernels on a CUDA device: correct first, then timed against eager PyTorch, torch.compile and libraries.

    python -m eval.bench kernels --out F.json     everything, and a Markdown table beside it (F.md)
    python -m eval.bench kernels --check          per kernel: available or why not, verified how, measured when
    python -m eval.bench kernels --tune           try other tile sizes, rewrite kernels/configs.json

Runs in a bare CUDA image: torch, triton, numpy, safetensors and nothing else. A time is the median of many runs with
the cache flushed between them. The limit of a row is max(bytes / bandwidth, operations / rate), where bandwidth and
rate are what this device reached in the same run: a copy of 1 GiB, a product of 8192³. Every tensor counts once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kernels import launch
from kernels.cases import Case, Make, cases
from kernels.compile import moved, operations

ROOM = Path(launch.__file__).parent
RESULTS = ROOM / "results"
DEVICE = "cuda"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def median_us(function: Callable[[], Any]) -> float:
    """Median time of a call on the device, in microseconds, with L2 flushed between calls."""
    from triton.testing import do_bench

    return float(do_bench(function, warmup=20, rep=60, return_mode="median")) * 1e3


def peaks(dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches: bytes/s of a copy, operations/s of a matrix product in `dtype`."""
    big = torch.empty(2**28, dtype=torch.float32, device="cuda")
    other = torch.empty_like(big)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    return {
        "bytes/s": 2 * big.nbytes / (median_us(lambda: other.copy_(big)) * 1e-6),
        "operations/s": 2 * 8192**3 / (median_us(lambda: a @ b) * 1e-6),
    }


def flat(out: Any) -> list[torch.Tensor]:
    return [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if t is not None]


def rms_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.detach().double() - truth.detach()).pow(2).mean().sqrt())


def verify(case: Case) -> dict[str, float | bool]:
    """Ours and PyTorch's root-mean-square error against fp64, worst result; right: ours ≤ 2 × PyTorch's on each."""
    torch.manual_seed(0)
    ours, plain, truth = case.build(Make(DEVICE, case.dtype))
    worst, right = (0.0, 0.0), True
    for mine, theirs, exact in zip(flat(ours()), flat(plain()), flat(truth()), strict=True):
        a, b = rms_error(mine, exact), rms_error(theirs, exact)
        floor = torch.finfo(case.dtype).eps / 2 * float(exact.detach().abs().max()) * 2**-10
        right &= bool(torch.isfinite(mine).all()) and a <= max(2 * b, floor)
        worst = max(worst, (a, b))
    return {"error": worst[0], "pytorch's error": worst[1], "right": right}


def limit_us(case: Case, reached: dict[str, float]) -> float:
    with launch.recording() as calls:
        case.build(Make("meta", case.dtype))[0]()
    work, bytes_ = sum(map(operations, calls)), sum(map(moved, calls))
    return max(bytes_ / reached["bytes/s"], work / reached["operations/s"]) * 1e6


def others(case: Case) -> dict[str, Callable[[], Any]]:
    """The same work by libraries that are installed; an empty result says that none knows it."""
    found: dict[str, Callable[[], Any]] = {}
    make = Make(DEVICE, case.dtype)
    if case.name == "rms_norm, 2048 rows":
        try:
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            x, g = make.normal(2048, 4096), make.normal(4096)
            found["liger"] = lambda: LigerRMSNormFunction.apply(x, g, 1e-5, 0.0, "llama", False)
        except ImportError:
            pass
    if case.kernel == "nf4_lora_linear":
        try:
            import bitsandbytes

            rows = int(case.name.split(", ")[-1].split()[0])
            x, w = make.normal(rows, 4096), make.normal(4096, 4096)
            packed, state = bitsandbytes.functional.quantize_4bit(w, quant_type="nf4", blocksize=64)
            found["bitsandbytes, without LoRA"] = lambda: bitsandbytes.matmul_4bit(x, packed.t(), state)
        except ImportError:
            pass
    return found


def row(case: Case, setting: str, ours: float, peer: float, peer_name: str, limit: float) -> dict[str, Any]:
    return {
        "name": f"kernels: {case.name}", "ours": ours, "peer": peer, "peer_name": peer_name, "ratio": peer / ours,
        "limit": limit, "share_of_limit": limit / ours, "unit": "us", "setting": setting,
    }  # fmt: skip


def measure(case: Case, reached: dict[str, float], notes: list[str]) -> list[dict[str, Any]]:
    """One row for each peer of a case."""
    ours, plain, _ = case.build(Make(DEVICE, case.dtype))
    setting = f"{str(case.dtype).removeprefix('torch.')}, Mistral-7B's shapes"
    mine, limit = median_us(ours), limit_us(case, reached)
    rows = [row(case, setting, mine, median_us(plain), "eager PyTorch", limit)]
    try:
        compiled = torch.compile(plain)
        compiled()
        rows.append(row(case, setting, mine, median_us(compiled), "torch.compile", limit))
    except Exception as error:  # a peer that does not run is a note, not a failure of ours
        notes.append(f"{case.name}: torch.compile did not run ({type(error).__name__})")
    for name, peer in others(case).items():
        try:
            rows.append(row(case, setting, mine, median_us(peer), name, limit))
        except Exception as error:
            notes.append(f"{case.name}: {name} did not run ({type(error).__name__})")
    return rows


def whole_model(notes: list[str]) -> list[dict[str, Any]]:
    """Tokens a second of Mistral-7B's shape, batch 1 after 512 tokens: plain, fused in bf16, fused in int4."""
    from infer.engine.fuse import fuse

    model = random_7b()
    speeds = {"plain bf16": decode_speed(model)}
    speeds["fused bf16"] = decode_speed(fuse(model))
    speeds["fused int4"] = decode_speed(fuse(model, four_bit=True))
    notes.append("whole model: every launch goes through Python; no CUDA graph is captured")
    rows = []
    for ours, peer in (("fused bf16", "plain bf16"), ("fused int4", "plain bf16"), ("fused int4", "fused bf16")):
        rows.append({
            "name": f"kernels: Mistral-7B decode, {ours}", "ours": speeds[ours], "peer": speeds[peer],
            "peer_name": peer, "ratio": speeds[ours] / speeds[peer], "limit": None, "share_of_limit": None,
            "unit": "tok/s", "setting": "batch 1, 512 tokens of context, random weights",
        })  # fmt: skip
    return rows


def random_7b() -> Any:
    """A model of Mistral-7B's shape in bf16 with random weights, made on the device."""
    from model import ModelConfig, Transformer

    config = ModelConfig.from_dict({
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 4096, "max_position_embeddings": 32768,
    })  # fmt: skip
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    model = model.to_empty(device=DEVICE).requires_grad_(False).eval()
    for weight in model.parameters():
        weight.normal_(0, 0.02) if weight.dim() > 1 else weight.fill_(1)
    return model


@torch.inference_mode()
def decode_speed(model: Any, held: int = 512, steps: int = 50) -> float:
    """Tokens a second, one row, each token after the same `held` ones."""
    from model import KVCache

    cache = KVCache(model.config)
    model(torch.zeros(1, held, dtype=torch.int64, device=DEVICE), cache=cache)
    token = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    start = 0.0
    for step in range(steps + 5):
        if step == 5:  # the first ones compile
            torch.cuda.synchronize()
            start = time.perf_counter()
        model(token, cache=cache)
        cache.truncate(held)
    torch.cuda.synchronize()
    return steps / (time.perf_counter() - start)


def run(options: argparse.Namespace) -> int:
    started, notes, rows, proofs = time.time(), [], [], []
    dtype = DTYPES[options.dtype]
    reached = peaks(dtype)
    wanted = [c for c in cases(dtype) if not options.only or options.only in c.kernel]
    for case in wanted:
        say(f"verifying {case.name}")
        proofs.append({"case": case.name, "kernel": case.kernel, **verify(case)})
    wrong = [p["case"] for p in proofs if not p["right"]]
    for case in wanted:
        if case.name not in wrong and time.time() - started < options.minutes * 60:
            say(f"timing {case.name}")
            rows += measure(case, reached, notes)
        elif case.name not in wrong:
            notes.append(f"{case.name}: not timed, {options.minutes:g} minutes were up")
    if not options.only and dtype == torch.bfloat16 and time.time() - started < options.minutes * 60:
        say("decoding with a whole model")
        rows += whole_model(notes)
    host = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": launch.triton.__version__,
        "measured": time.strftime("%Y-%m-%d"), "reached": reached, "seconds": round(time.time() - started, 1),
    }  # fmt: skip
    result = {"host": host, "rows": rows, "correct": proofs, "notes": notes}
    text = table(result)
    print(text)
    if options.out:
        write(Path(options.out), json.dumps(result, indent=1) + "\n")
        write(Path(options.out).with_suffix(".md"), text)
    return 1 if wrong else 0


def table(result: dict[str, Any]) -> str:
    host = result["host"]
    lines = [
        f"# Kernels on {host['device']}, {host['measured']}", "",
        f"torch {host['torch']}, Triton {host['triton']}; a copy reached {host['reached']['bytes/s'] / 1e9:.0f} GB/s, "
        f"a product {host['reached']['operations/s'] / 1e12:.0f} TFLOP/s. Medians; ratio > 1: ours is better.", "",
        "| what | ours | peer | | ratio | share of the limit | unit |", "| --- " * 7 + "|",
    ]  # fmt: skip
    for r in result["rows"]:
        share = "–" if r["share_of_limit"] is None else f"{r['share_of_limit']:.0%}"
        lines.append(
            f"| {r['name']} | {r['ours']:.1f} | {r['peer']:.1f} | {r['peer_name']} | {r['ratio']:.2f} | {share} "
            f"| {r['unit']} |"
        )
    wrong = [p["case"] for p in result["correct"] if not p["right"]]
    lines += ["", f"Wrong: {', '.join(wrong)}." if wrong else f"All {len(result['correct'])} cases are right."]
    return "\n".join(lines + [f"- {note}" for note in result["notes"]]) + "\n"


def check() -> list[dict[str, Any]]:
    """Per kernel: available here, why not, verified how, measured when and where."""
    from kernels import __all__ as names

    compiled = json.loads((ROOM / "compiled.json").read_text())
    measured: dict[str, str] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        for proof in result["correct"]:
            measured[proof["kernel"]] = f"{result['host']['measured']} on {result['host']['device']}"
    if launch.triton is None:
        reason = "Triton is not installed"
    elif not torch.cuda.is_available():
        reason = "no CUDA device"
    else:
        reason = ""
    verified = f"interpreter against fp64; compiled for sm_80 and sm_90 by Triton {compiled['triton']}"
    return [
        {
            "kernel": name, "available": not reason, "why not": reason, "verified": verified,
            "measured": measured.get(name, "not yet measured on a GPU"),
        }
        for name in names
    ]  # fmt: skip


def users(kernel: str, shape_class: str, every: list[Case]) -> list[Case]:
    """The cases whose launches look this configuration up."""
    found = []
    for case in every:
        launch.asked.clear()
        with launch.recording():
            case.build(Make("meta", case.dtype))[0]()
        if (kernel, shape_class) in launch.asked:
            found.append(case)
    return found


def tune(minutes: float) -> int:
    """Halve and double each number of each configuration while the time of its cases falls; rewrite configs.json."""
    every = cases(torch.bfloat16) + cases(torch.float32)
    end = time.time() + minutes * 60
    for kernel, classes in launch.CONFIGS.items():
        for shape_class, pinned in classes.items():
            mine = users(kernel, shape_class, every)
            if not mine or time.time() > end:
                continue
            best = cost(mine)
            for name in list(pinned):
                for factor in (2, 0.5):
                    before = pinned[name]
                    tried = before + (1 if factor == 2 else -1) if name == "num_stages" else int(before * factor)
                    if tried < 1:
                        continue
                    pinned[name] = tried
                    now = cost(mine)
                    if now < best * 0.98:  # less is noise
                        say(f"{kernel} {shape_class}: {name} {before} → {tried}, {best:.0f} → {now:.0f} us")
                        best = now
                    else:
                        pinned[name] = before
    lines = []
    for kernel, classes in launch.CONFIGS.items():
        inner = ",\n".join(f"    {json.dumps(name)}: {json.dumps(tiles)}" for name, tiles in classes.items())
        lines.append(f"  {json.dumps(kernel)}: {{\n{inner}\n  }}")
    write(ROOM / "configs.json", "{\n" + ",\n".join(lines) + "\n}\n")
    say("kernels/configs.json is rewritten; now `python -m kernels.compile`, then the tests")
    return 0


def cost(some: list[Case]) -> float:
    """Microseconds of these cases together; infinite when one does not compile, does not fit or is wrong."""
    total = 0.0
    for case in some:
        try:
            if not verify(case)["right"]:
                return float("inf")
            total += median_us(case.build(Make(DEVICE, case.dtype))[0])
        except Exception as error:
            say(f"{case.name}: {type(error).__name__}")
            return float("inf")
    return total


def say(text: str) -> None:
    print(text, file=sys.stderr)


def write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    os.replace(beside, path)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, 1 where a kernel is wrong, 2 where it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m eval.bench kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", "--json", help="write the results to this file as JSON, and beside it as Markdown")
    parser.add_argument("--check", action="store_true", help="say per kernel whether and how it is verified, and stop")
    parser.add_argument(
        "--tune", action="store_true", help="search tile sizes on this device, rewrite kernels/configs.json"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="bfloat16", help="dtype of the operands (default bfloat16)"
    )
    parser.add_argument("--only", help="only kernels whose name contains this")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="begin nothing new after so many minutes (default 7)"
    )
    options = parser.parse_args(argv)
    if options.check:
        rows = check()
        if options.out:
            write(Path(options.out), json.dumps(rows, indent=1) + "\n")
        for r in rows:
            state = "available" if r["available"] else f"not available: {r['why not']}"
            print(f"{r['kernel']:22} {state}; {r['verified']}; {r['measured']}")
        return 0
    if launch.triton is None or not torch.cuda.is_available() or launch.INTERPRETED:
        reason = "Triton" if launch.triton is None else "a CUDA device (and TRITON_INTERPRET unset)"
        say(f"eval.bench kernels: needs {reason}; --check says what is verified without one")
        return 2
    return tune(options.minutes) if options.tune else run(options)


if __name__ == "__main__":
    raise SystemExit(main())
