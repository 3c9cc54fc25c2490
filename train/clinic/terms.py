"""The types of the clinic's tables: wordings, sites, histologies, stages, cancers and note styles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
    """A place: its code ('#' stands for the side's digit), its names, and a choice weight."""

    code: str
    names: Wording
    weight: int = 1

    @property
    def whole(self) -> bool:
        """Whether this is the organ itself and not a place in it."""
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
    `varied` one names are reshaped too (varied.py).
    """

    name: str
    layouts: tuple[str, ...]
    bank: Mapping[str, tuple[str, ...]]
    words: Mapping[str, tuple[str, ...]]
    pathology: bool = False
    terse: bool = False
    unseen: bool = False
    capitals: bool = False
    varied: bool = False


def words(text: str) -> Wording:
    """A Wording from "full; short; new full; new short"; later ones default to earlier ones of the same length."""
    parts = [part.strip() for part in text.split(";")]
    full = parts[0]
    short = parts[1] if len(parts) > 1 else full
    return Wording(full, short, parts[2] if len(parts) > 2 else full, parts[3] if len(parts) > 3 else short)


def sites(text: str) -> tuple[Site, ...]:
    """Sites from lines "code | weight | wording"."""
    rows = [line.split(" ~ ") for line in text.strip().splitlines()]
    return tuple(Site(code.strip(), words(names), int(weight)) for code, weight, names in rows)


def histologies(text: str) -> tuple[Histology, ...]:
    """Histologies from lines "code or - ~ weight ~ grades or - ~ wording"."""
    rows = [[cell.strip() for cell in line.split(" ~ ")] for line in text.strip().splitlines()]
    return tuple(
        Histology(
            words(names),
            tuple(int(grade) for grade in grades.split()) if grades != "-" else (),
            code if code != "-" else "",
            int(weight),
        )
        for code, weight, grades, names in rows
    )


def stages(text: str) -> tuple[Stage, ...]:
    """Stages from "group T N M smallest largest; …"."""
    found = []
    for part in text.split(";"):
        group, t, n, m, smallest, largest = part.split()
        found.append(Stage(group, t, n, m, int(smallest), int(largest)))
    return tuple(found)
