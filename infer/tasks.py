"""The two clinical tasks: questions, prompt template and answer format, shared by training and inference.

Phenotype extraction asks eight questions about a note (paper, section on tasks); the answer is "not relevant" if the
note does not say. Diagnosis generation asks for the ICD-10-CM description and code.

The template puts the note first, so that all nine questions share it as a prefix:

    ### Note: {note}\n\n### Question: What is the tumor size?\n### Answer: 2.5 cm<eos>

`prefix(note)`, `branch(question)` and `answer(texts)` are tokenized separately and their ids concatenated, so the
boundary between prompt and answer is known without searching in token ids. With retrieval, other notes with their
diagnoses (`example`) are inserted between prefix and branch of the diagnosis question only: the prefix stays shared,
and the phenotype questions never see another patient's findings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from model.support.cli import nearest

NOT_RELEVANT = "not relevant"
SEPARATOR = "; "
"""Separates an answer's values. Not a comma: "2,5 cm" and "pT2, pN1a" are single values."""
NOTE = "### Note: "
"""Precedes the note. Models use their first token as an attention sink, so the note's first word must not be it."""
QUESTION = 64
"""Tokens per question that memory planning assumes."""


@dataclass(frozen=True)
class Phenotype:
    """One of the eight questions. `values` is the closed list of its answers; if empty, the answer is a verbatim span
    of the note."""

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


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for a name that is no phenotype's, without quoting it: it may be a note's text."""
    for name in names:
        if name not in PHENOTYPES:
            raise ValueError(
                f"'phenotypes' has an unknown name{nearest(name, list(PHENOTYPES))}; there are {', '.join(PHENOTYPES)}"
            )


DIAGNOSIS_QUESTION = "What is the diagnosis?"


def prefix(note: str) -> str:
    """The part of the prompt shared by all questions about a note."""
    return f"{NOTE}{note.strip()}\n\n"


def branch(question: str) -> str:
    """The part of the prompt that asks one question; the answer follows directly."""
    return f"### Question: {question}\n### Answer:"


def example(text: str, diagnosis: str) -> str:
    """A retrieved note (or its beginning) with its diagnosis, on two lines; tokenized separately."""
    return f"### Another note: {' '.join(text.split())}\n### Its diagnosis:{diagnosis}\n\n"


def answer(texts: Sequence[str]) -> str:
    """The answer text for a list of values: joined by "; ", or "not relevant" if empty."""
    return " " + (SEPARATOR.join(texts) if texts else NOT_RELEVANT)


def parse_answer(text: str) -> list[str]:
    """Splits an answer's text into values at semicolons before white space. Drops duplicates and keeps the order;
    returns [] for "not relevant"."""
    values = dict.fromkeys(" ".join(part.split()) for part in re.split(r";(?=\s|$)", text))
    values.pop("", None)
    if [value.lower().rstrip(".") for value in values] == [NOT_RELEVANT]:
        return []
    return list(values)


def diagnosis_answer(description: str, code: str) -> str:
    """The diagnosis task's answer: the ICD-10-CM description, then the code in parentheses."""
    return f" {description} ({code})"
