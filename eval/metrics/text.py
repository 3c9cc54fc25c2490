"""What a metric sees of an answer: each public scorer's own words, and ours, which keep what carries clinical meaning.

>>> released("HER2+, 2.5 cm (C50.911)"), released("HER2-, 25 cm (C50911)")
('her2 25 cm c50911', 'her2 25 cm c50911')
>>> clinical("HER2 positive"), clinical("HER2 −"), clinical("2.50cm"), clinical("Twenty-five mm"), clinical("25 cm")
('her2 +', 'her2 -', '25 mm', '25 mm', '250 mm')
>>> clinical("Adenocarcinoma, left (C50.911)."), clinical("adenocarcinoma left C50911")
('adenocarcinoma left c50.911', 'adenocarcinoma left c50911')
"""

from __future__ import annotations

import re
import string
from decimal import Decimal
from functools import lru_cache

from eval.metrics.stemmer import stem

_PUNCTUATION = str.maketrans("", "", string.punctuation)

# ---- the released script's ------------------------------------------------------------------------------------


def unstemmed(text: str) -> str:
    """Lower-cased, ASCII punctuation removed, spaces folded."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


@lru_cache(maxsize=2**16)
def released(text: str) -> str:
    """What the released set scorer compares: lower-cased, punctuation removed, every word Porter-stemmed."""
    return " ".join(filter(None, map(stem, unstemmed(text).split())))


# ---- sacrebleu's (mteval-v13a) --------------------------------------------------------------------------------

_SYMBOL = re.compile(r"([{-~\[-` -&(-+:-@/])")
_STOP_AFTER = re.compile(r"([^0-9])([.,])")
_STOP_BEFORE = re.compile(r"([.,])([^0-9])")
_DASH = re.compile(r"([0-9])(-)")


@lru_cache(maxsize=2**16)
def _word_13a(word: str) -> tuple[str, ...]:
    line = _SYMBOL.sub(r" \1 ", f" {word} ")
    line = _STOP_BEFORE.sub(r" \1 \2", _STOP_AFTER.sub(r"\1 \2 ", line))
    return tuple(_DASH.sub(r"\1 \2 ", line).split())


def words_13a(text: str) -> list[str]:
    """mteval-v13a's words. No rule of it looks past a space, so words are split one by one and remembered."""
    text = text.rstrip()
    if "<" in text:
        text = text.replace("<skipped>", "")
    if "\n" in text:
        text = text.replace("-\n", "").replace("\n", " ")
    if "&" in text:
        text = text.replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    words: list[str] = []
    for word in text.split():
        if word.isalnum():
            words.append(word)
        else:
            words += _word_13a(word)
    return words


# ---- rouge_score's --------------------------------------------------------------------------------------------

_ALPHANUMERIC = re.compile(r"[a-z0-9]+")


def words_rouge(text: str) -> list[str]:
    """rouge_score's default words: runs of a-z and 0-9, lower-cased, no stemming."""
    return _ALPHANUMERIC.findall(text.lower())


# ---- ours -----------------------------------------------------------------------------------------------------

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = {word: 10 * ten for ten, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_NUMBERS = {word: number for number, word in enumerate(_UNITS)} | _TENS
_NUMBER_WORD = re.compile(
    r"\b(?:("
    + "|".join(_TENS)
    + r")[-\s]("
    + "|".join(_UNITS[1:10])
    + r")|("
    + "|".join(sorted(_NUMBERS, key=len, reverse=True))
    + r"))\b",
    re.I,
)
_LENGTH = re.compile(r"(\d+(?:\.\d+)?(?:\s*(?:mm|cm)?\s*x\s*\d+(?:\.\d+)?)*)\s*-?\s*(mm|cm)\b")
_UNIT_WORDS = (
    (re.compile(r"\bcentimet(?:er|re)s?\b"), "cm"),
    (re.compile(r"\bmillimet(?:er|re)s?\b"), "mm"),
    (re.compile(r"\bper ?cent\b"), "%"),
    (re.compile(r"(?<=\d)\s*(?:×|x|by)\s*(?=\d)"), " x "),
    (re.compile(r"(mm|cm)\s*(?:×|x|by)\s*(?=\d)"), r"\1 x "),
)
_SIGNS = ((re.compile(r"\b(?:positive|pos)\b"), " + "), (re.compile(r"\b(?:negative|neg)\b"), " - "))
_KEPT = "\ue000"  # a private-use character: stands after a word whose capitals are kept
_TOKEN = re.compile(rf"\d+(?:\.\d+)+|[a-z]+\d\w*(?:\.\w+)?|\d+|[^\W\d_][^\W_]*|[+%<>=/-]|{_KEPT}")
_DECIMAL = re.compile(r"\d+\.\d+")
_LEADING_POINT = re.compile(r"(?<![\w.])[.](?=\d)")
_INNER_HYPHEN = re.compile(rf"(?<=[^\W\d_])-(?=\w)|(?<={_KEPT})-(?=\w)")  # inside words; a minus stands at a word's end
_CASED = re.compile(r"\b(?:ALL|AIDS|US|MEN|CAT|WHO|IT|OR|NO)\b")


@lru_cache(maxsize=2**16)
def clinical(text: str) -> str:
    """The form that our preset compares, words separated by single spaces. Kept: + − . % < > where they carry meaning,
    decimal points in numbers and codes, capitals of abbreviations that are words in small letters (ALL, AIDS, US …;
    not in a text all in capitals). Folded: other case and punctuation, number words, "positive"/"negative" to signs,
    cm to mm, "by"/"×" to "x", trailing zeros, words' hyphens."""
    text = text.translate({0xE000: " ", 0x2212: "-", 0x2013: "-", 0x2010: "-", 0x2011: "-", 0xD7: "x"})
    if text != text.upper() or len(text.split()) == 1:
        text = _CASED.sub(rf"\g<0>{_KEPT}", text)
    text = _NUMBER_WORD.sub(_number, text.lower())
    for pattern, replacement in (*_UNIT_WORDS, *_SIGNS):
        text = pattern.sub(replacement, text)
    text = _LENGTH.sub(_millimetres, _LEADING_POINT.sub("0.", text))
    text = _INNER_HYPHEN.sub(" ", text)
    words: list[str] = []
    for word in _TOKEN.findall(text):
        if word == _KEPT:
            words[-1] = words[-1].upper()
        else:
            words.append(_plain(word) if _DECIMAL.fullmatch(word) else word)
    return " ".join(words)


def _number(match: re.Match[str]) -> str:
    if match[3]:
        return str(_NUMBERS[match[3].lower()])
    return str(_NUMBERS[match[1].lower()] + _NUMBERS[match[2].lower()])


def _plain(number: str) -> str:
    """A decimal number without trailing zeros or an exponent."""
    return f"{Decimal(number).normalize():f}"


def _millimetres(match: re.Match[str]) -> str:
    """All dimensions in mm; one without a unit of its own has the last one's."""
    sizes = re.findall(r"(\d+(?:\.\d+)?)\s*(mm|cm)?", match[0])
    return " x ".join(_plain(str(Decimal(n) * (10 if (unit or match[2]) == "cm" else 1))) for n, unit in sizes) + " mm"
