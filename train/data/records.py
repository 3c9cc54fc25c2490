"""Encodes a JSON record as token ids: a prefix, then prompts and their answers.

A record's texts are [prefix, prompt 1, answer 1, prompt 2, answer 2, …]. In pre-training there is only the prefix (BOS,
the text, EOS). In tuning the prefix is the note and each question is a prompt with its answer: the questions of the two
tasks, or the record's own `questions` instead. Each text is encoded separately, so the start of an answer in the joined
ids is known exactly.
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
    """Encoder for pre-training: the text only. Raises ValueError for an annotated note or a record without text."""

    def encode(record: dict[str, Any]) -> Texts:
        if "phenotypes" in record or "questions" in record:
            raise ValueError("an annotated note: train.instruct trains on these, train.pretrain on plain documents")
        return [as_ids(tokenizer.encode(text_of(record), bos=True, eos=True))]

    return encode


def note_texts(tokenizer: Any, template: str, which: str, append_eos: bool, empty_kept: float = 1.0) -> Encode:
    """Encoder for tuning: a note and its questions, in `template` ("note-first" or "faithful").

    `which` selects the questions ("both", "phenotype", "diagnosis"); of those answered "not relevant" only the share
    `empty_kept` is kept.
    """
    if append_eos and tokenizer.eos_id is None:
        raise UserError("the tokenizer has no end-of-text token, so answers cannot end; set append_eos = false")
    end = [tokenizer.eos_id] if append_eos else []

    def encode(record: dict[str, Any]) -> Texts:
        text, asked = text_of(record), drop_unanswered(record.get("id"), questions(record, which), empty_kept)
        note_first = template == "note-first"
        if record.get("neighbours") and not note_first:
            raise ValueError("'neighbours' are shown by the template note-first only; train on records without them")
        texts = [as_ids(tokenizer.encode(tasks.prefix(text), bos=True) if note_first else [])]
        for question, answer in asked:
            prompt = tasks.branch(question) if note_first else instruction_first(question, text)
            shown = neighbours(record) if question == tasks.DIAGNOSIS_QUESTION else []
            ids = [i for text in shown for i in tokenizer.encode(text)]
            texts.append(as_ids(ids + tokenizer.encode(prompt, bos=not note_first)))
            texts.append(as_ids(tokenizer.encode(answer) + end))
        return texts

    return encode


def instruction_first(question: str, note: str) -> str:
    """Prompt of the faithful template: the instruction, the note as its input, and the heading of the response."""
    return f"### Instruction:\n{question}\n\n### Input:\n{note.strip()}\n\n### Response:\n"


def questions(record: dict[str, Any], which: str) -> list[tuple[str, str]]:
    """(question, answer) pairs of a record. Raises ValueError if it lacks what `which` needs or is malformed."""
    if "questions" in record:
        return own_questions(record["questions"])
    asked = phenotype_questions(record) if which != "diagnosis" else []
    if which != "phenotype" and record.get("diagnosis"):
        asked.append((tasks.DIAGNOSIS_QUESTION, diagnosis_answer(record["diagnosis"])))
    if not asked:
        raise ValueError("holds no question to train on")
    return asked


def phenotype_questions(record: dict[str, Any]) -> list[tuple[str, str]]:
    phenotypes = record.get("phenotypes")
    if not isinstance(phenotypes, dict):
        raise ValueError("lacks 'phenotypes' ({phenotype: answers}); train.instruct trains on annotated notes")
    tasks.check_names(phenotypes)
    asked = []
    for name, values in phenotypes.items():
        try:
            texts = list(dict.fromkeys(value["text"] for value in values))
            asked.append((tasks.PHENOTYPES[name].question, tasks.answer(texts)))
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"{name} is not a list of {{'text': …}}; train.importers.table makes such records"
            ) from error
    return asked


def diagnosis_answer(diagnosis: Any) -> str:
    if diagnosis == {"text": tasks.NOT_RELEVANT}:
        return tasks.answer([])
    if not (isinstance(diagnosis, dict) and all(isinstance(diagnosis.get(key), str) for key in ("text", "code"))):
        raise ValueError("'diagnosis' is not {'text': …, 'code': …}; train.importers.table makes such records")
    return tasks.diagnosis_answer(diagnosis["text"], diagnosis["code"])


def drop_unanswered(record_id: Any, asked: list[tuple[str, str]], kept: float) -> list[tuple[str, str]]:
    """Keeps the share `kept` of the questions answered "not relevant" (at least one question in all).

    Most notes leave the same questions unanswered, and a short run learns that before it learns to read. The choice is
    a function of (record id, question).
    """

    def keep(question: str, answer: str) -> bool:
        return answer != tasks.answer([]) or random.Random(f"{record_id}/{question}").random() < kept

    return [pair for pair in asked if keep(*pair)] or asked[:1]


def neighbours(record: dict[str, Any]) -> list[str]:
    """Texts of similar notes, shown before the diagnosis question as in infer.extract (see train.data.neighbours)."""
    try:
        texts = [one["text"] for one in record.get("neighbours", [])]
    except (TypeError, KeyError) as error:
        raise ValueError("'neighbours' is not a list of {id, text}; make it with train.data.neighbours") from error
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("'neighbours' holds a text that is not text; make it with train.data.neighbours")
    return texts


def own_questions(given: Any) -> list[tuple[str, str]]:
    """(question, answer) pairs of a record's own `questions`: [{"question", "answers": [{"text"}, …]}, …]."""
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
    """The record's text. Raises ValueError if it is missing or blank."""
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("lacks 'text', or it is empty")
    return text


def as_ids(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int64)
