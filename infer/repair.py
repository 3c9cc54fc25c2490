"""Spelling normalisation and abbreviation expansion before inference, as the paper suggests (section on failures).

    python -m infer.repair --notes F.jsonl --lexicon train.jsonl --out repaired.jsonl

A word is corrected only where it is unknown, long enough (two letters swapped: 5, one missing: 6, one too many: 7, one
wrong: 8), and one edit, not of its first or last letter, away from a word that stands three times or more in the
lexicon's notes; among several the commonest wins if it is clearly the commoner, else the word stays. Words of the notes
and of the ICD-10-CM descriptions are known. Candidates come from symmetric deletion (Garbe's SymSpell): two words one
edit apart share a form with at most one letter deleted.

Nothing with a digit or a sign in it, no word with two capitals, and no word beside such a sign is ever corrected:
numbers, units, doses, TNM, genes, receptors and codes stay as they are. The original note stands beside the
repaired one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from infer.codes import CODES
from model.command import UserError, run
from model.files import read_jsonl, write_jsonl

_WORD = re.compile(r"(?<![\w.+/-])[A-Za-z]+(?![\w+/]|[-.]\w)")  # letters only, not part of a code, unit or dose
CLEARLY = 5  # times as common as the next candidate


def read_abbreviations(path: Path) -> dict[str, tuple[str, frozenset[str]]]:
    """{abbreviation: (expansion, words of which the note must hold one)}."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            short, long, *context = line.split("\t")
            found[short] = (long, frozenset(" ".join(context).split()))
    return found


ABBREVIATIONS = read_abbreviations(Path(__file__).with_name("abbreviations.tsv"))
_SHORT = re.compile(
    r"(?<![\w/'.+-])(?:" + "|".join(re.escape(key) for key in sorted(ABBREVIATIONS, key=len, reverse=True))
    + r")(?![\w/'+-])", re.IGNORECASE,
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One repair: the place in the original text, what stood there and what stands there now."""

    start: int
    end: int
    before: str
    after: str


class Repair:
    """A corrector towards the words of `texts`, which leaves alone what stands in them at least twice, and every word
    of the ICD-10-CM descriptions."""

    def __init__(self, texts: Iterable[str]) -> None:
        seen = Counter(word.lower() for text in texts for word in _WORD.findall(text))
        self.known = {word for word, count in seen.items() if count > 1}
        for description in CODES.values():
            self.known.update(word.lower() for word in _WORD.findall(description))
        self.counts = {word: count for word, count in seen.items() if count >= 3}
        self.by_deletion: dict[str, list[str]] = defaultdict(list)
        for word in self.counts:
            if len(word) >= 5:
                for form in deletions(word):
                    self.by_deletion[form].append(word)

    def correct(self, word: str) -> str:
        """The word, or the known word that it most likely was meant to be, in the word's own capitals."""
        small = word.lower()
        if len(small) < 5 or small in self.known or sum(letter.isupper() for letter in word) > 1:
            return word
        near = {known for form in deletions(small) for known in self.by_deletion.get(form, ())}
        found = [known for known in near if known[0] == small[0] and one_edit(small, known)]
        # An edit of the last letter is more often another inflection (node, nodes) than a mistake.
        found = [known for known in found if known[:-1] not in (small, small[:-1]) and known != small[:-1]]
        found = [known for known in found if len(small) >= shortest(small, known)]
        found.sort(key=lambda known: (-self.counts[known], known))
        if not found or (len(found) > 1 and self.counts[found[0]] < CLEARLY * self.counts[found[1]]):
            return word
        return found[0].capitalize() if word[0].isupper() else found[0]

    def changes(self, text: str) -> list[Change]:
        """The repairs of a text, in order, none overlapping another."""
        words = {word.lower() for word in re.findall(r"[A-Za-z]+", text)}
        found = []
        for match in _SHORT.finditer(text):
            change = expand(match, words)
            if change is not None:
                found.append(change)
        taken = {place for change in found for place in range(change.start, change.end)}
        for match in _WORD.finditer(text):
            after = self.correct(match[0])
            if after != match[0] and match.start() not in taken:
                found.append(Change(match.start(), match.end(), match[0], after))
        return sorted(found, key=lambda change: change.start)

    def __call__(self, text: str) -> str:
        """The repaired text."""
        parts, at = [], 0
        for change in self.changes(text):
            parts += [text[at : change.start], change.after]
            at = change.end
        return "".join([*parts, text[at:]])


def expand(match: re.Match[str], words: set[str]) -> Change | None:
    """An abbreviation's expansion, or None where it is ambiguous in this note or may be a name or a unit.

    One with capitals is read only in those capitals ("SOB", not "sob"); a lower-case one also at a sentence's start.
    """
    short = match[0]
    key = short if short in ABBREVIATIONS else short[0].lower() + short[1:]
    if key not in ABBREVIATIONS:
        return None
    long, context = ABBREVIATIONS[key]
    if context and not context & words:
        return None
    after = long[0].upper() + long[1:] if short != key else long
    return Change(match.start(), match.end(), short, after)


def deletions(word: str) -> set[str]:
    """The word and its forms with one letter deleted."""
    return {word, *(word[:i] + word[i + 1 :] for i in range(len(word)))}


def shortest(word: str, known: str) -> int:
    """The letters that a word must have to be mended so. Short words have neighbours that are words: a "chance" is no
    "change", "tests" no "testis", a "dermoid" no "desmoid"."""
    if len(word) != len(known):
        return 6 if len(word) < len(known) else 7
    return 5 if sorted(word) == sorted(known) else 8


def one_edit(a: str, b: str) -> bool:
    """Whether one insertion, deletion, substitution or swap of neighbours makes a into b."""
    i = 0
    while i < min(len(a), len(b)) and a[i] == b[i]:
        i += 1
    x, y = a[i:], b[i:]
    return x[1:] == y or x == y[1:] or x[1:] == y[1:] or (x[:2] == y[:2][::-1] and x[2:] == y[2:])


@dataclass(frozen=True)
class Options:
    """Write notes with their spelling normalised and their abbreviations expanded."""

    notes: Path
    """JSON lines with `id` and `text`."""
    lexicon: Path
    """JSON lines whose `text` is spelled well (training notes)."""
    out: Path
    """JSON lines: the notes, repaired; `original` keeps the text that was, `repairs` says what changed."""


def repaired(options: Options, repair: Repair) -> Iterator[dict[str, object]]:
    for number, record in read_jsonl(options.notes, ("id", "text")):
        if not isinstance(record["text"], str):
            raise UserError(f"{options.notes}:{number}: 'text' is not text")
        changes = repair.changes(record["text"])
        listed = [[change.start, change.end, change.after] for change in changes]
        yield {**record, "text": repair(record["text"]), "original": record["text"], "repairs": listed}


def main(options: Options) -> None:
    repair = Repair(str(record["text"]) for _, record in read_jsonl(options.lexicon, ("text",)))
    count = write_jsonl(options.out, repaired(options, repair))
    print(f"{options.out}: {count} notes")


if __name__ == "__main__":
    run(main, Options)
