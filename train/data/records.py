"""From a JSON record to token ids: the prefix, the prompts and their answers.

A record's texts are [prefix, prompt 1, answer 1, prompt 2, answer 2, …]. For pre-training there is only the prefix (the
text between begin and end tokens). For tuning it is the note, and each question is a prompt with its answer; the
questions are those of the two tasks, or the record's own (`questions`, which replace them). Each text is encoded alone
and the ids are joined, so where an answer starts is known and never searched for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from infer import tasks
from model.support.cli import UserError

Texts = list[np.ndarray]
Encode = Callable[[dict[str, Any]], Texts]


def document_texts(tokenizer: Any) -> Encode:
    """Pre-training: the text alone. Raises ValueError for a record of the other stage or without text."""

    def encode(record: dict[str, Any]) -> Texts:
        if "phenotypes" in record or "questions" in record:
            raise ValueError("an annotated note: train.instruct trains on these, train.pretrain on plain documents")
        return [as_ids(tokenizer.encode(text_of(record), bos=True, eos=True))]

    return encode


def note_texts(tokenizer: Any, template: str, which: str, append_eos: bool, empty_kept: float = 1.0) -> Encode:
    """Tuning: a note with the questions of `which` ("both", "phenotype", "diagnosis"), in `template`; of those whose
    answer is "not relevant" the share `empty_kept`."""
    if append_eos and tokenizer.eos_id is None:
        raise UserError("the tokenizer has no end-of-text token, so answers cannot end; set append_eos = false")
    end = [tokenizer.eos_id] if append_eos else []

    def encode(record: dict[str, Any]) -> Texts:
        text, asked = text_of(record), thinned(record.get("id"), questions(record, which), empty_kept)
        first = template == "note-first"
        if record.get("neighbours") and not first:
            raise ValueError("'neighbours' are shown by the template note-first only; train on records without them")
        texts = [as_ids(tokenizer.encode(tasks.prefix(text), bos=True) if first else [])]
        for question, answer in asked:
            prompt = tasks.branch(question) if first else instruction_first(question, text)
            shown = neighbours(record) if question == tasks.DIAGNOSIS_QUESTION else []
            ids = [i for text in shown for i in tokenizer.encode(text)]
            texts.append(as_ids(ids + tokenizer.encode(prompt, bos=not first)))
            texts.append(as_ids(tokenizer.encode(answer) + end))
        return texts

    return encode


def instruction_first(question: str, note: str) -> str:
    """The faithful template: the instruction, then the note as its input, then the place of the answer."""
    return f"### Instruction:\n{question}\n\n### Input:\n{note.strip()}\n\n### Response:\n"


def questions(record: dict[str, Any], which: str) -> list[tuple[str, str]]:
    """(question, answer) for what the record holds. Raises ValueError where it lacks what `which` needs."""
    asked = []
    if "questions" in record:
        return own_questions(record["questions"])
    if which != "diagnosis":
        found = record.get("phenotypes")
        if not isinstance(found, dict):
            raise ValueError("lacks 'phenotypes'; train.instruct trains on annotated notes")
        for name in found:
            if name not in tasks.PHENOTYPES:
                raise ValueError(f"unknown phenotype {name!r}")
        for name, values in found.items():
            try:
                texts = list(dict.fromkeys(value["text"] for value in values))
                asked.append((tasks.PHENOTYPES[name].question, tasks.answer(texts)))
            except (TypeError, KeyError) as error:
                raise ValueError(
                    f"{name} is not a list of {{'text': …}}; train.importers.table makes such records"
                ) from error
    if which != "phenotype" and record.get("diagnosis"):
        given = record["diagnosis"]
        keys = () if given == {"text": tasks.NOT_RELEVANT} else ("text", "code")
        if not (isinstance(given, dict) and all(isinstance(given.get(key), str) for key in keys)):
            raise ValueError("'diagnosis' is not {'text': …, 'code': …}; train.importers.table makes such records")
        right = tasks.diagnosis_answer(given["text"], given["code"]) if keys else tasks.answer([])
        asked.append((tasks.DIAGNOSIS_QUESTION, right))
    if not asked:
        raise ValueError("holds no question to train on")
    return asked


def thinned(name: Any, asked: list[tuple[str, str]], kept: float) -> list[tuple[str, str]]:
    """The questions without some of those that the note does not answer: most notes leave most of the same questions
    unanswered, and a short run learns that before it learns to read. Which ones is a function of the record's name."""

    def stays(question: str, answer: str) -> bool:
        return answer != tasks.answer([]) or random.Random(f"{name}/{question}").random() < kept

    return [one for one in asked if stays(*one)] or asked[:1]


def neighbours(record: dict[str, Any]) -> list[str]:
    """The texts of other notes that stand before the diagnosis question (train.data.neighbours), as
    infer.extract.ask's."""
    try:
        texts = [one["text"] for one in record.get("neighbours", [])]
    except (TypeError, KeyError) as error:
        raise ValueError("'neighbours' is not a list of {id, text}; make it with train.data.neighbours") from error
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("'neighbours' holds a text that is not text; make it with train.data.neighbours")
    return texts


def own_questions(given: Any) -> list[tuple[str, str]]:
    """(question, answer) of a record that brings its own: [{"question", "answers": [{"text"}, …]}, …]."""
    try:
        asked = [
            (one["question"], tasks.answer(list(dict.fromkeys(answer["text"] for answer in one["answers"]))))
            for one in given
        ]
    except (TypeError, KeyError) as error:
        raise ValueError("'questions' is not a list of {question, answers: [{text}, …]}") from error
    if not asked or not all(isinstance(question, str) for question, _ in asked):
        raise ValueError("'questions' holds no question to train on")
    return asked


def text_of(record: dict[str, Any]) -> str:
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("lacks 'text', or it is empty")
    return text


def as_ids(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int64)
