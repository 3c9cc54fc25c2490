"""From generated answers to a note's record: values with spans and log-probabilities, diagnosis codes.

A record is what `python -m infer.extract` writes, one line per note; record.schema.json describes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from infer import codes, tasks
from infer.engine.settings import Generation
from infer.extract.places import Span, words
from model.support.cli import UserError
from model.support.files import read_json

TASKS = ("phenotype", "diagnosis")
SCHEMA: dict[str, Any] = read_json(Path(__file__).with_name("record.schema.json"))
CALIBRATION = "calibration.json"
"""File in an adapter's folder, {"phenotype": T, "diagnosis": T}; written by python -m eval.calibration."""


def read_calibration(adapters: Sequence[str | Path]) -> dict[str, float]:
    """Calibration temperatures of the last adapter, by task; {} if it has none. Raises UserError for an invalid
    file."""
    path = Path(adapters[-1]) / CALIBRATION if adapters else None
    if path is None or not path.is_file():
        return {}
    given = read_json(path)
    found = {task: given[task] for task in TASKS if task in given} if isinstance(given, dict) else {}
    if not found or not all(type(value) in (int, float) and 0 < value < math.inf for value in found.values()):
        raise UserError(f"{path}: not what python -m eval.calibration writes; make it again or remove it")
    return found


def probability(logprob: float, temperature: float) -> float:
    """exp(logprob / T): the calibrated probability that an answer is an exact match."""
    return math.exp(min(0.0, logprob) / temperature)


def calibrate(record: dict[str, Any], temperatures: Mapping[str, float]) -> None:
    """Adds `probability` to a record's answers, in place, for the tasks that have a temperature."""
    answers = [("phenotype", answer) for answer in record.get("phenotypes", {}).values()]
    answers += [("diagnosis", record["diagnosis"])] if "diagnosis" in record else []
    for task, answer in answers:
        if task in temperatures:
            answer["probability"] = round(probability(answer["logprob"], temperatures[task]), 4)


def written_values(text: str) -> list[tuple[str, Span]]:
    """The values in an answer's text, each with its span in that text."""
    values, at = [], 0
    for value in tasks.parse_answer(text):
        found = re.compile(words(value)).search(text, at)
        assert found is not None
        at = found.end()
        values.append((value, found.span()))
    return values


def phenotype_record(
    out: Generation, places: Sequence[Sequence[Span]], decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """One question's record. `places` gives, for every value, spans of the note: first the one where it was read, then
    those that cannot be ruled out; [] if the value does not occur in the note."""
    answers: list[dict[str, Any]] = []
    of_tokens = token_spans(out, decode)
    for (value, span), spans in zip(written_values(out.text), places, strict=True):
        start, end = spans[0] if spans else (None, None)
        logprob = span_logprob(out.logprobs, of_tokens, *span)
        answers.append({"text": value, "start": start, "end": end, "logprob": logprob})
        if len(spans) > 1:
            answers[-1]["ambiguous"] = [list(span) for span in spans[1:]]
    not_relevant = bool(out.text.strip()) and not answers
    record = {
        "answers": answers,
        "not_relevant": not_relevant,
        "logprob": round(sum(kept_logprobs(out, decode)), 4),
        "finish_reason": out.finish_reason,
    }
    if not answers and not not_relevant:
        record["raw"] = out.text
    return record


def diagnosis_record(out: Generation) -> dict[str, Any]:
    """The diagnosis as generated, and the ICD-10-CM codes it names or is most similar to; none if "not relevant"."""
    text = " ".join(out.text.split())
    matches = codes.lookup(text) if tasks.parse_answer(text) else []
    return {
        "text": text,
        "codes": [{"code": code, "description": codes.describe(code)} for code in matches],
        "logprob": round(sum(out.logprobs), 4),
        "finish_reason": out.finish_reason,
    }


def best_diagnosis(outs: Sequence[Generation], decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """The diagnosis of the window with the highest mean log-probability per token, and that window's index. Empty
    answers lose to all others."""
    kept = [replace(out, logprobs=kept_logprobs(out, decode)) for out in outs]
    means = [(bool(out.text.strip()), sum(out.logprobs) / max(1, len(out.logprobs))) for out in kept]
    best = means.index(max(means))
    return diagnosis_record(kept[best]) | ({"window": best} if len(outs) > 1 else {})


def merge(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Merges one question's records over the windows of a note.

    Each value appears once, in order of first appearance, with its highest log-probability. `finish_reason` is the
    first that means an answer was cut short, else the first other than "stop".
    """
    if len(records) == 1:
        return records[0]
    best: dict[str, dict[str, Any]] = {}
    for answer in (answer for record in records for answer in record["answers"]):
        if answer["text"] not in best or answer["logprob"] > best[answer["text"]]["logprob"]:
            best[answer["text"]] = answer
    other_reasons = [record["finish_reason"] for record in records if record["finish_reason"] != "stop"]
    reason = next((reason for reason in other_reasons if reason != "stop_string"), next(iter(other_reasons), "stop"))
    not_relevant = not best and all(record["not_relevant"] for record in records)
    merged = {
        "answers": list(best.values()),
        "not_relevant": not_relevant,
        "logprob": min(record["logprob"] for record in records),
        "finish_reason": reason,
    }
    if not best and not not_relevant:
        merged["raw"] = next(record["raw"] for record in records if "raw" in record)
    return merged


def kept_logprobs(out: Generation, decode: Callable[[list[int]], str]) -> list[float]:
    """Log-probabilities of the tokens of `out.text`, which may be shorter than what was generated."""
    if out.finish_reason in ("stop", "stop_string") or len(decode(out.tokens)) <= len(out.text):
        return out.logprobs
    return [
        logprob
        for (begin, _), logprob in zip(token_spans(out, decode), out.logprobs, strict=True)
        if begin < len(out.text)
    ]


def token_spans(out: Generation, decode: Callable[[list[int]], str]) -> list[Span]:
    """The span of each token in the generated text. Tokens that share a character's bytes all include it."""
    spans, start = [], 0
    for count in range(1, len(out.tokens) + 1):
        text = decode(out.tokens[:count])
        complete = len(text.rstrip("\ufffd"))  # without a last character whose bytes are incomplete
        spans.append((start, complete + (complete < len(text))))
        start = complete
    return spans


def span_logprob(logprobs: Sequence[float], spans: Sequence[Span], start: int, end: int) -> float:
    """Sum of the log-probabilities of the tokens that overlap the characters start … end − 1 of an answer; `spans` are
    those of its tokens."""
    scored = zip(spans, logprobs, strict=False)  # `logprobs` may end before `spans`: after the tokens of the value
    return round(sum(logprob for (first, stop), logprob in scored if first < end and stop > start), 4)
