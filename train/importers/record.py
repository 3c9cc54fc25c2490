"""Shared by the importers: names of phenotypes, ICD-10-CM diagnoses, spans of answers, and the output file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infer.codes import canonical, code_spans, describe, described
from infer.extract.places import occurrences
from infer.tasks import DIAGNOSIS_QUESTION, PHENOTYPES, parse_answer
from model.support.cli import UserError, nearest
from model.support.files import write_jsonl

Record = dict[str, Any]


def label(name: str, where: str) -> str:
    """The phenotype that a type or question names ("Tumor Size", "What is the tumor size?"), or "diagnosis".

    Raises UserError, with `where` at its start, for any other name, which it does not quote: it may be a note's text.
    """
    known = {"diagnosis": "diagnosis", _plain(DIAGNOSIS_QUESTION): "diagnosis"}
    for phenotype in PHENOTYPES.values():
        known |= {phenotype.name: phenotype.name, _plain(phenotype.question): phenotype.name}
    plain = _plain(name.lower().replace("tumour", "tumor"))
    if plain not in known:
        names = [*PHENOTYPES, "diagnosis"]
        raise UserError(f"{where} names no phenotype{nearest(plain, names)}; there are {', '.join(names)}")
    return known[plain]


def _plain(text: str) -> str:
    return re.sub(r"[^a-z]+", "_", text.lower()).strip("_")


def place(text: str, answer: str) -> Record:
    """The answer with the span where it first occurs in the text (case-sensitively, else in any case), or null."""
    found = occurrences(answer, text) or occurrences(answer, text, ignore_case=True)
    start, end = found[0] if found else (None, None)
    return {"text": answer, "start": start, "end": end}


def diagnosis(answer: str, where: str) -> Record:
    """{"text", "code"} of an answer that contains one ICD-10-CM code of C00-D49, in any case, or is the exact
    description of one. Raises UserError for no code, several or an unknown one; a code is never corrected."""
    codes = {canonical(answer[start:end]) or answer[start:end]: (start, end) for start, end in code_spans(answer)}
    if len(codes) > 1:
        raise UserError(f"{where}: the diagnosis holds several codes ({', '.join(codes)}); give one")
    if codes:
        code, (start, end) = codes.popitem()
        if canonical(code) is None:
            raise UserError(f"{where}: {code} is not an ICD-10-CM code of C00-D49 (release of April 2026); correct it")
        return {"text": _without(answer, start, end) or describe(code), "code": code}
    if exact := described(answer):
        return {"text": answer.strip(" ."), "code": exact[0]}
    raise UserError(f"{where}: the diagnosis holds no ICD-10-CM code of C00-D49; write it as 'description (code)'")


def _without(text: str, start: int, end: int) -> str:
    """`text` without its code, text[start:end], and the brackets around it."""
    before, after = text[:start].rstrip(), text[end:].lstrip()
    if before[-1:] in ("(", "[") and after[:1] in (")", "]"):
        before, after = before[:-1], after[1:]
    before, after = before.rstrip(), after.strip(" .")
    if before and after:
        return before + (" " if after[0].isalnum() else "") + after
    return (before + after).strip(" .,:;-–—")


def write(records: list[Record], out: Path, notices: Mapping[str, int] | None = None, unread: str = "") -> None:
    """Writes the records, and prints their counts (see remarks), the notices and the unread files or columns."""
    write_jsonl(out, records)
    counted = [f"{count} {what}" for what, count in (notices or {}).items() if count]
    print(f"{out}: {'; '.join(filter(None, (remarks(records), *counted, unread)))}")


def remarks(records: list[Record]) -> str:
    """Counts of records, answers and questions, and of answers that training or scoring treats differently, as text."""
    counts = Counter({"answers": 0, "questions not relevant": 0, "diagnoses": 0})
    for record in records:
        asked = [(PHENOTYPES[name].values, answers) for name, answers in record.get("phenotypes", {}).items()]
        asked += [((), question["answers"]) for question in record.get("questions", ())]
        for closed_list, answers in asked:
            counts["questions not relevant"] += not answers
            for answer in answers:
                text, fragments = answer["text"], "fragments" in answer
                not_found = not closed_list and answer["start"] is None and not fragments
                counts["answers"] += 1
                counts["answers in fragments"] += fragments
                counts["answers are not of their phenotype's closed list"] += (
                    closed_list != () and text not in closed_list
                )
                counts["answers are not in their text"] += not_found
                counts["answers hold the separator of answers and score as several"] += len(parse_answer(text)) > 1
        counts["diagnoses"] += "diagnosis" in record
        counts["further diagnoses, not asked for"] += len(record.get("further_diagnoses", ()))
    always = ", ".join(f"{counts.pop(name)} {name}" for name in ("answers", "questions not relevant", "diagnoses"))
    return "; ".join([f"{len(records)} records, {always}", *(f"{n} {name}" for name, n in counts.items() if n)])
