"""Atomic writes: killed at any step, a path holds the old or the new content, and unrelated files stay. Reading: a JSON
line that is accepted can be written again, and a refused one is named by its line number."""

import gzip
import json
import os
import signal
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lora.peft import AdapterFile, read_config
from model import ModelConfig, Transformer
from model.checkpoints.convert import open_any
from model.support import files
from model.support.cli import UserError
from model.support.files import atomic_file, atomic_folder, parse_json_line, read_json, read_jsonl


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "notes.jsonl").write_text("all I have")
    with pytest.raises(UserError, match="notes.jsonl: a file is there"), atomic_folder(tmp_path / "notes.jsonl"):
        pass
    assert os.listdir(tmp_path) == ["notes.jsonl"] and (tmp_path / "notes.jsonl").read_text() == "all I have"


def test_a_folder_keeps_what_the_new_one_does_not_have(tmp_path):
    old = tmp_path / "model"
    (old / "plots").mkdir(parents=True)
    names = ("config.json", "README.md", "plots/loss.png")
    for name in names:
        (old / name).write_text("old")
    with atomic_folder(old, keep_others=True) as new:
        (new / "config.json").write_text("new")
    assert [(old / name).read_text() for name in names] == ["new", "old", "old"]
    assert os.listdir(tmp_path) == ["model"]


def test_nothing_is_changed_where_the_work_fails(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "model") as new:
        (new / "config.json").write_text(str(1 / 0))
    assert (tmp_path / "model" / "config.json").read_text() == "old" and os.listdir(tmp_path) == ["model"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_infinity=True) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["id", "patient", "text", "x"]) | st.text(st.characters()), VALUES))
@example({"x": ["\ud83d"]})
@example({"\udc00": 1})
@example({"x": float("nan")})
@example({"id": 1, "patient": 2**70})
def test_a_json_line_that_is_read_can_be_written_and_compared(record):
    """Half of a surrogate pair anywhere (keys too), NaN and infinities, ids of any type: read whole or refused."""
    line = json.dumps(record).encode()
    try:
        read = parse_json_line("f", 7, line)
    except UserError as error:
        odd = not encodes(record) or any(word in line for word in (b"NaN", b"Infinity"))
        assert str(error).startswith("f:7: ") and (odd or "neither text nor a whole number" in str(error))
        assert encodes(str(error))
        return
    json.dumps(read, allow_nan=False)
    assert encodes(read) and all(isinstance(read.get(name), str | None) for name in ("id", "patient"))
    ids = {name: str(record[name]) for name in ("id", "patient") if record.get(name) is not None}
    assert read == record | ids


def encodes(value):
    try:
        return bool(json.dumps(value, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


WRONG = {
    b'{"id": 1}\r{"id": 2}\r': "f:1: not JSON .*lines end in a carriage return alone",
    b'{"id": "a"}\n[1]\n': "f:2: a list, not a JSON object",
    b'{"id": "a"}\n\n{"id": 1.5}\n': "f:3: 'id' is neither text nor a whole number",
    b'{"id": null}\n': "f:1: 'id' is neither text",
    b'{"id": "a", "x": -Infinity}\n': "f:1: -Infinity is not a JSON number",
    b'{"id": "a"}\n{"x": 1}': "f:2: lacks the field 'id'",
    b" \n": "empty",
    b'{"id": "a", "text": "x", "text": "y"}\n': "f:1: a field is there twice; keep one",
}


@pytest.mark.parametrize("content", WRONG)
def test_a_wrong_line_is_named(content, tmp_path):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(UserError, match=WRONG[content]):
        list(read_jsonl(tmp_path / "f", ("id",)))


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_beyond_the_limit_is_refused_and_the_next_is_found(packed, tmp_path):
    limit = files.LONGEST_LINE
    lines = [b'{"id": "%d"}\n' % n for n in range(3)]
    lines[1] = b'{"id": "' + b"x" * (2 * limit) + b'"}\n'
    path = tmp_path / ("f.gz" if packed else "f")
    path.write_bytes(gzip.compress(b"".join(lines)) if packed else b"".join(lines))
    held = list(files.numbered_lines(path))
    assert [number for number, _ in held] == [1, 2, 3] and held[2][1] == lines[2] and len(held[1][1]) == limit + 1
    with pytest.raises(UserError, match=r":2: a line of more than 33,554,432 bytes"):
        list(read_jsonl(path))


def test_a_byte_order_mark_is_no_part_of_json(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "config.json") == {"a": 1}


def killed(folder, steps: int, way: str) -> int:
    """Replace a folder in a child process that exits abruptly after `steps` file operations; returns its exit code."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = steps

    def hook(event, arguments):  # ctypes.dlsym: the look-up of renameat2
        nonlocal left
        if event in ("os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree", "ctypes.dlsym"):
            left -= 1
            if left < 0:
                os._exit(9)
        if event == "ctypes.dlsym" and way == "renames":
            raise AttributeError("renameat2")  # as in a C library without it

    sys.addaudithook(hook)
    try:
        with atomic_folder(folder, keep_others=True) as new:
            (new / "config.json").write_text("new")
    finally:
        os._exit(0)


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_killed_at_any_step_a_name_holds_the_old_folder_or_the_new_one(tmp_path, way):
    """Without renameat2 there are two renames; killed between them, the old folder is beside the path."""
    ends = set()
    for steps in range(30):
        folder = tmp_path / str(steps)
        (folder / "model").mkdir(parents=True)
        for name in ("config.json", "tokenizer.json"):
            (folder / "model" / name).write_text("old")
        code = killed(folder / "model", steps, way)
        if (folder / "model").exists():
            held = [(folder / "model" / name).read_text() for name in ("config.json", "tokenizer.json")]
        else:
            assert way == "renames"
            (was,) = folder.glob(".model.*.old/was")
            held = [(was / name).read_text() for name in ("config.json", "tokenizer.json")]
        assert held in (["old", "old"], ["new", "old"])
        ends.add((code, held[0], (folder / "model").exists()))
        if code == 0:
            assert os.listdir(folder) == ["model"]
            break
    assert {(9, "old", True), (9, "new", True), (0, "new", True)} <= ends
    assert ((9, "old", False) in ends) == (way == "renames")


def test_a_symbolic_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "disk" / "notes.json").write_text("old")
    for name in ("model", "notes.json"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    with atomic_folder(tmp_path / "model") as new:
        (new / "config.json").write_text("new")
    with atomic_file(tmp_path / "notes.json") as new:
        new.write_text("new")
    assert (tmp_path / "disk" / "model" / "config.json").read_text() == "new"
    assert (tmp_path / "disk" / "notes.json").read_text() == "new"
    assert (tmp_path / "model").is_symlink() and (tmp_path / "notes.json").is_symlink()


@pytest.mark.parametrize(
    "name, read",
    [
        ("config.json", ModelConfig.from_pretrained),
        ("model.safetensors", Transformer.from_pretrained),
        ("model.safetensors.index.json", Transformer.from_pretrained),
        ("m.gguf", Transformer.from_pretrained),
        ("pytorch_model.bin", open_any),
        ("consolidated.00.pth", open_any),
        ("params.json", open_any),
        ("adapter_config.json", read_config),
        ("adapter_model.safetensors", AdapterFile),
        ("adapter_model.bin", AdapterFile),
    ],
)
def test_a_pipe_or_device_among_the_files_is_never_opened(tmp_path, name, read):
    others = {"params.json": "consolidated.00.pth", "consolidated.00.pth": "params.json"}
    (tmp_path / others.get(name, "config.json")).write_text('{"model_type": "llama"}')
    (tmp_path / name).unlink(missing_ok=True)
    signal.alarm(20)  # a hang is a failure
    try:
        for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
            make(tmp_path / name)
            with pytest.raises(UserError):
                read(tmp_path)
            (tmp_path / name).unlink()
    finally:
        signal.alarm(0)


def test_json_has_a_largest_size_and_one_meaning(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1, "b": {"a": 2, "a": 3}}')
    assert read_json(tmp_path / "a.json")["b"] == {"a": 3}
    with pytest.raises(UserError, match="'a' is there twice"):
        read_json(tmp_path / "a.json", unique=True)
    with pytest.raises(UserError, match="31 bytes, more than the limit of 30"):
        read_json(tmp_path / "a.json", most=30)
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "marked.json") == {}, "some editors begin with a byte-order mark"
