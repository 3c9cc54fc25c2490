"""From a model's answers to a note's record: values, where they were read in the note, codes.

A record is what `python -m infer.extract` writes, one line a note; record.schema.json describes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
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
"""Beside an adapter: {"phenotype": T, "diagnosis": T}, which python -m eval.calibration fits."""


def read_calibration(adapters: Sequence[str | Path]) -> dict[str, float]:
    """The temperatures of the last adapter's answers by task; none where it has no calibration. Raises UserError for a
    file of another form."""
    path = Path(adapters[-1]) / CALIBRATION if adapters else None
    if path is None or not path.is_file():
        return {}
    given = read_json(path)
    found = {task: given[task] for task in TASKS if task in given} if isinstance(given, dict) else {}
    if not found or not all(type(value) in (int, float) and 0 < value < math.inf for value in found.values()):
        raise UserError(f"{path}: not what python -m eval.calibration writes; make it again or remove it")
    return found


def probability(logprob: float, temperature: float) -> float:
    """exp(logprob / T): how probable it is that an answer matches exactly."""
    return math.exp(min(0.0, logprob) / temperature)


def calibrate(record: dict[str, Any], temperatures: Mapping[str, float]) -> None:
    """Enter `probability` into a record's answers, for the tasks that have a temperature."""
    answers = [("phenotype", answer) for answer in record.get("phenotypes", {}).values()]
    answers += [("diagnosis", record["diagnosis"])] if "diagnosis" in record else []
    for task, answer in answers:
        if task in temperatures:
            answer["probability"] = round(probability(answer["logprob"], temperatures[task]), 4)


def written_values(text: str) -> list[tuple[str, Span]]:
    """The values in an answer's text, each with its characters there."""
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
    """One question's answer: its values, where they were read and their log-probabilities. `places`: for every value
    the place where it was read, then the others where it may have been; none where no place is known."""
    answers: list[dict[str, Any]] = []
    spelt = token_places(out, decode)
    for (value, span), spans in zip(written_values(out.text), places, strict=True):
        start, end = spans[0] if spans else (None, None)
        answers.append({"text": value, "start": start, "end": end, "logprob": span_logprob(out.logprobs, spelt, *span)})
        if len(spans) > 1:
            answers[-1]["ambiguous"] = [list(span) for span in spans[1:]]
    not_relevant = bool(out.text.strip()) and not answers
    logprob = round(sum(kept_logprobs(out, decode)), 4)
    record = {
        "answers": answers,
        "not_relevant": not_relevant,
        "logprob": logprob,
        "finish_reason": out.finish_reason,
    }
    if not answers and not not_relevant:
        record["raw"] = out.text
    return record


def diagnosis_record(out: Generation) -> dict[str, Any]:
    """The diagnosis as written, and the codes that it names or is most similar to: none where it is "not relevant"."""
    text = " ".join(out.text.split())
    near = codes.lookup(text) if tasks.parse_answer(text) else []
    found = [{"code": code, "description": codes.describe(code)} for code in near]
    return {
        "text": text,
        "codes": found,
        "logprob": round(sum(out.logprobs), 4),
        "finish_reason": out.finish_reason,
    }


def kept_logprobs(out: Generation, decode: Callable[[list[int]], str]) -> list[float]:
    """The log-probabilities of an answer's tokens, without those after the place where it was cut short."""
    if out.finish_reason in ("stop", "stop_string") or len(decode(out.tokens)) <= len(out.text):
        return out.logprobs
    return [
        logprob
        for (begin, _), logprob in zip(token_places(out, decode), out.logprobs, strict=True)
        if begin < len(out.text)
    ]


def token_places(out: Generation, decode: Callable[[list[int]], str]) -> list[Span]:
    """Which characters of the text each token spells, or spells a part of: all tokens of a character have its place."""
    places, begin = [], 0
    for count in range(1, len(out.tokens) + 1):
        text = decode(out.tokens[:count])
        whole = len(text.rstrip("\ufffd"))  # without a character of which bytes are still missing
        places.append((begin, whole + (whole < len(text))))
        begin = whole
    return places


def span_logprob(logprobs: Sequence[float], places: Sequence[Span], start: int, end: int) -> float:
    """The sum over the tokens that spell the characters start to end of an answer; `places` are all its tokens'."""
    spelt = zip(places, logprobs, strict=False)  # only the first tokens may have been scored
    return round(sum(logprob for (begin, stop), logprob in spelt if begin < end and stop > start), 4)
