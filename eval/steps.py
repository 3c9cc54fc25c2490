"""A long run as steps: what is done stands in OUT/steps.json, and the same command goes on after an interruption.

The steps are functions, or programs as `python -m` takes them; each one's seconds and peak memory are kept. What the
run is made of (its options) stands in OUT/made-of.json: a run with other options is not mixed with an older one's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.command import UserError
from model.files import read_json, write_json
from model.machine import compute_dtype


@dataclass
class Run:
    """A run's folder and what its steps took."""

    out: Path
    scale: str = ""
    steps: dict[str, dict[str, float]] = field(default_factory=dict)

    def step(self, name: str, work: Callable[[], None] | list[str]) -> None:
        """Do a step that is not yet done: a function, or a program as `-m` takes it (its output goes to stderr)."""
        if name in self.steps:
            return
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the run as Ctrl-C does
        try:
            print(f"· {name}", file=sys.stderr, flush=True)
            began = time.monotonic()
            peak = program(name, work) if isinstance(work, list) else work() or 0.0
        finally:
            signal.signal(signal.SIGTERM, before)
        self.steps[name] = {"seconds": round(time.monotonic() - began, 1), "peak_mb": round(peak)}
        print(f"  {name}: {self.steps[name]['seconds']} s", file=sys.stderr, flush=True)
        write_json(self.out / "steps.json", self.steps)

    def took(self, *names: str) -> float:
        """Seconds of the named steps, or of all."""
        return round(sum(self.steps[name]["seconds"] for name in names or self.steps), 1)

    def peak(self, *names: str) -> float:
        """The highest peak memory of the named steps, or of all, in MB."""
        return max(self.steps[name]["peak_mb"] for name in names or self.steps)


def training_dtype(out: Path) -> str:
    """What adapters on a real base train in: the faster of fp32 and bf16 on this machine, found once a run."""
    path = out / "dtype.json"
    if not path.is_file():
        write_json(path, str(compute_dtype()).removeprefix("torch."))
    return str(read_json(path))


def begin(out: Path, made_of: Mapping[str, Any], last: str = "") -> Run:
    """The run in `out`: it goes on where it is made of the same; another run that was left there makes way, and so
    does one that ended (the file `last` is there). Raises UserError where the folder holds anything else."""
    mark = out / "steps.json"
    if out.exists() and not mark.is_file() and any(out.iterdir()):
        raise UserError(f"{out} holds something that is no run of steps; give another folder with --out, or empty it")
    held = read_json(out / "made-of.json") if (out / "made-of.json").is_file() else None
    if held != made_of or (last and (out / last).is_file()):
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    steps = read_json(mark) if mark.is_file() else {}
    write_json(mark, steps)
    write_json(out / "made-of.json", dict(made_of))
    return Run(out, str(made_of.get("scale", "")), steps)


def program(name: str, arguments: list[str]) -> float:
    """Run `python -m …`. Returns its peak resident memory in MB. Raises UserError where it fails."""
    asked: list[int] = []  # a signal while the program starts: raised there, it would leave the program without the run
    handlers = {number: signal.signal(number, lambda number, _: asked.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}  # fmt: skip
    child = None
    try:
        child = subprocess.Popen([sys.executable, "-m", *arguments], stdout=sys.stderr)
        for number in handlers:
            signal.signal(number, signal.default_int_handler)
        if asked:
            raise KeyboardInterrupt
        _, status, usage = os.wait4(child.pid, 0)
    except BaseException:
        if child is not None:
            child.terminate()
            child.wait()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise UserError(
            f"the step '{name}' failed (exit {child.returncode}); its reason stands above, and the same command goes on"
        )
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
