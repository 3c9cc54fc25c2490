"""Every door of infer: a mistake is one clear line and exit 2, nothing overwritten; a bad note is one error record."""

import codecs
import csv
import gzip
import io
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from answering_models import write_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infer import generate, quick
from infer.engine.generate import Generator
from infer.engine.load import load
from infer.engine.settings import Settings
from infer.extract import program as extract
from infer.extract.ask import Asker, Limits
from infer.extract.notes import LONGEST, Note, read_notes
from lora import LoRAConfig, add_lora, save_adapter
from model.support.cli import UserError, guard

GOOD = '{"id": "a", "text": "Tumor of 2.5 cm"}\n'


def asked(weights, tmp_path: Path, **changes) -> extract.Options:
    given = {
        "weights": str(weights),
        "notes": tmp_path / "n.jsonl",
        "out": tmp_path / "o.jsonl",
        "form": "template",
        "max_new_tokens": 3,
        "max_new_diagnosis": 3,
        **changes,
    }
    return extract.Options(**given)


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def other_base(tmp_path) -> Path:
    """An adapter of a wider model."""
    model, _ = load(write_model(tmp_path / "wide", hidden_size=64))
    save_adapter(add_lora(model, LoRAConfig(r=2, alpha=4)), tmp_path / "adapter")
    return tmp_path / "adapter"


DOORS = {  # what is wrong: (files beside the notes, options, what the line says)
    "no notes there": ({"n.jsonl": None}, {}, "no such file or folder"),
    "no note in the file": ({"n.jsonl": b"\n \n"}, {}, "empty"),
    "a folder without .txt": ({"d/a.md": b"x", "d/b.txt/c": b"x"}, {"notes": "d"}, "holds no .txt file"),
    "the output is the input": ({}, {"out": "n.jsonl"}, "choose another --out"),
    "the schema is the input": (
        {"o.jsonl.schema.json": GOOD.encode()},
        {"notes": "o.jsonl.schema.json"},
        "choose another --out",
    ),
    "the job's file is the input": (
        {"o.jsonl.job.json": GOOD.encode()},
        {"notes": "o.jsonl.job.json"},
        "choose another --out",
    ),
    "the part is the input": ({"o.jsonl.part": GOOD.encode()}, {"notes": "o.jsonl.part"}, "write it as one of these"),
    "notes as a JSON array": ({"n.json": b"[" + GOOD.encode() + b"]"}, {"notes": "n.json"}, "write it as one of these"),
    "a table without the text's column": ({"n.csv": b"id,note\n1,A tumor\n"}, {"notes": "n.csv"}, "--text-column"),
    "a table without the id's column": (
        {"n.csv": b"id,text\n1,A tumor\n"},
        {"notes": "n.csv", "id_column": "row"},
        "--id-column",
    ),
    "a torn table": ({"n.csv": b'id,text\n1,A tumor\n2,"A'}, {"notes": "n.csv"}, "a quotation mark missing"),
    "half a gzip file": (
        {"n.jsonl.gz": gzip.compress(GOOD.encode() * 99)[:60]},
        {"notes": "n.jsonl.gz"},
        "not a whole gzip file",
    ),
    "an output of somebody else": ({"o.jsonl": b"mine"}, {}, "not written by a job"),
    "a mark of somebody else": ({"o.jsonl.job.json": b'{"mine": 1}'}, {}, "not written by a job"),
    "a schema of somebody else": ({"o.jsonl.schema.json": b'{"mine": 1}'}, {}, "not written by a job"),
    "no JSON in the schema's place": ({"o.jsonl.schema.json": b"mine"}, {}, "not written by a job"),
    "a folder in the schema's place": ({"o.jsonl.schema.json/mine": b""}, {}, "not written by a job"),
    "an output in a file": ({"f": b"x"}, {"out": "f/o.jsonl"}, "cannot write"),
    "a folder as output": ({"d/x": b""}, {"out": "d"}, "a folder; name the output file"),
    "the root folder as output": ({}, {"out": "/"}, "a folder; name the output file"),
    "a device as notes": ({}, {"notes": "/dev/zero"}, "a pipe, socket or device, not a file"),
    "parts of somebody else": ({"o.jsonl.parts/0.jsonl": b"mine"}, {}, "o.jsonl.parts: exists and was not written"),
    "a part that is a file": ({"o.jsonl.parts": b"mine"}, {}, "o.jsonl.parts: exists and was not written"),
    "an output among the notes": ({"d/a.txt": b"A tumor"}, {"notes": "d", "out": "d/o.txt"}, "one of the notes"),
    "memory in unknown units": ({}, {"memory": "6XB"}, "is not a size"),
    "too little memory": ({}, {"memory": "1MB"}, "is not enough"),
    "no batch": ({}, {"batch": -1}, "--batch is -1"),
    "no tokens": ({}, {"max_new_tokens": -1}, "--max-new-tokens is -1"),
    "no notes asked for": ({}, {"limit": 0}, "--limit is 0"),
    "a limit that no count reaches": ({}, {"limit": 2**70}, "--limit is 11"),
    "a batch that no count reaches": ({}, {"batch": 10**30}, "whole number from 0 to 1000000000"),
    "too many alternatives": ({}, {"alternatives": 10**10}, "--alternatives is 1"),
    "fewer than no neighbours": ({}, {"neighbours": -4}, "--neighbours is -4"),
    "memory for windows": ({}, {"memory": "6GB", "long": "windows"}, "give --long error or truncate"),
    "an adapter that is none": ({}, {"adapter": ("missing",)}, "no adapter_config.json there"),
    "no weights": ({}, {"weights": "/nowhere"}, "/nowhere"),
}


@pytest.mark.parametrize("wrong", DOORS)
def test_a_mistake_is_one_line_and_overwrites_nothing(wrong, weights, tmp_path, capsys, monkeypatch):
    files, options, said = DOORS[wrong]
    for name, data in {"n.jsonl": GOOD.encode(), **files}.items():
        if data is not None:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
    before = everything(tmp_path)
    options = {k: tmp_path / v if k in ("notes", "out") else v for k, v in options.items()}
    options = asked(options.pop("weights", weights), tmp_path, **options)
    assert guard(lambda: extract.main(options), "infer.extract") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("infer.extract: ") and said in line, line
    after = everything(tmp_path)
    assert {name: after[name] for name in before} == before and not (
        set(after) - set(before) - {str(tmp_path / f"o.jsonl.{own}.json") for own in ("job", "schema")}
    )


def test_an_adapter_of_another_base(weights, tmp_path, capsys):
    (tmp_path / "n.jsonl").write_text(GOOD)
    options = asked(weights, tmp_path, adapter=(str(other_base(tmp_path)),))
    assert guard(lambda: extract.main(options), "infer.extract") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "adapter" in line and not (tmp_path / "o.jsonl").exists()


def test_a_model_without_a_chat_form(tmp_path, capsys):
    (tmp_path / "n.jsonl").write_text(GOOD)
    weights = write_model(tmp_path / "llama", model_type="llama")
    assert guard(lambda: extract.main(asked(weights, tmp_path, form="chat")), "infer.extract") == 2
    assert "ask with --form template" in capsys.readouterr().err
    options = generate.Options(weights=str(weights), prompt="A tumor", chat=True)
    assert guard(lambda: generate.main(options), "infer.generate") == 2
    assert "has no chat template" in capsys.readouterr().err


NOTES = {  # a line: (id, what the error says, or None)
    b'{"id": "", "text": "A tumor"}': ("line 1", None),
    b'{"id": null, "text": "A tumor"}': ("line 2", None),
    b'{"id": true, "text": "A tumor"}': ("line 3", "'id' is neither text nor a whole number"),
    b'{"id": "same", "text": "A tumor"}': ("same", None),
    b'{"id": "same", "text": "Another"}': ("same", None),
    b'{"id": "\\ud800", "text": "A tumor"}': ("line 6", "half a surrogate pair"),
    b'{"id": "nul", "text": "A\\u0000 tumor\\u0000"}': ("nul", None),
    b'{"id": "crlf", "text": "A\\r\\ntumor"}\r': ("crlf", None),
    b'{"id": "half", "text": "A \\udc00 tumor"}': ("half", "half a surrogate pair"),
    b'{"id": "asked", "text": "A tumor", "questions": ["\\ud800?"]}': ("asked", "half a surrogate pair"),
    b'{"id": "list", "text": ["A tumor"]}': ("list", "'text' is missing or is not text"),
    b'{"id": "null", "text": null}': ("null", "'text' is missing or is not text"),
    b'{"id": ' + b"9" * 5000 + b', "text": "A tumor"}': ("line 13", "line 13: not JSON"),
    b"[" * 100_000: ("line 14", "line 14: not JSON"),
    b'{"id": "blank", "text": "\\u00a0\\n"}': ("blank", "the note is empty"),
    b'{"id": "nan", "text": "A tumor", "weight": NaN}': ("nan", "NaN is not a JSON number"),
    b'{"id": "long", "text": "' + b"A tumor " * 125_001 + b'"}': ("long", "more than 1,000,000"),
    b'{"id": "bytes", "text": "\xff"}': ("line 18", "not UTF-8 text"),
}


def test_a_bad_note_is_one_error_record(weights, tmp_path):
    (tmp_path / "n.jsonl").write_bytes(codecs.BOM_UTF8 + b"\n".join(NOTES))
    assert extract.main(asked(weights, tmp_path, task="diagnosis")) == 1
    found = records(tmp_path / "o.jsonl")
    assert [record["id"] for record in found] == [name for name, _ in NOTES.values()]
    for record, (name, error) in zip(found, NOTES.values(), strict=True):
        assert error is None and "error" not in record or error in record["error"], name


def test_a_model_is_never_asked_about_an_empty_note_whoever_asks(weights):
    """Notes that did not come from read_notes, as eval.run's."""
    asker = Asker(Generator(*load(weights)), "diagnosis", "template", Limits(300, 3, 3))
    found = asker.records([Note("a", " \n\u00a0"), Note("b", "A tumor"), Note("c", "x" * (LONGEST + 1))])
    assert ["error" in record for record in found] == [True, False, True]
    assert found[0]["error"] == "the note is empty" and "1,000,001 characters" in found[2]["error"]


def test_a_folder_s_texts_as_they_stand(weights, tmp_path, capsys):
    """A byte order mark is no part of a note, a line's end is: places are those of the file."""
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.txt").write_bytes(codecs.BOM_UTF8 + b"Tumor\r\nof 2.5 cm")
    (folder / "b.txt").write_bytes(b"\xff\xfeT\x00")
    (folder / "c.txt").symlink_to("nowhere")
    with open(os.path.join(os.fsencode(folder), b"d\xff.txt"), "w") as odd:
        odd.write("A tumor")
    (folder / "e.txt").write_text(" ")
    (folder / "f.txt").mkdir()
    (folder / "g.TXT").write_text("A tumor")
    for other in ("._a.txt", ".b.txt", "h.md", "i.md"):
        (folder / other).write_text("A tumor")
    notes = list(read_notes(folder))
    assert notes[0].text == "Tumor\r\nof 2.5 cm"
    assert [(note.id, note.error) for note in notes] == [
        ("a", None),
        ("b", "not UTF-8 text (byte 0); save it as UTF-8"),
        ("c", "no such file"),
        ("d\\udcff", None),
        ("e", "the note is empty"),
        ("g", None),
    ]
    assert extract.main(asked(weights, tmp_path, notes=folder, task="diagnosis")) == 1
    assert len(records(tmp_path / "o.jsonl")) == 6
    assert (
        "not read: 2 hidden files (._a.txt, …), 1 sub-folders (f.txt), 2 .md files (h.md, …)" in capsys.readouterr().err
    )


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(CELLS.map(str.strip), CELLS), min_size=1), st.sampled_from([",", ";", "\t"]), st.booleans())
@example([("1", 'A\r\nB\rC\n;",\t\u2028')], ";", False)
def test_notes_of_a_table_and_of_json_lines_are_those_written(notes, delimiter, packed):
    """Whatever the cells hold: delimiters, quotation marks, every kind of line end, a byte order mark."""
    table, lines = io.StringIO(newline=""), "".join(json.dumps({"Nr": a, "Note": b}) + "\n" for a, b in notes)
    csv.writer(table, delimiter=delimiter).writerows([("Nr", "ward", "Note"), *((a, "", b) for a, b in notes)])
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("n.csv", table.getvalue()), ("n.jsonl", lines)):
            path = Path(folder) / (name + ".gz" * packed)
            path.write_bytes(gzip.compress(content.encode()) if packed else content.encode("utf-8-sig"))
            assert [(note.id, note.text) for note in read_notes(path, "Note", "Nr")] == notes


def test_a_limit_beyond_the_model_s_length_is_the_model_s(tmp_path):
    """A note that the model cannot take is an error in its record, not the end of the job."""
    weights = write_model(tmp_path / "short", max_position_embeddings=128)
    (tmp_path / "n.jsonl").write_text(json.dumps({"id": "long", "text": "tumor " * 60}) + "\n" + GOOD)
    assert extract.main(asked(weights, tmp_path, max_input_tokens=10**6)) == 1
    long, short = records(tmp_path / "o.jsonl")
    assert "limit 125" in long["error"] and "error" not in short


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"max_new_diagnosis": 500}, "--max-new-diagnosis 500"),
        ({"max_new_diagnosis": 250}, "--max-new-diagnosis 250"),
        ({"max_new_tokens": 300}, "--max-new-tokens 300"),
        ({"max_new_tokens": 240, "max_new_diagnosis": 500, "task": "phenotype"}, "--max-new-tokens 240"),
    ],
)
def test_answers_that_leave_the_model_no_room_for_a_note(options, option, tmp_path, capsys):
    """Not an error in each record: no note at all could be asked about."""
    weights = write_model(tmp_path / "short", max_position_embeddings=300)
    (tmp_path / "n.jsonl").write_text(GOOD)
    assert guard(lambda: extract.main(asked(weights, tmp_path, **options)), "infer.extract") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert option in line and "length is 300" in line and not (tmp_path / "o.jsonl").exists()
    assert extract.main(asked(weights, tmp_path, max_new_diagnosis=200)) == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt": "x" * 5000}, "exceeds the model's"),
        ({"prompt": "half \udc80"}, "not Unicode"),
        ({"stop": ("",)}, "stop string is empty"),
        ({"stop": ("</s>",)}, "is a special token"),
        ({"stop": ("\ud800",)}, "not Unicode"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "leaves no token"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 10**400}, "top_k is 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": 2**70}, "seed is"),
        ({"memory": "6XB"}, "is not a size"),
    ],
)
def test_a_prompt_s_mistakes(wrong, said, weights, capsys):
    given = {"prompt": "A tumor", **wrong}
    chosen = {name: given.pop(name) for name in wrong if name in Settings.__dataclass_fields__}

    def program():
        return generate.main(generate.Options(weights=str(weights), settings=Settings(**chosen), **given))

    assert guard(program, "infer.generate") == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1 and said in captured.err and not captured.out


@pytest.mark.parametrize("wrong", [{"top_k": 2.5}, {"seed": 1.5}, {"max_new_tokens": "5"}, {"temperature": None}])
def test_settings_of_another_type(wrong, tokenizer, weights):
    model, _ = load(weights)
    with pytest.raises(UserError):
        Generator(model, tokenizer).generate(["a"], **wrong)


def test_a_stop_string_that_the_tokenizer_cannot_spell(tmp_path, weights):
    """A tokenizer without byte fallback: a letter outside its vocabulary never comes."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models

    from model import Tokenizer

    letters = Fast(models.BPE({"a": 0, "b": 1, "?": 2}, [], unk_token="?"))
    letters.decoder = decoders.Fuse()
    (tmp_path / "tokenizer.json").write_text(letters.to_str())
    model, _ = load(weights)
    generator = Generator(model.to(torch.float64), Tokenizer.from_pretrained(tmp_path))
    assert generator.generate(["ab"], max_new_tokens=2, stop=("ba",))
    with pytest.raises(UserError, match="no way to spell it"):
        generator.generate(["ab"], stop=("bé",))


def test_notes_that_are_a_link_to_itself_are_named(weights, tmp_path):
    (tmp_path / "n.jsonl").symlink_to(tmp_path / "n.jsonl")
    with pytest.raises(UserError, match=r"n\.jsonl: no such file or folder"):
        extract.main(asked(weights, tmp_path))


def test_quick_never_takes_its_notes_place_nor_a_files(tmp_path):
    notes = tmp_path / "answers.jsonl"
    notes.write_text(GOOD)
    for out, said in ((tmp_path, "is itself read"), (notes, "is a file")):
        with pytest.raises(UserError, match=said):
            quick.main(quick.Options(notes, out))
    assert notes.read_text() == GOOD
