"""A long run as steps: finished ones are in OUT/steps.json, and the same command continues after an interruption.

A step is a function, or a program as `python -m` takes it; its seconds and its peak memory are kept. OUT/made-of.json
has the run's options: a run of other options is refused in the same folder, and nothing is removed without --overwrite.
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
from model.support.cli import UserError
from model.support.files import check_writable, read_json, read_jsonl, sha256_file, write_json
from model.support.hardware import compute_dtype, max_resident_mb
from model.support.lock import claim, discard, hold, is_claimed, is_empty, sweep

RECIPES = Path("train/recipes")
LONG = {"long": "windows", "max_new_diagnosis": 60}  # how the experiments ask: no note is cut


@dataclass
class Run:
    """A run's folder and what its steps took."""

    out: Path
    scale: str = ""
    steps: dict[str, dict[str, float]] = field(default_factory=dict)

    def step(self, name: str, work: Callable[[], object] | list[str]) -> None:
        """Do a step that is not yet done: a function, or a program as `-m` takes it (its output goes to stderr)."""
        if name in self.steps:
            return

        def alone() -> dict[str, float]:
            if isinstance(work, list):
                return programs({name: work})
            work()
            return {name: 0.0}

        self._do([name], alone)

    def run_in_parallel(self, works: Mapping[str, list[str]]) -> None:
        """Do programs two at a time, each with half of the cores: small products, which synchronise often
        when they are divided over cores, are faster that way (two tunings of a 135M base: 1.3 times). The time of a
        pair is divided between the two, so that seconds add up. On a GPU they run one after the other."""
        left = [(name, work) for name, work in works.items() if name not in self.steps]
        size = 1 if torch.cuda.is_available() else 2
        for pair in (dict(left[at : at + size]) for at in range(0, len(left), size)):
            self._do(pair, partial(programs, pair, max(1, (os.cpu_count() or 1) // 2) if size == 2 else 0))

    def _do(self, names: Iterable[str], work: Callable[[], Mapping[str, float]]) -> None:
        """Do steps; note what they took together, and the peak memory of each, which `work` returns."""
        with ended_by_sigterm():
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
    """What adapters on a real base train in: the faster of fp32 and bf16 on this machine, found once a run."""
    path = out / "dtype.json"
    if not path.is_file():
        write_json(path, str(compute_dtype()).removeprefix("torch."))
    return str(read_json(path))


def made_from(options: Any, files: Mapping[str, Path] | None = None, models: Iterable[str] = ()) -> dict[str, Any]:
    """What a run is made of: options but for --out and --overwrite, hashes of files, stamps of models."""
    given = {key: str(value) for key, value in vars(options).items() if key not in ("out", "overwrite")}
    hashes = {f"{name}_sha256": sha256_file(path) for name, path in (files or {}).items()}
    return given | hashes | {"models": [stamp(path) for path in models if path]}


def experiment(
    options: Any, files: Mapping[str, Path], models: Iterable[str], work: Callable[[Run], dict[str, Any]]
) -> dict[str, Any]:
    """Do `work` in the folder --out, or what an interrupted call left of it; writes its result, with the seconds that
    its steps took, to result.json and returns it."""
    with begin(options.out, made_from(options, files, models), overwrite=options.overwrite) as run:
        result = work(run) | {"seconds": run.took()}
        write_json(run.out / "result.json", result)
        return result


def check_folder() -> None:
    """Raise UserError where the recipes are not below the current folder."""
    if not RECIPES.is_dir():
        raise UserError("run this from the repository's root, which holds train/recipes")


def argv(program: str, *arguments: Any, **options: Any) -> list[str]:
    """A program as `python -m` takes it: limit=3 is --limit 3, of a sequence every value follows, True is the option
    alone, and None and False are no option.

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
    """The command of a training program. On a CPU of several cores it is two ranks, each with the whole model and a
    core: a small model's products are too small to be divided."""
    command = argv(program, *arguments, **options)
    if torch.cuda.is_available() or (os.cpu_count() or 1) < 2:
        return command
    return [*argv("torch.distributed.run", standalone=True, nproc_per_node=2), "-m", *command, "--sharded", "False"]


def extraction(weights: str, adapter: Path | str | None, notes: Path | str, out: Path | str, **how: Any) -> list[str]:
    """The command of infer.extract that asks a tuned model."""
    asked = {"form": "template"} | how
    return argv("infer.extract", weights=weights, adapter=adapter, notes=notes, out=out, **asked)


def public_base(run: Run) -> Path:
    """SmolLM2's 4-bit file, dequantised, as a folder of the run."""
    base = run.out / "base"
    run.step("base: SmolLM2 out of its GGUF file", argv("model.checkpoints.convert", smollm2(), base, overwrite=True))
    return base


def records_of(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_jsonl(path)]


@contextmanager
def begin(out: Path, made_of: Mapping[str, Any], last: str = "", overwrite: bool = False) -> Iterator[Run]:
    """The run in `out`, locked against other processes: a new one, or an interrupted one of the same options.

    Raises UserError where the folder contains anything else, and where the run is finished (the file `last` is there).
    `overwrite`: a run that is there, ended or not, is removed first.
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


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what runs here as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def programs(works: Mapping[str, list[str]], threads: int = 0) -> dict[str, float]:
    """Run programs (`python -m …`) in parallel, each with `threads` of torch's (0: its default). Returns their peak
    resident memory in MB. Raises UserError where one fails: the others run to their end first."""
    asked: list[int] = []  # a signal while a program starts: raised there, it would leave the program without the run
    handlers = {
        number: signal.signal(number, lambda number, _: asked.append(number))
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
        if asked:
            raise KeyboardInterrupt
        for name, child in children.items():
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            peaks[name] = max_resident_mb(usage)
            if child.returncode and not (child.returncode == 1 and answered(works[name])):
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


def answered(program: list[str]) -> bool:
    """Whether infer.extract has ended: it exits 1 where some notes could not be answered (an empty one, say), and its
    output, which is renamed only when it is complete, has their errors."""
    return program[0] == "infer.extract" and Path(program[program.index("--out") + 1]).is_file()
