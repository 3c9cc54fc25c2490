"""Benchmarks on a CUDA device: decoding with a 7B model, each kernel, extraction, training, correctness.

    python -m eval.bench gpu --json F.json        run the cases, the most important first, until --minutes are up
    python -m eval.bench gpu --tune               search tile sizes for this card and write kernels/configs.json
    python -m eval.bench gpu --prepare BASE       on a machine with the tokenizer: write inputs of the extraction case

Needs only torch, triton, numpy and safetensors, so it runs in a bare CUDA image. The C compiler and Python.h that
Triton needs at its first launch are checked at the start. Results are written after each case, and an error becomes a
row, so an early end loses only the current case. The cases are in gpu_cases.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eval.bench.gpu_cases import BF16, Setup, reached, sections, us, verify
from eval.bench.row import Row, table
from kernels import launch
from kernels.proof.cases import Case, Make
from model.support.cli import UserError
from model.support.files import write_json, write_text
from model.support.lock import output

CONFIGS = Path(launch.__file__).parent / "configs.json"


def what_is_missing() -> str | None:
    """What keeps Triton from running here, with the remedy; None if it can run."""
    if launch.triton is None:
        return "Triton is not installed; pip install triton"
    if not torch.cuda.is_available() or launch.INTERPRETED:
        return "no CUDA device (or TRITON_INTERPRET is set); run it on a machine that has one"
    return missing_build_tool()


def missing_build_tool() -> str | None:
    """What Triton's first launch needs and this machine lacks, with the remedy; None if nothing."""
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "no C compiler, which Triton needs at its first launch; apt-get install gcc, or set CC"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"{header} is missing, which Triton needs at its first launch; apt-get install python3-dev"
    return None


def prepare(weights: str, setup: Setup) -> int:
    """Write `setup.inputs`: a base as safetensors in bf16, token ids of synthetic notes and of the questions."""
    from infer import tasks
    from infer.engine.load import load
    from train.clinic.program import patient_notes

    model, tokenizer = load(weights, dtype="bfloat16", device="cpu")
    model.save_pretrained(setup.inputs)
    asked = [*(phenotype.question for phenotype in tasks.PHENOTYPES.values()), tasks.DIAGNOSIS_QUESTION]
    texts = [next(patient_notes("gpu", number, 1))["text"] for number in range(setup.notes)]
    notes = [tokenizer.encode(tasks.prefix(text), bos=True) for text in texts]
    inputs = {"notes": notes, "questions": [tokenizer.encode(tasks.branch(question)) for question in asked]}
    write_json(setup.inputs / "tokens.json", inputs)
    say(f"{setup.inputs} is written; carry it to the machine with the GPU, beside the repository's files")
    return 0


def start_afresh() -> None:
    """Free compiled code and memory of the previous case. Raises if that case left the device in an error state."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(named: Any, minutes: float, out: Path | None, result: dict[str, Any]) -> dict[str, Any]:
    """Run the sections in order and write the result after each. An error becomes a row and the next section runs."""
    end = time.monotonic() + minutes * 60
    for name, function in named:
        if time.monotonic() > end:
            result["notes"].append(f"stopped after {minutes:g} minutes, before {name}")
            break
        say(name)
        try:
            start_afresh()
            found = function()
            for one in found if isinstance(found, list) else [found]:
                kept = one.as_dict() if isinstance(one, Row) else one
                result["rows" if isinstance(one, Row) else "correct"].append(kept)
        except Exception as error:  # whatever it is, the other cases should run
            result["rows"].append({"name": name, "error": f"{type(error).__name__}: {error}"[:500]})
        if out is not None:
            write_json(out, result)
    if out is not None:
        write_json(out, result)
    return result


def summary(result: dict[str, Any]) -> str:
    """The rows as a table (with errors in the column of settings), then the wrong cases and the notes."""
    rows = table([{"setting": row.get("error"), **row} for row in result["rows"]])
    wrong = [proof["case"] for proof in result["correct"] if not proof["right"]]
    right = f"Wrong: {', '.join(wrong)}." if wrong else f"{len(result['correct'])} cases verified, all right."
    return "\n".join([rows, "", right, *(f"- {note}" for note in result["notes"])])


def tune(
    minutes: float, setup: Setup, path: Path = CONFIGS, cost_of: Callable[[list[Case]], float] | None = None
) -> int:
    """Tune each configuration by coordinate search: try half and twice each number and keep what is faster. Writes the
    configurations to `path` after each class of shapes. The cost of cases is their time, or `cost_of`."""
    cost_of = cost_of or partial(cost, setup)
    every = setup.kernel_cases(BF16) + setup.kernel_cases(torch.float32)
    end, configs = time.monotonic() + minutes * 60, launch.CONFIGS
    capability, sms = launch.card(torch.device(setup.device, 0))
    for kernel, classes in configs.items():
        for shape_class in [name for name in classes if " sm_" not in name]:
            launch.used_configs.clear()
            mine = []
            for case in every:
                launch.used_configs.clear()
                with launch.recording():
                    case.build(Make("meta", case.dtype))[0]()
                mine += [case] * ((kernel, shape_class) in launch.used_configs)
            if not mine or time.monotonic() > end:
                continue
            tiles = classes[f"{shape_class} sm_{capability} {sms}"] = launch.tiles_of(
                kernel, shape_class, (capability, sms)
            )
            best = cost_of(mine)
            for name, before in list(tiles.items()):
                if (kernel, name) == ("int4", "BD"):  # fixed by the layout of the weights
                    continue
                for tried in (
                    (before + 1, before - 1) if name in ("num_stages", "RESIDENT") else (before * 2, before // 2)
                ):
                    kept, tiles[name] = tiles[name], max(tried, 1)
                    now = cost_of(mine)
                    if now < best * 0.98:  # less is noise
                        say(f"{kernel} {shape_class}: {name} {kept} → {tiles[name]}, {best:.0f} → {now:.0f} us")
                        best = now
                    else:
                        tiles[name] = kept
            write_text(path, layout(configs))
    say(f"{path} is written; now `python -m kernels.proof.machine_code`, then the tests")
    return 0


def layout(configs: dict[str, dict[str, dict[str, int]]]) -> str:
    """The text of configs.json, one configuration per line."""
    parts = []
    for kernel, classes in configs.items():
        inner = ",\n".join(f"    {json.dumps(name)}: {json.dumps(tiles)}" for name, tiles in classes.items())
        parts.append(f"  {json.dumps(kernel)}: {{\n{inner}\n  }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def ours(case: Case, device: str) -> Callable[[], Any]:
    return case.build(Make(device, case.dtype))[0]


def cost(setup: Setup, some: list[Case]) -> float:
    """Microseconds of these cases together, in CUDA graphs over inputs larger than L2; infinite if one does not
    compile, does not fit or is wrong."""
    total = 0.0
    for case in some:
        try:
            if not verify(case, setup.device)["right"]:
                return float("inf")
            total += us(
                setup, partial(ours, case, setup.device), 2**23
            )  # bytes of the smallest weight, that of o in int4
        except Exception as error:  # a configuration that cannot run is rejected
            say(f"{case.name}: {type(error).__name__}")
            return float("inf")
    return total


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 1 if a kernel is wrong or a case failed. Raises UserError if it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m eval.bench gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results to this file, again after each case")
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="start no new case after this many minutes (default 4)"
    )
    parser.add_argument(
        "--tune", action="store_true", help="search tile sizes for this card, write kernels/configs.json"
    )
    parser.add_argument(
        "--prepare",
        metavar="BASE",
        help=f"write {Setup.inputs} from a base's folder or GGUF file, for the extraction case",
    )
    options, setup = parser.parse_args(argv), Setup()
    if options.prepare:
        return prepare(options.prepare, setup)
    missing = what_is_missing()
    if missing is not None:
        raise UserError(missing)
    if options.tune:
        return tune(options.minutes, setup)
    with output(options.json, overwrite=False):
        return measure(options.minutes, options.json, setup)


def measure(minutes: float, out: Path | None, setup: Setup) -> int:
    """Run all sections and print their table. Returns 1 if a kernel is wrong or a case failed."""
    limits = reached(setup)
    host = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": launch.triton.__version__,
        "python": sys.version.split()[0],
        "measured": time.strftime("%Y-%m-%d"),
        "reached": limits,
    }
    started: dict[str, Any] = {"host": host, "rows": [], "correct": [], "notes": []}
    result = run(sections(setup, limits), minutes, out, started)
    print(summary(result))
    failed = any("error" in r for r in result["rows"]) or not all(p["right"] for p in result["correct"])
    return int(failed)
