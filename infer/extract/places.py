"""Where a span of a note may begin and end: one definition for grounded decoding, records and scores.

An edge is a word boundary that is not inside a number and not between a number and its sign: "5 cm" does not occur in
".5 cm", "2·5 cm", "3-4 cm" or "> 5 cm", nor "205 g" in "1'205 g". Word boundaries follow Unicode's UAX #29, with two
differences: an apostrophe, colon or full stop between letters is a boundary, because notes omit spaces ("Site:breast"),
and so is every Hangul syllable, because particles follow a noun without a space. As in UAX #29, scripts without spaces
(Chinese, Japanese, Thai, Lao, Khmer, Burmese) have a boundary after every character with its marks, and katakana words
stay together.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

Span = tuple[int, int]

# Scripts that do not separate words (line break classes ID, CJ and SA), and Hangul syllables.
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x1950, 0x19FF),
    (0x1A20, 0x1AAF),
    (0x3005, 0x3007),
    (0x3021, 0x3029),
    (0x3040, 0x309F),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xA9E0, 0xA9FF),
    (0xAA60, 0xAADF),
    (0xAC00, 0xD7A3),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
_KATAKANA = ((0x30A0, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F))

_NO_SPACES = "".join(f"{chr(first)}-{chr(last)}" for first, last in _UNSPACED)
_WORD, _LETTER = rf"[^\W{_NO_SPACES}]", rf"[^\W\d_{_NO_SPACES}]"  # of scripts with spaces
_DIGIT = r"[\d²³¹⁰⁴-⁹₀-₉¼-¾⅐-⅞]"
_BLANK = r"[^\S\r\n]"
_COMPARISON = r"[<>≤≥≦≧⩽⩾＜＞]=?"
_NUMBER = re.compile(
    rf"""
    (?:                                                     # comparisons:
        (?<![-=–—<>]) {_COMPARISON}                         #   >5, but no arrow
      | (?<![-=–—<>)\]]) (?<!{_WORD}) (?<![cm]m\s) (?<!\d\s)
        {_COMPARISON} {_BLANK}+                             #   > 5, but neither "Size> 5" nor "6 cm > 5 cm"
      | [~∼≈≃±∓√] {_BLANK}*
    )?
    (?: (?<!{_LETTER}) [-+−–－＋] )?                        # -5, but not of Ki-67
    (?:                                                     # .5, but not of "breast.5 cm"
        (?<![^\s(\[<>≤≥~≈=:/×*±+−{_NO_SPACES}-]) [.,·٫]
      | (?<=\dx) [.,·٫]
    )?
    (?:
        (?<!{_WORD}) {_DIGIT}+
        (?:
            (?:
                [eE] [-+−]?                                 # 1e-5
              | [^\w\s;|()\[\]{{}}<>"“”„]{{1,3}}            # 2.5, 1'205, 1/2, 3-4, 2:1, 10^-9
              | [\u00a0\u2009\u202f] (?=\d\d\d(?!\d))      # 1 205, with a no-break or thin space
              | {_BLANK}* (?:[-‒–—−~±/]|\+/-) {_BLANK}*     # 3 - 4, 2.5 ± 0.5
              | {_BLANK} (?={_DIGIT}+[/⁄]{_DIGIT}|[¼-¾⅐-⅞]) # 1 1/2, 1 ½
              | {_BLANK}* [x×*·] {_BLANK}* (?=10[\^⁰¹²³⁴-⁹⁻]) # 5 x 10^9
            )
            {_DIGIT}+
        )*
        (?: [%‰°′″] | \+(?!{_WORD}) | [十百千万萬億亿兆]+ )?  # 5%, 2+
      | (?<={_LETTER}) {_DIGIT}+ (?:[-.,·/'’^–]{_DIGIT}+)+  # T2-3, C50.9
      | [〇零一二三四五六七八九十百千万萬億亿兆两兩点點]{{2,}}
    )
    """,
    re.VERBOSE,
)


@lru_cache(16)  # called for the same note by each of its windows and answers
def edges(text: str) -> tuple[int, ...]:
    """Offsets in `text` at which a span may begin or end, ascending, 0 and len(text) included."""
    kinds = [""]  # before the text
    found = []
    for character in text:
        kind = _kind(character, kinds[-1])
        if kind != "mark" and not (kind and kind == kinds[-1]):
            found.append(len(kinds) - 1)
        kinds.append(kinds[-1] if kind == "mark" else kind)
    found.append(len(text))
    inside = {n for number in _NUMBER.finditer(text) for n in range(number.start() + 1, number.end())}
    return tuple(n for n in found if n not in inside)


def _kind(character: str, before: str) -> str:
    """Characters of the same kind ("word", "katakana") stay together, a "mark" with the character before it, those of
    kind "" with none."""
    code = ord(character)
    if code < 128:
        return "word" if character.isalnum() or character == "_" else ""
    if unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf"):
        return "mark"
    if any(first <= code <= last for first, last in _UNSPACED):
        return ""
    if any(first <= code <= last for first, last in _KATAKANA):
        return "katakana"
    return "word" if character.isalnum() else ""


def words(value: str) -> str:
    """Regular expression for a value's words with any white space between them."""
    return r"\s+".join(map(re.escape, value.split()))


def occurrences(value: str, text: str, ignore_case: bool = False) -> list[Span]:
    """All spans (start, end) of `text` that match a value, up to white space, and begin and end at edges. Spans may
    overlap."""
    pattern = words(value)
    if not pattern:
        return []
    matches = list(re.finditer(f"(?=({pattern}))", text, re.IGNORECASE if ignore_case else 0))
    if not matches:
        return []
    at = set(edges(text))
    return [match.span(1) for match in matches if {*match.span(1)} <= at]


def occurs_in(value: str, text: str) -> bool:
    """True if a value occurs in a text as whole words and numbers, ignoring case: "5 cm" does not in "2.5 cm"."""
    return bool(occurrences(value, text, ignore_case=True))
