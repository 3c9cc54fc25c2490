"""Temperatures, reliability and abstention: what is known of made answers comes out."""

import json
import math
import random

import pytest

from eval import calibration
from eval.calibration import Confidence, Options, confidences, main, review_first, summary, temperature
from eval.questions import Question
from infer.extract.answers import calibrate, probability, read_calibration
from model.support.cli import UserError


def answered(logprob, right, name="tumor_size", record="a"):
    one = Question(record, record, name, ("2 cm",), ("2 cm",) if right else ("3 cm",))
    return Confidence(one, logprob, math.exp(logprob))


def drawn(t, count=4000):
    """Answers that are right with probability exp(logprob / t)."""
    rng = random.Random(0)
    logprobs = [-rng.expovariate(0.5) for _ in range(count)]
    return [answered(logprob, rng.random() < math.exp(logprob / t)) for logprob in logprobs]


@pytest.mark.parametrize("t", [0.5, 1.0, 4.0])
def test_the_temperature_that_answers_were_drawn_with_is_found_and_mends_their_reliability(t):
    found = drawn(t)
    fitted = temperature(found)
    assert fitted == pytest.approx(t, rel=0.1)
    mended = [Confidence(one.question, one.logprob, probability(one.logprob, fitted)) for one in found]
    assert summary(mended)["error"] < 0.03 and summary(mended)["log_loss"] <= summary(found)["log_loss"] + 1e-9
    if t != 1:
        assert summary(found)["error"] > 0.1


def test_bins_hold_every_answer_and_f1_rises_as_unsure_answers_are_left_out():
    found = [answered(-n / 10, right=n < 60) for n in range(100)]
    shown = summary(found)
    assert sum(group["n"] for group in shown["reliability"]) == 100 == shown["n"]
    assert [group["right"] for group in shown["reliability"]] == [0.0] * 4 + [1.0] * 6
    assert shown["abstention"][0] == [1.0, pytest.approx(60)] and shown["abstention"][-1] == [0.5, pytest.approx(100)]
    assert [one["p"] for one in review_first(found, 2)] == [math.exp(-9.9), math.exp(-9.8)]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def files(tmp_path):
    spans = {"tumor_size": [{"text": "2 cm", "start": 0, "end": 4}], "cancer_stage": []}
    gold = {"text": "2 cm", "phenotypes": spans, "diagnosis": {"text": "Malignant neoplasm of rectum", "code": "C20"}}
    value = {"text": "2 cm", "start": 0, "end": 4, "logprob": -1.0}
    phenotypes = {
        "tumor_size": {"answers": [value], "not_relevant": False, "logprob": -1.0, "finish_reason": "stop"},
        "cancer_stage": {"answers": [], "not_relevant": True, "logprob": -0.5, "finish_reason": "stop"},
    }
    said = {"text": "Malignant neoplasm of colon (C18.9)", "codes": [], "logprob": -3.0, "finish_reason": "stop"}
    ids = [f"n{n}" for n in range(calibration.FEWEST)]
    return (
        write(tmp_path / "p.jsonl", *({"id": one, "phenotypes": phenotypes, "diagnosis": said} for one in ids)),
        write(tmp_path / "g.jsonl", *({"id": one, **gold} for one in ids)),
    )


def test_of_few_answers_no_temperature_is_fitted():
    assert temperature(drawn(4.0, 49)) == 1.0 and temperature(drawn(4.0, 50)) != 1.0


def test_the_program_keeps_temperatures_that_extraction_reads_and_writes_into_records(tmp_path, capsys):
    predictions, references = files(tmp_path)
    main(Options(predictions, references, tmp_path / "calibration.json", json=True))
    result = json.loads(capsys.readouterr().out)
    found = read_calibration(["other", tmp_path])
    assert found == result["temperature"] and set(found) == {"phenotype", "diagnosis"}
    assert found["phenotype"] == calibration.TEMPERATURES[-1]  # all are right
    assert found["diagnosis"] == calibration.TEMPERATURES[0]  # none is
    record = json.loads(predictions.read_text().splitlines()[0])
    calibrate(record, {"phenotype": 2.0})
    assert record["phenotypes"]["cancer_stage"]["probability"] == round(math.exp(-0.25), 4)
    assert "probability" not in record["diagnosis"]


def test_a_records_probability_counts_where_there_is_one(tmp_path):
    one = Question("a", "a", "tumor_size", (), ())
    record = {"id": "a", "phenotypes": {"tumor_size": {"logprob": -1.0, "probability": 0.9}}}
    assert confidences([one], [record])[0].p == 0.9


def test_answers_without_log_probabilities_are_refused(tmp_path):
    _, references = files(tmp_path)
    bare = write(tmp_path / "b.jsonl", {"id": "n0", "phenotypes": {"tumor_size": {"answers": []}}})
    with pytest.raises(UserError, match="no answer with a log-probability"):
        main(Options(bare, references))


@pytest.mark.parametrize("text", ["[]", "{}", '{"phenotype": 0}', '{"diagnosis": "2"}', '{"phenotype": true}'])
def test_a_calibration_of_another_form_is_one_line(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(UserError, match="calibration.json: not what python -m eval.calibration writes"):
        read_calibration([tmp_path])
    assert read_calibration([]) == {}
