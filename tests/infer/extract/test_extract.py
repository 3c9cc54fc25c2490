"""The product: order, places, bad notes, windows, what a batch holds."""

import gc
import json
import tracemalloc
from pathlib import Path

import jsonschema
import pytest
from jobs import extract, records, write_notes
from tqdm import tqdm

from infer import tasks
from model.support.cli import UserError


@pytest.fixture(autouse=True)
def short_epochs(monkeypatch):
    """Of as many notes as are asked at once."""
    monkeypatch.setattr("infer.extract.program.EPOCH", 1)


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
        b'{"id": 8, "text": "x", "n": NaN}',
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
        (True, "8"),
        (False, "7"),
    ]
    assert "too long" in found[8]["error"] and "word word" not in found[8]["error"]
    assert f"{tmp_path / 'o.jsonl'}: 11 notes, 9 with an error, " in capsys.readouterr().out.splitlines()[-1]
    assert extract(weights, notes, tmp_path / "o.jsonl", max_input_tokens=300, json=True) == 1
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["notes"], said["errors"], said["out"]) == (11, 9, str(tmp_path / "o.jsonl")) and said["seconds"] >= 0


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [("id,text\n", {}, "holds no note"), ("name,text\na,b\n", {"text_column": "id"}, "names no column 'id'")],
)
def test_a_table_without_notes_is_refused(weights, tmp_path, content, options, message):
    (tmp_path / "n.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        extract(weights, tmp_path / "n.csv", tmp_path / "o.jsonl", **options)
    assert list(tmp_path.glob("o.jsonl*")) == []


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


def test_nothing_to_read(weights, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    for notes in (tmp_path / "missing.jsonl", tmp_path / "empty.jsonl", tmp_path / "folder"):
        with pytest.raises(UserError):
            extract(weights, notes, tmp_path / "o.jsonl")
    assert not list(tmp_path.glob("o.jsonl*"))


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
