"""Notes as clinics write them: many kinds and lengths, shorthand, real prose around the facts, slips and scans.

A model that reads a few styles learns those styles. Here the kind of note, its structure and every wording are drawn
from clinical.toml, for cases with more sites and types than cancers.toml has, and the body around the facts comes from
MTS-Dialog. One note in ten is of a person without cancer: its phenotypes and its diagnosis are "not relevant".
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from infer.tasks import NOT_RELEVANT, PHENOTYPES
from model.support.files import read_jsonl
from train.clinic.markup import sentence, unmark, upper, visible
from train.clinic.notes import Writer, write_note
from train.clinic.patients import Case, draw_case, draw_receptors, quantile
from train.clinic.terms import CANCERS, Cancer, Style, completed, places_and_types, read, wording

MTS_DIALOG = Path(__file__).with_name("mts_dialog.jsonl")
HEALTHY = 1 / 10  # share of the notes that are of people without cancer
TESTED = 0.4  # share of the cases outside the breast whose receptors are known, where an organ has any
WIDER = 0.75  # share of the cases that are drawn from clinical.toml's sites and types
PROSE_WORDS = (15, 110)
_CANCER = re.compile(
    r"cancer|carcinoma|tumou?r|lymphoma|leuk|melanoma|malign|metasta|chemo|radiation|biops|lesion|\bmass\b|nodule|"
    r"grade|stage|\bcm\b|\bmm\b|oncolog|sarcoma|neoplas|polyp|lumpectomy|mastectomy|year[- ]old|gentleman|lady|"
    r"[\[\]{}<>|~]",
    re.I,
)
_TABLES = read("clinical")
_BANKS, _WORDS = completed(_TABLES["bank"]), completed(_TABLES["words"])


def _widened(cancer: Cancer) -> Cancer:
    more = next(table for table in _TABLES["cancer"] if table["name"] == cancer.name)
    return replace(cancer, **places_and_types(more), operation=wording(more["operation"]))


CASES = tuple(_widened(cancer) for cancer in CANCERS)


@cache
def world() -> dict[str, list[str]]:
    """The phrases that any note may hold; `prose` are sections of MTS-Dialog that mention neither cancer nor age."""
    sections = [" ".join(row["text"].split()) for _, row in read_jsonl(MTS_DIALOG)]
    low, high = PROSE_WORDS
    fit = [text for text in sections if len(text.split()) >= low and not _CANCER.search(text)]
    return _TABLES["world"] | {"prose": [_sexed(_beginning(text, high)) for text in fit]}


def _sexed(text: str) -> str:
    """`text` with the condition that its pronouns set."""
    of_man, of_woman = re.search(r"\b(?:he|his)\b", text, re.I), re.search(r"\b(?:she|her)\b", text, re.I)
    return "{need_man}" * bool(of_man) + "{need_woman}" * bool(of_woman) + text


def _beginning(text: str, words: int) -> str:
    """The sentences of `text` within its first `words` words (the first sentence whole)."""
    kept: list[str] = []
    for part in re.split(r"(?<=[.!?]) ", text):
        if kept and len(" ".join([*kept, part]).split()) > words:
            break
        kept.append(part)
    return " ".join(kept)


def clinical_notes(count: int, seed: int) -> Iterator[dict]:
    """`count` annotated notes, drawn from (seed, the note's number). The diagnosis of those without cancer is
    "not relevant"."""
    offset = random.Random(f"{seed}/clinical").random()
    for number in range(count):
        name = f"c{number:05d}"
        rng = random.Random(f"{seed}/{name}")
        cancers = CASES if rng.random() < WIDER else CANCERS
        case = draw_case(rng, quantile(number, offset), cancers)
        case = with_receptors(case, rng)
        finish = partial(worn, rng=rng)
        if rng.random() < HEALTHY:
            writer = Writer(case, healthy_style(), rng, world())
            writer.shown.clear()
            text = unmark(finish(writer.body()))[0]
            truth: dict = {
                "phenotypes": {phenotype: [] for phenotype in PHENOTYPES},
                "diagnosis": {"text": NOT_RELEVANT},
            }
        else:
            text, truth = write_note(case, style(case.cancer, rng), world(), rng, finish)
        yield {"id": f"{name}-n1", "patient": name, "style": "clinical", "text": text, **truth}


def with_receptors(case: Case, rng: random.Random) -> Case:
    """`case`, now and then with the receptors that a laboratory tests in its organ outside the breast."""
    tested = _TABLES["receptors"].get(case.cancer.name, ())
    if not tested or rng.random() > TESTED:
        return case
    return replace(case, receptors=tuple(result for result in draw_receptors(rng) if result[0] in tested))


def style(cancer: Cancer, rng: random.Random) -> Style:
    """A kind of note that suits the cancer: a leukemia has neither a specimen nor a place to begin with."""
    kinds = [kind for kind in _TABLES["kind"] if cancer.surgical or not kind.get("pathology")]
    kind = rng.choices(kinds, [kind["weight"] for kind in kinds])[0]
    layout = rng.choice(kind["layouts"])
    if cancer.name == "leukemia":
        layout = re.sub(r" ?\b(?:hist|side)\b", "", layout.replace("{where}", "<dx>"))
        layout = re.sub(r"\bsite\b", "dx", layout).replace("<>", "")
    fixed = _WORDS[kind["words"]]
    words = fixed | {
        key: rng.sample(fixed[key], min(3, len(fixed[key])))
        for key in ("size", "join", "stage", "ER", "PR", "HER2", "positive", "negative", "listing")
    }
    words |= {side: [rng.choice(fixed[side])] for side in ("left", "right", "bilateral")}
    terse = kind["register"] == "short" or (kind["register"] == "lines" and rng.random() < 0.4)
    return Style(
        "clinical",
        (layout,),
        _BANKS[kind["register"]],
        words,
        pathology=bool(kind.get("pathology")),
        terse=terse,
        varied=rng.random() < 0.4,
        grades=_TABLES["graded"],
    )


def healthy_style() -> Style:
    own = _TABLES["checkup"]
    bank = _BANKS["short"] | {key: texts for key, texts in own.items() if key != "layouts"}
    return Style("clinical", tuple(own["layouts"]), bank, _WORDS["short"], terse=True)


# ---- what happens to a text after it is written ----


def worn(marked: str, rng: random.Random) -> str:
    """`marked` as it is typed, dictated, scanned or printed; marks stay with their words."""
    marked = re.sub(r"([:=.-] )the ", r"\1", marked)
    if rng.random() < 0.5:
        marked = sentence(marked)
    fate = rng.random()
    if fate < 0.10:
        return visible(marked, partial(typed, rng=rng))
    if fate < 0.16:
        return visible(marked, partial(scanned, rng=rng))
    if fate < 0.22:
        return visible(marked, partial(dictated, rng=rng))
    if fate < 0.30:
        return visible(marked, str.lower)
    return upper(marked) if fate < 0.36 else marked


def typed(text: str, rng: random.Random) -> str:
    """Slips of the keyboard in one long word of twelve: a letter left out, doubled, or two exchanged."""

    def slip(match: re.Match[str]) -> str:
        word = match[0]
        if rng.random() > 1 / 12:
            return word
        at = rng.randrange(1, len(word) - 2)
        middle = rng.choice(("", word[at] * 2, word[at + 1] + word[at]))
        return word[:at] + middle + word[at + (2 if len(middle) == 2 and middle[0] != middle[1] else 1) :]

    return re.sub(r"[a-z]{5,}", slip, text)


_CONFUSED = {"l": "1", "1": "l", "o": "0", "O": "0", "0": "O", "I": "l", "i": "l", "5": "S", "e": "c", "m": "rn"}


def scanned(text: str, rng: random.Random) -> str:
    """Letters and digits that look alike confused, and spaces where there were none."""
    rate = rng.choice((0.02, 0.05))
    changed = (_CONFUSED.get(c, c) if rng.random() < rate else c for c in text)
    return "".join(f"{c} " if c in ".,:" and rng.random() < 0.05 else c for c in changed)


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def dictated(text: str, rng: random.Random) -> str:
    """Punctuation spoken, decimals and small numbers in words, no capitals."""

    def spoken(match: re.Match[str]) -> str:
        return " point ".join(_DIGITS[int(digit)] for digit in match[0].split("."))

    text = re.sub(r"(?<![\w.])\d(?:\.\d)?(?![\w.]*\d)(?=\s(?:cm|mm|x|by|cent|mill))", spoken, text)
    text = re.sub(r"\. ", lambda match: " period " if rng.random() < 0.6 else match[0], text)
    text = re.sub(r", ", lambda match: " comma " if rng.random() < 0.5 else match[0], text)
    return re.sub(r"\bcm\b", "centimeters", text).lower()
