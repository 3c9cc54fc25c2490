"""What the importers share: a question's name, a diagnosis, an answer's place, and the file that they write."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infer.codes import canonical, describe, described, written
from infer.extract.places import occurrences
from infer.tasks import DIAGNOSIS_QUESTION, PHENOTYPES, parse_answer
from model.support.cli import UserError, nearest
from model.support.files import check_regular, write_jsonl
from model.support.lock import output

Record = dict[str, Any]


def read_text(path: Path, keep_mark: bool = False) -> str:
    """A file's text as it is, line ends included; with `keep_mark` a byte order mark at its beginning too."""
    check_regular(path)
    try:
        return path.read_bytes().decode("utf-8" if keep_mark else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def label(name: str, where: str) -> str:
    """The phenotype that a type or question names ("Tumor Size", "What is the tumor size?"), or "diagnosis"."""
    known = {"diagnosis": "diagnosis", _plain(DIAGNOSIS_QUESTION): "diagnosis"}
    for phenotype in PHENOTYPES.values():
        known |= {phenotype.name: phenotype.name, _plain(phenotype.question): phenotype.name}
    plain = _plain(name.lower().replace("tumour", "tumor"))
    if plain not in known:
        names = [*PHENOTYPES, "diagnosis"]
        raise UserError(f"{where}: no type {name!r}{nearest(plain, names)}; there are {', '.join(names)}")
    return known[plain]


def _plain(text: str) -> str:
    return re.sub(r"[^a-z]+", "_", text.lower()).strip("_")


def place(text: str, answer: str) -> Record:
    """The answer and where it first occurs in the text (in its own case, else in any); null where it does not."""
    found = occurrences(answer, text) or occurrences(answer, text, ignore_case=True)
    start, end = found[0] if found else (None, None)
    return {"text": answer, "start": start, "end": end}


def diagnosis(answer: str, where: str) -> Record:
    """Description and ICD-10-CM code of an answer that holds one code of C00-D49 anywhere, in any case, or is a code's
    description word for word. A written code is never replaced: one that is not known, and several, are refused."""
    found = {canonical(answer[start:end]) or answer[start:end]: (start, end) for start, end in written(answer)}
    if len(found) > 1:
        raise UserError(f"{where}: the diagnosis holds several codes ({', '.join(found)}); give one")
    for code, (start, end) in found.items():
        if canonical(code) is None:
            raise UserError(
                f"{where}: {code} is not an ICD-10-CM code of C00-D49 (release of April 2026); leave the "
                "row out, or correct the code"
            )
        return {"text": _without(answer, start, end) or describe(code), "code": code}
    exact = described(answer)
    if not exact:
        raise UserError(
            f"{where}: the diagnosis holds no ICD-10-CM code of C00-D49, and is no code's description; "
            "write it as 'description (code)'"
        )
    return {"text": answer.strip(" ."), "code": exact[0]}


def _without(text: str, start: int, end: int) -> str:
    """A diagnosis without its code and the code's brackets."""
    before, after = text[:start].rstrip(), text[end:].lstrip()
    if before[-1:] in ("(", "[") and after[:1] in (")", "]"):
        before, after = before[:-1], after[1:]
    before, after = before.rstrip(), after.strip(" .")
    if before and after:
        return before + (" " if after[0].isalnum() else "") + after
    return (before + after).strip(" .,:;-–—")


def write(
    made: list[Record], out: Path, overwrite: bool, notices: Mapping[str, int] | None = None, more: str = ""
) -> None:
    """Write the records and say their number, what training cannot learn to copy, and what was not read."""
    with output(out, overwrite):
        write_jsonl(out, made)
    counted = [f"{count} {what}" for what, count in (notices or {}).items() if count]
    print(f"{out}: {'; '.join(filter(None, (remarks(made), *counted, more)))}")


def remarks(made: list[Record]) -> str:
    counts: Counter[str] = Counter()
    for record in made:
        given = [(PHENOTYPES[name].values, many) for name, many in record.get("phenotypes", {}).items()]
        given += [((), one["answers"]) for one in record.get("questions", ())]
        for values, answers in given:
            counts["questions not relevant"] += not answers
            for one in answers:
                counts["answers"] += 1
                counts["answers in fragments"] += "fragments" in one
                if values:
                    counts["answers are not of their phenotype's closed list"] += one["text"] not in values
                elif one["start"] is None and "fragments" not in one:
                    counts["answers stand nowhere in their text"] += 1
                counts["answers hold the separator of answers and score as several"] += (
                    len(parse_answer(one["text"])) > 1
                )
        counts["diagnoses"] += "diagnosis" in record
        counts["further diagnoses, not asked for"] += len(record.get("further_diagnoses", ()))
    always = ", ".join(f"{counts.pop(name, 0)} {name}" for name in ("answers", "questions not relevant", "diagnoses"))
    rest = [f"{count} {name}" for name, count in counts.items() if count]
    return "; ".join([f"{len(made)} records, {always}", *rest])
