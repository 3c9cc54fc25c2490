"""A run killed before any write or removal ends, resumed, with the same bytes."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from tiny_runs import as_recipe

from train.distributed.checkpoint import newest_intact, step_of
from train.distributed.sharding import Ranks
from train.session import finish, prepare, train

CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.truncate")  # with dir_fd too, as in rmtree
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def contents(out: Path) -> dict[str, bytes]:
    """Every file and folder of a run but its tokens; temporary names without their chance letters."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if "tokens" not in path.parts):
        name = re.sub(r"\.\w{8}\.(part|old)", r".\1", str(path.relative_to(out)))
        found[name] = path.read_bytes() if path.is_file() else b""
    return found


def watch(out: Path, into: Path, stop: int) -> None:
    """An audit hook that copies `out` before each change of the disk that finds another state than the one before, as
    a kill there would leave it; before the stop-th (from 1; 0: never) it kills this process."""
    held: list[dict[str, bytes]] = [{}]

    def hook(event, args):
        if event in CHANGES or (event == "open" and args[2] & WRITING):
            state = contents(out)
            if state != held[-1]:
                if len(held) == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                held.append(state)  # first: the copy's own writes come back here
                shutil.copytree(out, into / f"{len(held) - 1:03d}")

    sys.addaudithook(hook)


def trained(options: dict, out: Path, into: Path, stop: int = 0) -> int:
    """Train in a child process that copies its states, or dies. Returns its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            watch(out, into, stop)
            train(as_recipe(options, out=str(out)), "instruct")
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lines(out: Path) -> int:
    return len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").is_file() else 0


@pytest.mark.slow
def test_killed_before_any_write_or_removal_and_resumed_ends_with_the_same_bytes(options, tmp_path):
    """Three checkpoints of which one is kept, the metrics, the final adapter and the card: the state that each write
    or removal finds is copied as it comes, and a run goes on from each copy."""
    options = {**options, "steps": 3, "save_every": 1, "keep_last": 1, "batch_rows": 1, "valid_data": []}
    out, copies, killed = tmp_path / "run", tmp_path / "copies", tmp_path / "killed"
    assert trained(options, out, copies) == 0
    whole, states = contents(out), sorted(copies.iterdir())
    middle = len(states) // 2
    assert trained(options, killed, tmp_path / "unused", stop=middle) == -signal.SIGKILL
    assert contents(killed) == contents(states[middle - 1]), "a copy is what a kill leaves"
    third = next(state for state in states if lines(state) == 3)  # of a step that no checkpoint holds yet
    half = Path(shutil.copytree(third, copies / "half a line"))
    (half / "metrics.jsonl").write_bytes((half / "metrics.jsonl").read_bytes()[:-9])
    states.insert(states.index(third), half)
    reached, same = 0, ["checkpoints", "metrics.jsonl"]
    for state in states:
        found = newest_intact(state / "checkpoints")
        step = 0 if found is None else step_of(found)
        assert step >= reached, f"{state.name}: the checkpoint of step {reached} is lost"
        reached = step
        made = prepare(as_recipe(options, out=str(state)), "instruct", Ranks())
        made.run()
        if any("adapter" in path.name for path in state.iterdir()):  # killed when training was over
            finish(made, 0.0)
            same = [*same, "adapter"]
            assert json.loads((state / "run.json").read_text())["steps"] == 3
        ours, theirs = (
            {name: held for name, held in found.items() if name.split("/")[0] in same}
            for found in (contents(state), whole)
        )
        assert ours == theirs, state.name
    assert reached == 3 and "adapter" in same
