"""A run of steps that is ended leaves no program behind, at whichever moment the signal comes; it goes on where it
stopped, and what else its folder holds stays."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eval.experiments import steps
from eval.experiments.steps import Run, begin
from model.support.cli import UserError
from model.support.files import read_json, write_json


def children():
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def signal_at(moment, number):
    """A tracer that sends this process a signal at one line, by number, of starting a program and waiting for it: the
    lines of steps.programs, and of subprocess's own code once the program exists."""
    lines = itertools.count()

    def line(frame, event, _):
        own = frame.f_code is steps.programs.__code__ or hasattr(frame.f_locals["self"], "pid")
        if event == "line" and own and next(lines) == moment:
            sys.settrace(None)
            os.kill(os.getpid(), number)
        return line

    codes = (steps.programs.__code__, subprocess.Popen._execute_child.__code__)
    return lambda frame, *_: line if frame.f_code in codes else None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts child processes in /proc: needs Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_line_of_a_program_s_start_ends_it_too(tmp_path, number):
    held = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a signal before the step began is no failure
    before, traced = children(), sys.gettrace()
    try:
        for moment in itertools.count():
            sys.settrace(signal_at(moment, number))
            try:
                Run(tmp_path).step("one", ["__future__"])
                break  # the program ended and no line was left
            except KeyboardInterrupt:
                assert children() == before, f"a signal at line {moment} left a program behind"
                assert not (tmp_path / "steps.json").exists()
            finally:
                sys.settrace(traced)
    finally:
        signal.signal(signal.SIGTERM, held)
    assert moment > 30


def test_programs_beside_one_another_are_done_once_and_the_failed_one_again(tmp_path, capfd):
    run = Run(tmp_path)
    quick = ["timeit", "-n1", "-r1", "pass"]
    run.run_in_parallel({"one": quick, "two": quick, "three": quick})
    assert list(run.steps) == ["one", "two", "three"] and run.steps["one"]["seconds"] == run.steps["two"]["seconds"]
    assert run.peak("two") > 1
    assert "· one and two\n" in capfd.readouterr().err
    run.run_in_parallel({"one": quick, "two": quick, "three": quick})
    assert "·" not in capfd.readouterr().err
    with pytest.raises(UserError, match=r"the step 'four' failed \(exit 1\); the reason is"):
        run.run_in_parallel({"four": ["timeit", "-n1", "-r1", "1/0"], "five": quick})
    assert "four" not in run.steps


def left_alone(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_steps_go_on_where_they_stopped(tmp_path):
    done = []

    def broken():
        raise RuntimeError

    with pytest.raises(RuntimeError), begin(tmp_path / "run", {"scale": "tiny", "n": 1}) as run:
        run.step("first", lambda: done.append(1))
        write_json(tmp_path / "run" / ".notes.jsonl.abcdefg1.part", "what a kill left")
        run.step("second", broken)
    with begin(tmp_path / "run", {"scale": "tiny", "n": 1}) as again:
        again.step("first", lambda: done.append("twice"))
        again.step("second", lambda: done.append(2))
    assert done == [1, 2] and again.took() >= 0 and again.scale == "tiny"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["made-of.json", "steps.json"]


@pytest.mark.parametrize("how", ["of other options", "ended"])
def test_a_run_that_is_there_is_removed_only_with_overwrite(tmp_path, how):
    out, made_of = tmp_path / "run", {"n": 1}
    with begin(out, {"n": 1 if how == "ended" else 2}):
        write_json(out / "report.html", "minutes of work")
    before = left_alone(tmp_path)
    said = "a finished run, with its report.html" if how == "ended" else r"another job \(other n\)"
    for last in ("report.html", "report.html" if how == "ended" else ""):
        with pytest.raises(UserError, match=said), begin(out, made_of, last):
            pass
        assert left_alone(tmp_path) == before
    with begin(out, made_of, "report.html", overwrite=True) as run:
        assert not (out / "report.html").exists() and not run.steps


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("theirs", ["thesis.tex", "steps.json", "made-of.json", "folder/thesis.tex", ".git"])
def test_a_folder_of_something_else_is_never_removed(tmp_path, theirs, overwrite):
    """steps.json and made-of.json are names that others give their files too."""
    file = tmp_path / "out" / theirs
    file.parent.mkdir(parents=True)
    file.write_text('{"mine": 1}')
    (tmp_path / "to-out").symlink_to("out")
    before = left_alone(tmp_path)
    for out, said in (("out", "was not written by a job"), ("to-out", "a symbolic link")):
        with pytest.raises(UserError, match=said), begin(tmp_path / out, {}, "report.html", overwrite):
            pass
        assert left_alone(tmp_path) == before


@pytest.mark.parametrize("out", ["/proc/x", "file"])
def test_a_place_that_cannot_hold_a_run_is_named(tmp_path, out):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^cannot write \S+: .*; choose another place"), begin(tmp_path / out, {}):
        pass


def test_two_runs_never_share_a_folder(tmp_path):
    with begin(tmp_path / "run", {"n": 1}) as run:
        run.step("first", lambda: None)
        for overwrite in (False, True):
            with pytest.raises(UserError, match="is writing it"), begin(tmp_path / "run", {"n": 1}, "", overwrite):
                pass
        assert run.steps.keys() == read_json(tmp_path / "run" / "steps.json").keys()
