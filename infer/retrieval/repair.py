"""Spelling correction and abbreviation expansion before inference, as the paper suggests (section on failures).

    python -m infer.extract … --repair train.jsonl

The lexicon is well-spelled text: training notes. A word is corrected if neither the lexicon nor the ICD-10-CM
descriptions contain it, and it is one edit, not of its first letter, away from words of the lexicon (candidates):

* by context: one candidate occurs at least three times in the lexicon next to the word's neighbours ("lft breast" →
  "left"), and at least five times as often there as the next candidate;
* else by frequency: one candidate is at least five times as common as the next, the edit is not of the last letter, and
  the word is long enough to be unambiguous (letters: 5 for a transposition, 6 for a missing letter, 7 for an extra one,
  8 for a wrong one).

Candidates are found by symmetric deletion (Garbe's SymSpell): words one edit apart share a form with at most one letter
deleted. Medical words that are one edit apart (TWINS: macroscopic, microscopic) are never corrected.

Abbreviations are expanded with abbreviations.tsv, ambiguous ones only in a matching context. Those that the lexicon
uses stay: a model tuned on these notes can read them and answers as written.

Numbers, units, doses, TNM, genes, receptors and codes stay: words that contain or touch a digit or sign are never
corrected, and words with two capitals only in a line of capitals, to a word that the lexicon has in capitals.
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

# Medical words that are one edit apart but differ in meaning
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
MIN_COUNT = 3  # occurrences of a word or a pair in the lexicon
MIN_RATIO = 5  # count of the best candidate relative to the next one


def read_abbreviations(path: Path) -> dict[str, tuple[str, frozenset[str]]]:
    """{abbreviation: (expansion, context words of which the note must contain one; empty: no condition)}."""
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
    """One repair: the span in the original text, and the text before and after."""

    start: int
    end: int
    before: str
    after: str


class Repair:
    """Corrects texts, given the lexicon `texts`."""

    def __init__(self, texts: Iterable[str]) -> None:
        counts: Counter[str] = Counter()
        pairs: Counter[tuple[str, str]] = Counter()
        capitals: Counter[str] = Counter()
        self.kept: set[str] = set()  # abbreviations that the lexicon uses
        for text in texts:
            tokens = _TOKEN.findall(text)
            counts.update(token.lower() for token in tokens if token.isalpha())
            capitals.update(token.lower() for token in tokens if token.isupper() and len(token) > 1)
            pairs.update(pairwise(map(context, tokens)))
            self.kept.update(match[0] for match in _SHORT.finditer(text))
        self.pairs = Counter({pair: count for pair, count in pairs.items() if "" not in pair})
        self.counts = {word: count for word, count in counts.items() if count >= MIN_COUNT and len(word) >= 4}
        self.known = {word for word, count in counts.items() if count > 1}
        for description in CODES.values():
            self.known.update(word.lower() for word in _WORD.findall(description))
        self.known |= SHORT_FORMS
        self.capitals = {word for word, count in capitals.items() if count >= MIN_COUNT}
        self.by_deletion: dict[str, list[str]] = defaultdict(list)
        for word in self.counts:
            for form in deletions(word):
                self.by_deletion[form].append(word)

    def correct(self, word: str, before: str = "", after: str = "", in_capitals: bool = False) -> str:
        """The word's correction in the word's own case, or the word itself. `before` and `after` are the tokens next to
        it; `in_capitals` is True if its whole line is in capitals."""
        small = word.lower()
        upper = len(word) > 1 and word.isupper()
        if len(small) < 3 or small in self.known or small in TWINS:
            return word
        if sum(map(str.isupper, word)) > 1 and not (upper and in_capitals):
            return word
        near = {known for form in deletions(small) for known in self.by_deletion.get(form, ())}
        near = {known for known in near if known[0] == small[0] and one_edit(small, known)}
        if upper:
            near = {known for known in near if known in self.capitals and min(len(known), len(small)) >= 5}
        if len(small) == 3:  # three letters are more often an abbreviation than a word without its last letter
            near = {known for known in near if known[:-1] != small}
        in_context = {known: self.pairs[context(before), known] + self.pairs[known, context(after)] for known in near}
        alone = {known: self.counts[known] for known in near if is_unambiguous(small, known)}
        chosen = dominant(in_context) or dominant(alone)
        if not chosen:
            return word
        return chosen.upper() if upper else chosen.capitalize() if word[0].isupper() else chosen

    def changes(self, text: str) -> list[Change]:
        """The repairs of a text, in order, without overlaps."""
        words = {word.lower() for word in re.findall(r"[A-Za-z]+", text)}
        found = []
        for match in _SHORT.finditer(text):
            change = expand(match, words) if match[0] not in self.kept else None
            if change is not None:
                found.append(change)
        expanded = {i for change in found for i in range(change.start, change.end)}
        tokens = list(_TOKEN.finditer(text))
        index_at = {token.start(): index for index, token in enumerate(tokens)}
        in_capitals = {i for line in _LINE.finditer(text) if line[0].isupper() for i in range(*line.span())}
        for match in _WORD.finditer(text):
            index = index_at.get(match.start(), 0)
            before, after = (tokens[i][0] if 0 <= i < len(tokens) else "" for i in (index - 1, index + 1))
            corrected = self.correct(match[0], before, after, match.start() in in_capitals)
            if corrected != match[0] and match.start() not in expanded:
                found.append(Change(match.start(), match.end(), match[0], corrected))
        return sorted(found, key=lambda change: change.start)

    def __call__(self, text: str) -> str:
        """The repaired text."""
        return apply(text, self.changes(text))


def apply(text: str, changes: Iterable[Change]) -> str:
    """`text` with the changes applied."""
    parts, end = [], 0
    for change in changes:
        parts += [text[end : change.start], change.after]
        end = change.end
    return "".join([*parts, text[end:]])


def context(token: str) -> str:
    """A token as a context: words in lower case, "0" for all numbers, "" for signs."""
    return "0" if token[:1].isdigit() else token.lower() if token.isalpha() else ""


def dominant(counts: dict[str, int]) -> str:
    """The key with a count of at least MIN_COUNT and MIN_RATIO times the next count; "" if there is none."""
    ranked = sorted(counts, key=lambda key: (-counts[key], key))
    if not ranked or counts[ranked[0]] < MIN_COUNT:
        return ""
    return ranked[0] if len(ranked) == 1 or counts[ranked[0]] >= MIN_RATIO * counts[ranked[1]] else ""


def expand(match: re.Match[str], words: set[str]) -> Change | None:
    """Expands an abbreviation; None if its context words are not among the note's `words`, or its case differs.

    An abbreviation with capitals must match exactly ("SOB", not "sob"); a lower-case one may also begin a sentence.
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


def is_unambiguous(word: str, known: str) -> bool:
    """True if `word` may be corrected to `known` without context. Short words may be other words (chance/change,
    tests/testis, dermoid/desmoid), and an edit of the last letter is often an inflection (node/nodes)."""
    if known[:-1] in (word, word[:-1]) or known == word[:-1]:
        return False
    if len(word) != len(known):
        return len(word) >= (6 if len(word) < len(known) else 7)
    return len(word) >= (5 if sorted(word) == sorted(known) else 8)


def one_edit(a: str, b: str) -> bool:
    """True if one insertion, deletion, substitution or transposition makes a into b (or they are equal)."""
    i = 0
    while i < min(len(a), len(b)) and a[i] == b[i]:
        i += 1
    x, y = a[i:], b[i:]
    return x[1:] == y or x == y[1:] or x[1:] == y[1:] or (x[:2] == y[:2][::-1] and x[2:] == y[2:])


def read_lexicon(lexicon: Path) -> list[str]:
    """The texts of a JSON-lines file. Raises UserError for a line without `text`."""
    return [record["text"] for _, record in read_jsonl(lexicon, ("text",))]


def read_repair(lexicon: Path) -> Repair:
    """A Repair with the texts of a JSON-lines file as its lexicon."""
    return Repair(read_lexicon(lexicon))
