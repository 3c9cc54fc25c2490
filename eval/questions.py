"""Predictions paired with references, one `Question` for everything that was asked; nothing is dropped silently.

A reference record is train.clinic's, a prediction record infer.extract's:

    {"id": "p1-n1", "phenotypes": {"tumor_size": {"answers": [{"text": "2.5 cm"}], "not_relevant": false}},
     "diagnosis": {"text": "…"}}

Shorter forms are taken too, in both files, so that any system's output can be scored: an answer may be a string, a
phenotype a list of strings or one string ("not relevant" or "ER+; PR-"), a diagnosis a string. What a reference does
not have is not asked. A record may hold questions of its own instead (train.importers.conll), the prediction their
answers in the same order:

    {"id": "c-1", "text": "…", "questions": [{"question": "Which diseases?", "answers": [{"text": "gout"}]}]}
    {"id": "c-1", "answers": [{"answers": [{"text": "gout"}], "not_relevant": false}]}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eval.metrics import PRESETS, Figures
from eval.metrics.scoring import METRICS, gather, question
from eval.metrics.statistics import interval, paired
from infer.tasks import NOT_RELEVANT, PHENOTYPES, diagnosis_answer, parse_answer
from model.support.cli import UserError, nearest
from model.support.files import read_jsonl

Json = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One question about one note. `name` is a phenotype, "diagnosis", or the text of a question of the record's `own`.
    `gold` and `predicted` are answers without "not relevant"; `empty_output` tells an empty output from an answer "not
    relevant"."""

    record: str
    patient: str
    name: str
    gold: tuple[str, ...]
    predicted: tuple[str, ...]
    empty_output: bool = False
    finish_reason: str = ""
    own: bool = False

    @property
    def task(self) -> str:
        if self.own:
            return "own question"
        return "diagnosis" if self.name == "diagnosis" else "phenotype"

    @property
    def answerable(self) -> bool:
        return bool(self.gold)


@dataclass
class Counts:
    """What did not pair up, by record id, and how many answers were empty."""

    missing: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    empty_answers: int = 0


# ---- files ----------------------------------------------------------------------------------------------------


def read_references(path: str | Path) -> list[Json]:
    """The annotated notes of a file, phenotypes as lists. Raises UserError for a line without id, text or truth, of
    another form, or whose id occurred before."""
    records, seen = [], set()
    for number, record in read_jsonl(path, ("id", "text"), lambda record: replies(record, "questions")):
        where = f"{path}:{number}"
        if not {"phenotypes", "diagnosis", "questions"} & set(record):
            raise UserError(f"{where}: no 'phenotypes', no 'diagnosis' and no 'questions': give annotated notes")
        if record["id"] in seen:
            raise UserError(f"{where}: the id {record['id']!r} occurs twice")
        seen.add(record["id"])
        for name, given in (record.get("phenotypes") or {}).items():
            if not isinstance(given, list):
                record["phenotypes"][name] = list(reply(given).texts)
        records.append(record)
    return records


def read_predictions(path: str | Path) -> list[Json]:
    """A file of predictions. Raises UserError for a line of another form."""
    return [record for _, record in read_jsonl(path, ("id",), lambda record: replies(record, "answers"))]


# ---- forms ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """The answers to one question; `empty`: the output was empty, not even "not relevant"."""

    texts: tuple[str, ...] = ()
    empty: bool = True
    finish_reason: str = ""


def replies(record: Json, own: str) -> dict[str | int, Reply]:
    """A record's answers by phenotype, "diagnosis", and the place among the record's own questions, whose answers are
    listed under `own`. Raises ValueError where something has none of the forms above."""
    phenotypes, diagnosis, listed = record.get("phenotypes"), record.get("diagnosis"), record.get(own)
    if phenotypes is not None and not isinstance(phenotypes, dict):
        raise ValueError(f"'phenotypes' is a {type(phenotypes).__name__}; give {{phenotype: answers}}")
    found: dict[str | int, Reply] = {}
    for name, given in (phenotypes or {}).items():
        if name not in PHENOTYPES:
            raise ValueError(
                f"no phenotype {name!r}{nearest(name, list(PHENOTYPES))}; there are {', '.join(PHENOTYPES)}"
            )
        try:
            found[name] = reply(given)
        except TypeError as error:
            raise ValueError(f"{name} is neither a text nor a list of texts or of {{'text': …}}") from error
    try:
        if diagnosis:
            text = diagnosis_of(diagnosis)
            found["diagnosis"] = Reply((text,) if parse_answer(text) else (), not text)
            if isinstance(diagnosis, Mapping):
                found["diagnosis"] = replace(found["diagnosis"], finish_reason=str(diagnosis.get("finish_reason", "")))
    except TypeError as error:
        raise ValueError("'diagnosis' is neither a text nor {'text': …}") from error
    try:
        for place, one in enumerate(listed or []):
            found[place] = reply(one)
            if own == "questions" and not isinstance(one["question"], str):
                raise TypeError
    except (TypeError, KeyError) as error:
        raise ValueError(f"'{own}' is not a list of {{'question': …, 'answers': …}}") from error
    return found


def reply(given: Any) -> Reply:
    """Any form of the answers to one question. Raises TypeError for another."""
    if given is None:
        return Reply()
    if isinstance(given, str):
        return Reply(tuple(parse_answer(given)), not given.strip())
    listed = (given.get("answers") or []) if isinstance(given, Mapping) else given
    listed = parse_answer(listed) if isinstance(listed, str) else listed
    if not isinstance(listed, list | tuple):
        raise TypeError
    distinct = dict.fromkeys(text_of(one).strip() for one in listed)
    texts = tuple(text for text in distinct if text and text.lower().rstrip(".") != NOT_RELEVANT)
    if isinstance(given, Mapping):
        return Reply(texts, not texts and not given.get("not_relevant", False), str(given.get("finish_reason", "")))
    return Reply(texts, False)


def text_of(given: Any) -> str:
    text = given["text"] if isinstance(given, Mapping) and "text" in given else given
    if not isinstance(text, str):
        raise TypeError
    return text


def diagnosis_of(given: Any) -> str:
    """A diagnosis as it is answered: the right one's code follows its description."""
    text, code = text_of(given), given.get("code") if isinstance(given, Mapping) else None
    return (diagnosis_answer(text, code) if code else text).strip()


def code_of(record: Mapping[str, Any]) -> str | None:
    """The code of a record's diagnosis; None where it has none."""
    given = record.get("diagnosis")
    return given.get("code") if isinstance(given, Mapping) else None


def patient_of(record: Json) -> str:
    """Whose note it is; a note that does not say is a patient of its own."""
    return str(record["id"] if record.get("patient") in (None, "") else record["patient"])


# ---- pairs ----------------------------------------------------------------------------------------------------


def pair(
    references: Iterable[Json], predictions: Iterable[Json], asked: int | None = None
) -> tuple[list[Question], Counts]:
    """Questions of every reference, and what did not pair up. A missing prediction counts as an empty answer to each
    question, the first of duplicates counts. `asked`: the system was given that many notes only; the references are
    then those with a prediction, filled up from the top."""
    references, counts = list(references), Counts()
    by_id: dict[str, Json] = {}
    for prediction in predictions:
        if prediction["id"] in by_id:
            counts.duplicate.append(prediction["id"])
        by_id.setdefault(prediction["id"], prediction)
    known = {record["id"] for record in references}
    counts.extra = [name for name in by_id if name not in known]
    if asked is not None:
        references = sorted(references, key=lambda record: record["id"] not in by_id)[:asked]
    questions: list[Question] = []
    for record in references:
        prediction = by_id.get(record["id"], {})
        if not prediction:
            counts.missing.append(record["id"])
        elif prediction.get("error"):
            counts.failed.append(record["id"])
        questions += questions_of(record, prediction)
    counts.empty_answers = sum(one.empty_output for one in questions)
    return questions, counts


def questions_of(record: Json, prediction: Json) -> list[Question]:
    """The questions of one note."""
    given, patient, found = replies(prediction, "answers"), patient_of(record), []
    for key, gold in replies(record, "questions").items():
        predicted, own = given.get(key, Reply()), isinstance(key, int)
        name = record["questions"][key]["question"] if own else str(key)
        answers = (predicted.texts, predicted.empty, predicted.finish_reason)
        found.append(Question(record["id"], patient, name, gold.texts, *answers, own=own))
    return found


# ---- figures --------------------------------------------------------------------------------------------------


def score_question(one: Question, preset: str) -> dict[str, Figures]:
    """A question's three metrics. Presets for which "not relevant" is a text like any other see that text. An
    empty output, or none, is not that answer: it is wrong where the right answer is "not relevant" too."""
    chosen = PRESETS[preset]
    predicted, gold = list(one.predicted), list(one.gold)
    if one.empty_output and not gold:
        predicted = ["(empty output)"]
    if chosen.nothing is None:
        predicted = predicted or ([] if one.empty_output else [NOT_RELEVANT])
        gold = gold or [NOT_RELEVANT]
        if one.task == "diagnosis":  # the scripts split every answer on commas, a diagnosis too
            return question(",".join(predicted), ",".join(gold), chosen)
    return question(predicted, gold, chosen)


def f1_of(one: Question, metric: str = "exact_match") -> float:
    """A question's F1 under the clinical preset. `average_f1` is the paper's figure: the mean over the metrics."""
    found = score_question(one, "clinical")
    return sum(found[name].f1 for name in METRICS) / len(METRICS) if metric == "average_f1" else found[metric].f1


def asked_both(a: Iterable[Question], b: Iterable[Question]) -> list[tuple[Question, Question]]:
    """The questions that both systems were asked, each as A and as B answered it."""
    theirs = {(one.record, one.name): one for one in b}
    return [(one, theirs[one.record, one.name]) for one in a if (one.record, one.name) in theirs]


def paired_f1(a: Iterable[Question], b: Iterable[Question], metric: str = "exact_match") -> Json | None:
    """What system B adds to system A on the questions that both were asked: the means and statistics.paired of the
    F1s. None where there is no such question."""
    both = asked_both(a, b)
    if not both:
        return None
    first, second = ([f1_of(one, metric) for one in side] for side in zip(*both, strict=True))
    means = {"mean_a": sum(first) / len(both), "mean_b": sum(second) / len(both)}
    return means | paired(first, second, [one.patient for one, _ in both])


def figures(questions: list[Question], preset: str = "clinical") -> Json | None:
    """The metrics of these questions with their intervals, the counts behind them and the gold-against-gold
    ceiling."""
    if not questions:
        return None
    patients = [one.patient for one in questions]
    scores = gather([score_question(one, preset) for one in questions], preset)
    right = [replace(one, predicted=one.gold, empty_output=False) for one in questions]
    ceiling = gather([score_question(one, preset) for one in right], preset)
    result: Json = {"n": len(questions), "patients": len(set(patients)), "signature": scores.signature}
    computed: list[list[float]] = []
    for metric in METRICS:
        mean: Figures = getattr(scores, metric)
        result[metric] = None
        if not math.isnan(mean.f1):
            computed.append([one[metric].f1 for one in scores.per_question])
            result[metric] = {"precision": mean.precision, "recall": mean.recall}
            result[metric] |= spread(computed[-1], patients) | {"ceiling": getattr(ceiling, metric).f1}
    average = [sum(f1s) / len(f1s) for f1s in zip(*computed, strict=True)]
    result["average_f1"] = spread(average, patients) | {"ceiling": ceiling.average_f1}
    return result


def spread(f1s: list[float], patients: list[str]) -> Json:
    """The mean of values in percent with its interval, under the names that figures have."""
    low, high = interval(f1s, patients)
    return {"f1": math.fsum(f1s) / len(f1s), "low": low, "high": high}
