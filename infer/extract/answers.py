"""From a model's answers to a note's record: values, where they were read in the note, codes.

A record is what `python -m infer.extract` writes, one line a note; SCHEMA describes it as a JSON schema.
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
_VALUE = {
    "type": "object",
    "required": ["text", "start", "end", "logprob"],
    "properties": {
        "text": {"type": "string", "description": "the value"},
        "start": {
            "type": ["integer", "null"],
            "description": "first character of the place in the note where it was read; null: no such place is known",
        },
        "end": {"type": ["integer", "null"], "description": "the character after its last"},
        "ambiguous": {
            "type": "array",
            "description": "[start, end] of the other places where it may have been read; absent: there is none",
            "items": {"type": "array", "items": {"type": "integer"}},
        },
        "logprob": {"type": "number", "description": "natural log-probability of its tokens, given what came before"},
    },
}
_ANSWER: dict[str, Any] = {
    "type": "object",
    "required": ["answers", "not_relevant", "finish_reason"],
    "properties": {
        "answers": {"type": "array", "items": _VALUE},
        "not_relevant": {"type": "boolean", "description": "the model answered that the note does not say"},
        "logprob": {
            "type": "number",
            "description": "natural log-probability of the whole answer and its end; of several windows' the least",
        },
        "probability": {
            "type": "number",
            "description": "that the answer matches exactly, where the adapter has a calibration.json",
        },
        "finish_reason": {
            "enum": ["stop", "stop_string", "repetition", "length"],
            "description": "why the answer ended; of several windows' the first that was cut short, if one was",
        },
        "raw": {
            "type": "string",
            "description": "the model's words, where no value could be read from them; of several windows the first's",
        },
    },
}
_OWN = {
    **_ANSWER,
    "required": ["question", *_ANSWER["required"]],
    "properties": {"question": {"type": "string"}, **_ANSWER["properties"]},
}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "One line of infer.extract's output: one note, in the order of the input",
    "type": "object",
    "required": ["id"],
    "properties": {
        "id": {"type": "string"},
        "phenotypes": {"type": "object", "properties": {name: _ANSWER for name in tasks.PHENOTYPES}},
        "diagnosis": {
            "type": "object",
            "required": ["text", "codes", "logprob", "finish_reason"],
            "properties": {
                "text": {"type": "string", "description": "the diagnosis as the model wrote it"},
                "codes": {
                    "type": "array",
                    "description": "ICD-10-CM codes that the text names or is most similar to, best first",
                    "items": {
                        "type": "object",
                        "properties": {"code": {"type": "string"}, "description": {"type": "string"}},
                    },
                },
                "logprob": {"type": "number", "description": "natural log-probability of its tokens and its end"},
                "probability": {"type": "number", "description": "as a phenotype's"},
                "finish_reason": {"type": "string"},
                "window": {
                    "type": "integer",
                    "description": "of a note read in windows: the one of this answer (the likeliest), from 0",
                },
            },
        },
        "answers": {"type": "array", "items": _OWN, "description": "to the record's own questions, in their order"},
        "tokens": {
            "type": "object",
            "required": ["note", "prompt", "new"],
            "properties": {
                "note": {"type": "integer", "description": "of the note alone, as it was read"},
                "prompt": {"type": "integer", "description": "of all its prompts, what they share counted in each"},
                "new": {"type": "integer", "description": "generated, over all its answers and windows"},
            },
        },
        "long": {
            "type": "object",
            "description": "what was done with a note beyond the limit; absent: it was read whole",
            "required": ["did", "tokens"],
            "properties": {
                "did": {"enum": ["truncate", "windows"], "description": "read in part, or in overlapping windows"},
                "tokens": {"type": "integer", "description": "of the whole note"},
                "read": {"type": "integer", "description": "truncate: how many of them were read, from its beginning"},
                "windows": {"type": "integer", "description": "windows: how many"},
                "size": {"type": "integer", "description": "windows: tokens of each"},
            },
        },
        "repairs": {
            "type": "array",
            "description": "with --repair: [start, end, new words] of each change, places in the original note",
            "items": {"type": "array"},
        },
        "neighbours": {
            "type": "array",
            "items": {"type": "string"},
            "description": "ids of the notes that were shown with the diagnosis question, best first (--retriever)",
        },
        "error": {"type": "string", "description": "why this note has no answers"},
    },
}


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
    ends = token_ends(out, decode)
    for (value, span), spans in zip(written_values(out.text), places, strict=True):
        start, end = spans[0] if spans else (None, None)
        answers.append({"text": value, "start": start, "end": end, "logprob": span_logprob(out.logprobs, ends, *span)})
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
    """The diagnosis as written, and the codes that it names or is most similar to."""
    text = " ".join(out.text.split())
    found = [{"code": code, "description": codes.describe(code)} for code in codes.lookup(text)]
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
    begins = [0, *token_ends(out, decode)]
    return [logprob for begin, logprob in zip(begins, out.logprobs, strict=False) if begin < len(out.text)]


def token_ends(out: Generation, decode: Callable[[list[int]], str]) -> list[int]:
    """Where in the text each token's characters end."""
    return [len(decode(out.tokens[: n + 1])) for n in range(len(out.tokens))]


def span_logprob(logprobs: Sequence[float], ends: Sequence[int], start: int, end: int) -> float:
    """The sum over the tokens that spell the characters start to end of an answer; `ends` are all its tokens' ends."""
    total, begin = 0.0, 0
    for stop, logprob in zip(ends, logprobs, strict=False):  # only the first tokens may have been scored
        if begin < end and stop > start:
            total += logprob
        begin = max(begin, stop)
    return round(total, 4)
