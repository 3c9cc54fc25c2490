"""One more way to write training notes: the wording itself is drawn, note by note.

A model that reads seven styles learns seven styles. Here labels, verbs, joints, separators, the order of everything and
the forms of the names are combined at random, so that what stays the same is whose tumor a sentence speaks of, and that
the answer is the note's own words. varied.toml holds nothing that an unseen style says; a reshaped name that happens to
equal one of theirs is not used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from train.clinic.terms import CANCERS, GRADES, TRAINING, Style, Wording, read

VARIED = read("varied")
BANKS = {style.name: style.bank for style in TRAINING.styles}
SCALE = {
    int(grade): dict(zip(("R", "low", "well", "poor", "gl", "sum"), words, strict=True))
    for grade, words in VARIED["scale"].items()
}
_HEAD = re.compile(r"(.+) (carcinoma|adenocarcinoma|melanoma|lymphoma|leukemia|astrocytoma|ca)")
_PLACE = re.compile(r"(.+) (quadrant|lobe|wall|pole|colon|body|antrum|cardia|fundus|esophagus|lymph nodes|LN|arm|leg)")
_OF = re.compile(r"(.+) of the (\w+)")
_PART = re.compile(r"<([^<>]+)>")


def _taken() -> frozenset[str]:
    """Every name that the unseen styles use and training's fixed ones do not."""

    def parts(words: str) -> set[str]:
        return {part.strip() for part in re.split(r"[\[\]|]", words)}

    names = [w for c in CANCERS for w in (*(h.names for h in c.histologies), *(s.names for s in c.sites))]
    names += [wording for grades in GRADES.values() for wording in grades.values()]
    new = set().union(*(parts(n.new_full) | parts(n.new_short) for n in names))
    return frozenset(new - set().union(*(parts(n.full) | parts(n.short) for n in names)))


TAKEN = _taken()


def reshaped(words: str, kind: str, rng: random.Random, terse: bool = False) -> str:
    """The name of a type ("hist") or a place ("site"), as it is, in another form, or (terse) with its words cut off."""
    new, shape = words, rng.random()
    found = (_HEAD if kind == "hist" else _PLACE).fullmatch(words)
    of = _OF.fullmatch(words)
    if of and shape < 0.6:
        new = rng.choice(VARIED["names"]["of"]).format(k=of[1], h=of[2])
    elif found and shape < 0.6:
        new = rng.choice(VARIED["names"][kind]).format(k=found[1], h=found[2])
    if terse and rng.random() < 0.6:
        dot = rng.choice((".", ".", ""))
        new = " ".join(cut(word, dot, rng) for word in new.split())
    return words if new in TAKEN else new


def cut(word: str, dot: str, rng: random.Random) -> str:
    """A long word shortened to its first letters."""
    return word[: rng.randint(3, 5)] + dot if re.fullmatch("[a-z]{6,}", word) and rng.random() < 0.7 else word


def graded(system: str, grade: int, fixed: Wording, rng: random.Random) -> str:
    """A template for the grade: one of the fixed styles' or one of varied.toml's."""
    new = filled(rng.choice(VARIED["systems"][system]), grade)
    return new if new not in TAKEN and rng.random() < 0.6 else rng.choice((fixed.full, fixed.short))


def filled(template: str, grade: int) -> str:
    """A grade's template with the grade as a figure {g}, in Roman ({R}) and in words ({low}, {well}, {poor})."""
    return template.format(g=grade, **SCALE[grade])


def placed(organ: str, sided: bool, rng: random.Random) -> str:
    """A template of where: the place, its side, and the organ where the place does not name it."""
    place = rng.choice(VARIED["places"]["organ"]).replace("{organ}", organ) if organ else "{site}"
    return rng.choice(VARIED["places"]["side"]).replace("{place}", place) if sided else place


def varied(surgical: bool, rng: random.Random) -> Style:
    """A style drawn from `rng`. `surgical`: the case's tumor is one that is cut out and reported by parts."""
    pick = rng.choice
    listed = rng.random() < 0.45
    terse = rng.random() < 0.35
    parts = listed and surgical and rng.random() < 0.5
    fixed = BANKS[pick(("clinic", "terse", "dictated", "board", "nursing", "surgical")) if not terse else "terse"]
    separator = pick(VARIED["separators"])
    case = pick((str, str.upper, str.lower, str))
    bank: dict[str, Sequence[str]] = dict(fixed)
    for key in ("no_size", "no_grade", "no_stage", "no_rec", "ros", "exam", "labs", "plan", "neg", "d_side", "open"):
        bank[key] = fixed.get(key) or BANKS["clinic"][key]
    in_lines = parts or rng.random() < 0.5
    for key, templates in (lines(rng, separator, case) if listed else spoken(rng)).items():
        ended = templates if in_lines or not listed else [template + "." for template in templates]
        bank[key] = [*ended, *(fixed.get(key, ()) if key.startswith("d_") else ())]
    left, right = pick(VARIED["sides"])
    words = {key: rng.sample(forms, min(3, len(forms))) for key, forms in VARIED["results"].items()}
    words |= {"size": VARIED["sizes"], "join": rng.sample(VARIED["joins"], 4), "stage": rng.sample(VARIED["stages"], 3)}
    words |= {"left": [left], "right": [right], "bilateral": [pick(VARIED["bilateral"])]}
    words["listing"] = [pick(VARIED["listing"])]
    order = pick(VARIED["listed_orders"] if parts else VARIED["orders"])
    layout = pick(VARIED["titles"]) + "\n" + (re.sub(r"<~(?!\|)", "<~|", order) if listed and in_lines else order)
    return Style("varied", (layout,), bank, words, pathology=surgical and rng.random() < 0.4, terse=terse, varied=True)


def lines(rng: random.Random, separator: str, case: Callable[[str], str]) -> dict[str, list[str]]:
    """Facts as lines "Label: value", each label drawn once a note; what is not an answer says so in its label."""
    label = {key: case(rng.choice(forms)).replace("{YEAR}", "{year}") for key, forms in VARIED["labels"].items()}
    label |= {":": separator, "old": case(rng.choice(VARIED["pieces"]["old"]))}

    def written(match: re.Match[str]) -> str:
        return label.get(match[1]) or case(match[1])

    return {key: [_PART.sub(written, one) for one in templates] for key, templates in VARIED["lines"].items()}


def spoken(rng: random.Random) -> dict[str, list[str]]:
    """Facts in sentences put together from pieces."""
    pieces = VARIED["pieces"]
    own = {key: rng.choice(pieces[key]) for key in ("source", "old")}  # one of each for the whole note

    def drawn(key: str) -> list[str]:
        recipes = VARIED["sentences"][key]
        return [joined(rng, [pieces[name] for name in recipe]) for recipe in recipes for _ in range(3)]

    def piece(match: re.Match[str]) -> str:
        return own.get(match[1]) or rng.choice(pieces[match[1]])

    def whole(key: str) -> list[str]:
        return [_PART.sub(piece, template) for template in VARIED["spoken"][key]]

    bank = {"size": drawn("size")}
    of_two = whole("size")
    bank["dx"] = drawn("dx")
    bank["size"] += rng.sample(of_two, 2)
    for key in ("grade", "stage", "rec", "prior", "family"):
        bank[key] = drawn(key)
    bank["grade"] += ["{grade}."]
    return bank | {key: whole(key) for key in ("d_size", "d_grade", "d_stage", "d_site", "d_rec")}


def joined(rng: random.Random, pieces: list[list[str]]) -> str:
    """One of each, in a row, without a space before a full stop."""
    return " ".join(" ".join(rng.choice(piece) for piece in pieces).split()).replace(" .", ".")
