"""The neoplasm chapter of ICD-10-CM (C00-D49): codes, descriptions, and lookup of codes by text.

`icd10cm.tsv` holds the 2,178 codes of the April 2026 release with their official descriptions, one
`code<TAB>description` a line in the classification's own order. ICD-10-CM is published by the US National Center for
Health Statistics and is in the public domain; the lines were read from the PyPI package simple-icd-10-cm 1.5.0 (MIT
licence, Stefano Travasci) by

    import simple_icd_10_cm as icd
    codes = [c for c in icd.get_all_codes(True) if icd.is_category_or_subcategory(c) and "C00" <= c[:3] <= "D49"]
    lines = [f"{c}\\t{icd.get_description(c)}" for c in dict.fromkeys(codes)]  # 5 are blocks and categories at once

A code is *billable* if it has no subdivisions: C50 and C50.4 are categories, C50.411 is billable.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

_CODE = re.compile(
    r"""(?<![\w.]) (?:
        [A-Z]\d[0-9A-Z] \. (?:[0-9ABCXZ][0-9A-Z]{0,5})? -?    # dotted, of any chapter: C50.911, Z85.3, C18.-
      | [CD]\d[0-9AB] [0-9A-Z]{0,5}                         # without a dot, of this chapter: c180
      | (?<=[(\[]) [A-Z]\d[0-9A-Z]{1,5} (?=[)\]])           # alone in brackets, of any chapter: (Z853)
    ) (?!\w|\.\w)""",
    re.IGNORECASE | re.VERBOSE,
)
_WORD = re.compile(r"[a-z0-9]+")


def _read(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines if line and not line.startswith("#"))


CODES: dict[str, str] = _read(Path(__file__).with_name("icd10cm.tsv"))
"""Every code of the chapter, categories included, with its description, in the classification's order."""

_DOTLESS = {code.replace(".", ""): code for code in CODES}
_CATEGORIES = {code[:end] for code in _DOTLESS for end in range(3, len(code))}


def is_billable(code: str) -> bool:
    """True if `code` (dotted or not) exists and has no subdivisions."""
    found = canonical(code)
    return found is not None and found.replace(".", "") not in _CATEGORIES


def canonical(code: str) -> str | None:
    """The dotted upper-case form of a code ("c50411" → "C50.411"); None if there is no such code."""
    return _DOTLESS.get(code.strip().upper().replace(".", ""))


def describe(code: str) -> str:
    """Official description of a code, dotted or not. Raises KeyError for an unknown code."""
    found = canonical(code)
    if found is None:
        raise KeyError(f"{code!r} is not an ICD-10-CM code of C00-D49")
    return CODES[found]


BILLABLE: tuple[str, ...] = tuple(code for code in CODES if is_billable(code))
"""The billable codes, in order."""


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


_BY_WORDS: dict[tuple[str, ...], list[str]] = {}
for _code, _text in CODES.items():
    _BY_WORDS.setdefault(tuple(_words(_text)), []).append(_code)
_WORD_SETS = {code: frozenset(_words(text)) for code, text in CODES.items()}
_COUNTS = Counter(word for words in _WORD_SETS.values() for word in words)
_IDF = {word: math.log(1 + len(CODES) / count) for word, count in _COUNTS.items()}


def code_spans(text: str) -> list[tuple[int, int]]:
    """Spans (start, end) of the codes of any chapter written in a text; the codes need not exist."""
    return [match.span() for match in _CODE.finditer(text)]


def described(text: str) -> list[str]:
    """The codes whose description equals the text, ignoring case and punctuation; billable ones first."""
    return sorted(_BY_WORDS.get(tuple(_words(text)), ()), key=lambda code: not is_billable(code))


def lookup(text: str, limit: int = 5) -> list[str]:
    """The codes that a text names, best first; [] if there are none.

    1. If codes are written in the text (dotted or not, any case: "c50411", "carcinoma (C50.411)"): those that exist.
    2. Else, if the text is a description: its codes.
    3. Else: the `limit` codes of highest cosine similarity between sets of words, weighted by inverse document
       frequency over the descriptions.
    """
    if spans := code_spans(text):
        known = [found for start, end in spans if (found := canonical(text[start:end]))]
        return list(dict.fromkeys(known))
    if exact := described(text):
        return exact
    query = frozenset(_words(text)) & _IDF.keys()
    if not query:
        return []
    query_norm = math.sqrt(sum(_IDF[word] ** 2 for word in query))
    scores = []
    for rank, (code, words) in enumerate(_WORD_SETS.items()):
        shared = sum(_IDF[word] ** 2 for word in query & words)
        if shared:
            norm = math.sqrt(sum(_IDF[word] ** 2 for word in words))
            scores.append((-shared / (query_norm * norm), not is_billable(code), rank, code))
    return [code for *_, code in sorted(scores)[:limit]]
