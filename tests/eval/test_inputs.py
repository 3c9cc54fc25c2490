"""Only regular files are opened: a pipe may have no writer, and reading a device may never end."""

import os
import signal

import pytest

from eval import perplexity
from infer.extract.job import stamp
from infer.extract.notes import fingerprint, read_notes
from infer.retrieval import index
from model.support.cli import UserError
from model.support.files import read_json, read_jsonl
from train.data.store import Encoding, identity_of
from train.recipe import read_toml

READERS = {
    "JSON": read_json,
    "JSON lines": lambda path: list(read_jsonl(path)),
    "a recipe": read_toml,
    "notes": lambda path: list(read_notes(path)),
    "notes to index": lambda path: list(index.records(path)),
    "a text": lambda path: perplexity.read_texts(path),
    "training records": lambda path: identity_of([str(path)], Encoding("instruct", "none"), 0),
}


@pytest.fixture(autouse=True)
def _ended():
    """A program that waits would wait forever: SIGALRM ends the test."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_or_device_as_input_is_refused_unopened(tmp_path, name, kind):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(UserError, match="a pipe, socket or device|no such file"):
        READERS[name](path if kind == "pipe" else type(path)("/dev/zero"))


def test_a_pipe_among_a_folder_s_notes_is_one_error_record(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("Mass")
    assert [(note.id, note.error) for note in read_notes(tmp_path)] == [
        ("a", "a pipe, socket or device, not a file"),
        ("b", None),
    ]
    assert fingerprint(tmp_path) == fingerprint(tmp_path) and stamp(tmp_path)[1][0] == "b.txt"


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a" + ".a" * 900 + " = 1", "a = " + "9" * 5000, "\x00"])
def test_a_recipe_that_cannot_be_parsed_is_one_line(tmp_path, text):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"r.toml: ") as refused:
        read_toml(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
