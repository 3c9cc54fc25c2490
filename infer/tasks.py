"""The two clinical tasks: their questions, prompts and answers, in one place for training and for inference.

Phenotype extraction asks eight questions about a note (paper, section on tasks); a question that the note does not
answer is answered "not relevant". Diagnosis generation asks for the ICD-10-CM description and code.

The tuned form puts the note first, so that one note serves all of its questions (one prefix, nine branches):

    ### Note: {note}\n\n### Question: What is the tumor size?\n### Answer: 2.5 cm<eos>

`prefix(note)`, `branch(question)` and `answer(texts)` are the three parts. They are encoded separately and their ids
joined, so the boundary between prompt and answer is known without searching in token ids. With retrieval, other notes
with their diagnoses (`example`) come between prefix and branch of the diagnosis question alone: the prefix stays what
all questions share, and the other eight never see another patient's findings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

NOT_RELEVANT = "not relevant"
SEPARATOR = "; "
"""Between an answer's values. Not a comma: "2,5 cm" and "pT2, pN1a" are single values."""
NOTE = "### Note: "
"""Before the note. A model attends to its first token wherever it has nothing to look at, and reads no meaning from it:
a note's own first word is not lost to that."""
QUESTION = 64
"""Tokens of a question that a plan of memory counts with."""


@dataclass(frozen=True)
class Phenotype:
    """One of the eight questions. `values` is the closed list of its answers, or empty where the note's own words
    are the answer (a span of the note, verbatim)."""

    name: str
    question: str
    values: tuple[str, ...] = ()


PHENOTYPES: dict[str, Phenotype] = {
    p.name: p
    for p in (
        Phenotype("hormone_receptor_type", "Which hormone receptors were tested?", ("ER", "PR", "HER2")),
        Phenotype(
            "hormone_receptor_status",
            "What is the status of each receptor?",
            tuple(f"{receptor}{status}" for receptor in ("ER", "PR", "HER2") for status in ("+", "-", " equivocal")),
        ),
        Phenotype("tumor_size", "What is the tumor size?"),
        Phenotype("tumor_site", "What is the tumor site?"),
        Phenotype("cancer_grade", "What is the cancer grade?", ("grade 1", "grade 2", "grade 3", "grade 4")),
        Phenotype("histological_type", "What is the histological type?"),
        Phenotype("tumor_laterality", "What is the tumor laterality?", ("left", "right", "bilateral")),
        Phenotype("cancer_stage", "What is the cancer stage?"),
    )
}

DIAGNOSIS_QUESTION = "What is the diagnosis?"


def prefix(note: str) -> str:
    """The part of the prompt that all questions about a note share."""
    return f"{NOTE}{note.strip()}\n\n"


def branch(question: str) -> str:
    """The part of the prompt that asks one question; the answer follows it at once."""
    return f"### Question: {question}\n### Answer:"


def example(text: str, diagnosis: str) -> str:
    """Another patient's note (or its beginning) with its diagnosis, on two lines; a piece of its own."""
    return f"### Another note: {' '.join(text.split())}\n### Its diagnosis:{diagnosis}\n\n"


def answer(texts: Sequence[str]) -> str:
    """The answer's text for the values found: joined by "; ", or "not relevant" where there is none."""
    return " " + (SEPARATOR.join(texts) if texts else NOT_RELEVANT)


def parse_answer(text: str) -> list[str]:
    """The values in an answer's text: split at semicolons before white space, duplicates dropped, order kept; [] for
    "not relevant"."""
    values = dict.fromkeys(" ".join(part.split()) for part in re.split(r";(?=\s|$)", text))
    values.pop("", None)
    if [value.lower().rstrip(".") for value in values] == [NOT_RELEVANT]:
        return []
    return list(values)


def diagnosis_answer(description: str, code: str) -> str:
    """The diagnosis task's answer: the ICD-10-CM description (commas and all), then the code in brackets."""
    return f" {description} ({code})"
