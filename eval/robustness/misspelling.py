"""Misspelled notes by five rules: a neighbouring key, two letters swapped, one left out, one doubled, one by its sound.

Every word has one fixed draw u in [0, 1) from (seed, record's id, the word's place), and is misspelled where u < rate:
what is wrong at 5 % is wrong in the same way at 10 %. Words are runs of four letters or more that touch no digit or
sign and are no Roman numeral, so sizes, codes, stages and receptors stay what they were: the question is spelling. Only
a note's text changes; the answers stay in their right spelling, and their places are moved along.
"""

from __future__ import annotations

import copy
import hashlib
import random
import re
from collections.abc import Callable
from typing import Any

_WORD = re.compile(r"(?<![\w.+/-])(?![IVX]+[A-C]?\b)[A-Za-z]{4,}(?![\w+/]|[-.]\w)")
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_SOUNDS = (("ph", "f"), ("y", "i"), ("ea", "ee"), ("ou", "u"), ("ck", "k"), ("c", "k"), ("s", "z"), ("oe", "e"))


def keyboard(word: str, rng: random.Random) -> str:
    """One letter, not the first, replaced by its neighbour on a row of the keyboard."""
    place = rng.randrange(1, len(word))
    row = next(row for row in _ROWS if word[place].lower() in row)
    at = row.index(word[place].lower())
    letter = rng.choice([row[i] for i in (at - 1, at + 1) if 0 <= i < len(row)])
    return word[:place] + (letter.upper() if word[place].isupper() else letter) + word[place + 1 :]


def transposition(word: str, rng: random.Random) -> str:
    """Two neighbouring letters swapped, not the first; unchanged where all of them are alike."""
    places = [i for i in range(1, len(word) - 1) if word[i] != word[i + 1]]
    if not places:
        return word
    place = rng.choice(places)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def omission(word: str, rng: random.Random) -> str:
    """One letter left out, not the first."""
    place = rng.randrange(1, len(word))
    return word[:place] + word[place + 1 :]


def doubling(word: str, rng: random.Random) -> str:
    """One letter twice."""
    place = rng.randrange(1, len(word))
    return word[: place + 1] + word[place:]


def phonetic(word: str, rng: random.Random) -> str:
    """Letters written as they sound; a letter left out where no rule applies."""
    found = [(word.find(was, 1), was, now) for was, now in _SOUNDS if word.find(was, 1) > 0]
    if not found:
        return omission(word, rng)
    place, was, now = rng.choice(found)
    return word[:place] + now + word[place + len(was) :]


RULES: tuple[Callable[[str, random.Random], str], ...] = (keyboard, transposition, omission, doubling, phonetic)


def eligible(text: str) -> int:
    """How many words of a text can be misspelled."""
    return sum(1 for _ in _WORD.finditer(text))


def misspell(record: dict[str, Any], rate: float, seed: int = 0) -> dict[str, Any]:
    """A copy of an annotated note with about `rate` of its words misspelled. Raises ValueError outside 0 … 1."""
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate of {rate} is not between 0 and 1")
    text, parts, at, moves = record["text"], [], 0, []
    for match in _WORD.finditer(text):
        key = f"{seed}:{record['id']}:{match.start()}".encode()
        rng = random.Random(hashlib.sha256(key).digest())
        if rng.random() >= rate:
            continue
        word = rng.choice(RULES)(match[0], rng)
        parts += [text[at : match.start()], word]
        at = match.end()
        moves.append((match.end(), len(word) - len(match[0])))
    changed = copy.deepcopy(record)
    changed["text"] = "".join([*parts, text[at:]])
    for spans in (changed.get("phenotypes") or {}).values():
        for span in spans:
            if isinstance(span, dict) and span.get("start") is not None:
                # A place is moved by every changed word that ends at or before it.
                for name in ("start", "end"):
                    span[name] += sum(by for end, by in moves if end <= span[name])
    return changed
