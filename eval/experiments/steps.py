"""Resumable runs: a run is a sequence of named steps, and the same command continues after an interruption.

A step is a function, or a program as `python -m` takes it. OUT/steps.json lists the finished ones with their seconds
and peak memory. OUT/made-of.json has the run's options: a run with other options is refused in the same folder, and
nothing is removed without --overwrite.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from infer.extract.job import stamp
from infer.released import smollm2
from model.support.cli import UserError, on_sigterm
from model.support.files import check_writable, read_json, read_jsonl, sha256_file, write_json
from model.support.hardware import compute_dtype, max_resident_mb
from model.support.lock import claim, discard, hold, is_claimed, is_empty, sweep

RECIPES = Path("train/recipes")
LONG = {"long": "windows", "max_new_diagnosis": 60}  # options of infer.extract in experiments: no note is truncated


@dataclass
class Run:
    """A run's folder, and the time and peak memory of its finished steps."""

    out: Path
    scale: str = ""
    steps: dict[str, dict[str, float]] = field(default_factory=dict)

    def step(self, name: str, work: Callable[[], object] | list[str]) -> None:
        """Run a step unless it is finished: a function, or a program as `-m` takes it (its output goes to stderr)."""
        if name in self.steps:
            return

        def once() -> dict[str, float]:
            if isinstance(work, list):
                return programs({name: work})
            work()
            return {name: 0.0}

        self._do([name], once)

    def run_in_parallel(self, works: Mapping[str, list[str]]) -> None:
        """Run the unfinished programs two at a time, each with half of the cores; on a GPU one at a time.

        Small GEMMs scale badly over cores, so two programs side by side are faster (two tunings of a 135M base: 1.3
        times). Each of a pair is charged half of its time, so that the seconds of all steps add up.
        """
        left = [(name, work) for name, work in works.items() if name not in self.steps]
        size = 1 if torch.cuda.is_available() else 2
        for pair in (dict(left[at : at + size]) for at in range(0, len(left), size)):
            self._do(pair, partial(programs, pair, max(1, (os.cpu_count() or 1) // 2) if size == 2 else 0))

    def _do(self, names: Iterable[str], work: Callable[[], Mapping[str, float]]) -> None:
        """Run `work`, which returns each step's peak memory, and record the steps with equal shares of its time."""
        with on_sigterm(signal.default_int_handler):  # as by Ctrl-C
            print(f"· {' and '.join(names)}", file=sys.stderr, flush=True)
            began = time.monotonic()
            peaks = work()
        seconds = time.monotonic() - began
        for name, peak in peaks.items():
            self.steps[name] = {"seconds": round(seconds / len(peaks), 1), "peak_mb": round(peak)}
            print(f"  {name}: {self.steps[name]['seconds']} s", file=sys.stderr, flush=True)
        write_json(self.out / "steps.json", self.steps)

    def took(self, *names: str) -> float:
        """Seconds of the named steps, or of all."""
        return round(sum(self.steps[name]["seconds"] for name in names or self.steps), 1)

    def peak(self, *names: str) -> float:
        """The highest peak memory of the named steps, or of all, in MB."""
        return max(self.steps[name]["peak_mb"] for name in names or self.steps)


def training_dtype(out: Path) -> str:
    """The dtype in which adapters on the public base are trained: the faster of fp32 and bf16 on this machine, measured
    once per run."""
    path = out / "dtype.json"
    if not path.is_file():
        write_json(path, str(compute_dtype()).removeprefix("torch."))
    return str(read_json(path))


def made_from(options: Any, files: Mapping[str, Path] | None = None, models: Iterable[str] = ()) -> dict[str, Any]:
    """The inputs that identify a run: options except --out and --overwrite, hashes of files, stamps of models."""
    given = {key: str(value) for key, value in vars(options).items() if key not in ("out", "overwrite")}
    hashes = {f"{name}_sha256": sha256_file(path) for name, path in (files or {}).items()}
    return given | hashes | {"models": [stamp(path) for path in models if path]}


def experiment(
    options: Any, files: Mapping[str, Path], models: Iterable[str], work: Callable[[Run], dict[str, Any]]
) -> dict[str, Any]:
    """Run `work` in the folder --out, or continue it there. Writes its result, with the seconds of its steps, to
    result.json and returns it."""
    with begin(options.out, made_from(options, files, models), overwrite=options.overwrite) as run:
        result = work(run) | {"seconds": run.took()}
        write_json(run.out / "result.json", result)
        return result


def check_folder() -> None:
    """Raises UserError unless the current folder is the repository's root."""
    if not RECIPES.is_dir():
        raise UserError("run this from the repository's root, which holds train/recipes")


def argv(program: str, *arguments: Any, **options: Any) -> list[str]:
    """The arguments of `python -m` for a program: limit=3 becomes --limit 3, a sequence all its values, True the bare
    option; None and False are left out.

    >>> argv("infer.extract", max_new_tokens=8, grounded=True, adapter=None)
    ['infer.extract', '--max-new-tokens', '8', '--grounded']
    """
    words = [*program.split(), *map(str, arguments)]
    for name, value in options.items():
        if value is not None and value is not False:
            words.append(f"--{name.replace('_', '-')}")
            words += map(str, value if isinstance(value, list | tuple) else [] if value is True else [value])
    return words


def training(program: str, *arguments: Any, **options: Any) -> list[str]:
    """The command of a training program. On a CPU with several cores it runs two data-parallel ranks, each with the
    whole model, because the GEMMs of a small model are too small to split."""
    command = argv(program, *arguments, **options)
    if torch.cuda.is_available() or (os.cpu_count() or 1) < 2:
        return command
    return [*argv("torch.distributed.run", standalone=True, nproc_per_node=2), "-m", *command, "--sharded", "False"]


def extraction(weights: str, adapter: Path | str | None, notes: Path | str, out: Path | str, **how: Any) -> list[str]:
    """The command of infer.extract for a tuned model."""
    asked = {"form": "template"} | how
    return argv("infer.extract", weights=weights, adapter=adapter, notes=notes, out=out, **asked)


def public_base(run: Run) -> Path:
    """SmolLM2's 4-bit GGUF file, dequantized into a checkpoint in the run's folder."""
    base = run.out / "base"
    run.step("base: SmolLM2 out of its GGUF file", argv("model.checkpoints.convert", smollm2(), base, overwrite=True))
    return base


def records_of(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_jsonl(path)]


@contextmanager
def begin(out: Path, made_of: Mapping[str, Any], last: str = "", overwrite: bool = False) -> Iterator[Run]:
    """Start a run in `out`, or continue an interrupted one with the same options; locked against other processes.

    Raises UserError if the folder contains anything else, or if the run is finished (its file `last` exists).
    `overwrite` removes an existing run first, finished or not.
    """
    with hold(out):
        mark = out / "made-of.json"
        check_writable(mark)
        if overwrite and is_claimed(mark):
            discard(out)
            check_writable(mark)
        claim(out, mark, made_of, begun=not is_empty(out))
        if last and (out / last).is_file():
            raise UserError(
                f"{out}: a finished run, with its {last}; choose another --out, or give "
                "--overwrite to remove that run and begin again"
            )
        sweep(out)
        steps = out / "steps.json"
        yield Run(out, str(made_of.get("scale", "")), read_json(steps) if steps.is_file() else {})


def programs(works: Mapping[str, list[str]], threads: int = 0) -> dict[str, float]:
    """Run programs (`python -m …`) in parallel, each with `threads` threads (0: torch's default). Returns their peak
    resident memory in MB. Raises UserError if one fails, after the others have ended."""
    # Signals are deferred while programs start: an exception inside Popen would leave an orphan.
    pending: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: pending.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    children: dict[str, subprocess.Popen[bytes]] = {}
    peaks, failed = {}, []
    try:
        for line, (name, arguments) in enumerate(works.items()):
            bars = {"TQDM_POSITION": str(line)} if line else {}
            own = {"OMP_NUM_THREADS": str(threads)} if threads else {}
            children[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments], stdout=sys.stderr, env=os.environ | bars | own
            )
        for number in handlers:
            signal.signal(number, signal.default_int_handler)
        if pending:
            raise KeyboardInterrupt
        for name, child in children.items():
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            peaks[name] = max_resident_mb(usage)
            if child.returncode and not (child.returncode == 1 and has_answers(works[name])):
                failed.append(f"the step '{name}' failed (exit {child.returncode})")
    except BaseException:
        for child in children.values():
            child.terminate()
        for child in children.values():
            child.wait()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if failed:
        raise UserError(f"{' and '.join(failed)}; the reason is above; the same command continues")
    return peaks


def has_answers(program: list[str]) -> bool:
    """True if `program` is infer.extract and its output is complete. It exits 1 if some notes could not be answered
    (such as an empty one); their errors are then in the output, which is renamed only when complete."""
    return program[0] == "infer.extract" and Path(program[program.index("--out") + 1]).is_file()
