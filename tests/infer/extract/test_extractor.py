"""One note from Python: the same answers as the program's record, or the program's refusal."""

import json

import pytest
from answering_models import write_adapter, write_model

from infer import Extractor, tasks
from infer.extract.program import Options, main
from model.support.cli import UserError

NOTE = "Left breast, 2.5 cm, grade 2. " * 3 + "A cyst of 2.5 cm."


@pytest.fixture(scope="module")
def adapter(weights, tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter"), weights)


@pytest.mark.parametrize("grounded", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_the_answers_are_the_programs(weights, adapter, tmp_path, grounded, adapted):
    (tmp_path / "n.jsonl").write_text(json.dumps({"id": "a", "text": NOTE}) + "\n")
    out = tmp_path / "o.jsonl"
    chosen = (str(adapter),) if adapted else ()
    main(
        Options(
            weights=str(weights),
            notes=tmp_path / "n.jsonl",
            out=out,
            adapter=chosen,
            grounded=grounded,
            long="windows",
            alternatives=1,
        )
    )
    record = json.loads(out.read_text())
    extractor = Extractor(weights, adapter if adapted else None, grounded=grounded)
    found = extractor.answers(NOTE)
    assert {"id": "a", **found} == record
    assert found == extractor.answers(NOTE)
    assert found["phenotypes"].keys() == tasks.PHENOTYPES.keys() and found["diagnosis"]["logprob"] < 0
    for name, answer in found["phenotypes"].items():
        for value in answer["answers"] if grounded and not tasks.PHENOTYPES[name].values else ():
            assert NOTE[value["start"] : value["end"]].split() == value["text"].split()


@pytest.mark.parametrize("text", [NOTE, NOTE * 40])  # whole, and in windows
def test_the_stream_tells_each_answer_once_and_ends_in_the_record(weights, text):
    extractor = Extractor(weights)
    *parts, record = extractor.stream(text)
    assert record == extractor.answers(text)
    told = [name for part in parts for name in part.get("phenotypes", ())]
    assert sorted(told) == (sorted(tasks.PHENOTYPES) if text == NOTE else [])
    for name, answer in ((name, answer) for part in parts for name, answer in part.get("phenotypes", {}).items()):
        whole = record["phenotypes"][name]
        assert [value["text"] for value in answer["answers"]] == [value["text"] for value in whole["answers"]]
        assert answer["logprob"] == whole["logprob"]


def test_a_note_that_cannot_be_asked_about_raises(weights):
    with pytest.raises(UserError, match="the note is empty"):
        Extractor(weights, grounded=False).answers(" \n")


def test_an_adapter_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no adapter_config.json"):
        Extractor(write_model(tmp_path / "m"), tmp_path / "none")
