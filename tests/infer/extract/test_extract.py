"""The product: order, places, bad notes, resuming after a kill to the same bytes, ranks, windows, others' files."""

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from shutil import copytree

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from infer import tasks
from infer.engine.generate import Rows
from infer.engine.load import load
from infer.extract.job import END, EPOCH, Job, Unchanged, epochs, stamp
from infer.extract.notes import Note
from infer.extract.program import Options, main
from lora import LoRAConfig, add_lora, save_adapter
from model.support.cli import UserError
from model.support.files import write_jsonl

SMALL = {"max_new_tokens": 6, "max_new_diagnosis": 9, "batch": 3}


@pytest.fixture(autouse=True)
def short_epochs(monkeypatch):
    """Of as many notes as are asked at once."""
    monkeypatch.setattr("infer.extract.program.EPOCH", 1)


def write_notes(path: Path, count: int = 8) -> Path:
    lines = [
        {"id": f"n{i}", "text": f"Tumor {i}.5 cm of the left breast" + " and more" * (i % 3)} for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered(out: Path) -> list[dict]:
    """What a job that has not ended has answered so far."""
    parts = sorted(Path(f"{out}.parts").glob("*.jsonl"), key=lambda part: int(part.stem))
    return [record for part in parts for record in records(part)]


def write_parts(out: Path, lines: list[bytes], size: int = 3) -> Path:
    """Put lines in the place of what a job has answered, `size` an epoch; returns the folder."""
    folder = Path(f"{out}.parts")
    folder.mkdir()
    for epoch, start in enumerate(range(0, len(lines), size)):
        (folder / f"{epoch}.jsonl").write_bytes(b"".join(lines[start : start + size]))
    return folder


def extract(weights, notes, out, **options) -> int:
    return main(Options(weights=str(weights), notes=notes, out=out, form="template", **{**SMALL, **options}))


def test_one_record_a_note_in_order(weights, tmp_path):
    assert extract(weights, write_notes(tmp_path / "n.jsonl"), tmp_path / "o.jsonl") == 0
    found = records(tmp_path / "o.jsonl")
    assert [r["id"] for r in found] == [f"n{i}" for i in range(8)]
    for record in found:
        assert list(record["phenotypes"]) == list(tasks.PHENOTYPES)
        assert record["tokens"]["new"] > 0 and {"text", "codes", "logprob"} <= record["diagnosis"].keys()


def closed(schema):
    """The schema with no other keys than it names, so that what it leaves unsaid fails."""
    if isinstance(schema, dict):
        schema = {key: closed(part) for key, part in schema.items()}
        return {**schema, "additionalProperties": False} if isinstance(schema.get("properties"), dict) else schema
    return [closed(part) for part in schema] if isinstance(schema, list) else schema


@pytest.mark.parametrize("long", ["error", "truncate", "windows"])
def test_every_kind_of_record_is_what_the_schema_says(weights, tmp_path, long):
    """Answered, own questions, too long, wrong; with --repair. Of a finished job too, whose schema was removed."""
    lines = [
        {"id": "plain", "text": "tumor of the LUL"},
        {"id": "wrong", "text": 5},
        {"id": "own", "text": "a tumor", "questions": [{"question": "Which?"}, {"question": "Where?"}]},
        {"id": "long", "text": "tumor of the breast " * 30},
    ]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"max_input_tokens": 300, "long": long, "repair": write_notes(tmp_path / "lexicon.jsonl", 3)}
    extract(weights, tmp_path / "n.jsonl", tmp_path / "o.jsonl", **options)
    (tmp_path / "o.jsonl.schema.json").unlink()
    extract(weights, tmp_path / "n.jsonl", tmp_path / "o.jsonl", **options)
    schema = json.loads((tmp_path / "o.jsonl.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["phenotypes"]["propertyNames"]["enum"] == list(tasks.PHENOTYPES)
    plain, wrong, own, last = found = records(tmp_path / "o.jsonl")
    for record in found:
        jsonschema.validate(record, closed(schema))
    assert plain.keys() >= {"phenotypes", "diagnosis", "tokens", "repairs"}
    assert own["answers"][1]["question"] == "Where?"
    assert "error" in wrong and ("error" in last) == (long == "error") == ("long" not in last)
    if long != "error":
        assert last["long"]["did"] == long
    own["answers"][0].pop("question")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(own, schema)


def test_the_batch_does_not_change_answers(weights, tmp_path):
    notes = write_notes(tmp_path / "n.jsonl")
    extract(weights, notes, tmp_path / "a.jsonl", batch=1, dtype="float64")
    extract(weights, notes, tmp_path / "b.jsonl", batch=8, dtype="float64")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_bad_notes_do_not_end_the_job(weights, tmp_path, capsys):
    notes = tmp_path / "n.jsonl"
    lines = [
        b'{"id": "good", "text": "a tumor"}',
        b'{"id": "empty", "text": "  "}',
        b'{"id": "number", "text": 5}',
        b"not json",
        b"[1]",
        b'{"id": "none"}',
        b"\xff\xfe",
        b'{"id": "half", "text": "\\ud800"}',
        json.dumps({"id": "long", "text": "word " * 400}).encode(),
        b'{"id": 7, "text": "last"}',
    ]
    notes.write_bytes(b"\n".join(lines))
    assert extract(weights, notes, tmp_path / "o.jsonl", max_input_tokens=300) == 1
    found = records(tmp_path / "o.jsonl")
    assert [("error" in r, r["id"]) for r in found] == [
        (False, "good"),
        (True, "empty"),
        (True, "number"),
        (True, "line 4"),
        (True, "line 5"),
        (True, "none"),
        (True, "line 7"),
        (True, "half"),
        (True, "long"),
        (False, "7"),
    ]
    assert "too long" in found[8]["error"] and "word word" not in found[8]["error"]
    assert f"{tmp_path / 'o.jsonl'}: 10 notes, 8 with an error, " in capsys.readouterr().out.splitlines()[-1]
    assert extract(weights, notes, tmp_path / "o.jsonl", max_input_tokens=300, json=True) == 1
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["notes"], said["errors"], said["out"]) == (10, 8, str(tmp_path / "o.jsonl")) and said["seconds"] >= 0


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


def test_a_folder_of_texts(weights, tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for name in ("b", "a"):
        (folder / f"{name}.txt").write_text(f"note {name}")
    assert extract(weights, folder, tmp_path / "o.jsonl", task="diagnosis") == 0
    assert [r["id"] for r in records(tmp_path / "o.jsonl")] == ["a", "b"]


def test_own_questions(weights, tmp_path):
    notes = tmp_path / "n.jsonl"
    asked = [{"question": "Which disease?"}, {"question": "Which gene?"}]
    notes.write_text(json.dumps({"id": "x", "text": "A text.", "questions": asked}) + "\n")
    extract(weights, notes, tmp_path / "o.jsonl")
    (record,) = records(tmp_path / "o.jsonl")
    assert [a["question"] for a in record["answers"]] == ["Which disease?", "Which gene?"]


@pytest.mark.parametrize("long", ["truncate", "windows"])
def test_long_notes_say_what_was_done(weights, tmp_path, long):
    notes = tmp_path / "n.jsonl"
    notes.write_text(json.dumps({"id": "x", "text": "tumor of the breast " * 60}) + "\n")
    assert extract(weights, notes, tmp_path / "o.jsonl", max_input_tokens=300, long=long) == 0
    (record,) = records(tmp_path / "o.jsonl")
    assert record["long"]["did"] == long and record["long"]["tokens"] > 300
    if long == "windows":
        assert record["long"]["windows"] >= 4


def command(weights, notes, out) -> list[str]:
    return [
        sys.executable,
        "-m",
        "infer.extract",
        "--weights",
        str(weights),
        "--notes",
        str(notes),
        "--out",
        str(out),
        "--form",
        "template",
        "--max-new-tokens",
        "6",
        "--max-new-diagnosis",
        "9",
        "--batch",
        "1",
    ]


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
    with pytest.raises(UserError, match="no job's of ours"):
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
    with pytest.raises(UserError, match="no job's of ours"):
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


def test_nothing_to_read(weights, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    for notes in (tmp_path / "missing.jsonl", tmp_path / "empty.jsonl", tmp_path / "folder"):
        with pytest.raises(UserError):
            extract(weights, notes, tmp_path / "o.jsonl")
    assert not list(tmp_path.glob("o.jsonl*"))


@given(st.lists(st.integers(0, 9000), max_size=40), st.integers(1, 5))
def test_an_epoch_holds_as_many_notes_as_asked_for_however_long_they_are(lengths, most):
    notes = [Note(str(i), "x" * n) for i, n in enumerate(lengths)]
    found = list(epochs(notes, most))
    assert [n for epoch in found for n in epoch] == notes
    assert all(len(epoch) == most for epoch in found[:-1]) and all(found)


class Full(Rows):
    """A device whose memory is not enough for more than `room` notes."""

    room = 0

    def add(self, states):
        super().add(states)
        if len({tuple(state.prompt[:30]) for state in self.active}) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_halves_the_notes_at_once_and_is_remembered(weights, tmp_path, monkeypatch, capsys):
    notes, out = write_notes(tmp_path / "n.jsonl", 12), tmp_path / "o.jsonl"
    extract(weights, notes, tmp_path / "whole.jsonl", batch=6, dtype="float64")
    monkeypatch.setattr("infer.extract.ask.Rows", Full)
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


class Bar(tqdm):
    """The job's bar; from its start on, memory's peak is the notes' and not the loading's."""

    def __init__(self, **shown):
        tracemalloc.reset_peak()
        super().__init__(**shown)


def peak_of(weights, folder: Path, count: int, answered: bool) -> int:
    """Bytes of Python's objects at most while `count` notes are read: of 20,000 letters, too long, or answered."""
    folder.mkdir()
    with open(folder / "n.jsonl", "w") as out:
        for n in range(count):
            text = f"{n:03d} tumor " * (3 if answered else 2000)
            note = {"id": f"n{n}", "text": text, "questions": [{"question": "?"}]}
            out.write(json.dumps(note) + "\n")
    gc.collect()
    tracemalloc.start()
    try:
        assert extract(weights, folder / "n.jsonl", folder / "o.jsonl", max_new_tokens=2) == (not answered)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("answered", "few", "more"), [(False, 30, 180_000), (True, 60, 27_000)])
def test_a_job_holds_a_batch_of_notes_and_not_all(weights, tmp_path, monkeypatch, answered, few, more):
    """Four times the notes. Of long ones, 1.8 MB more text: less than a tenth of it more memory. Of answered ones less
    than 150 bytes a note, where a record or a prompt takes several times that."""
    monkeypatch.setattr("infer.extract.program.tqdm", Bar)
    peak_of(weights, tmp_path / "warm", 4 * few, answered)  # compiled patterns and other bounded caches
    peaks = [peak_of(weights, tmp_path / str(count), count, answered) for count in (few, 4 * few)]
    assert peaks[1] - peaks[0] < more
