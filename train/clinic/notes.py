"""Writes a note from a case and a style: selects the facts it states, their wording, and distractors."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from infer.codes import describe
from train.clinic.markup import TAG, answers, choose, fill, mark, mark_receptor, sentence, slots, unmark, upper
from train.clinic.patients import Case, draw_case, draw_receptors
from train.clinic.terms import GRADES, Site, Stage, Style, Wording
from train.clinic.varied import filled, graded, placed, reshaped

FACTS = {"dx", "hist", "site", "side", "size", "grade", "stage", "rec"}
TELLING = ("size", "grade", "stage", "rec", "hist", "dx")  # slots that state a fact; a note states each fact once
SHOWN = {"size": 0.88, "grade": 0.85, "stage": 0.75, "rec": 0.85}  # probability that a note states a fact of its case
SIDE_SHOWN = 0.8  # the same for the side; it is always stated if the ICD-10-CM code depends on it
SAME_ORGAN = 0.4  # probability that other cancers in a note may be in the index cancer's organ
RIVAL_SIDED = 0.6  # probability that another cancer must have a side
RIVAL_FACTS = (2, 2, 3)  # number of facts stated about another cancer
KIN = (("small cell", "oat", "neuroendocrine"), ("squamous",), ("melanoma",), ("sarcoma",), ("lymphoma",), ("in situ",))
NEAR = {"kidney": "renal", "liver": "hepatic", "lymph nodes": "node", "ovary": "ovarian", "stomach": "gastric"}
OWN = ("family", "benign", "other_hist")  # tables of `world` with a slot_ method of their own
_GROUP = re.compile(r"<(~?)(\|?)([^<>~|]+)>")
_STOPS = re.compile(rf"(\w\.(?:{TAG})*)\.(?=\s|$)", re.M)  # two full stops, of an abbreviation and of the sentence
_A = re.compile(rf"\b([Aa]) ((?:{TAG})*(?:[aeio](?!ne\b)|un(?!i)))")  # "a adenoma" is "an adenoma"


@dataclass
class Writer:
    """State of a note while it is written. `shown`: facts to state; `stated`: facts stated so far."""

    case: Case
    style: Style
    rng: random.Random
    world: Mapping[str, Sequence[str]]
    shown: set[str] = field(default_factory=set)
    stated: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        case, rng = self.case, self.rng
        self.shown = {"dx", "hist", "site"}
        if case.side and (case.coded_by_side or rng.random() < SIDE_SHOWN):
            self.shown.add("side")
        for fact, there in (("size", case.size), ("grade", case.grade), ("stage", case.stage), ("rec", case.receptors)):
            if there and rng.random() < SHOWN[fact]:
                self.shown.add(fact)
        if case.histology.code == "C82.G":
            self.shown.add("grade")  # its code depends on the grade
        self.form = rng.choice(self.style.words["size"])
        spelled = "tnm" in self.style.words  # clinics give T, N and M alone as often as a group
        self.staging = rng.choices(("group", "tnm", "both"), (3, 4, 2) if spelled else (5, 3, 3))[0]
        if not case.stage or case.stage.t == "-":
            self.staging = "group"
        self.man = case.sex == "M"
        self.avoid = "" if rng.random() < SAME_ORGAN else case.cancer.name  # else a rival may sit in the same organ
        self.op = choose(self.wording(case.cancer.operation), rng)

    def body(self) -> str:
        """The whole note, with marks."""
        text = _GROUP.sub(self.group, self.rng.choice(self.style.layouts))
        lines = [" ".join(line.split()) for line in fill(choose(text, self.rng), self.slot).splitlines()]
        kept = "\n".join(line for line in lines if line and not re.fullmatch(r"[^.:]{1,40}[:|]", line))
        kept = _STOPS.sub(r"\1", re.sub(r" (?=[.;,](?:\s|$))", "", kept, flags=re.M))
        return _A.sub(r"\1n \2", kept)

    def group(self, match: re.Match[str]) -> str:
        keys = match[3].split()
        if match[1]:
            self.rng.shuffle(keys)
        sentences = [self.tell(key) for key in keys]
        return ("\n" if match[2] else " ").join(one for one in sentences if one)

    def tell(self, key: str) -> str:
        """A sentence for the key; '' if it is left out or its fact has been stated."""
        if key.endswith("?"):
            if self.rng.random() < 0.5:
                return ""
            key = key[:-1]
        fact = key.removeprefix("l_")
        if key in ("size", "d_size", "stage", "d_stage") and not self.case.size:
            return ""  # a leukemia has no size, margin or TNM, and notes do not say so
        if fact in FACTS:
            if fact in self.stated:
                return ""
            if fact not in self.shown:
                silent = self.style.bank.get("no_" + fact, ())
                if not silent or self.rng.random() < 0.5 or not self.possible("no_" + fact):
                    return ""
                key = "no_" + fact
        choices = self.possible(key)
        if not choices:
            return ""
        self.used.add(template := self.rng.choice(choices))
        text = fill(choose(template, self.rng), self.slot)
        if fact in FACTS and key == fact or fact in self.shown:
            self.stated.add(fact)
        return sentence(text)

    def possible(self, key: str) -> list[str]:
        """The unused templates of a key whose facts can be stated now."""
        return [t for t in self.style.bank[key] if t not in self.used and self.fits(t)]

    def fits(self, template: str) -> bool:
        """True if every slot of the template can be filled; `{need_…}` slots are conditions, filled with ''."""
        case = self.case
        nodes = bool(case.stage and case.stage.n not in ("N0", "-"))
        staged = "stage" in self.shown and case.stage is not None and case.stage.t != "-"
        conditions = {
            **dict.fromkeys(("size_old", "size_less"), "size" in self.shown and case.size >= 9),
            **dict.fromkeys(("stage_old", "tnm_old"), staged),
            "tnm_now": staged and self.staging == "group",  # beside its group, which is the answer
            "grade_old": "grade" in self.shown and len(self.other_grades()) > 0,
            "rec_old": "rec" in self.shown,
            "other_site": len(self.other_sites()) > 0,
            "other_type": len(case.cancer.histologies) > 1,
            "need_paired": case.side in ("left", "right"),
            "need_breast": case.cancer.name == "breast cancer",
            "need_man": case.sex == "M",
            "need_woman": case.sex == "F",
            "need_tumor": case.size > 0,
            "need_knife": case.cancer.surgical,
            "need_nodes": nodes,
            "need_clean": not nodes and case.cancer.name not in ("lymphoma", "leukemia"),
            "need_local": case.cancer.surgical and not (case.stage and case.stage.m.startswith("M1")),
        }
        for slot in slots(template):
            if slot in TELLING and (slot in self.stated or slot not in self.shown):
                return False
            if not conditions.get(slot, True):
                return False
        return True

    def other_grades(self) -> list[int]:
        """The grades of the case's system that are not its own; none where the type's name holds the grade."""
        named = self.case.histology.names.full.startswith("high-grade")
        return [] if named else [g for g in GRADES.get(self.case.cancer.grading, ()) if g != self.case.grade]

    def other_sites(self) -> list[Site]:
        """Other places in the tumour's organ; none if its site is the whole organ."""
        own = self.case.site
        if not self.case.cancer.surgical or own.whole:
            return []
        return [s for s in self.case.cancer.sites if s.names != own.names and not s.whole]

    # ---- the slots -------------------------------------------------------------------------------------------

    def slot(self, name: str) -> str:
        he = ("man", "male", "M", "he", "his", "him") if self.man else ("woman", "female", "F", "she", "her", "her")
        plain = {
            **dict(zip(("person", "sex", "S", "he", "his", "him"), he, strict=True)),
            "age": str(self.case.age),
            "loose": self.case.cancer.loose,
            "op": self.op,
            "disease": self.case.cancer.name,
            "year": str(self.rng.randint(1996, 2019)),
            "date": f"{self.rng.randint(1, 12)}/{self.rng.randint(1, 28)}/{self.rng.choice(('21', '22', '23', '24'))}",
            "mm": str(self.rng.randint(2, 12)),
            "n": str(self.rng.randint(2, 6)),
            "g": str(self.rng.randint(1, 3)),
            "kg": str(self.rng.randint(51, 104)),
            "nodes": str(self.rng.randint(8, 24)),
            "pct": str(self.rng.randrange(20, 100, 5)),
            "any_side": self.rng.choice(self.style.words["left" if self.rng.random() < 0.5 else "right"]),
        }
        if name.startswith("need_"):
            return ""
        if name in self.world and name not in OWN:
            return self.drawn(name)
        if name.endswith("rival"):
            return self.rival({"her_rival": "F", "his_rival": "M"}.get(name, self.case.sex))
        return plain[name] if name in plain else getattr(self, "slot_" + name)()

    def drawn(self, name: str) -> str:
        """A phrase of the world's table `name` that suits the patient and does not name the tumour's organ."""
        barred = self.organ() if name in ("lesion", "past") else ()
        fit = [one for one in self.world[name] if self.fits(one) and not any(word in one for word in barred)]
        return fill(choose(self.rng.choice(fit), self.rng), self.slot)

    def organ(self) -> tuple[str, ...]:
        """Words that name the tumour's organ."""
        loose = self.case.cancer.loose
        return loose, NEAR.get(loose, loose)

    def slot_complaint(self) -> str:
        return choose(self.wording(self.case.cancer.complaint), self.rng)

    def wording(self, wording: Wording) -> str:
        return wording.pick(self.style.terse, self.style.unseen)

    def named(self, wording: Wording, kind: str) -> str:
        """A type's ("hist") or a place's ("site") name in the style's words."""
        words = choose(self.wording(wording), self.rng)
        plain = not self.style.varied or "{S}" in words or words.startswith("high-gr")
        return words if plain else reshaped(words, kind, self.rng, self.style.terse)

    def grading(self, grade: int) -> str:
        """A grade's name in the case's system and the style's words."""
        system = self.case.cancer.grading
        if system == "nuclear" and self.case.histology.names.short == "acinar":
            system = "differentiation"
        more = self.style.grades.get(system)
        if more and self.rng.random() < 0.5:
            return filled(self.rng.choice(more), grade)
        fixed = GRADES[system][grade]
        return choose(graded(system, grade, fixed, self.rng) if self.style.varied else self.wording(fixed), self.rng)

    def slot_hist(self) -> str:
        self.stated.add("hist")
        words = self.named(self.case.histology.names, "hist")
        if words.startswith("high-gr"):  # the serous type is named by its grade
            self.stated.add("grade")
            first, rest = words.split(" ", 1)
            words = mark("cancer_grade", first, "grade 3") + " " + rest
        return mark("histological_type", words)

    def slot_status(self) -> str:
        return choose(self.wording(self.case.site.names), self.rng)

    def slot_site(self) -> str:
        self.stated.add("site")
        words = self.named(self.case.site.names, "site")
        if "{S}" in words:
            if "side" not in self.shown:
                words = choose(self.case.site.names.full, self.rng)
            else:
                self.stated.add("side")
                letter = mark("tumor_laterality", self.case.side[0].upper(), self.case.side)
                words = words.replace("{S}", letter)
        return mark("tumor_site", words)

    def slot_side(self) -> str:
        self.stated.add("side")
        return mark("tumor_laterality", self.rng.choice(self.style.words[self.case.side]), self.case.side)

    def slot_where(self) -> str:
        cancer = self.case.cancer
        sided = "side" in self.shown and bool(self.case.side)
        template = choose(self.wording(cancer.where if sided else cancer.nowhere), self.rng)
        if self.case.side == "bilateral" and sided:
            new = self.style.unseen
            words = choose(
                "[the two ovaries|ovary on either side]" if new else "[both ovaries|bilateral ovaries]", self.rng
            )
            first, site = words.rsplit(" ", 1) if "either" not in words else ("on either side", "ovary")
            site = mark("tumor_site", site)
            self.stated |= {"site", "side"}
            said = mark("tumor_laterality", first, "bilateral")
            return f"{site} {said}" if "either" in words else f"{said} {site}"
        if self.style.terse and cancer.name == "lung cancer" and "{S}" not in self.wording(self.case.site.names):
            template = choose(cancer.where.new_short if sided else cancer.nowhere.short, self.rng)
        if self.style.varied and not self.case.site.whole and cancer.name != "leukemia" and self.rng.random() < 0.5:
            organ = cancer.loose if cancer.surgical and f" {cancer.loose}" in cancer.where.full else ""
            template = placed(organ, sided, self.rng)
        if self.case.site.whole and cancer.sided:
            template = "{side} {site}" if sided else "{site}"
        return fill(template, self.slot)

    def slot_dx(self) -> str:
        """The tumour with its place, as one noun phrase."""
        join = self.rng.choice(self.style.words["join"])
        if self.case.cancer.name == "leukemia":
            join = "{hist} {where}"
        self.stated.add("dx")
        return re.sub(r"([,:;(-]) the ", r"\1 ", fill(join, self.slot))

    def slot_grade(self) -> str:
        self.stated.add("grade")
        return mark("cancer_grade", self.grading(self.case.grade), f"grade {self.case.grade}")

    def slot_grade_old(self) -> str:
        return self.grading(self.rng.choice(self.other_grades()))

    def slot_stage(self) -> str:
        stage = self.stage()
        self.stated.add("stage")
        tnm = "" if stage.t == "-" else self.tnm()
        if self.staging == "tnm":
            return mark("cancer_stage", tnm)
        words = choose(self.rng.choice(self.style.words["stage"]), self.rng)
        group = fill(words, lambda _: mark("cancer_stage", stage.group))
        return f"{group} ({tnm})" if self.staging == "both" else group

    def stage(self) -> Stage:
        assert self.case.stage is not None, "a slot of the stage in a note of a case without one"
        return self.case.stage

    def spelled(self, stage: Stage) -> str:
        """T, N and M in the style's own forms, with any prefix."""
        parts = {"p": self.rng.choice(("p", "p", "c", "c", "", "yp", "r")), "T": stage.t, "N": stage.n, "M": stage.m}
        forms = [form for form in self.style.words["tnm"] if stage.m == "M0" or "M" in form]
        return fill(self.rng.choice(forms), lambda name: parts[name])

    def tnm(self) -> str:
        stage = self.stage()
        if "tnm" in self.style.words:
            return self.spelled(stage)
        gap = self.rng.choice(("", " "))
        prefix = "p" if self.style.pathology else self.rng.choice(("", "p", "c"))
        return gap.join((prefix + stage.t, stage.n, stage.m))

    def slot_tnm_now(self) -> str:
        return self.tnm()

    def slot_stage_old(self) -> str:
        return self.rng.choice([s.group for s in self.case.cancer.stages if s.group != self.stage().group])

    def slot_size(self) -> str:
        self.stated.add("size")
        return mark("tumor_size", self.measure(self.case.size))

    def measure(self, mm: int) -> str:
        """A length in the note's own form; two or three dimensions where the form has them."""
        others = sorted((max(2, round(mm * self.rng.uniform(0.5, 0.95))) for _ in range(2)), reverse=True)

        def shown(match: re.Match[str]) -> str:
            value = {"a": mm, "b": others[0], "c": others[1]}[match[1]]
            return f"{value / 10:.1f}" if "m" not in match[2] else str(value)

        return re.sub(r"\{([abc])(m?)\}", shown, self.form)

    def slot_size_any(self) -> str:
        return self.measure(self.rng.randint(4, 60))

    def slot_size_small(self) -> str:
        return self.measure(self.rng.randint(3, 15))

    def slot_size_spec(self) -> str:
        return self.measure(self.rng.randint(max(60, self.case.size + 20), 240))

    def slot_size_old(self) -> str:
        old = self.case.size
        while old == self.case.size:
            old = max(3, round(self.case.size * self.rng.uniform(0.5, 1.6)))
        return self.measure(old)

    def slot_size_less(self) -> str:
        return self.measure(self.rng.randint(3, self.case.size - 2))

    def slot_rec(self) -> str:
        self.stated.add("rec")
        return self.receptors(self.case.receptors)

    def slot_rec_old(self) -> str:
        """The receptors of an earlier sample or tumour, at least one of them different; unmarked."""
        old = self.case.receptors
        while old == self.case.receptors:
            old = draw_receptors(self.rng)
        return unmark(self.receptors(old))[0]

    def receptors(self, results: tuple[tuple[str, str], ...]) -> str:
        """The results, in any order; in one of seven lists HER2 is still awaited."""
        words = self.style.words
        if len(results) == 3 and all(status == "-" for _, status in results) and self.rng.random() < 0.5:
            status_words = self.rng.choice(words["triple"])
            for receptor, status in results:
                status_words = mark_receptor(receptor, status, status_words)
            return status_words
        awaited = self.rng.random() < 0.14
        listed = []
        for receptor, status in results:
            name = self.rng.choice(words[receptor])
            if receptor == "HER2" and awaited:
                listed.append(self.rng.choice(words["awaited"]).replace("{r}", name))
                continue
            kind = {"+": "positive", "-": "negative", " equivocal": "equivocal"}[status]
            forms = words.get(f"{receptor}_{kind}") or words[kind]
            said = fill(self.rng.choice(forms).replace("{r}", name), self.slot)
            listed.append(mark_receptor(receptor, status, said))
        if self.rng.random() < 0.3:
            listed.reverse()
        return self.rng.choice(words["listing"]).join(listed)

    def slot_family(self) -> str:
        return fill(choose(self.rng.choice(self.world["family"]), self.rng), self.slot)

    def rival(self, sex: str) -> str:
        """Another cancer, of the patient or a relative of this sex, in the style's own words; unmarked."""
        rng = self.rng
        sided = rng.random() < RIVAL_SIDED
        while True:
            case = draw_case(rng)
            if case.sex == sex and case.cancer.name not in ("leukemia", self.avoid) and (case.side or not sided):
                break
        other = Writer(case, self.style, rng, self.world)
        other.form = self.form
        facts = [fact for fact in ("rec", "grade", "size", "stage") if fact in other.shown]
        chosen = sorted(rng.sample(facts, min(len(facts), rng.choice(RIVAL_FACTS))))
        phrase = ", ".join([other.slot("dx")] + [other.slot(fact) for fact in chosen if fact not in other.stated])
        words = unmark(phrase)[0]
        return words[4:] if words.startswith("the ") else words

    def slot_other_site(self) -> str:
        words = self.named(self.rng.choice(self.other_sites()).names, "site")
        return words.replace("{S}", self.case.side[:1].upper() if self.case.side and "side" in self.shown else "")

    def slot_other_type(self) -> str:
        other = [h for h in self.case.cancer.histologies if h is not self.case.histology]
        return self.named(self.rng.choice(other).names, "hist")

    def slot_tnm_old(self) -> str:
        other = self.rng.choice([s for s in self.case.cancer.stages if s.t != self.stage().t])
        return self.spelled(other) if "tnm" in self.style.words else f"c{other.t} {other.n} {other.m}"

    def slot_benign(self) -> str:
        barred = [*self.organ()] + ["ovarian"] * self.man
        return choose(self.rng.choice([b for b in self.world["benign"] if not any(w in b for w in barred)]), self.rng)

    def slot_other_side(self) -> str:
        return self.rng.choice(self.style.words["left" if self.case.side == "right" else "right"])

    def slot_other_hist(self) -> str:
        """A type that the index tumour does not have, and that shares no word of KIN with its type."""
        own = self.case.histology.names
        said = f"{own.full} {own.new_full} {'in situ' * (self.case.cancer.name == 'breast cancer')}"
        kin = [group for group in KIN if any(word in said for word in group)]
        barred = [word for group in kin for word in group]
        return self.rng.choice([t for t in self.world["other_hist"] if not any(word in t for word in barred)])


def write_note(
    case: Case,
    style: Style,
    world: Mapping[str, Sequence[str]],
    rng: random.Random,
    finish: Callable[[str], str] = str,
) -> tuple[str, dict]:
    """A note's text and its annotations, {"phenotypes": …, "diagnosis": …} as in a record.

    `finish` transforms the marked text, for example into a scan with errors. Raises AssertionError if the style left
    out the diagnosis or a fact that it had to state (a mistake in the style).
    """
    writer = Writer(case, style, rng, world)
    marked = finish(writer.body())
    if style.capitals:
        marked = upper(marked)
    text, spans = unmark(marked)
    missing = (writer.shown & {"size", "grade", "stage", "rec"}) - writer.stated
    assert not missing and "hist" in writer.stated, (style.name, case.cancer.name, missing)
    phenotypes = answers(spans)
    code = case.code(sided=bool(phenotypes["tumor_laterality"]))
    return text, {"phenotypes": phenotypes, "diagnosis": {"text": describe(code), "code": code}}
