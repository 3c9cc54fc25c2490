"""A job of infer.extract: resumed to the same bytes after a kill, ranks, epochs, others' files, changed notes."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import answered, command, extract, records, write_notes, write_parts
from tqdm import tqdm

from infer.engine.generate import RequestBatch
from infer.engine.load import load
from infer.extract.job import END, EPOCH, Job, Unchanged, epochs, stamp
from infer.extract.notes import Note
from lora import LoRAConfig, add_lora, save_adapter
from model.support.cli import UserError
from model.support.files import write_jsonl


@pytest.fixture(autouse=True)
def short_epochs(monkeypatch):
    """Of as many notes as are asked at once."""
    monkeypatch.setattr("infer.extract.program.EPOCH", 1)


def test_a_job_that_goes_on_counts_what_was_answered_and_not_into_its_rate(weights, tmp_path, monkeypatch):
    """tqdm's rate is of what comes after `initial`."""
    bars = []

    class Bar(tqdm):
        def __init__(self, **shown):
            super().__init__(**{**shown, "disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr("infer.extract.program.tqdm", Bar)
    notes, out = write_notes(tmp_path / "n.jsonl"), tmp_path / "o.jsonl"
    extract(weights, notes, out)
    whole = out.read_bytes()
    out.unlink()
    write_parts(out, whole.splitlines(keepends=True)[:6])
    extract(weights, notes, out)
    assert out.read_bytes() == whole
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, 8, 8), (6, 8, 8)]


@pytest.mark.slow
def test_killed_and_continued_gives_the_same_bytes(weights, tmp_path):
    notes = write_notes(tmp_path / "n.jsonl", 5 * EPOCH)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(weights, notes, tmp_path / "whole.jsonl"), check=True, env=env, capture_output=True)
    out = tmp_path / "cut.jsonl"
    kills = 0
    for parts in (1, 2):
        process = subprocess.Popen(command(weights, notes, out), env=env, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if len(list(tmp_path.glob("cut.jsonl.parts/*.jsonl"))) >= parts:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
            time.sleep(0)
        (tmp_path / "cut.jsonl.parts" / ".2.jsonl.abcdefg1.part").write_bytes(b'{"id": "half a rec')
    assert kills == 2 and not out.exists()
    subprocess.run(command(weights, notes, out), check=True, env=env, capture_output=True)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def with_descendants(pid: int) -> list[int]:
    """A process and all below it: torchrun starts each rank in a session of its own."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds torchrun's ranks in /proc")
def test_two_ranks_killed_and_continued_give_the_bytes_of_one(weights, tmp_path):
    notes = write_notes(tmp_path / "n.jsonl", 6 * EPOCH + 1)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = command(weights, notes, tmp_path / "one.jsonl")
    subprocess.run(one, check=True, env=env, capture_output=True)
    out = tmp_path / "two.jsonl"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += command(weights, notes, out)[1:]
    process, killed = subprocess.Popen(launch, env=env, stderr=subprocess.DEVNULL), 0
    while process.poll() is None:
        if len(list(tmp_path.glob("two.jsonl.parts/*.jsonl"))) >= 2:
            for pid in with_descendants(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
        time.sleep(0)
    assert killed >= 3 and not out.exists()
    done = subprocess.run(launch, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_a_job(weights, tmp_path):
    """One answers an epoch and stops; two do the rest."""
    notes, out = write_notes(tmp_path / "n.jsonl", 3 * EPOCH), tmp_path / "o.jsonl"
    one = command(weights, notes, tmp_path / "one.jsonl")
    subprocess.run(one, check=True, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infer.extract.program.EPOCH", EPOCH)
        patch.setattr(Job, "take", lambda job, epoch: epoch == 0)
        with pytest.raises(UserError, match="not whole: nobody had epoch 1, 2; the same command"):
            extract(weights, notes, out, batch=1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(launch + command(weights, notes, out)[1:], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_another_job_s_output_is_left_alone(weights, tmp_path):
    notes, out = write_notes(tmp_path / "n.jsonl", 2), tmp_path / "o.jsonl"
    out.write_text("mine\n")
    with pytest.raises(UserError, match="not written by a job"):
        extract(weights, notes, out)
    assert out.read_text() == "mine\n"
    out.unlink()
    extract(weights, notes, out)
    before = out.read_bytes()
    assert extract(weights, notes, out) == 0  # finished already
    schema = tmp_path / "o.jsonl.schema.json"
    schema.write_text('{"title": "of an older version"}')
    assert extract(weights, notes, out) == 0
    assert set(records(out)[0]) <= set(json.loads(schema.read_text())["properties"])
    with pytest.raises(UserError, match="another job"):
        extract(weights, notes, out, max_new_tokens=7)
    write_notes(notes, 3)
    with pytest.raises(UserError, match="another job"):
        extract(weights, notes, out)
    assert out.read_bytes() == before


def test_weights_that_were_trained_anew_are_another_job(weights, tmp_path):
    """The same folder and files of the same sizes: their tensors tell, though only their two ends are read."""
    folder, notes, out = tmp_path / "adapter", write_notes(tmp_path / "n.jsonl", 2), tmp_path / "o.jsonl"
    for seed in (1, 2):
        model, _ = load(weights)
        save_adapter(add_lora(model, LoRAConfig(r=2, alpha=4), seed=seed), folder)
        if seed == 1:
            extract(weights, notes, out, adapter=(str(folder),))
            assert extract(weights, notes, out, adapter=(str(folder),)) == 0
    with pytest.raises(UserError, match=r"another job \(other adapter\)"):
        extract(weights, notes, out, adapter=(str(folder),))
    (tmp_path / "f").write_bytes(bytes(3 * END))
    before = stamp(tmp_path / "f")
    for byte in (0, END - 1, 2 * END, 3 * END - 1):
        (tmp_path / "f").write_bytes(bytes(byte) + b"1" + bytes(3 * END - byte - 1))
        assert stamp(tmp_path / "f") != before


def test_processes_take_every_epoch_once(tmp_path):
    jobs = [Job(tmp_path / "o.jsonl", {}, rank) for rank in range(3)]
    with pytest.raises(UserError, match=r"o.jsonl.parts: not there; every process must write into the same folder"):
        jobs[1].take(0)
    assert not jobs[0].claim()
    owners = {
        epoch: [job.rank for job in sorted(jobs, key=lambda job: (job.rank - epoch) % 3) if job.take(epoch)]
        for epoch in range(7)
    }
    assert owners == {epoch: [epoch % 3] for epoch in range(7)}


def test_a_process_that_died_is_named_and_its_epochs_are_answered_at_the_next_call(tmp_path, capsys):
    sizes, unchanged = [2, 1, 1], Unchanged(tmp_path)
    first, second = (Job(tmp_path / "o.jsonl", {}, rank) for rank in range(2))
    assert not first.claim() and first.take(0) and second.take(1) and first.take(2)
    first.write(0, [{"id": "a"}, {"id": "b"}])
    first.write(2, [{"id": "d"}])
    with pytest.raises(UserError, match="o.jsonl: not whole: rank 1 had epoch 1; the same command answers"):
        first.finish(sizes, unchanged)
    assert not (tmp_path / "o.jsonl").exists()
    again = Job(tmp_path / "o.jsonl", {})
    assert not again.claim() and capsys.readouterr().err.count("rank 1 ended in epoch 1, which is answered again") == 1
    assert again.done(sizes) == {0, 2} and again.take(1)
    again.write(1, [{"id": "c"}])
    again.finish(sizes, unchanged)
    assert [record["id"] for record in records(tmp_path / "o.jsonl")] == list("abcd")


@pytest.mark.slow
def test_more_ranks_than_batches(weights, tmp_path):
    notes, out = write_notes(tmp_path / "n.jsonl", 1), tmp_path / "o.jsonl"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, *command(weights, notes, out)[1:]],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [record["id"] for record in records(out)] == ["n0"]


def test_a_job_that_never_started_is_in_nobody_s_way(weights, tmp_path):
    notes, out = write_notes(tmp_path / "n.jsonl", 2), tmp_path / "o.jsonl"
    with pytest.raises(UserError):
        extract(weights, notes, out, adapter=(str(tmp_path),))  # a folder without an adapter
    assert extract(weights, notes, out) == 0


def test_a_job_that_has_begun_has_its_schema(weights, tmp_path):
    """Whoever reads what a killed job has answered so far can look up there what it means."""
    notes, out = write_notes(tmp_path / "n.jsonl", 2), tmp_path / "o.jsonl"
    with pytest.raises(UserError, match="no adapter_config.json"):
        extract(weights, notes, out, adapter=(str(tmp_path),))
    assert "phenotypes" in json.loads((tmp_path / "o.jsonl.schema.json").read_text())["properties"]


def test_a_neighbour_s_parts_are_its_own(tmp_path):
    """Outputs beside one another: o3 is not o32; a folder of parts that no job's file speaks of is somebody else's."""
    for name in ("o32.parts", "o3.x.parts", "xo3.parts"):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.iterdir())
    assert not Job(tmp_path / "o3", {}).claim()
    (tmp_path / "o3.job.json").unlink()
    with pytest.raises(UserError, match="not written by a job"):
        Job(tmp_path / "o3", {}).claim()
    (tmp_path / "o3.parts").rmdir()
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_kill_at_the_very_end_left_is_cleared_when_the_job_is_called_again(tmp_path):
    jobs = [Job(tmp_path / "o.jsonl", {}, rank) for rank in range(2)]
    assert not jobs[0].claim()
    for epoch, job in enumerate(jobs):
        assert job.take(epoch)
        job.write(epoch, [{"id": "a"}])
    copytree(jobs[0].parts, tmp_path / "kept")
    jobs[0].finish([1, 1], Unchanged(tmp_path))
    (tmp_path / "kept").rename(jobs[0].parts)
    assert jobs[1].claim() and jobs[0].parts.exists()  # the first alone takes away
    assert jobs[0].claim() and not jobs[0].parts.exists()
    assert [record["id"] for record in records(tmp_path / "o.jsonl")] == ["a", "a"]


def test_a_second_job_on_one_output_is_refused_while_the_first_lives(weights, tmp_path):
    """The first is this process; the second is one of its own, and then the same one after it."""
    notes, out = write_notes(tmp_path / "n.jsonl", 4), tmp_path / "cut.jsonl"
    with Job(out, {}).lock():
        second = subprocess.run(command(weights, notes, out), capture_output=True, text=True)
        assert second.returncode == 2 and second.stdout == ""
        (line,) = second.stderr.splitlines()
        assert line.startswith(f"infer.extract: {out}: process {os.getpid()} on ") and "is writing it; wait" in line
        assert sorted(path.name for path in tmp_path.iterdir()) == [".cut.jsonl.lock", "n.jsonl"]
    assert extract(weights, notes, out) == 0 and len(records(out)) == 4


@pytest.mark.slow
def test_two_jobs_begun_at_once_leave_the_bytes_of_one(weights, tmp_path):
    """However they meet: one is refused, or finds the other's finished."""
    notes = write_notes(tmp_path / "n.jsonl", 30)
    subprocess.run(command(weights, notes, tmp_path / "one.jsonl"), check=True, capture_output=True)
    out = tmp_path / "two.jsonl"
    both = [subprocess.Popen(command(weights, notes, out), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [(job.communicate()[1], job.returncode) for job in both]
    assert 0 in [code for _, code in said]
    assert all(code == 0 or (code == 2 and "is writing it" in text) for text, code in said)
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes() and not list(tmp_path.glob("*two*part*"))


def rewritten(notes: Path, how: str) -> None:
    """The notes' file as another program leaves it while a job runs."""
    lines = notes.read_text().splitlines(keepends=True)
    if how == "replaced":
        (notes.parent / "new").write_text("".join(lines[::-1]))
        os.replace(notes.parent / "new", notes)
        return
    changed = {
        "fewer": lines[:5],
        "doubled": lines * 2,
        "of other texts": [line.replace("left", "lung") for line in lines],
        "emptied": [],
        "removed": [],
    }[how]
    notes.write_text("".join(changed))
    if how == "removed":
        notes.unlink()


@pytest.mark.parametrize("when", [3, 6, 8])  # after so many notes of 8, in batches of 3
@pytest.mark.parametrize("how", ["fewer", "doubled", "of other texts", "emptied", "removed", "replaced"])
def test_notes_that_are_rewritten_under_a_job_never_become_its_output(weights, tmp_path, monkeypatch, when, how):
    """What is answered is kept; with the old notes back, the same command ends with an undisturbed job's bytes."""
    notes, out = write_notes(tmp_path / "n.jsonl"), tmp_path / "o.jsonl"
    before = notes.read_bytes()
    extract(weights, notes, tmp_path / "whole.jsonl")

    def write(job, epoch, made):
        write_jsonl(job.part(epoch), made)
        if len(answered(out)) == when:
            rewritten(notes, how)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "write", write)
        with pytest.raises(UserError, match="n.jsonl: was changed while the job ran"):
            extract(weights, notes, out)
    assert not out.exists() and len(answered(out)) == when
    if notes.exists() and how != "emptied":
        with pytest.raises(UserError, match=r"another job \(other notes\)"):
            extract(weights, notes, out)
    notes.write_bytes(before)
    assert extract(weights, notes, out) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_folder_s_note_rewritten_under_a_job_ends_it_for_good(weights, tmp_path, monkeypatch):
    """Nobody saw when: some answers may be about the other text, so none is taken over."""
    folder, out = tmp_path / "notes", tmp_path / "o.jsonl"
    folder.mkdir()
    for name in "abcdef":
        (folder / f"{name}.txt").write_text(f"note {name}")

    class Rewriting(tqdm):
        def update(self, count=1):
            (folder / "f.txt").write_text("another")

    with monkeypatch.context() as patch:
        patch.setattr("infer.extract.program.tqdm", Rewriting)
        with pytest.raises(UserError, match="notes: was changed while the job ran"):
            extract(weights, folder, out, task="diagnosis")
    (folder / "f.txt").write_text("note f")
    with pytest.raises(UserError, match=r"another job \(other notes\)"):
        extract(weights, folder, out, task="diagnosis")
    assert not out.exists() and len(answered(out)) == 6


@pytest.mark.parametrize("wrong", [b"no JSON", b"[]", b"[" * 100_000, b"{}", b"\xff", b"9" * 5000])
def test_a_part_whose_line_is_no_record_is_named_before_anything_else_is_done(weights, tmp_path, wrong):
    notes, out = write_notes(tmp_path / "n.jsonl"), tmp_path / "o.jsonl"
    extract(weights, notes, out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.unlink()
    folder = write_parts(out, [*lines[:4], wrong + b"\n", lines[5]])
    part = folder / "1.jsonl"
    with pytest.raises(UserError, match=rf"^{part}:2: .*; 1.jsonl was changed: remove it, and the same command"):
        extract(weights, notes, out)
    assert part.read_bytes() == lines[3] + wrong + b"\n" + lines[5] and not out.exists()
    part.unlink()
    extract(weights, notes, out)
    assert out.read_bytes() == b"".join(lines)
    out.write_bytes(b"".join(lines[:2]) + wrong + b"\n")
    with pytest.raises(UserError, match=rf"^{out}:3: "):
        extract(weights, notes, out)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.data())
def test_an_output_holds_a_record_for_each_note_or_has_no_name(tmp_path_factory, sizes, data):
    """Whatever another program added to a part or took from it; seen at the end, and when the job goes on."""
    folder = tmp_path_factory.mktemp("job")
    job = Job(folder / "o.jsonl", {})
    assert not job.claim()
    for epoch, size in enumerate(sizes):
        job.write(epoch, [{"id": f"{epoch}-{i}"} for i in range(size)])
    part = job.part(data.draw(st.integers(0, len(sizes) - 1)))
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:-1] if data.draw(st.booleans()) else [*lines, b'{"id": "more"}\n']))
    for look in (lambda: job.finish(sizes, Unchanged(folder)), lambda: job.done(sizes)):
        with pytest.raises(UserError, match=f"records for {len(lines)} notes: something else wrote to it"):
            look()
    assert not (folder / "o.jsonl").exists() and part.exists()
    part.write_bytes(b"".join(lines))
    job.finish(sizes, Unchanged(folder))
    assert [record["id"] for record in records(folder / "o.jsonl")] == [
        f"{epoch}-{i}" for epoch, size in enumerate(sizes) for i in range(size)
    ]


@given(st.lists(st.integers(0, 9000), max_size=40), st.integers(1, 5))
def test_an_epoch_holds_as_many_notes_as_asked_for_however_long_they_are(lengths, most):
    notes = [Note(str(i), "x" * n) for i, n in enumerate(lengths)]
    found = list(epochs(notes, most))
    assert [n for epoch in found for n in epoch] == notes
    assert all(len(epoch) == most for epoch in found[:-1]) and all(found)


class Full(RequestBatch):
    """A device whose memory is not enough for more than `room` notes."""

    room = 0

    def add(self, states):
        super().add(states)
        if len({tuple(state.prompt[:30]) for state in self.active}) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_halves_the_notes_at_once_and_is_remembered(weights, tmp_path, monkeypatch, capsys):
    notes, out = write_notes(tmp_path / "n.jsonl", 12), tmp_path / "o.jsonl"
    extract(weights, notes, tmp_path / "whole.jsonl", batch=6, dtype="float64")
    monkeypatch.setattr("infer.extract.ask.RequestBatch", Full)
    monkeypatch.setattr(Full, "room", 2)
    assert extract(weights, notes, out, batch=6, dtype="float64") == 0
    assert (
        "out of the device's memory: 3 notes at once" in (said := capsys.readouterr().err) and "1 notes at once" in said
    )
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    mark = json.loads((tmp_path / "o.jsonl.job.json").read_text())
    assert (mark["batch"], mark["batch now"]) == (6, 1)
    write_parts(out, out.read_bytes().splitlines(keepends=True)[:6], 6)
    out.unlink()  # a job that goes on begins with what the memory was enough for
    assert extract(weights, notes, out, batch=6, dtype="float64") == 0 and "memory" not in capsys.readouterr().err
    monkeypatch.setattr(Full, "room", 0)
    with pytest.raises(UserError, match="memory is not enough for one note; give --format"):
        extract(weights, notes, tmp_path / "none.jsonl")


def test_a_job_keeps_the_number_of_notes_at_once_that_it_began_with(weights, tmp_path, monkeypatch):
    notes, out = write_notes(tmp_path / "n.jsonl", 2), tmp_path / "o.jsonl"
    kept = []
    for free in (1e12, 0.0):
        monkeypatch.setattr("model.support.hardware.free_memory", lambda device, free=free: free)
        assert extract(weights, notes, out, batch=0) == 0
        kept.append(json.loads((tmp_path / "o.jsonl.job.json").read_text())["batch"])
    assert kept == [8, 8]
    assert extract(weights, notes, tmp_path / "other.jsonl", batch=0) == 0
    assert json.loads((tmp_path / "other.jsonl.job.json").read_text())["batch"] == 1
