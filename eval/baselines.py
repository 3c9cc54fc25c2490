"""Two baselines without a model: the commonest answer, and regular expressions with learnt word lists.

Both are fitted on training records only (see train.clinic) and answer a note's text with

    {"phenotypes": {name: [answer, …] for the eight names}, "diagnosis": "description (code)"}

`RegexBaseline` is what a careful person writes in an afternoon. Word lists come from the closed lists, the training
answers and the words that show them; sixteen readings per phenotype (first, last, largest or commonest match, sentences
about relatives and the past left out or not, only after a cue word or not) are tried, and the one that is right most
often on the training notes is kept. It cannot read: that "the smaller focus" is not the answer, or that a grade is a
side effect's, it does not see unless a word list says so.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infer.codes import describe, is_billable, lookup
from infer.tasks import PHENOTYPES, diagnosis_answer

Answers = dict[str, Any]

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


@dataclass(frozen=True)
class Found:
    """One candidate answer: where it starts, and its weight where the largest is wanted (mm)."""

    value: str
    start: int
    amount: float = 0.0


@dataclass(frozen=True)
class Reading:
    """How to choose among candidates: `pick` one of first, last, largest or commonest, outside sentences that speak
    of relatives and the past (`aside`), after a cue word of the phenotype if there is one (`cued`)."""

    pick: str
    aside: bool
    cued: bool


_READINGS = [
    Reading(p, a, c) for p in ("first", "last", "largest", "commonest") for a in (True, False) for c in (True, False)
]


def empty_answers() -> Answers:
    """The answer "not relevant" to every phenotype, and no diagnosis."""
    return {"phenotypes": {name: [] for name in PHENOTYPES}, "diagnosis": ""}


class MajorityBaseline:
    """Answers every note alike: the commonest non-empty training answer of each phenotype, the commonest diagnosis."""

    def fit(self, records: Iterable[Mapping[str, Any]]) -> MajorityBaseline:
        """Count the answers of training records. Ties go to the answer met first."""
        counts: dict[str, Counter[tuple[str, ...]]] = {name: Counter() for name in PHENOTYPES}
        diagnoses: Counter[str] = Counter()
        for record in records:
            for name, spans in record["phenotypes"].items():
                if spans:
                    counts[name][tuple(span["text"] for span in spans)] += 1
            diagnoses[diagnosis_answer(record["diagnosis"]["text"], record["diagnosis"]["code"]).strip()] += 1
        self._answers = empty_answers()
        for name, count in counts.items():
            self._answers["phenotypes"][name] = list(count.most_common(1)[0][0]) if count else []
        self._answers["diagnosis"] = diagnoses.most_common(1)[0][0] if diagnoses else ""
        return self

    def answers(self, text: str) -> Answers:
        """The same answers for every text."""
        return {
            "phenotypes": {k: list(v) for k, v in self._answers["phenotypes"].items()},
            "diagnosis": self._answers["diagnosis"],
        }


def _millimetres(size: str) -> float:
    numbers = [float(number) for number in re.findall(_NUMBER, size)]
    return max(numbers) * (1 if re.search(r"mm|millim", size, re.I) else 10)


def _listed(words: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(set(words), key=lambda word: (-len(word), word))
    if not longest_first:
        return None
    return re.compile(r"(?<![\w-])(?:" + "|".join(re.escape(word) for word in longest_first) + r")(?![\w-])", re.I)


class RegexBaseline:
    """Regular expressions, word lists from the training answers, and the reading that suits each phenotype best."""

    def fit(self, records: Sequence[Mapping[str, Any]]) -> RegexBaseline:
        """Learn word lists, cue words and readings from training records; nothing else is ever looked at."""
        self._vocabulary = {
            name: _listed(self._answer_words(records, name)) for name in ("tumor_site", "histological_type")
        }
        self._shown: dict[str, dict[str, Counter[str]]] = {
            "cancer_grade": defaultdict(Counter),
            "cancer_stage": defaultdict(Counter),
        }
        for record in records:
            for span in record["phenotypes"]["cancer_grade"]:
                evidence = record["text"][span["start"] : span["end"]].lower()
                self._shown["cancer_grade"][evidence][span["text"]] += 1
        self._grades = _listed(self._shown["cancer_grade"])
        self._cues = {name: self._cue_words(records, name) for name in PHENOTYPES}
        self._reading = {name: self._best_reading(records, name) for name in PHENOTYPES}
        self._fit_diagnosis(records)
        return self

    def answers(self, text: str) -> Answers:
        """The baseline's answers for a note."""
        found = empty_answers()
        for name in PHENOTYPES:
            found["phenotypes"][name] = self._answer(text, name, self._reading[name])
        found["diagnosis"] = self._diagnosis(found["phenotypes"])
        return found

    # ---- phenotypes ------------------------------------------------------------------------------------------

    @staticmethod
    def _answer_words(records: Iterable[Mapping[str, Any]], name: str) -> list[str]:
        return [span["text"].lower() for record in records for span in record["phenotypes"][name]]

    def _cue_words(self, records: Iterable[Mapping[str, Any]], name: str) -> frozenset[str]:
        """The words that precede right candidates at least twice as often as before wrong ones."""
        right: Counter[str] = Counter()
        wrong: Counter[str] = Counter()
        for record in records:
            answers = {span["text"].lower() for span in record["phenotypes"][name]}
            for found in self._candidates(record["text"], name):
                count = right if found.value.lower() in answers else wrong
                count.update(set(self._before(record["text"], found.start)))
        return frozenset(word for word, times in right.items() if times >= 3 and times >= 2 * wrong[word])

    @staticmethod
    def _before(text: str, start: int) -> list[str]:
        return re.findall(r"[a-z]+|:", text[max(0, start - 30) : start].lower())[-4:]

    def _best_reading(self, records: Sequence[Mapping[str, Any]], name: str) -> Reading:
        candidates = [(record, self._candidates(record["text"], name)) for record in records]

        def right(reading: Reading) -> int:
            return sum(
                {answer.lower() for answer in self._chosen(found, record["text"], name, reading)}
                == {span["text"].lower() for span in record["phenotypes"][name]}
                for record, found in candidates
            )

        return max(_READINGS, key=right)

    def _answer(self, text: str, name: str, reading: Reading) -> list[str]:
        return self._chosen(self._candidates(text, name), text, name, reading)

    def _chosen(self, found: list[Found], text: str, name: str, reading: Reading) -> list[str]:
        if reading.aside:
            found = [one for one in found if not _ASIDE.search(self._sentence(text, one.start))]
        if reading.cued:
            cued = [one for one in found if self._cues[name] & set(self._before(text, one.start))]
            found = cued or found
        if name.startswith("hormone"):
            return list(dict.fromkeys(one.value for one in found))
        if not found:
            return []
        if reading.pick == "commonest":
            return [Counter(one.value for one in found).most_common(1)[0][0]]
        if reading.pick == "largest":
            return [max(found, key=lambda one: (one.amount, len(one.value))).value]
        return [found[0 if reading.pick == "first" else -1].value]

    @staticmethod
    def _sentence(text: str, position: int) -> str:
        start = max(text.rfind(". ", 0, position), text.rfind("\n", 0, position)) + 1
        ends = [end for end in (text.find(". ", position), text.find("\n", position)) if end >= 0]
        return text[start : min(ends, default=len(text))]

    def _candidates(self, text: str, name: str) -> list[Found]:
        if name == "tumor_size":
            return [Found(m[0], m.start(), _millimetres(m[0])) for m in _SIZE.finditer(text)]
        if name in ("tumor_site", "histological_type"):
            words = self._vocabulary[name]
            return [Found(m[0], m.start()) for m in words.finditer(text)] if words else []
        if name == "cancer_stage":
            groups = [Found(m[1], m.start(1), 1.0) for m in _GROUP.finditer(text)]
            return groups or [Found(m[0], m.start()) for m in _TNM.finditer(text)]
        if name == "cancer_grade":
            return self._grade_candidates(text)
        if name == "tumor_laterality":
            sides = {"l": "left", "r": "right", "b": "bilateral"}
            return [Found(sides[m[0][0].lower()], m.start()) for m in _SIDE.finditer(text)]
        return self._receptor_candidates(text, status=name.endswith("status"))

    def _grade_candidates(self, text: str) -> list[Found]:
        found = {}
        for match in _GRADE.finditer(text):
            grade = (match["named"] or match["tier"] or match["number"]).lower()
            found[match.start()] = Found(f"grade {_WORD_GRADES.get(grade) or _NUMERALS[grade]}", match.start())
        for match in self._grades.finditer(text) if self._grades else ():
            value = self._shown["cancer_grade"][match[0].lower()].most_common(1)[0][0]
            found[match.start()] = Found(value, match.start(), 1.0)
        return [found[start] for start in sorted(found)]

    @staticmethod
    def _receptor_candidates(text: str, status: bool) -> list[Found]:
        triple = re.search(r"triple[\s-]neg|TNBC", text, re.I)
        if triple:
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

    # ---- diagnosis -------------------------------------------------------------------------------------------

    def _fit_diagnosis(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Which code the training notes give to a site, side and histology as the expressions find them."""
        self._codes: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for record in records:
            found = {name: self._answer(record["text"], name, self._reading[name]) for name in PHENOTYPES}
            for key in self._keys(found):
                self._codes[key][record["diagnosis"]["code"]] += 1

    @staticmethod
    def _keys(found: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
        site, side, kind = (
            "/".join(found[name]).lower() for name in ("tumor_site", "tumor_laterality", "histological_type")
        )
        return [
            ("site, side, type", site, side, kind),
            ("site, side", site, side),
            ("type", kind),
            ("site", site),
            ("any",),
        ]

    def _diagnosis(self, found: Mapping[str, Sequence[str]]) -> str:
        """The commonest training code of the most specific key that training met; failing both site and type, the code
        whose ICD description is nearest to the words found."""
        keys = self._keys(found)
        if all(key not in self._codes for key in keys[:2]):
            words = " ".join(("malignant neoplasm", *found["tumor_site"], *found["tumor_laterality"]))
            near = [code for code in lookup(words) if is_billable(code)]
            if near and found["tumor_site"]:
                return diagnosis_answer(describe(near[0]), near[0]).strip()
        code = next((self._codes[key].most_common(1)[0][0] for key in keys if key in self._codes), "")
        return diagnosis_answer(describe(code), code).strip() if code else ""
