"""Patients: who they are and what their cancer is. A `Case` is the truth that notes are written from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from infer.codes import CODES
from train.clinic.terms import CANCERS, SIDE_DIGIT, Cancer, Histology, Site, Stage


@dataclass(frozen=True)
class Case:
    """A patient with one index cancer. Size in mm (0: none); receptors: (name, '+', '-' or ' equivocal') pairs."""

    sex: str
    age: int
    cancer: Cancer
    site: Site
    side: str
    histology: Histology
    grade: int
    size: int
    stage: Stage | None
    receptors: tuple[tuple[str, str], ...]

    @property
    def coded_by_side(self) -> bool:
        """True if the ICD-10-CM code depends on the side."""
        return self.site.code.endswith("#") and not self.histology.code

    def code(self, sided: bool) -> str:
        """The ICD-10-CM code of what a note states; `sided`: it states the tumour's side, where there is one."""
        code = self.site.code
        if self.histology.code == "C82.G":
            return f"C82.{self.grade - 1}{code[-1]}"
        if self.histology.code:  # blood: type then site or remission; liver: the type alone
            return self.histology.code + code.strip("#-")
        code = code.replace("@", "2" if self.sex == "M" else "1")
        if "#" in code:
            code = code.replace("#", SIDE_DIGIT[self.side] if sided else self.cancer.undetermined)
        assert code in CODES, code
        return code


def pick(options: Sequence, u: float) -> tuple:
    """The weighted option at the quantile `u` of [0, 1), and the quantile within it: one number picks several times."""
    u *= sum(option.weight for option in options)
    for option in options:
        if u < option.weight:
            break
        u -= option.weight
    return option, min(u / option.weight, 1 - 2**-53)


def quantile(number: int, offset: float) -> float:
    """Quantiles of patients 0, 1, 2, …: any run of n of them meets every stratum heavier than about 2.6/n (steps of the
    golden ratio), so that a small training split still holds nearly all codes."""
    return (number * (5**0.5 - 1) / 2 + offset) % 1.0


def draw_case(rng: random.Random, u: float | None = None, cancers: Sequence[Cancer] = CANCERS) -> Case:
    """A patient with one of the cancers, drawn by the weights of cancers, sites and types; `u` in [0, 1) settles these
    three and the side."""
    cancer, u = pick(cancers, rng.random() if u is None else u)
    site, u = pick(cancer.sites, u)
    right, u = int(u * 2), u * 2 % 1.0
    histology, u = pick(cancer.histologies, u)
    stage = rng.choice(cancer.stages) if cancer.stages and cancer.sizes[1] else None
    low, high = cancer.sizes
    if stage:
        low, high = max(low, stage.smallest), min(high, stage.largest)
    size = rng.randint(low, high) if high else 0
    sex = rng.choice(cancer.sexes)
    side = ""
    if cancer.sided and (site.code.count("#") or cancer.name in ("prostate cancer", "thyroid cancer", "brain tumor")):
        side = ("left", "right")[right]
        if cancer.name == "ovarian cancer" and rng.random() < 0.25:
            side = "bilateral"
    elif site.code == "C34.2":
        side = "right"
    young = {"leukemia": 20, "lymphoma": 19, "brain tumor": 24, "thyroid cancer": 22}.get(cancer.name, 41)
    return Case(
        sex=sex,
        age=rng.randint(young, 84),
        cancer=cancer,
        site=site,
        side=side,
        histology=histology,
        grade=rng.choice(histology.grades) if histology.grades else 0,
        size=size,
        stage=stage,
        receptors=draw_receptors(rng) if cancer.receptors else (),
    )


def draw_receptors(rng: random.Random) -> tuple[tuple[str, str], ...]:
    """ER, PR and HER2 in proportions that clinics see: PR rarely positive without ER, one in six triple negative."""
    er = "+" if rng.random() < 0.68 else "-"
    pr = "+" if rng.random() < (0.75 if er == "+" else 0.06) else "-"
    her2 = rng.choices(("+", "-", " equivocal"), (25, 60, 15))[0]
    return (("ER", er), ("PR", pr), ("HER2", her2))
