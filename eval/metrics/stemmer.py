"""Porter's stemmer (Program 14.3, 1980) with the extensions that nltk's default mode carries.

The set scorer compares stemmed words, so "carcinomas" and "carcinoma" are one answer. The rules are data; a rule fires
on the first suffix that fits, and whether or not its condition is met, no later rule of the step is tried.

    >>> [stem(word) for word in ("carcinomas", "metastatic", "biopsies", "staging", "relational", "dying")]
    ['carcinoma', 'metastat', 'biopsi', 'stage', 'relat', 'die']
"""

from __future__ import annotations

from functools import lru_cache

_IRREGULAR = {
    "sky": "sky",
    "skies": "sky",
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "news": "news",
    "innings": "inning",
    "inning": "inning",
    "outings": "outing",
    "outing": "outing",
    "cannings": "canning",
    "canning": "canning",
    "howe": "howe",
    "proceed": "proceed",
    "exceed": "exceed",
    "succeed": "succeed",
}
_STEP_1A = (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", ""))
_STEP_2 = (
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    ("fulli", "ful"),
)
_STEP_3 = (("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""))
_STEP_4 = (
    "al",
    "ance",
    "ence",
    "er",
    "ic",
    "able",
    "ible",
    "ant",
    "ement",
    "ment",
    "ent",
    "ion",
    "ou",
    "ism",
    "ate",
    "iti",
    "ous",
    "ive",
    "ize",
)


@lru_cache(maxsize=2**16)
def stem(word: str) -> str:
    """The stem of one word, lower-cased."""
    size = len(word)  # nltk measures before lower-casing, which lengthens a few letters ("İ")
    word = word.lower()
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if size <= 2:
        return word
    word = _step_1c(_step_1b(_step_1a(word)))
    word = _step_4(_suffixes(_step_2(word), _STEP_3))
    return _step_5(word)


def _consonants(word: str) -> str:
    """ "c" or "v" for every letter; "y" is a vowel after a consonant."""
    kinds = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and kinds[-1:] == "c")
        kinds += "v" if vowel else "c"
    return kinds


def _measure(word: str) -> int:
    """m in [C](VC){m}[V]."""
    return _consonants(word).count("vc")


def _ends_short(word: str) -> bool:
    """consonant, vowel, consonant other than w, x, y at the end; or a word of a vowel and a consonant."""
    kinds = _consonants(word)
    return kinds == "vc" or (kinds.endswith("cvc") and word[-1] not in "wxy")


def _suffixes(word: str, rules: tuple[tuple[str, str], ...]) -> str:
    """The first rule whose suffix fits, applied where the rest has a positive measure."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            rest = word[: -len(suffix)]
            return rest + replacement if _measure(rest) > 0 else word
    return word


def _step_1a(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    for suffix, replacement in _STEP_1A:
        if word.endswith(suffix):
            return word[: -len(suffix)] + replacement
    return word


def _step_1b(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    rest = next(
        (word[: -len(end)] for end in ("ed", "ing") if word.endswith(end) and "v" in _consonants(word[: -len(end)])),
        None,
    )
    if rest is None:
        return word
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if len(rest) > 1 and rest[-1] == rest[-2] and _consonants(rest)[-1] == "c":
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if _measure(rest) == 1 and _ends_short(rest) else rest


def _step_1c(word: str) -> str:
    if word.endswith("y") and len(word) > 2 and _consonants(word[:-1])[-1] == "c":
        return word[:-1] + "i"
    return word


def _step_2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _step_2(word[:-2])
    if word.endswith("logi") and not word.endswith(tuple(suffix for suffix, _ in _STEP_2)):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _suffixes(word, _STEP_2)


def _step_4(word: str) -> str:
    for suffix in _STEP_4:
        if word.endswith(suffix):
            rest = word[: -len(suffix)]
            fits = _measure(rest) > 1 and (suffix != "ion" or rest[-1] in "st")
            return rest if fits else word
    return word


def _step_5(word: str) -> str:
    if word.endswith("e"):
        rest = word[:-1]
        if _measure(rest) > 1 or (_measure(rest) == 1 and not _ends_short(rest)):
            word = rest
    if word.endswith("ll") and _measure(word[:-1]) > 1:
        word = word[:-1]
    return word
