"""Two baselines without a model: the most frequent answer, and regular expressions with learned word lists.

Both are fitted on training records only (see train.clinic) and return for a note's text

    {"phenotypes": {name: [answer, …] for the eight names}, "diagnosis": "description (code)"}

`RegexBaseline` is what an engineer would write in an afternoon. Its word lists come from the closed lists, the training
answers and the spans that they annotate. For each phenotype it tries sixteen rules for choosing among the matches
(first, last, largest or most frequent; with or without sentences about relatives and the past; only after a cue word or
not) and keeps the one that is right most often on the training notes. It does not understand context: it cannot tell
that "the smaller focus" is not the answer, or that a grade is that of a side effect.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from eval.questions import code_of
from infer.codes import describe, is_billable, lookup
from infer.tasks import PHENOTYPES, diagnosis_answer

Answers = dict[str, Any]
Records = Sequence[Mapping[str, Any]]

_NUMBER = r"\d+(?:\.\d+)?"
_UNIT = r"(?:cm|mm|centimeters?|millimeters?)"
_SIZE = re.compile(rf"{_NUMBER}(?:\s*{_UNIT})?(?:\s*(?:x|×|by)\s*{_NUMBER}(?:\s*{_UNIT})?){{0,2}}[\s-]*{_UNIT}\b", re.I)
_TNM = re.compile(r"\b[ypc]{0,2}T(?:is|[0-4][a-d]?)\s?N[0-3][a-c]?\s?M[01][a-c]?\b", re.I)
_GROUP = re.compile(r"\b(?:stage(?: group| of)?|stg|st|staged as|uicc|ajcc)[:\s-]+((?:IV|I{1,3})[ABC]?\d?)\b", re.I)
_GRADE = re.compile(
    r"\b(?:(?P<named>well|moderately|poorly)[\s-]differentiated|(?P<tier>low|intermediate|high)[\s-]grade"
    r"|(?:grade(?: group)?|gr|G|GG|FG)\s?(?P<number>[1-4]|I{1,3}|IV)\b)",
    re.I,
)
_SIDE = re.compile(r"\b(left|right|bilateral|lt|rt|l|r)\b", re.I)
_RECEPTORS = {
    "ER": r"\bER\b|o?estrogen receptors?",
    "PR": r"\bPR\b|progesterone receptors?",
    "HER2": r"\bHER-?2(?:/neu)?\b|\bH2N\b|erbB-?2",
}
_RESULT = re.compile(
    r"(?P<equivocal>equiv|2\+(?! (?:but|with amp))|indeterminate|borderline)"
    r"|(?P<minus>neg|not |absent|\(-\)|-(?!\w)|[^\d]0\b|1\+)"
    r"|(?P<plus>pos|3\+|strong|amplif|\+|\d+ ?%)",
    re.I,
)
_PENDING = re.compile(r"pend|await|not yet|requested|ordered", re.I)
_ASIDE = re.compile(
    r"famil|mother|father|sister|brother|aunt|uncle|cousin|FHx|history of|prior|previous|earlier|remote|no evidence"
    r"|\bno\b|negative for|denies|h/o|PMH|benign|incidental",
    re.I,
)
_NUMERALS = {"i": 1, "ii": 2, "iii": 3, "iv": 4, "1": 1, "2": 2, "3": 3, "4": 4}
_WORD_GRADES = {"well": 1, "low": 1, "moderately": 2, "intermediate": 2, "poorly": 3, "high": 3}
_SIDES = {"l": "left", "r": "right", "b": "bilateral"}
_PICKS = ("first", "last", "largest", "commonest")


class Found(NamedTuple):
    """A candidate answer with its start in the text and, for choosing the largest, its size (mm)."""

    value: str
    start: int
    amount: float = 0.0


class Rule(NamedTuple):
    """A rule for choosing among candidates: which to `pick`, whether to skip sentences about relatives and the past
    (`aside`), whether to prefer candidates after a cue word of the phenotype (`cued`)."""

    pick: str
    aside: bool
    cued: bool


class MajorityBaseline:
    """The same answers for every note: the most frequent non-empty training answer of each question."""

    def fit(self, records: Records) -> MajorityBaseline:
        """Count the answers of training records. Ties go to the answer seen first."""
        self._phenotypes = {}
        for name in PHENOTYPES:
            counts = Counter(texts for record in records if (texts := tuple(texts_of(record, name))))
            self._phenotypes[name] = commonest(counts, ())
        given = (record["diagnosis"] for record in records if code_of(record))
        self._diagnosis = commonest(Counter(diagnosis_answer(one["text"], one["code"]).strip() for one in given), "")
        return self

    def answers(self, text: str) -> Answers:
        """The same answers for every text."""
        phenotypes = {name: list(texts) for name, texts in self._phenotypes.items()}
        return {"phenotypes": phenotypes, "diagnosis": self._diagnosis}


class RegexBaseline:
    """Regular expressions, word lists from the training answers, and the best choosing rule for each phenotype."""

    def fit(self, records: Records) -> RegexBaseline:
        """Learn word lists, cue words, choosing rules and codes from training records."""
        self._words: dict[str, re.Pattern[str]] = {}
        for name in ("tumor_site", "histological_type"):
            self._words[name] = any_of(text for record in records for text in texts_of(record, name))
        self._grades: dict[str, Counter[str]] = defaultdict(Counter)  # annotated span → its grades
        for record in records:
            for span in record["phenotypes"]["cancer_grade"]:
                self._grades[record["text"][span["start"] : span["end"]].lower()][span["text"]] += 1
        self._words["cancer_grade"] = any_of(self._grades)
        self._cues = {name: self._cue_words(records, name) for name in PHENOTYPES}
        self._rules = {name: self._best_rule(records, name) for name in PHENOTYPES}
        self._codes: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for record in records:
            for key in code_keys(self._phenotypes(record["text"])) if code_of(record) else ():
                self._codes[key][record["diagnosis"]["code"]] += 1
        return self

    def answers(self, text: str) -> Answers:
        """The baseline's answers for a note."""
        phenotypes = self._phenotypes(text)
        return {"phenotypes": phenotypes, "diagnosis": self._diagnosis(phenotypes)}

    def _phenotypes(self, text: str) -> dict[str, list[str]]:
        return {name: self._chosen(self._candidates(text, name), text, name, self._rules[name]) for name in PHENOTYPES}

    def _cue_words(self, records: Records, name: str) -> frozenset[str]:
        """Words that precede right candidates at least three times, and twice as often as wrong ones."""
        right: Counter[str] = Counter()
        wrong: Counter[str] = Counter()
        for record in records:
            answers = lowered(texts_of(record, name))
            for found in self._candidates(record["text"], name):
                count = right if found.value.lower() in answers else wrong
                count.update(words_before(record["text"], found.start))
        return frozenset(word for word, times in right.items() if times >= 3 and times >= 2 * wrong[word])

    def _best_rule(self, records: Records, name: str) -> Rule:
        found = [(record, self._candidates(record["text"], name)) for record in records]

        def right(rule: Rule) -> int:
            return sum(
                lowered(self._chosen(candidates, record["text"], name, rule)) == lowered(texts_of(record, name))
                for record, candidates in found
            )

        return max((Rule(*one) for one in product(_PICKS, (True, False), (True, False))), key=right)

    def _chosen(self, found: list[Found], text: str, name: str, rule: Rule) -> list[str]:
        if rule.aside:
            found = [one for one in found if not _ASIDE.search(sentence_at(text, one.start))]
        if rule.cued:
            found = [one for one in found if self._cues[name] & words_before(text, one.start)] or found
        values = [one.value for one in found]
        if name.startswith("hormone"):
            return list(dict.fromkeys(values))
        if rule.pick == "largest" and found:
            return [max(found, key=lambda one: (one.amount, len(one.value))).value]
        if rule.pick == "commonest":
            return [value for value, _ in Counter(values).most_common(1)]
        return values[:1] if rule.pick == "first" else values[-1:]

    def _candidates(self, text: str, name: str) -> list[Found]:
        if name == "tumor_size":
            return [Found(m[0], m.start(), millimetres(m[0])) for m in _SIZE.finditer(text)]
        if name in ("tumor_site", "histological_type"):
            return [Found(m[0], m.start()) for m in self._words[name].finditer(text)]
        if name == "cancer_stage":
            groups = [Found(m[1], m.start(1)) for m in _GROUP.finditer(text)]
            return groups or [Found(m[0], m.start()) for m in _TNM.finditer(text)]
        if name == "cancer_grade":
            return self._grade_candidates(text)
        if name == "tumor_laterality":
            return [Found(_SIDES[m[0][0].lower()], m.start()) for m in _SIDE.finditer(text)]
        return receptor_candidates(text, status=name.endswith("status"))

    def _grade_candidates(self, text: str) -> list[Found]:
        found = {}
        for match in _GRADE.finditer(text):
            grade = (match["named"] or match["tier"] or match["number"]).lower()
            found[match.start()] = Found(f"grade {_WORD_GRADES.get(grade) or _NUMERALS[grade]}", match.start())
        for match in self._words["cancer_grade"].finditer(text):
            value = commonest(self._grades[match[0].lower()], "")
            found[match.start()] = Found(value, match.start(), 1.0)
        return [found[start] for start in sorted(found)]

    def _diagnosis(self, found: Mapping[str, Sequence[str]]) -> str:
        """The most frequent training code of the most specific known key. If a site was found but neither key with a
        side is known, the code whose ICD description is closest to the words found."""
        keys = code_keys(found)
        if found["tumor_site"] and all(key not in self._codes for key in keys[:2]):
            words = " ".join(("malignant neoplasm", *found["tumor_site"], *found["tumor_laterality"]))
            if near := [code for code in lookup(words) if is_billable(code)]:
                return diagnosis_answer(describe(near[0]), near[0]).strip()
        code = next((commonest(self._codes[key], "") for key in keys if key in self._codes), "")
        return diagnosis_answer(describe(code), code).strip() if code else ""


def texts_of(record: Mapping[str, Any], name: str) -> list[str]:
    return [span["text"] for span in record["phenotypes"].get(name) or ()]


def lowered(texts: Iterable[str]) -> set[str]:
    return {text.lower() for text in texts}


def commonest(counts: Counter[Any], otherwise: Any) -> Any:
    return counts.most_common(1)[0][0] if counts else otherwise


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the words, longest first; it matches nothing if there are none."""
    longest_first = sorted(lowered(words), key=lambda word: (-len(word), word))
    return re.compile(r"(?<![\w-])(?:" + ("|".join(map(re.escape, longest_first)) or "(?!)") + r")(?![\w-])", re.I)


def millimetres(size: str) -> float:
    return max(map(float, re.findall(_NUMBER, size))) * (1 if re.search(r"mm|millim", size, re.I) else 10)


def words_before(text: str, start: int) -> set[str]:
    return set(re.findall(r"[a-z]+|:", text[max(0, start - 30) : start].lower())[-4:])


def sentence_at(text: str, position: int) -> str:
    start = max(text.rfind(". ", 0, position), text.rfind("\n", 0, position)) + 1
    ends = [end for end in (text.find(". ", position), text.find("\n", position)) if end >= 0]
    return text[start : min(ends, default=len(text))]


def receptor_candidates(text: str, status: bool) -> list[Found]:
    """Each receptor's first mention with a result: its name, with the sign of the result if `status`."""
    if triple := re.search(r"triple[\s-]neg|TNBC", text, re.I):
        return [Found(name + "-" * status, triple.start()) for name in _RECEPTORS]
    found = []
    for name, pattern in _RECEPTORS.items():
        for match in re.finditer(pattern, text, re.I):
            after = re.split(r"[;.\n]|\band\b|, (?=[A-Zep])", text[match.end() : match.end() + 40])[0]
            result = _RESULT.search(after)
            if result is None or _PENDING.search(after) and not result["equivocal"]:
                continue
            sign = "+" if result["plus"] else "-" if result["minus"] else " equivocal"
            found.append(Found(name + (sign if status else ""), match.start()))
            break
    return sorted(found, key=lambda one: one.start)


def code_keys(found: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """The keys under which a code is counted, most specific first."""
    names = ("tumor_site", "tumor_laterality", "histological_type")
    site, side, kind = ("/".join(found[name]).lower() for name in names)
    return [
        ("site, side, type", site, side, kind),
        ("site, side", site, side),
        ("type", kind),
        ("site", site),
        ("any",),
    ]
