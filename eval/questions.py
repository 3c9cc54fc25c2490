"""Predictions paired with references, one `Question` for everything that was asked; nothing is dropped silently.

A reference record is train.clinic's, a prediction record infer.extract's:

    {"id": "p1-n1", "phenotypes": {"tumor_size": {"answers": [{"text": "2.5 cm"}], "not_relevant": false}}, "diagnosis":
    {"text": "…"}}

Shorter forms are taken too, in both files, so that any system's output can be scored: an answer may be a string, a
phenotype a list of strings or one string ("not relevant" or "ER+; PR-"), a diagnosis a string. What a reference does
not have is not asked. A record may hold questions of its own instead (train.importers.conll), the prediction their
answers in the same order:

    {"id": "c-1", "text": "…", "questions": [{"question": "Which disease names are mentioned?", "answers": [{"text":
    "gout"}]}]}   and   {"id": "c-1", "answers": [{"answers": [{"text": "gout"}], "not_relevant": false}]}
"""

from __future__ import annotations

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
    empty: int = 0

    def named(self) -> dict[str, Any]:
        return {
            "missing": self.missing,
            "duplicate": self.duplicate,
            "extra": self.extra,
            "failed": self.failed,
            "empty_answers": self.empty,
        }


def read_references(path: str | Path) -> list[Json]:
    """The annotated notes of a file, right answers as lists. Raises UserError for a line without id, text or truth, of
    another form, or whose id occurred before."""
    records, seen = [], set()
    for number, record in read_jsonl(path, ("id", "text")):
        where = f"{path}:{number}"
        if not isinstance(record["text"], str):
            raise UserError(f"{where}: 'text' is a {type(record['text']).__name__}, not the note's text")
        if not {"phenotypes", "diagnosis", "questions"} & set(record):
            raise UserError(f"{where}: no 'phenotypes', no 'diagnosis' and no 'questions': give annotated notes")
        record = of_form(record, where)
        check_own(record.get("questions"), f"{where}: 'questions'", ("question",))
        for name, given in (record.get("phenotypes") or {}).items():
            if not isinstance(given, list):
                record["phenotypes"][name] = list(phenotype_answers(given)[0])
        if record["id"] in seen:
            raise UserError(f"{where}: the id {record['id']!r} occurs twice")
        seen.add(record["id"])
        records.append(record)
    return records


def read_predictions(path: str | Path) -> list[Json]:
    """A file of predictions. Raises UserError for a line of another form."""
    records = []
    for number, record in read_jsonl(path, ("id",)):
        records.append(of_form(record, f"{path}:{number}"))
        check_own(record.get("answers"), f"{path}:{number}: 'answers'", ())
    return records


def is_answer(one: Any) -> bool:
    return isinstance(one, str) or (isinstance(one, Mapping) and isinstance(one.get("text"), str))


def has_answers(given: Any) -> bool:
    """Whether it has one of the forms of answers above."""
    found = given.get("answers") or [] if isinstance(given, Mapping) else given
    return found is None or isinstance(found, str) or (isinstance(found, list) and all(map(is_answer, found)))


def check_own(given: Any, where: str, fields: tuple[str, ...]) -> None:
    """Raise UserError where a record's own questions, or the answers to them, have none of the forms above."""
    for one in given if isinstance(given, list) else [given] if given is not None else []:
        texts = isinstance(one, Mapping) and all(isinstance(one.get(field), str) for field in fields)
        if not isinstance(given, list) or not texts or not has_answers(one):
            needed = ", ".join(f"'{field}': …" for field in (*fields, "answers"))
            raise UserError(f"{where} is not a list of {{{needed}}}")


def of_form(record: Json, where: str) -> Json:
    """The record with its id as text. Raises UserError where its answers have none of the forms above."""
    phenotypes, diagnosis = record.get("phenotypes"), record.get("diagnosis")
    if not isinstance(record["id"], str | int) or isinstance(record["id"], bool):
        raise UserError(f"{where}: 'id' is neither a text nor a whole number")
    if phenotypes is not None and not isinstance(phenotypes, dict):
        raise UserError(f"{where}: 'phenotypes' is a {type(phenotypes).__name__}; give {{phenotype: answers}}")
    for name, given in (phenotypes or {}).items():
        if name not in PHENOTYPES:
            raise UserError(
                f"{where}: no phenotype {name!r}{nearest(name, list(PHENOTYPES))}; there are {', '.join(PHENOTYPES)}"
            )
        if not has_answers(given):
            raise UserError(f"{where}: {name} is neither a text nor a list of texts or of {{'text': …}}")
    if diagnosis is not None and not is_answer(diagnosis):
        raise UserError(f"{where}: 'diagnosis' is neither a text nor {{'text': …}}")
    return {**record, "id": str(record["id"])}


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
    if asked is not None and asked < len(references):
        given = [record for record in references if record["id"] in by_id][:asked]
        rest = [record for record in references if record["id"] not in by_id][: asked - len(given)]
        references = given + rest
    questions: list[Question] = []
    for record in references:
        prediction = by_id.get(record["id"], {})
        if not prediction:
            counts.missing.append(record["id"])
        elif prediction.get("error"):
            counts.failed.append(record["id"])
        questions += questions_of(record, prediction)
    counts.empty = sum(one.empty_output for one in questions)
    return questions, counts


def patient_of(record: Json) -> str:
    """Whose note it is; a note that does not say is a patient of its own."""
    return str(record["id"] if record.get("patient") in (None, "") else record["patient"])


def questions_of(record: Json, prediction: Json) -> list[Question]:
    """The questions of one note."""
    patient, found = patient_of(record), []
    for name, spans in (record.get("phenotypes") or {}).items():
        if name not in PHENOTYPES:
            raise UserError(f"{record['id']}: no phenotype {name!r}; there are {', '.join(PHENOTYPES)}")
        gold = tuple(dict.fromkeys(_text(span) for span in spans))
        answers, silent, reason = phenotype_answers((prediction.get("phenotypes") or {}).get(name))
        found.append(Question(record["id"], patient, name, gold, answers, silent, reason))
    if record.get("diagnosis"):
        given = prediction.get("diagnosis") or ""
        text = (given if isinstance(given, str) else str(given.get("text") or "")).strip()
        reason = "" if isinstance(given, str) else str(given.get("finish_reason", ""))
        answers = (text,) if text else ()
        gold = (diagnosis_of(record),)
        found.append(Question(record["id"], patient, "diagnosis", gold, answers, not text, reason))
    given_own = prediction.get("answers") or []
    for place, asked in enumerate(record.get("questions") or []):
        gold = phenotype_answers(asked)[0]
        answers, silent, reason = phenotype_answers(given_own[place] if place < len(given_own) else None)
        found.append(Question(record["id"], patient, asked["question"], gold, answers, silent, reason, own=True))
    return found


def diagnosis_of(record: Json) -> str:
    """The right answer to the diagnosis question."""
    right = record["diagnosis"]
    if isinstance(right, str):
        return right
    return diagnosis_answer(right["text"], right["code"]).strip() if right.get("code") else right["text"]


def phenotype_answers(given: Any) -> tuple[tuple[str, ...], bool, str]:
    """(answers, whether the output was empty, finish reason) from any form of a predicted phenotype."""
    if isinstance(given, str):
        return tuple(parse_answer(given)), not given.strip(), ""
    if isinstance(given, Mapping):
        listed = given.get("answers") or ()
        listed = parse_answer(listed) if isinstance(listed, str) else listed
        answers = tuple(dict.fromkeys(text for one in listed if (text := _text(one).strip())))
        answers = tuple(answer for answer in answers if answer.lower().rstrip(".") != NOT_RELEVANT)
        return answers, not answers and not given.get("not_relevant", False), str(given.get("finish_reason", ""))
    answers = tuple(dict.fromkeys(text for one in given or () if (text := _text(one).strip())))
    return answers, given is None, ""


def _text(span: Any) -> str:
    return span if isinstance(span, str) else str(span["text"])


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


def paired_f1(a: Iterable[Question], b: Iterable[Question], metric: str = "exact_match") -> Json | None:
    """What system B adds to system A on the questions that both were asked: the means and statistics.paired of the
    F1s. None where there is no such question."""
    theirs = {(one.record, one.name): one for one in b}
    both = [(one, theirs[one.record, one.name]) for one in a if (one.record, one.name) in theirs]
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
    per_question = [score_question(one, preset) for one in questions]
    patients = [one.patient for one in questions]
    scores = gather(per_question, preset)
    ceiling = gather([score_question(gold_itself(one), preset) for one in questions], preset)
    result: Json = {"n": len(questions), "patients": len(set(patients)), "signature": scores.signature}
    means = []
    for metric in METRICS:
        mean, best = getattr(scores, metric), getattr(ceiling, metric)
        if mean.f1 != mean.f1:
            result[metric] = None
            continue
        f1s = [one[metric].f1 for one in per_question]
        means.append(f1s)
        low, high = interval(f1s, patients)
        result[metric] = {
            "precision": mean.precision,
            "recall": mean.recall,
            "f1": mean.f1,
            "low": low,
            "high": high,
            "ceiling": best.f1,
        }
    average = [sum(values) / len(values) for values in zip(*means, strict=True)]
    low, high = interval(average, patients)
    result["average_f1"] = {"f1": scores.average_f1, "low": low, "high": high, "ceiling": ceiling.average_f1}
    return result


def gold_itself(one: Question) -> Question:
    return replace(one, predicted=one.gold, empty_output=False, finish_reason="")
