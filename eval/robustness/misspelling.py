"""Misspelled notes: a tuned adapter answers the same notes at nested rates of misspelling, with and without repair.

A word is misspelled by one of five rules: a neighbouring key, two letters swapped, a letter omitted, a letter doubled,
a phonetic spelling. Each word has a fixed random number in [0, 1) derived from (seed, record id, offset) and is
misspelled if it is below the rate, so a word wrong at 5 % is wrong in the same way at 10 %. Words are runs of four or
more letters that touch no digit or sign and are no Roman numeral, so sizes, codes, stages and receptors are never
changed. Only the note's text changes: the gold answers keep their spelling, and their spans are shifted.

The repair is that of infer.extract. All rates are answered in two jobs, with and without repair.
"""

from __future__ import annotations

import copy
import hashlib
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.experiments.steps import LONG, Run, experiment, extraction
from eval.questions import Question, pair, read_predictions, read_references
from eval.robustness.curve import check_rates, curve, name_of, recovery, recovery_lines, text_table
from infer.retrieval.repair import read_lexicon
from model.support.cli import UserError
from model.support.files import write_jsonl

Record = dict[str, Any]
PLAIN, REPAIRED = "as misspelled", "repaired"


@dataclass(frozen=True)
class Misspelling:
    """Answer notes at nested rates of misspelling, with and without repair."""

    weights: str
    """The base model's folder."""
    notes: Path
    """Annotated test notes, JSON lines; their texts get misspelled, their answers do not."""
    lexicon: Path
    """JSON lines with correctly spelled `text` (training notes), the vocabulary for repair."""
    out: Path
    """The run's folder: the misspelled notes, answers, result.json."""
    adapter: str = ""
    """The tuned adapter (empty: the base alone)."""
    rates: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4)
    """Shares of misspelled words among those of four or more letters; a word wrong at one rate is wrong in the same way
    at a higher one."""
    limit: int = 0
    """Only the first notes (0: all)."""
    grounded: bool = False
    """Use constrained decoding (infer.extract --grounded)."""
    overwrite: bool = False
    """Remove an existing run and start again."""

    def __post_init__(self) -> None:
        check_rates(self.rates)
        if self.limit < 0:
            raise UserError(f"--limit {self.limit}: 0 or more")


# ---- the corruption -------------------------------------------------------------------------------------------


_WORD = re.compile(r"(?<![\w.+/-])(?![IVX]+[A-C]?\b)[A-Za-z]{4,}(?![\w+/]|[-.]\w)")
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_SOUNDS = (("ph", "f"), ("y", "i"), ("ea", "ee"), ("ou", "u"), ("ck", "k"), ("c", "k"), ("s", "z"), ("oe", "e"))


def keyboard(word: str, rng: random.Random) -> str:
    """One letter, not the first, replaced by its neighbour on a row of the keyboard."""
    place = rng.randrange(1, len(word))
    row = next(row for row in _ROWS if word[place].lower() in row)
    at = row.index(word[place].lower())
    letter = rng.choice([row[i] for i in (at - 1, at + 1) if 0 <= i < len(row)])
    return word[:place] + (letter.upper() if word[place].isupper() else letter) + word[place + 1 :]


def transposition(word: str, rng: random.Random) -> str:
    """Two neighbouring letters swapped, not the first; unchanged if all are equal."""
    places = [i for i in range(1, len(word) - 1) if word[i] != word[i + 1]]
    if not places:
        return word
    place = rng.choice(places)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def omission(word: str, rng: random.Random) -> str:
    """One letter omitted, not the first."""
    place = rng.randrange(1, len(word))
    return word[:place] + word[place + 1 :]


def doubling(word: str, rng: random.Random) -> str:
    """One letter doubled, not the first."""
    place = rng.randrange(1, len(word))
    return word[: place + 1] + word[place:]


def phonetic(word: str, rng: random.Random) -> str:
    """A phonetic spelling; an omission if no rule of _SOUNDS applies."""
    found = [(word.find(was, 1), was, now) for was, now in _SOUNDS if word.find(was, 1) > 0]
    if not found:
        return omission(word, rng)
    place, was, now = rng.choice(found)
    return word[:place] + now + word[place + len(was) :]


RULES: tuple[Callable[[str, random.Random], str], ...] = (keyboard, transposition, omission, doubling, phonetic)


def misspell(record: Record, rate: float, seed: int = 0) -> Record:
    """A copy of an annotated note with about `rate` of its words misspelled. Raises ValueError if the rate is outside
    0 … 1."""
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate of {rate} is not between 0 and 1")
    text, parts, at, moves = record["text"], [], 0, []
    for match in _WORD.finditer(text):
        key = f"{seed}:{record['id']}:{match.start()}".encode()
        rng = random.Random(hashlib.sha256(key).digest())
        if rng.random() >= rate:
            continue
        word = rng.choice(RULES)(match[0], rng)
        parts += [text[at : match.start()], word]
        at = match.end()
        moves.append((match.end(), len(word) - len(match[0])))
    changed = copy.deepcopy(record)
    changed["text"] = "".join([*parts, text[at:]])
    for spans in (changed.get("phenotypes") or {}).values():
        for span in spans:
            if isinstance(span, dict) and span.get("start") is not None:
                # Every changed word that ends at or before an offset shifts it.
                for name in ("start", "end"):
                    span[name] += sum(by for end, by in moves if end <= span[name])
    return changed


# ---- the experiment -------------------------------------------------------------------------------------------


def run_misspelling(options: Misspelling) -> dict[str, Any]:
    """Run the unfinished steps, write result.json and return it."""
    given = read_references(options.notes)[: options.limit or None]
    references = [record for record in given if record["text"].strip()]
    if not references:
        raise UserError(f"{options.notes}: every note is empty")
    if len(references) < len(given):
        left_out = len(given) - len(references)
        print(f"{options.notes}: {left_out} of {len(given)} notes are empty and left out", file=sys.stderr)
    read_lexicon(options.lexicon)  # report a mistake in it now: it is needed only after the plain answers
    files = {"notes": options.notes, "lexicon": options.lexicon}
    models = (options.weights, options.adapter)
    return experiment(options, files, models, lambda run: measured(run, options, references))


def measured(run: Run, options: Misspelling, references: list[Record]) -> dict[str, Any]:
    """Answer and score the notes of all rates, with and without repair."""
    rates, notes = sorted(options.rates), options.out / "notes.jsonl"
    misspelled = {rate: [misspell(record, rate) for record in references] for rate in rates}
    write_jsonl(
        notes,
        [
            {"id": f"{record['id']}@{name_of(rate)}", "text": record["text"]}
            for rate in rates
            for record in misspelled[rate]
        ],
    )
    series = {}
    for name, file, lexicon in ((PLAIN, "plain", None), (REPAIRED, "repaired", options.lexicon)):
        answers = options.out / f"{file}.jsonl"
        how = LONG | {"repair": lexicon, "grounded": options.grounded}
        run.step(f"answers: {name}", extraction(options.weights, options.adapter or None, notes, answers, **how))
        given = {prediction["id"]: prediction for prediction in read_predictions(answers)}
        series[name] = {rate: questions_at(rate, references, given) for rate in rates}
    plain, repaired = series[PLAIN], series[REPAIRED]
    return {
        "corrupted": "words misspelled",
        "changed": [sum(map(words_changed, misspelled[rate], references)) for rate in rates],
        "of": sum(len(_WORD.findall(record["text"])) for record in references),
        "recovery": [{"rate": rate, **recovery(plain[0.0], plain[rate], repaired[rate])} for rate in rates],
        **curve(series),
    }


def words_changed(new: Record, old: Record) -> int:
    return sum(a != b for a, b in zip(new["text"].split(), old["text"].split(), strict=True))


def questions_at(rate: float, references: list[Record], given: dict[str, Record]) -> list[Question]:
    own = [{**given[f"{record['id']}@{name_of(rate)}"], "id": record["id"]} for record in references]
    return pair(references, own)[0]


def format_result(result: dict[str, Any]) -> str:
    return "\n".join([text_table(result), *recovery_lines(result["recovery"])])
