"""A run of steps that is ended leaves no program behind, at whichever moment the signal comes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from eval.experiments.steps import Run
from model.support.cli import UserError


def children():
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts child processes in /proc: needs Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_program_starts_ends_it_too(tmp_path, number):
    held = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a signal before the step began is no failure
    before = children()
    try:
        for milliseconds in (0, 0.2, 0.4, 0.6, 0.8, 1, 1.5, 2, 3, 5, 50):
            begun = threading.Event()

            def end(delay=milliseconds / 1000, begun=begun):
                begun.wait()
                time.sleep(delay)
                os.kill(os.getpid(), number)

            sender = threading.Thread(target=end)
            sender.start()
            with pytest.raises(KeyboardInterrupt):
                begun.set()
                Run(tmp_path).step("sleep", ["timeit", "-n1", "-r1", "-s", "import time", "time.sleep(60)"])
            sender.join()
            assert children() == before, f"a signal after {milliseconds} ms left a program behind"
            assert not (tmp_path / "steps.json").exists()
    finally:
        signal.signal(signal.SIGTERM, held)


def test_programs_beside_one_another_are_done_once_and_the_failed_one_again(tmp_path, capfd):
    run = Run(tmp_path)
    quick = ["timeit", "-n1", "-r1", "pass"]
    run.beside({"one": quick, "two": quick, "three": quick})
    assert list(run.steps) == ["one", "two", "three"] and run.steps["one"]["seconds"] == run.steps["two"]["seconds"]
    assert run.took() < 10 and run.peak("two") > 1
    assert "· one, beside two\n" in capfd.readouterr().err
    run.beside({"one": quick, "two": quick, "three": quick})
    assert "·" not in capfd.readouterr().err
    with pytest.raises(UserError, match=r"the step 'four' failed \(exit 1\); the reason"):
        run.beside({"four": ["timeit", "-n1", "-r1", "1/0"], "five": quick})
    assert "four" not in run.steps
