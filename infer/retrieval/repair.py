"""Spelling normalisation and abbreviation expansion before inference, as the paper suggests (section on failures).

    python -m infer.extract … --repair train.jsonl

The lexicon is text that is spelled well: training notes. A word is corrected only where the lexicon (and the ICD-10-CM
descriptions) do not know it and it is one edit, not of its first letter, away from words that are in it:

* by its neighbours: one of these occurs three times or more between such neighbours ("lft breast":
  "left"), and clearly more often than the others;
* else without them, where it is long enough to be unambiguous (two letters swapped: 5, one missing: 6, one
  too many: 7, one wrong: 8), the edit is not of its last letter, and one candidate is clearly the commonest.

Candidates come from symmetric deletion (Garbe's SymSpell): two words one edit apart share a form with at most one
letter deleted. There is no list of mistakes and no map of keys or sounds here; a word of medicine that is one edit from
another (TWINS: macroscopic, microscopic) is taken as meant.

Abbreviations are expanded by abbreviations.tsv, ambiguous ones only in their context. One that the lexicon itself
uses stays: a model tuned on those notes has learnt to read it, and answers with it as written.

Nothing with a digit or a sign in it, and no word next to such a sign, is ever corrected, and a word with two capitals
only in a line of capitals, towards a word that the lexicon writes so: numbers, units, doses, TNM, genes, receptors
and codes stay as they are. The original note is kept with the repaired one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from infer.codes import CODES
from model.support.files import read_jsonl

# Words of medicine that are one edit apart and mean something else: a note that writes one means it.
TWINS = frozenset(
    "macroscopic microscopic macroscopically microscopically macrocytic microcytic macroscopy microscopy ileum ilium "
    "ileal iliac dysphagia dysphasia dysplasia dyskinesia aphasia aphagia perineal peroneal perineum peritoneum "
    "abduction adduction abducted adducted abducent adducent ureter ureteral urethral mucous mucus palpation "
    "palpitation discreet discrete prostate prostrate humeral humoral carotid parotid tubular tubal facial fascial "
    "cirrhosis sclerosis gastritis gastric vesical vesicle radicular radial arteritis arthritis "
    "metastasis metastases metastatic callous callus".split()
)
_WORD = re.compile(r"(?<![\w.+/-])[A-Za-z]+(?![\w+/]|[-.]\w)")  # letters only, not part of a code, unit or dose
_TOKEN = re.compile(r"[A-Za-z]+|\d[\d.,]*|[^\w\s]")
_LINE = re.compile(r"[^\n]+")
ENOUGH = 3  # times that the lexicon must hold a word or a pair
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
SHORT_FORMS = frozenset(key.lower() for key in ABBREVIATIONS)
_SHORT = re.compile(
    r"(?<![\w/'.+-])(?:"
    + "|".join(re.escape(key) for key in sorted(ABBREVIATIONS, key=len, reverse=True))
    + r")(?![\w/'+-])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Change:
    """One repair: the place in the original text, the text before and after."""

    start: int
    end: int
    before: str
    after: str


class Repair:
    """A corrector towards the words of `texts` (the lexicon)."""

    def __init__(self, texts: Iterable[str]) -> None:
        seen: Counter[str] = Counter()
        self.pairs: Counter[tuple[str, str]] = Counter()
        capitals: Counter[str] = Counter()
        short: set[str] = set()
        for text in texts:
            tokens = _TOKEN.findall(text)
            seen.update(token.lower() for token in tokens if token.isalpha())
            capitals.update(token.lower() for token in tokens if token.isupper() and len(token) > 1)
            self.pairs.update(pairwise(map(context, tokens)))
            short.update(match[0] for match in _SHORT.finditer(text))
        self.pairs = Counter({pair: count for pair, count in self.pairs.items() if "" not in pair})
        self.counts = {word: count for word, count in seen.items() if count >= ENOUGH and len(word) >= 4}
        self.known = {word for word, count in seen.items() if count > 1}
        for description in CODES.values():
            self.known.update(word.lower() for word in _WORD.findall(description))
        self.known |= SHORT_FORMS
        self.capitals = {word for word, count in capitals.items() if count >= ENOUGH}
        self.kept = short
        self.by_deletion: dict[str, list[str]] = defaultdict(list)
        for word in self.counts:
            for form in deletions(word):
                self.by_deletion[form].append(word)

    def correct(self, word: str, before: str = "", after: str = "", shouted: bool = False) -> str:
        """The word, or the known word that it most likely was meant to be, in the word's own capitals. `before` and
        `after` are the tokens next to it, `shouted` says that its whole line is in capitals."""
        small = word.lower()
        upper = len(word) > 1 and word.isupper()
        if len(small) < 3 or small in self.known or small in TWINS:
            return word
        if sum(map(str.isupper, word)) > 1 and not (upper and shouted):
            return word
        near = {known for form in deletions(small) for known in self.by_deletion.get(form, ())}
        near = {known for known in near if known[0] == small[0] and one_edit(small, known)}
        if upper:
            near = {known for known in near if known in self.capitals and min(len(known), len(small)) >= 5}
        if len(small) == 3:  # an abbreviation, more often than a word's beginning
            near = {known for known in near if known[:-1] != small}
        adjacent = {known: self.pairs[context(before), known] + self.pairs[known, context(after)] for known in near}
        chosen = clearly(adjacent) or clearly({known: self.counts[known] for known in near if plain(small, known)})
        if not chosen:
            return word
        return chosen.upper() if upper else chosen.capitalize() if word[0].isupper() else chosen

    def changes(self, text: str) -> list[Change]:
        """The repairs of a text, in order, none overlapping another."""
        words = {word.lower() for word in re.findall(r"[A-Za-z]+", text)}
        found = []
        for match in _SHORT.finditer(text):
            change = expand(match, words) if match[0] not in self.kept else None
            if change is not None:
                found.append(change)
        taken = {place for change in found for place in range(change.start, change.end)}
        tokens = list(_TOKEN.finditer(text))
        adjacent = {token.start(): place for place, token in enumerate(tokens)}
        shouted = {place for line in _LINE.finditer(text) if line[0].isupper() for place in range(*line.span())}
        for match in _WORD.finditer(text):
            place = adjacent.get(match.start(), 0)
            before, after = (tokens[i][0] if 0 <= i < len(tokens) else "" for i in (place - 1, place + 1))
            corrected = self.correct(match[0], before, after, match.start() in shouted)
            if corrected != match[0] and match.start() not in taken:
                found.append(Change(match.start(), match.end(), match[0], corrected))
        return sorted(found, key=lambda change: change.start)

    def __call__(self, text: str) -> str:
        """The repaired text."""
        return apply(text, self.changes(text))


def apply(text: str, changes: Iterable[Change]) -> str:
    """`text` with its changes made."""
    parts, at = [], 0
    for change in changes:
        parts += [text[at : change.start], change.after]
        at = change.end
    return "".join([*parts, text[at:]])


def context(token: str) -> str:
    """A token as a neighbour: its letters' case and a number's value do not matter; a sign is no context ("")."""
    return "0" if token[:1].isdigit() else token.lower() if token.isalpha() else ""


def clearly(counts: dict[str, int]) -> str:
    """The key that is counted often enough and clearly more often than the next; "" where there is none."""
    ranked = sorted(counts, key=lambda key: (-counts[key], key))
    if not ranked or counts[ranked[0]] < ENOUGH:
        return ""
    return ranked[0] if len(ranked) == 1 or counts[ranked[0]] >= CLEARLY * counts[ranked[1]] else ""


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


def plain(word: str, known: str) -> bool:
    """Whether a word is corrected without asking its neighbours. Short words have neighbours that are words: a "chance"
    is no "change", "tests" no "testis", a "dermoid" no "desmoid"; and an edit of the last letter is more often another
    inflection (node, nodes) than a mistake."""
    if known[:-1] in (word, word[:-1]) or known == word[:-1]:
        return False
    if len(word) != len(known):
        return len(word) >= (6 if len(word) < len(known) else 7)
    return len(word) >= (5 if sorted(word) == sorted(known) else 8)


def one_edit(a: str, b: str) -> bool:
    """Whether one insertion, deletion, substitution or swap of neighbours makes a into b."""
    i = 0
    while i < min(len(a), len(b)) and a[i] == b[i]:
        i += 1
    x, y = a[i:], b[i:]
    return x[1:] == y or x == y[1:] or x[1:] == y[1:] or (x[:2] == y[:2][::-1] and x[2:] == y[2:])


def read_lexicon(lexicon: Path) -> list[str]:
    """The texts of a JSON-lines file. Raises UserError for a line without one."""
    return [record["text"] for _, record in read_jsonl(lexicon, ("text",))]


def read_repair(lexicon: Path) -> Repair:
    """A corrector whose lexicon are the texts of a JSON-lines file."""
    return Repair(read_lexicon(lexicon))
