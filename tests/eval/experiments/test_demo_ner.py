"""The disease-name score: distinct names, exact, over all records; an error counts as no answer."""

import json

import pytest

from eval.experiments.adapter import release
from eval.experiments.demo_ner import NAMED, found_in, score, text_of_card
from model.support.cli import UserError
from model.support.files import read_json


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(*names):
    answers = [{"text": name} for name in names]
    return [{"question": "Which?", "answers": answers, "not_relevant": not names}]


def test_names_are_counted_once_a_record_and_exactly(tmp_path):
    gold = [
        {"id": "a", "text": "t", "questions": asked("flu", "flu", "colon cancer")},
        {"id": "b", "text": "t", "questions": asked()},
        {"id": "c", "text": "t", "questions": asked("gout")},
        {"id": "d", "text": "t", "questions": asked()},
    ]
    said = [
        {"id": "b", "answers": asked()},
        {"id": "a", "answers": asked("flu", "Colon cancer")},
        {"id": "c", "error": "too long"},
        {"id": "d", "answers": asked("flu")},
    ]
    found = score(write(tmp_path / "gold", gold), write(tmp_path / "predicted", said))
    assert (found["names"], found["predicted"], found["right"]) == (3, 3, 1)
    assert found["precision"] == found["recall"] == found["f1"] == pytest.approx(100 / 3)
    assert (found["empty"], found["empty_right"]) == (2, 1)


def test_mentions_count_by_place_and_every_place_of_an_answered_name_is_answered(tmp_path):
    text = "Gout and colon cancer; cancer of no kind, gout; gout."
    at = [(9, 21), (42, 46), (48, 52)]
    answers = [{"text": text[a:b], "start": a, "end": b} for a, b in at]
    gold = [{"id": "a", "text": text, "questions": [{"question": "Which?", "answers": answers}]}]
    said = [{"id": "a", "answers": asked("gout", "cancer", "colon cancer")}]
    found = score(write(tmp_path / "gold", gold), write(tmp_path / "predicted", said))
    assert found_in(text, ["cancer", "colon cancer"]) == [(9, 21), (23, 29)]  # the longest name has its place
    entities = found["entities"]
    assert (entities["mentions"], entities["predicted"], entities["right"]) == (3, 4, 3)
    assert entities["recall"] == 100 and entities["precision"] == 75


def test_a_missing_record_is_no_score(tmp_path):
    gold = write(tmp_path / "gold", [{"id": "a", "text": "t", "questions": asked("x")}])
    with pytest.raises(UserError, match="'a'"):
        score(gold, write(tmp_path / "predicted", [{"id": "b", "answers": asked()}]))


def test_the_released_card_is_made_of_the_released_scores():
    scores, training = (read_json(NAMED / name) for name in ("scores.json", "training.json"))
    assert text_of_card(NAMED, scores, training) == (NAMED / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("itself", [False, True])
def test_a_release_holds_the_adapter_and_what_was_scored(tmp_path, itself):
    adapter, named, scored = (tmp_path / name for name in ("adapter", "named", "scored"))
    for folder in (adapter, named, scored):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for name in ("README.md", "score.json"):
        (scored / name).write_text(f"new {name}")
    release(adapter, adapter if itself else named, scored, "score.json")
    found = {file.name: file.read_text() for file in (adapter if itself else named).iterdir()}
    assert found == {"adapter_config.json": "{}", "README.md": "new README.md", "scores.json": "new score.json"}
