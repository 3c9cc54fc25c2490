"""The clinic's tables: their types, and what they hold, read from the TOML files beside this one.

cancers.toml has sites, histologies, grading and stages of the 17 cancers; styles.toml and unseen.toml the note styles
of training and of the unseen test set; varied.toml and general.toml the wordings of varied.py and general.py.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Wording:
    """One thing's names: in full and short for the training styles, in full and short for the unseen ones."""

    full: str
    short: str
    new_full: str
    new_short: str

    def pick(self, terse: bool, unseen: bool) -> str:
        return (self.new_short if terse else self.new_full) if unseen else (self.short if terse else self.full)


@dataclass(frozen=True)
class Site:
    """A place: its code ('#' is the side's digit), its names, and the weight with which it is drawn."""

    code: str
    names: Wording
    weight: int = 1

    @property
    def whole(self) -> bool:
        """True if this is the organ itself and not a place in it."""
        return self.names.full in ("breast", "liver", "kidney")


@dataclass(frozen=True)
class Histology:
    """A type of tumour. `code` goes before the site's (blood cancers, liver); `grades` are the possible ones."""

    names: Wording
    grades: tuple[int, ...] = ()
    code: str = ""
    weight: int = 1


@dataclass(frozen=True)
class Stage:
    """A stage group with its T, N, M and the sizes in mm for which the T is right."""

    group: str
    t: str
    n: str
    m: str
    smallest: int
    largest: int


@dataclass(frozen=True)
class Cancer:
    """One of the 17 cancers.

    `where` places {site} and {side} ({site} alone in `nowhere`, for a tumour without a side). `loose` is the rough
    organ that a sentence may name without giving the site away. `undetermined` is the code's digit for no side.
    """

    name: str
    loose: str
    weight: int
    sexes: str
    sites: tuple[Site, ...]
    histologies: tuple[Histology, ...]
    where: Wording
    nowhere: Wording
    operation: Wording
    complaint: Wording
    stages: tuple[Stage, ...] = ()
    grading: str = ""
    sizes: tuple[int, int] = (0, 0)
    sided: bool = False
    undetermined: str = ""
    surgical: bool = True
    receptors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Style:
    """A way to write notes.

    `layouts` are texts with groups of keys: `<a b?>` gives a sentence from bank[a], and one in two times one from
    bank[b]; `<~a b>` in any order; `<|a b>` a line each. `words` holds the forms of sizes, sides and receptors. In a
    `varied` one names are reshaped too (varied.py). `grades` has more forms of a grade for each grading system.
    """

    name: str
    layouts: tuple[str, ...]
    bank: Mapping[str, Sequence[str]]
    words: Mapping[str, Sequence[str]]
    pathology: bool = False
    terse: bool = False
    unseen: bool = False
    capitals: bool = False
    varied: bool = False
    grades: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """What a set of notes is written from: its styles, and phrases for relatives, benign lesions and other types."""

    styles: tuple[Style, ...]
    world: Mapping[str, Sequence[str]]


def read(name: str) -> dict[str, Any]:
    """The tables of NAME.toml."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))


def source(name: str) -> Source:
    """The styles of NAME.toml, each with its bank and words."""
    raw = read(name)
    words, bank = completed(raw["words"]), completed(raw["bank"])
    unseen = name == "unseen"
    styles = tuple(
        Style(**style | {"bank": bank[style["bank"]], "words": words[style["words"]], "unseen": unseen})
        for style in raw["style"]
    )
    return Source(styles, raw["world"])


def completed(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each table with the entries of the table that it is `like`, where it has none of its own."""
    whole: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        own = dict(table)
        like = own.pop("like", "")
        whole[name] = (whole[like] if like else {}) | own
    return whole


def wording(text: str) -> Wording:
    """A Wording from "full; short; new full; new short", or from "full; short" for both."""
    names = [part.strip() for part in text.split(";")]
    return Wording(*(names if len(names) == 4 else names * 2))


def places_and_types(raw: dict[str, Any]) -> dict[str, Any]:
    """The sites and histologies of a Cancer's table."""
    return {
        "sites": tuple(Site(**site | {"names": wording(site["names"])}) for site in raw["sites"]),
        "histologies": tuple(Histology(**one | {"names": wording(one["names"])}) for one in raw["histologies"]),
    }


def cancer(raw: dict[str, Any]) -> Cancer:
    """A Cancer from its table in cancers.toml."""
    named = {key: wording(raw[key]) for key in ("where", "nowhere", "operation", "complaint")}
    stages = []
    for line in raw.get("stages", ()):
        group, t, n, m, smallest, largest = line.split()
        stages.append(Stage(group, t, n, m, int(smallest), int(largest)))
    return Cancer(**raw | named | places_and_types(raw) | {"stages": tuple(stages)})


_KNOWN = read("cancers")
CANCERS = tuple(cancer(raw) for raw in _KNOWN["cancer"])
GRADES = {
    system: {int(grade): wording(names) for grade, names in grades.items()}
    for system, grades in _KNOWN["grades"].items()
}
"""Grading system → grade → its names, as an adjective phrase that can stand alone ("moderately differentiated")."""

SIDE_DIGIT = {"right": "1", "left": "2", "bilateral": "3"}  # in an ICD-10-CM code
TRAINING, UNSEEN = source("styles"), source("unseen")
