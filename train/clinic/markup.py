"""Templates with choices `[a|b]`, slots `{slot}` and marks, which carry the annotations into the text.

A mark is `mark("tumor_size", "2.5 cm")` or, where the answer differs from the words that show it,
`mark("tumor_laterality", "Lt", "left")`. Marks nest ("left upper lobe" holds a side and a site) and are invisible in
the finished text: `unmark` takes them out and says where they stood. So a note's truth is read off the note itself and
cannot disagree with it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from infer.tasks import PHENOTYPES

OPEN, BAR, CLOSE = "\ue000", "\ue001", "\ue002"  # private-use characters: no note holds them

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
TAG = f"{OPEN}[^{BAR}]*{BAR}|{CLOSE}"
"""The pattern of a mark's invisible ends."""

_TAG = re.compile(TAG)


@dataclass(frozen=True)
class Span:
    """One answer's evidence: `name` of the phenotype, its `value`, and text[start:end] that shows it."""

    name: str
    value: str
    start: int
    end: int


def mark(name: str, words: str, value: str = "") -> str:
    """`words`, marked as showing the phenotype `name`; its answer is `value`, or the words themselves."""
    return f"{OPEN}{name}={value}{BAR}{words}{CLOSE}"


def mark_receptor(receptor: str, status: str, words: str) -> str:
    """`words` that tell a receptor's result: they show its type and its status."""
    return mark("hormone_receptor_type", mark("hormone_receptor_status", words, receptor + status), receptor)


def choose(template: str, rng: random.Random) -> str:
    """`template` with every `[a|b|c]` (nested or not) replaced by one of its alternatives."""
    while True:
        resolved = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
        if resolved == template:
            return template
        template = resolved


def slots(template: str) -> list[str]:
    """The names of the template's slots, in order."""
    return _SLOT.findall(template)


def fill(template: str, value: Callable[[str], str]) -> str:
    """`template` with every `{slot}` replaced by `value(slot)`."""
    return _SLOT.sub(lambda match: value(match[1]), template)


def sentence(marked: str) -> str:
    """`marked` with its first visible letter in upper case."""
    return re.sub(f"^((?:{OPEN}[^{BAR}]*{BAR})*)([a-z])", lambda match: match[1] + match[2].upper(), marked, count=1)


def visible(marked: str, change: Callable[[str], str]) -> str:
    """`marked` with each run of its visible text changed; marks stay where they are."""
    parts = re.split(f"({TAG})", marked)
    return "".join(part if _TAG.fullmatch(part) else change(part) for part in parts)


def upper(marked: str) -> str:
    """`marked` with all visible letters in upper case."""
    return visible(marked, str.upper)


def unmark(marked: str) -> tuple[str, list[Span]]:
    """The visible text, and the spans in the order in which they open."""
    text, position = "", 0
    spans: list[tuple[int, Span]] = []
    stack: list[tuple[str, str, int, int]] = []
    for tag in _TAG.finditer(marked):
        text += marked[position : tag.start()]
        position = tag.end()
        if tag[0] == CLOSE:
            name, value, start, order = stack.pop()
            spans.append((order, Span(name, value or text[start:], start, len(text))))
        else:
            name, _, value = tag[0][1:-1].partition("=")
            stack.append((name, value, len(text), len(spans) + len(stack)))
    text += marked[position:]
    assert not stack, "a mark was opened and not closed"
    return text, [span for _, span in sorted(spans, key=lambda item: (item[1].start, item[0]))]


def answers(spans: Iterable[Span]) -> dict[str, list[dict]]:
    """A record's `phenotypes`: each answer once, at the place that shows it first."""
    found: dict[str, list[dict]] = {name: [] for name in PHENOTYPES}
    for span in spans:
        if all(span.value.lower() != other["text"].lower() for other in found[span.name]):
            found[span.name].append({"text": span.value, "start": span.start, "end": span.end})
    for name in ("hormone_receptor_type", "hormone_receptor_status"):  # ER, PR, HER2, in whatever order they are stated
        found[name].sort(key=lambda answer: PHENOTYPES[name].values.index(answer["text"]))
    return found
