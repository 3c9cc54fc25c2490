"""One process writes an output at a time, whichever is killed when; nothing that a user had is replaced or swept."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from model.support.cli import UserError
from model.support.lock import claim, discard, hold, output, sweep

HOLDER = """
import sys
from model.support.lock import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(out):
    """A process that holds `out` until its input is closed."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.mark.parametrize("by", ["its path", "a link to its folder"])
def test_another_process_is_named_and_a_killed_one_is_in_nobody_s_way(tmp_path, by):
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to("runs")
    out = tmp_path / "runs" / "a"
    first = holder(out)
    with (
        pytest.raises(UserError, match=rf"process {first.pid} on .* is writing it"),
        hold(out if by == "its path" else tmp_path / "link" / "a"),
    ):
        pass
    with hold(tmp_path / "runs" / "b"):
        first.send_signal(signal.SIGKILL)
        first.communicate()
        with hold(out), pytest.raises(UserError, match=f"process {os.getpid()} on"), hold(out):
            pass
    assert not list((tmp_path / "runs").iterdir())


def test_of_many_processes_one_at_a_time_is_inside(tmp_path):
    """Each adds to a number in a file, reading and writing it: none is lost. Holders remove the lock file."""
    out, each = tmp_path / "n", 60
    out.write_text("0")
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            done = 0
            try:
                while done < each:
                    try:
                        with hold(out):
                            out.write_text(str(int(out.read_text()) + 1))
                            done += 1
                    except UserError:
                        os.sched_yield()
            finally:
                os._exit(done != each)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert out.read_text() == str(4 * each) and sorted(tmp_path.iterdir()) == [out]


def test_a_symbolic_link_is_refused_wherever_it_points(tmp_path):
    (tmp_path / "folder").mkdir()
    for target in ("folder", "nowhere"):
        link = tmp_path / f"to-{target}"
        link.symlink_to(target)
        for opened in (hold(link), output(link, True)):
            with pytest.raises(UserError, match=rf"a symbolic link; give its target, \S*/{target}"), opened:
                pass
        assert link.is_symlink()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="^/: the root folder; name a folder in it"), hold("/"):
        pass
    for out in (tmp_path / "file" / "x", "/proc/x"):
        with pytest.raises(UserError, match=rf"^cannot write {out}: .*; choose another place for it$"), hold(out):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path / "a"):
        pass
    assert "cannot be locked" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", ["a file", "a folder", "a link"])
def test_what_a_user_had_is_replaced_only_with_overwrite(tmp_path, there):
    out = tmp_path / "mine"
    if there == "a file":
        out.write_text("mine")
    elif there == "a folder":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        out.symlink_to(tmp_path)
    with pytest.raises(UserError, match="--overwrite|a symbolic link"), output(out, False):
        pass
    if there != "a link":
        with output(out, True):
            pass
    assert os.path.lexists(out) and sorted(tmp_path.iterdir()) == [out]


def test_an_empty_folder_and_what_a_kill_left_are_nobody_s(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".notes.jsonl.abcdefg1.part").write_text("half")
    with output(tmp_path / "a", False):
        sweep(tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())


NAME = st.text("ab.*[]?1", min_size=1, max_size=6).filter(lambda name: name.strip("."))
CHANCE = st.text("abz019_", min_size=8, max_size=8)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAME, NAME, CHANCE, st.sampled_from(["part", "old"]), st.booleans())
def test_only_what_was_left_of_this_name_is_swept_beside_it(tmp_path_factory, name, other, chance, end, folder):
    assume(name != f".{other}")  # the last of these files would be the other's temporary folder
    place = tmp_path_factory.mktemp("place")
    for one in {name, other}:
        left = place / f".{one}.{chance}.{end}"
        left.mkdir() if folder else left.write_text("notes")
    (place / f"{name}.{chance}.{end}").write_text("no temporary name")
    before = set(os.listdir(place))
    with hold(place / name):
        pass
    assert before - set(os.listdir(place)) == {f".{name}.{chance}.{end}"}


def test_a_folder_that_was_moved_aside_for_another_gets_its_name_back(tmp_path):
    """A kill between the two renames of a folder that replaces another."""
    old = tmp_path / ".a.abcdefg1.old"
    (old / "was").mkdir(parents=True)
    (old / "was" / "kept").write_text("whole")
    with hold(tmp_path / "a"):
        assert (tmp_path / "a" / "kept").read_text() == "whole"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a"]


def test_what_another_process_holds_inside_is_not_swept(tmp_path):
    inner, theirs = tmp_path / "run" / "inner", []
    for folder, name in ((tmp_path / "run", "inner"), (inner, "tokens"), (tmp_path / "run", "mine")):
        folder.mkdir(parents=True, exist_ok=True)
        theirs.append(folder / f".{name}.abcdefg1.part")
    with hold(tmp_path / "run"), hold(inner):
        for left in theirs:
            left.write_text("half")
        sweep(tmp_path / "run")
        assert [left.exists() for left in theirs] == [True, True, False]
    with hold(tmp_path / "run"):
        sweep(tmp_path / "run")
    assert not any(left.exists() for left in theirs)


def test_a_name_is_claimed_by_one_job(tmp_path):
    out, mark = tmp_path / "a", tmp_path / "a.json"
    assert claim(out, mark, {"n": (1, 2), "m": 1}, False)["n"] == [1, 2]
    before = mark.read_bytes()
    claim(out, mark, {"n": [1, 2], "m": 1}, True)
    with pytest.raises(UserError, match=r"belongs to another job \(other m\)"):
        claim(out, mark, {"n": [1, 2], "m": 2}, True)
    assert mark.read_bytes() == before
    claim(out, mark, {"n": 3}, False)  # nothing was made under the name: the mark is of a job that never began
    assert mark.read_bytes() != before
    for theirs in ('{"mine": 1}', "[]", "no JSON", "[" * 100_000):
        mark.write_text(theirs)
        for begun in (True, False):
            with pytest.raises(UserError, match="was not written by a job"):
                claim(out, mark, {"n": 3}, begun)
        assert mark.read_text() == theirs
    mark.unlink()
    with pytest.raises(UserError, match="was not written by a job"):
        claim(out, mark, {"n": 3}, True)
    assert not mark.exists()


def test_a_discarded_folder_is_gone_and_what_a_kill_leaves_of_it_is_swept(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with hold(tmp_path / "a"):
        discard(tmp_path / "a")
        assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]
    (tmp_path / ".a.abcdefg1.old" / "discarded" / "b").mkdir(parents=True)
    with hold(tmp_path / "a"):
        assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]
