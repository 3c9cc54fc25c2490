"""Classifies wrong answers, after the paper's error analysis: incomplete, irrelevant, repeated, misspelt, abbreviated,
label noise.

A wrong answer gets the first class of `CLASSES` whose rule fits; the rules compare clinical forms. Independently of the
class, an answer that does not occur in the note is counted as invented (open phenotypes only; the values of a closed
list need not occur in the note).

    >>> wrong = lambda p, g: classify(Question("n", "p", "histological_type", (g,), (p,) if p else ()))
    >>> right = "invasive ductal carcinoma"
    >>> [wrong(given, right) for given in ("", "carcinoma", f"{right} in situ", "invasive ductal carcinmoa")]
    ['incomplete', 'incomplete', 'too much', 'misspelling']
    >>> [wrong(given, right) for given in ("IDC", "no no no", "glioma")]
    ['abbreviation', 'repeated', 'irrelevant']
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nltk.metrics.distance import edit_distance

from eval.metrics.text import clinical
from eval.questions import Question, f1_of
from infer.extract.places import occurs_in
from infer.tasks import PHENOTYPES

CLASSES = {
    "empty": "an empty output",
    "repeated": "the same words three times or more in a row",
    "not asked for": "an answer where the note gives none",
    "incomplete": "none, or only a part, of the right answer",
    "too much": "the right answer and more",
    "misspelling": "a letter or two away from the right answer",
    "abbreviation": "the right answer shortened, or a shortened one written out",
    "label noise suspected": "an independent system gives the same answer and the note contains it, or not the label",
    "another value": "another value of the same kind",
    "irrelevant": "no word of the right answer",
}
_GROUP = re.compile(r"\b(?:iv|i{1,3})[abc]?\d?\b")  # a stage group: one letter makes another value, no misspelling
_KINDS = {"stage group": _GROUP, "length": re.compile(r"\d mm\b"), "number": re.compile(r"\d(?! mm\b)")}
_REPEATED = re.compile(r"\b(\w[\w ,.-]{0,60}?)(?:[\s,.;]+\1\b){2,}", re.I)


def is_right(one: Question) -> bool:
    """Exact match of the whole set under the clinical preset."""
    return f1_of(one) == 100


def classify(one: Question, note: str = "", witnesses: int = 0) -> str:
    """The class of a wrong answer. `witnesses` is the number of independent systems that gave the same answer."""
    predicted = [clinical(answer) for answer in one.predicted]
    gold = [clinical(answer) for answer in one.gold]
    given, right = " ; ".join(predicted), " ; ".join(gold)
    if one.empty_output and one.finish_reason != "repetition":
        return "empty"
    if one.finish_reason == "repetition" or _REPEATED.search(", ".join(one.predicted)):
        return "repeated"
    if not gold:
        return "not asked for"
    if not predicted or set(predicted) < set(gold) or _part(given, right):
        return "incomplete"
    if set(predicted) > set(gold) or _part(right, given):
        return "too much"
    if _misspelt(given, right):
        return "misspelling"
    if _shortened(given, right) or _shortened(right, given):
        return "abbreviation"
    if note and is_open(one):
        text = f" {clinical(note)} "
        if (witnesses and f" {predicted[0]} " in text) or not all(f" {answer} " in text for answer in gold):
            return "label noise suspected"
    alike = set(given.split()) & set(right.split()) - {"mm", "x", "-"} or kinds(given) & kinds(right)
    values = PHENOTYPES[one.name].values if one.name in PHENOTYPES else ()
    if alike or set(one.predicted) & set(values):
        return "another value"
    return "irrelevant"


def kinds(text: str) -> set[str]:
    """The kinds of value in a clinical form: a stage group, a length, a plain number."""
    return {name for name, pattern in _KINDS.items() if pattern.search(text)}


def is_open(one: Question) -> bool:
    """True for a phenotype whose values are spans of the note, False for a closed list."""
    return one.name in PHENOTYPES and not PHENOTYPES[one.name].values


def invented(one: Question, note: str) -> int:
    """Number of answers to an open phenotype that do not occur in the note."""
    if not is_open(one):
        return 0
    text = f" {clinical(note)} "
    return sum(not occurs_in(answer, note) and f" {clinical(answer)} " not in text for answer in one.predicted)


def count_failures(
    questions: list[Question],
    notes: Mapping[str, str],
    others: Mapping[tuple[str, str], list[tuple[str, ...]]],
    examples: int = 3,
) -> dict[str, Any]:
    """Number of failures in each class with the first `examples` of them, and the number of invented answers.

    `notes` maps record ids to texts, `others` maps (record, question) to the answers of independent systems.
    """
    by_class: dict[str, list[dict[str, str]]] = {name: [] for name in CLASSES}
    for one in (one for one in questions if not is_right(one)):
        same = sum(answer == one.predicted for answer in others.get((one.record, one.name), ()))
        by_class[classify(one, notes.get(one.record, ""), same)].append(
            {
                "record": one.record,
                "question": one.name,
                "right": "; ".join(one.gold) or "not relevant",
                "answered": "; ".join(one.predicted)[:200] or ("" if one.empty_output else "not relevant"),
            }
        )
    return {
        "n": len(questions),
        "wrong": sum(map(len, by_class.values())),
        "invented": sum(invented(one, notes.get(one.record, "")) for one in questions),
        "answers": sum(len(one.predicted) for one in questions),
        "classes": [
            {"name": name, "what": CLASSES[name], "count": len(found), "examples": found[:examples]}
            for name, found in by_class.items()
            if found
        ],
    }


def _part(short: str, long: str) -> bool:
    return short != long and f" {short} " in f" {long} "


def _misspelt(a: str, b: str) -> bool:
    if max(len(a), len(b)) < 4 or _GROUP.search(b) or re.findall(r"\d+|[+-]", a) != re.findall(r"\d+|[+-]", b):
        return False
    limit = 1 if min(len(a), len(b)) < 8 else 2
    return abs(len(a) - len(b)) <= limit and edit_distance(a, b) <= limit


def _shortened(short: str, long: str) -> bool:
    """True for initials ("idc"), or if every word is a prefix of its counterpart ("intrahep cholangio")."""
    a, b = short.split(), long.split()
    if len(b) > 1 and len(a) == 1 and a[0] == "".join(word[0] for word in b):
        return True
    pairs = list(zip(a, b, strict=False))
    starts = all(x == y or (y.startswith(x) and len(x) > 1 and len(y) > 5) for x, y in pairs)
    return len(a) == len(b) and starts and short != long
