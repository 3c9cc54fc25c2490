"""Normalization and tokenization of answers: the public scorers' rules, and our own.

Ours (`clinical`) keeps what carries clinical meaning (signs, decimal points, units); `released`, the paper's, does not:

>>> released("HER2+, 2.5 cm (C50.911)"), released("HER2-, 25 cm (C50911)")
('her2 25 cm c50911', 'her2 25 cm c50911')
>>> clinical("HER2-positive"), clinical("HER2 −"), clinical("2.50cm"), clinical("Twenty-five mm"), clinical("3–4 cm")
('her2 +', 'her2 -', '25 mm', '25 mm', '30 - 40 mm')
>>> clinical("≥2,5 cm²"), clinical("1,000 × 10⁹/L"), clinical("2½ cm"), clinical("pT₂, N0")
('≥ 250 mm ^ 2', '1000 x 10 ^ 9 / l', '25 mm', 'pt2 n0')
>>> clinical("Adenocarcinoma, left (C50.911)."), clinical("adenocarcinoma left C50911")
('adenocarcinoma left c50.911', 'adenocarcinoma left c50911')
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import cache, lru_cache

_PUNCTUATION = str.maketrans("", "", string.punctuation)

# ---- the paper's released script ------------------------------------------------------------------------------


def unstemmed(text: str) -> str:
    """Lower case, without ASCII punctuation, whitespace collapsed."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


@lru_cache(maxsize=2**16)
def released(text: str) -> str:
    """The form that the paper's released scorer compares: lower case, no punctuation, every word Porter-stemmed."""
    return " ".join(filter(None, map(_stem(), unstemmed(text).split())))


@cache
def _stem() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer  # imported here: takes 0.4 s, and only the paper's presets need it

    return lru_cache(maxsize=2**16)(PorterStemmer().stem)


# ---- sacrebleu's tokenizer, 13a (mteval-v13a) -----------------------------------------------------------------

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
    """mteval-v13a's words. None of its rules crosses a space, so each word is split alone and its split cached."""
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


# ---- rouge_score's tokenizer ----------------------------------------------------------------------------------

_ALPHANUMERIC = re.compile(r"[a-z0-9]+")


def words_rouge(text: str) -> list[str]:
    """rouge_score's default words: runs of a-z and 0-9 in lower case, no stemming."""
    return _ALPHANUMERIC.findall(text.lower())


# ---- our clinical form ----------------------------------------------------------------------------------------


@lru_cache(maxsize=2**16)
def clinical(text: str) -> str:
    """The form that our preset compares: tokens separated by single spaces. Idempotent.

    Kept: signs, comparisons, arrows, primes and other symbols, decimal points in numbers and codes, and capitals of
    abbreviations that are also common words (ALL, AIDS, US …; not in a text all in capitals). Removed: other case,
    Unicode compatibility forms, punctuation, hyphens inside words, thousands separators, trailing zeros. Rewritten:
    number words to digits, "positive" and "negative" to signs, µm and cm to mm (also squared and cubed), "by" to x,
    "to" between numbers to a hyphen, decimal commas to points.

    Rules that look at neighbouring characters run before tokenization; each leaves nothing that it would match again.
    Rules that look at neighbouring tokens run afterwards, on the tokens joined by spaces.
    """
    text = _fold_case(_fold_characters(_fractions_and_powers(text)))
    for rewrite in (_statuses, _hyphens, _number_words, _times):
        text = rewrite(text)
    return _lengths(_units(" ".join(_tokens(text))))


# Characters.

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_POWER = re.compile(r"[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_VULGAR = re.compile(r"(?<![\w.,/⁄])(\d{1,9}) ?([¼-¾⅐-⅞↉])|([¼-¾⅐-⅞↉])")
_DASHES = re.compile(
    "["
    + "".join(map(chr, (0x2010, 0x2011, 0x2012, 0x2013, 0x2014, 0x2015, 0x2043, 0x2212, 0x2E3A, 0x2E3B, 0x301C)))
    + "]"
)
_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]")
_SYNONYMS = (
    (re.compile(r">=|[⩾≧≽]"), "≥"),
    (re.compile(r"<=|[⩽≦≼]"), "≤"),
    (re.compile(r"!="), "≠"),
    (re.compile(r"\+/-"), "±"),
    (re.compile(r"[≈∼≃≅]"), "~"),
    (re.compile(r"[×✕✖⨯]"), " x "),
    (re.compile(r"(?<=\d)[·⋅∙・٫](?=\d)"), "."),
)
_CASED = re.compile(r"\b(ALL|AIDS|US|MEN|CAT|WHO|IT|OR|NO)\b")


def _fractions_and_powers(text: str) -> str:
    """10⁹ to 10^9 and 2½ to 2.5. Must run before NFKC, which would make them 109 and 21/2."""
    text = _POWER.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)

    def value(match: re.Match[str]) -> str:
        top, _, bottom = unicodedata.normalize("NFKC", match[2] or match[3]).partition("⁄")
        return f" {_rational(int(match[1] or 0) + Fraction(int(top), int(bottom)))} "

    return _VULGAR.sub(value, text)


def _fold_characters(text: str) -> str:
    """NFKC without invisible characters; all dashes, comparisons, decimal points and digits in one spelling each."""
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text))
    text = _DASHES.sub("-", text)
    for pattern, character in _SYNONYMS:
        text = pattern.sub(character, text)
    return text if text.isascii() else re.sub(r"\d", lambda digit: str(int(digit[0])), text)


def _fold_case(text: str) -> str:
    """Lower case, except for the words of _CASED, unless the whole text is in capitals."""
    parts = _CASED.split(text)  # odd indices hold the matches
    others = "".join(parts[::2])
    if text == text.upper() and others != others.casefold():
        parts = [text]
    folded = [part if place % 2 else part.casefold() for place, part in enumerate(parts)]
    return unicodedata.normalize("NFKC", "".join(folded))


# Words and signs.

_STATUS = re.compile(
    r"(?:(?<=[^\W_])-|(?<!\S)-\s+|=\s*)?(?<![^\W\d_])(?:(?P<plus>positive|pos)|negative|neg)(?![^\W_])"
    r"|(?P<sign>[+-])ve(?![^\W_])"
)
_HYPHEN = re.compile(r"(?<=[^\W_])-(?=[^\W\d_])|(?<=[^\W\d_])-(?=[^\W_])")
_JOINT = "‐"  # a hyphen inside a word: every other dash is "-" by now
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = {word: 10 * ten for ten, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_NUMBERS = {word: number for number, word in enumerate(_ONES)} | _TENS
_NUMBER_WORD = re.compile(
    rf"(?<![^\W\d_])(?:(?P<ten>{'|'.join(_TENS)})[{_JOINT}\s](?P<one>{'|'.join(_ONES[1:10])})|"
    rf"(?P<word>{'|'.join(_NUMBERS)}))(?![^\W_])"
)
_TIMES = re.compile(r"(?<=\d)((?:\s*(?:mm|cm|μm))?)x(?=\.?\d)|(?<=\d)\s*\*\s*(?=\.?\d)")
_RATIO = re.compile(r"(?<![\w.,/⁄])(\d{1,9})/(0*[1-9]\d{0,8})(?=\s*-?\s*(?:[cmμu]m|centim|millim|microm))")


def _statuses(text: str) -> str:
    """ER-positive, ER: pos and ER+ve to ER +."""
    return _STATUS.sub(lambda match: f" {match['sign'] or ('+' if match['plus'] else '-')} ", text)


def _hyphens(text: str) -> str:
    """Replace hyphens inside words (mucin-rich, HER2-low, IL-2) by _JOINT; signs and ranges (HER2-, 3-4) stay."""
    return _HYPHEN.sub(_JOINT, text)


def _number_words(text: str) -> str:
    """twenty-five to 25, two-three to 2 - 3."""

    def digits(match: re.Match[str]) -> str:
        return f" {_NUMBERS[match['word']] if match['word'] else _NUMBERS[match['ten']] + _NUMBERS[match['one']]} "

    return re.sub(rf"(?<=\d)\s*{_JOINT}\s*(?=\d)", " - ", _NUMBER_WORD.sub(digits, text))


def _times(text: str) -> str:
    """2.5x3cm to 2.5 x 3cm, and 1/2 cm to a fraction."""
    return _RATIO.sub(lambda match: _rational(Fraction(int(match[1]), int(match[2]))), _TIMES.sub(r"\1 x ", text))


# Tokens.

_TOKEN = re.compile(
    r"(?P<ratio>(?<![\d.,])\d{1,9}⁄0*[1-9]\d{0,8}(?![\d⁄]))"
    r"|(?P<number>\d(?:[\d.,'’]*\d)?|(?<![\w.])\.\d+)"
    r"|(?P<word>[^\W\d_][^\W_]*(?:(?<=\d)\.\d[^\W_]*)?)"
    r"|(?P<symbol>[^\w\s])"
)
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:(?:,\d{3})+(?:\.\d+)?|(?:['’]\d{3})+(?:[.,]\d+)?)")
_DECIMAL = re.compile(r"\d*[.,]\d+|\d+")
_MEANINGFUL = frozenset("%‰/^′-")
_MEANINGLESS = frozenset("|®©∙⋅")


def _tokens(text: str) -> list[str]:
    """Words, codes, numbers as plain decimals, and symbols that carry meaning."""
    found = []
    for match in _TOKEN.finditer(text):
        if match["ratio"]:
            found.append(_rational(Fraction(*map(int, match[0].split("⁄")))))
        elif match["number"]:
            found += _numbers(match[0])
        elif match["word"] or _carries_meaning(match[0]):
            found.append(match[0])
    return found


def _numbers(text: str) -> list[str]:
    """The numbers in a run of digits, points and commas.

    A comma or apostrophe before three digits separates thousands; any other comma is a decimal comma. 1.2.3 is kept,
    and 1,2,3 is three numbers.
    """
    if _THOUSANDS.fullmatch(text):
        mark = "," if "," in text.split(".")[0] and "'" not in text and "’" not in text else "'’"
        for character in mark:
            text = text.replace(character, "")
    if _DECIMAL.fullmatch(text):
        return [_decimal(text.replace(",", "."))]
    parts = re.split(r"[,'’]", text)
    return parts if len(parts) == 1 else [number for part in parts if part for number in _numbers(part)]


def _carries_meaning(symbol: str) -> bool:
    """True for mathematical and other symbols and combining marks; False for punctuation, bullets and box drawing."""
    if symbol in _MEANINGFUL or symbol in _MEANINGLESS or "\u2500" <= symbol <= "\u25ff":
        return symbol in _MEANINGFUL
    return unicodedata.category(symbol) in ("Sm", "So", "Sc", "Mn", "Mc", "Me")


def _decimal(number: str, places: int = 0) -> str:
    """The number times 10**places, exact, without trailing zeros or an exponent."""
    _, digits, exponent = Decimal(number).as_tuple()
    plain = f"{Decimal((0, digits, int(exponent) + places)):f}"
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def _rational(value: Fraction) -> str:
    """The value as a finite decimal if it is one, else as numerator⁄denominator."""
    bottom = value.denominator
    for prime in (2, 5):
        while bottom % prime == 0:
            bottom //= prime
    if bottom > 1:
        return f"{value.numerator}⁄{value.denominator}"
    places = value.denominator.bit_length()
    return _decimal(str(value.numerator * 10**places // value.denominator), -places)


# Quantities, in tokens joined by spaces.

_NUMBER = r"(?<!\S)(?<!\^ )\d[\d.⁄]*(?!\S)"  # not an exponent
_UNIT = r"(?:mm|cm|μm)(?!\S)"
_UNIT_WORDS = (
    (re.compile(r"(?<!\S)centimet(?:er|re)s?(?!\S)"), "cm"),
    (re.compile(r"(?<!\S)millimet(?:er|re)s?(?!\S)"), "mm"),
    (re.compile(r"(?<!\S)(?:micromet(?:er|re)s?|microns?)(?!\S)"), "μm"),
    (re.compile(rf"({_NUMBER}) um(?!\S)"), r"\1 μm"),
    (re.compile(rf"(?<!\S)(?:sq|square) ({_UNIT})"), r"\1 ^ 2"),
    (re.compile(rf"(?<!\S)cubic ({_UNIT})"), r"\1 ^ 3"),
    (re.compile(rf"(?<!\S)({_UNIT}) squared(?!\S)|(?<!\S)(mm|cm|μm)2(?!\S)"), r"\1\2 ^ 2"),
    (re.compile(rf"(?<!\S)({_UNIT}) cubed(?!\S)|(?<!\S)(mm|cm|μm)3(?!\S)"), r"\1\2 ^ 3"),
    (re.compile(rf"({_NUMBER}) cc(?!\S)"), r"\1 cm ^ 3"),
    (re.compile(r"(?<!\S)(?:percent|per cent)(?!\S)"), "%"),
    (re.compile(rf"({_NUMBER}(?: {_UNIT})?) x(?=(?:0|[1-9]\d*)(?:\.\d*[1-9])?(?!\S))"), r"\1 x "),
    (re.compile(rf"({_NUMBER}(?: {_UNIT})?) by (?={_NUMBER})"), r"\1 x "),
    (re.compile(rf"({_NUMBER}(?: {_UNIT})?) to (?={_NUMBER})"), r"\1 - "),
    (re.compile(rf"({_NUMBER}) % - (?={_NUMBER} %)"), r"\1 - "),
)
_LENGTH = re.compile(rf"{_NUMBER}(?: {_UNIT})?(?: [x-] {_NUMBER}(?: {_UNIT})?)*(?<=m)(?: \^ (?P<power>[23])(?!\S))?")
_DIMENSION = re.compile(rf"(?P<number>{_NUMBER})(?: (?P<unit>{_UNIT}))?(?P<between> [x-] )?")
_PLACES = {"mm": 0, "cm": 1, "μm": -3}


def _units(text: str) -> str:
    """One spelling for each unit; "by" and "to" between numbers as x and -. Repeated until nothing changes, because
    one rule's output may be another's input."""
    before = ""
    while before != text:
        before = text
        for pattern, replacement in _UNIT_WORDS:
            text = pattern.sub(replacement, text)
    return text


def _lengths(text: str) -> str:
    """All numbers of a size or range in mm. A number without a unit takes the unit of the number after it."""

    def millimetres(match: re.Match[str]) -> str:
        power, unit, converted = int(match["power"] or 1), "mm", ""
        for part in reversed(list(_DIMENSION.finditer(match[0].split(" ^ ")[0]))):
            unit = part["unit"] or unit
            number = _scaled(part["number"], power * _PLACES[unit])
            converted = number + (part["between"] or "") + converted
        return f"{converted} mm" + (f" ^ {power}" if power > 1 else "")

    return _LENGTH.sub(millimetres, text)


def _scaled(number: str, places: int) -> str:
    if "⁄" in number:
        return _rational(Fraction(*map(int, number.split("⁄"))) * Fraction(10) ** places)
    return _decimal(number, places) if number.count(".") < 2 else number
