"""Pairs predictions with references: one `Question` per question of each reference; what does not pair is counted.

References have the form of train.clinic's records, predictions that of infer.extract's:

    {"id": "p1-n1", "phenotypes": {"tumor_size": {"answers": [{"text": "2.5 cm"}], "not_relevant": false}},
     "diagnosis": {"text": "…"}}

Both files also accept shorter forms, so that any system's output can be scored: an answer may be a string, a phenotype
a list of strings or one string ("not relevant" or "ER+; PR-"), a diagnosis a string. A phenotype or diagnosis that a
reference lacks is not scored. Instead of phenotypes, a record may hold questions of its own (train.importers.conll);
the prediction lists their answers in the same order:

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
from infer.tasks import NOT_RELEVANT, check_names, diagnosis_answer, parse_answer
from model.support.cli import UserError
from model.support.files import read_jsonl

Json = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One question about one note, with its gold and predicted answers."""

    record: str
    patient: str
    name: str
    """A phenotype, "diagnosis", or the text of the record's own question."""
    gold: tuple[str, ...]
    """Empty if the right answer is "not relevant"."""
    predicted: tuple[str, ...]
    """Empty if the system answered "not relevant", or nothing at all (then `empty_output`)."""
    empty_output: bool = False
    finish_reason: str = ""
    own: bool = False
    """True for a question of the record's own."""

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
    """Record ids that did not pair up, and the number of empty outputs."""

    missing: list[str] = field(default_factory=list)
    """References without a prediction."""
    duplicate: list[str] = field(default_factory=list)
    """Predicted more than once; the first counts."""
    extra: list[str] = field(default_factory=list)
    """Predictions without a reference."""
    failed: list[str] = field(default_factory=list)
    """Predictions with an "error"."""
    empty_answers: int = 0


# ---- files ----------------------------------------------------------------------------------------------------


def read_references(path: str | Path) -> list[Json]:
    """The annotated notes of a file, phenotypes as lists. Raises UserError for a line that lacks an id, a text or
    annotations, has another form, or repeats an id."""
    records: list[Json] = []
    seen: dict[str, int] = {}
    for number, record in read_jsonl(path, ("id", "text"), lambda record: replies(record, "questions")):
        where = f"{path}:{number}"
        if not {"phenotypes", "diagnosis", "questions"} & set(record):
            raise UserError(f"{where}: no 'phenotypes', 'diagnosis' or 'questions'; give annotated notes")
        if (first := seen.setdefault(record["id"], number)) != number:
            raise UserError(f"{where}: its id is that of line {first} too; give each note its own")
        for name, given in (record.get("phenotypes") or {}).items():
            if not isinstance(given, list):
                record["phenotypes"][name] = list(reply(given).texts)
        records.append(record)
    return records


def read_predictions(path: str | Path) -> list[Json]:
    """The records of a predictions file. Raises UserError for a line of another form."""
    return [record for _, record in read_jsonl(path, ("id",), lambda record: replies(record, "answers"))]


# ---- forms ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """The answers to one question. `empty`: the output was empty; an answer "not relevant" is not."""

    texts: tuple[str, ...] = ()
    empty: bool = True
    finish_reason: str = ""


def replies(record: Json, own: str) -> dict[str | int, Reply]:
    """A record's answers by phenotype name, "diagnosis", and (int) index of the record's own question.

    `own` is the key that lists the own questions: "questions" in a reference, "answers" in a prediction. Raises
    ValueError if a value has none of the forms in the module's docstring.
    """
    phenotypes, diagnosis, listed = record.get("phenotypes"), record.get("diagnosis"), record.get(own)
    if phenotypes is not None and not isinstance(phenotypes, dict):
        raise ValueError(f"'phenotypes' is a {type(phenotypes).__name__}; give {{phenotype: answers}}")
    found: dict[str | int, Reply] = {}
    check_names(phenotypes or ())
    for name, given in (phenotypes or {}).items():
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
    """The answers to one question in any of the accepted forms. Raises TypeError otherwise."""
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
    """A diagnosis in the form of an answer: a reference's code is appended to its description."""
    text, code = text_of(given), given.get("code") if isinstance(given, Mapping) else None
    return (diagnosis_answer(text, code) if code else text).strip()


def code_of(record: Mapping[str, Any]) -> str | None:
    """The code of a record's diagnosis, or None."""
    given = record.get("diagnosis")
    return given.get("code") if isinstance(given, Mapping) else None


def patient_of(record: Json) -> str:
    """The patient of a note; a note without one counts as a patient of its own."""
    return str(record["id"] if record.get("patient") in (None, "") else record["patient"])


# ---- pairs ----------------------------------------------------------------------------------------------------


def pair(
    references: Iterable[Json], predictions: Iterable[Json], asked: int | None = None
) -> tuple[list[Question], Counts]:
    """The questions of every reference, and what did not pair up.

    A missing prediction counts as an empty answer to each question; of duplicates the first counts. `asked` is the
    number of notes that the system was given (None: all): only that many references are scored, those with a prediction
    first, then others in file order.
    """
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
    """A question's three metrics.

    Presets that treat "not relevant" as ordinary text get that text. An empty output is never right, not even where the
    right answer is "not relevant".
    """
    chosen = PRESETS[preset]
    predicted, gold = list(one.predicted), list(one.gold)
    if one.empty_output and not gold:
        predicted = ["(empty output)"]
    if chosen.nothing is None:
        predicted = predicted or ([] if one.empty_output else [NOT_RELEVANT])
        gold = gold or [NOT_RELEVANT]
        if one.task == "diagnosis":  # the paper's script splits every answer at commas, diagnoses too
            return question(",".join(predicted), ",".join(gold), chosen)
    return question(predicted, gold, chosen)


def f1_of(one: Question, metric: str = "exact_match") -> float:
    """A question's F1 under the clinical preset. The metric `average_f1`, the paper's, is the mean of the three."""
    found = score_question(one, "clinical")
    return sum(found[name].f1 for name in METRICS) / len(METRICS) if metric == "average_f1" else found[metric].f1


def asked_both(a: Iterable[Question], b: Iterable[Question]) -> list[tuple[Question, Question]]:
    """The questions that both systems were asked, as pairs (A's answer, B's answer)."""
    theirs = {(one.record, one.name): one for one in b}
    return [(one, theirs[one.record, one.name]) for one in a if (one.record, one.name) in theirs]


def paired_f1(a: Iterable[Question], b: Iterable[Question], metric: str = "exact_match") -> Json | None:
    """Both systems' mean F1 on the questions that both were asked, and statistics.paired of them. None if there is no
    such question."""
    both = asked_both(a, b)
    if not both:
        return None
    first, second = ([f1_of(one, metric) for one in side] for side in zip(*both, strict=True))
    means = {"mean_a": sum(first) / len(both), "mean_b": sum(second) / len(both)}
    return means | paired(first, second, [one.patient for one, _ in both])


def figures(questions: list[Question], preset: str = "clinical") -> Json | None:
    """The metrics with intervals, the numbers of questions and patients, and the ceiling (gold scored against gold).
    None without questions."""
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
    """Mean (percent) and interval, with the keys of `figures`."""
    low, high = interval(f1s, patients)
    return {"f1": math.fsum(f1s) / len(f1s), "low": low, "high": high}
