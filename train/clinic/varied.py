# ruff: noqa: E501  (tables of wordings: one a line)
"""One more way to write training notes: the wording itself is drawn, note by note.

Who reads seven styles learns seven styles. Here labels, verbs, joints, separators, the order of everything and the
forms of the names are combined at random, so that little is left to learn but what stays the same: whose tumor a
sentence speaks of, and that the answer is the note's own words. Nothing stands here that an unseen style says; a
reshaped name that happens to equal one of theirs is not used. No name holds a comma: answers are joined by them.
"""

from __future__ import annotations

import random
import re

from train.clinic.knowledge import CANCERS, GRADES
from train.clinic.styles import STYLES as FIXED
from train.clinic.terms import Style, Wording

ROMAN = {1: "I", 2: "II", 3: "III", 4: "IV"}
BANKS = {style.name: style.bank for style in FIXED}
_HEAD = re.compile(r"(.+) (carcinoma|adenocarcinoma|melanoma|lymphoma|leukemia|astrocytoma|ca)")
_PLACE = re.compile(r"(.+) (quadrant|lobe|wall|pole|colon|body|antrum|cardia|fundus|esophagus|lymph nodes|LN|arm|leg)")
_OF = re.compile(r"(.+) of the (\w+)")

NAMES: dict[str, tuple[str, ...]] = {  # how a type "K H" (ductal carcinoma) may stand otherwise
    "hist": ("{h} ({k})", "{h} ({k} type)", "{h} / {k} variant", "{k}-type {h}", "{h} with {k} features", "{h} with {k} differentiation", "{h} of the {k} kind", "{k} {h} NOS", "{k} {h} (usual form)", "{h} - {k}", "{h}: {k}", "{h} in a {k} pattern", "conventional {k} {h}", "{k} {h} with typical features"),
    "site": ("{k} part of the {h}", "{h} - {k}", "{k} portion of the {h}", "{h} ({k})", "{k}/{h}", "{k} {h} region"),
}  # fmt: skip

_SCALE = {1: ("low", "well", "well"), 2: ("intermediate", "moderately", "moderate"), 3: ("high", "poorly", "poor"), 4: ("very high", "un", "no")}
_SYSTEMS: dict[str, tuple[str, ...]] = {  # {g} the number, {R} roman, {low} {well} {poor} the words for it
    "differentiation": ("grade {g}", "grade {g} of 3", "grade {R}", "{low} grade", "{low} histologic grade", "{well}-differentiated", "{poor} differentiation", "{well} differentiated (grade {g})", "G{g} on a scale of 3", "histologic grade {g}", "{well} formed"),
    "nottingham": ("grade {g}", "SBR grade {g}", "Nottingham {R}", "combined grade {g} of 3", "histologic grade {g}", "grade {R} by Nottingham", "{low} combined grade", "Nottingham {g}/3"),
    "nuclear": ("nuclear grade {g}", "Fuhrman {g} of 4", "WHO/ISUP grade {g}", "grade {g}/4", "Fuhrman nuclear grade {R}", "grade {g}"),
    "gleason": ("Gleason {gl}", "Gleason {sum} ({gl})", "grade group {g}", "prognostic group {g}", "group {g} of 5", "Gleason score of {gl}"),
    "figo": ("FIGO {g}", "grade {g} by FIGO", "FIGO grade {R}", "grade {g} of 3", "FIGO {low} grade"),
    "who": ("CNS WHO grade {g}", "grade {g} by WHO", "WHO grade {R}", "grade {g} of 4", "CNS grade {g}"),
    "urothelial": ("{low} histologic grade", "WHO {low} grade", "urothelial grade {low}", "graded {low}"),
    "follicular": ("grade {g} of 3", "follicular grade {g}", "WHO follicular grade {g}"),
}  # fmt: skip
_GLEASON = {1: ("3+3", "6"), 2: ("3+4", "7"), 3: ("4+3", "7"), 4: ("4+4", "8")}

_JOIN = ("{hist} of {where}", "{hist}, {where}", "{hist} in {where}", "{hist} at {where}", "{where}: {hist}", "{where}, {hist}", "{where} - {hist}", "{where} with {hist}", "{where} showing {hist}", "{hist} located in {where}", "{hist} within {where}", "{hist} that began in {where}", "{hist}, primary {where}", "{hist} / {where}", "{hist} affecting {where}", "{hist} occupying {where}", "{where} containing {hist}", "{where} bearing {hist}", "{where} affected by {hist}", "{where}; {hist}", "{where} invaded by {hist}", "{hist} growing in {where}")
_SIZES = ("{a} cm", "{a} cm", "{am} mm", "{a} x {b} cm", "{a} cm x {b} cm", "{a} by {b} cm", "{am} x {bm} x {cm} mm", "{a} x {b} x {c} cm", "{am}mm x {bm}mm", "{am} by {bm} by {cm} mm", "{a} centimeters", "{am}mm", "{a} x {b}cm", "{am} × {bm} mm")
_STAGES = ("stage {x}", "{x}", "Stage {x} disease", "prognostic stage {x}", "group {x}", "AJCC {x}", "st. {x}", "clinically {x}", "AJCC8 {x}", "stage: {x}")
_RESULTS: dict[str, tuple[str, ...]] = {
    "ER": ("ER", "estrogen receptor", "estrogen", "ER (SP1)", "estrogen-receptor"), "PR": ("PR", "PgR", "progesterone receptor", "progesterone", "progesterone-receptor"), "HER2": ("HER2", "HER2 (ERBB2)", "her2neu", "HER2 IHC", "HER2 status"),
    "positive": ("{r} is positive", "{r} {pct}%", "positive {r}", "{r} high", "{r} reactive in {pct}%", "{r} staining in {pct}% of cells", "{r} = pos", "{r} (pos)", "{r}: +", "{r} detected", "{r} expressed"),
    "negative": ("{r} is negative", "{r} <1%", "negative {r}", "{r} none", "{r} not reactive", "{r} = neg", "{r} (neg)", "{r}: -", "{r} undetected", "{r} without staining", "{r} lost"),
    "HER2_positive": ("{r} is positive", "{r} score 3+", "{r} amplified", "{r} FISH ratio 4.{n}", "positive {r}", "{r} 3+ staining", "{r} gene amplification found", "{r} 2+, FISH positive"),
    "HER2_negative": ("{r} is negative", "{r} score 0", "{r} score 1+", "{r} unamplified", "negative {r}", "{r} 2+, FISH negative", "{r} 0/3+", "{r} without amplification"),
    "HER2_equivocal": ("{r} score 2+, FISH to follow", "{r} is equivocal", "equivocal {r}", "{r} unclear (2+)", "{r} 2+, reflex FISH sent"),
    "triple": ("ER, PR and HER2 all negative", "negative for ER, PR and HER2", "triple negative phenotype", "ER-/PR-/HER2-"), "awaited": ("{r} not back yet", "{r} to follow", "awaiting {r}"),
}  # fmt: skip

LABELS: dict[str, tuple[str, ...]] = {
    "hist": ("Type", "Histology", "Cell type", "Tumor type", "Morphology", "Histologic type", "Kind of tumor"), "site": ("Site", "Location", "Primary site", "Primary", "Origin", "Where", "Topography"), "side": ("Side", "Laterality", "Left or right"),
    "size": ("Size", "Tumor size", "Dimensions", "Diameter", "Measurement", "Largest diameter", "Extent", "Tumor diameter"), "grade": ("Grade", "Differentiation", "Tumor grade", "Histologic grade", "Grading"),
    "stage": ("Stage", "Staging", "TNM", "Stage at present", "Stage group", "Spread"), "rec": ("Receptors", "ER/PR/HER2", "Breast panel", "IHC", "Receptor status", "Biomarkers"),
    "dx": ("Diagnosis", "Impression", "Problem", "Cancer", "Main diagnosis", "Active cancer", "Disease", "Reason", "Tumor", "Result", "Assessment", "Specimen shows"),
    "prior": ("Prior cancer", "Past malignancy", "Old cancer", "Previous tumor", "Remote cancer", "Cancer before this one", "Other cancer (cured)", "Second cancer", "{year}"), "family": ("FH", "Family", "Heredity", "Kin", "Relatives with cancer"),
}  # fmt: skip
_IT = ("the lesion", "this tumor", "the cancer", "the mass", "it", "the main lesion", "the invasive part", "the neoplasm", "the primary", "the index tumor", "the malignancy")
_OLD = ("before treatment", "earlier", "superseded", "outdated", "replaced", "withdrawn", "since revised", "no longer valid", "corrected since", "wrong", "at first", "old report", "preliminary")
_FROM = ("imaging", "CT", "MRI", "ultrasound", "the first report", "the referral", "the outside report", "the small sample", "the first biopsy", "an earlier reading")
_LEAD = ("We are treating", "This is a case of", "Confirmed", "The specimen holds", "The final answer is", "Main problem:", "Here for", "On treatment for", "Newly found", "Followed for", "Current cancer:", "Carries a diagnosis of", "The slides are those of", "There is", "The tissue contains", "All agree on", "Patient with", "Proven", "Seen for", "Examination of the tissue gives", "Today's topic is")
_PAST = ("Earlier cancer, cured:", "Also had", "Previously treated for", "Unrelated second cancer:", "Survivor of", "In {year} treated for", "Not the present problem:", "Past tumor:", "{n} years ago there was", "Other history:", "Another tumor, from {year}, was", "A separate cancer, {year}:", "Cancer number one ({year}) was", "Someone else follows the patient for", "Old slides of {year} show", "Long ago,")
_KIN = ("Family:", "Among relatives:", "Runs in the family:", "Of relatives,", "Kin:", "Not the patient's own:")
_TITLES = ("", "", "NOTE", "ONCOLOGY SUMMARY", "REPORT", "VISIT", "Encounter note", "RECORD", "Summary of findings", "SPECIMEN REPORT", "Progress note", "E-consult", "DISCHARGE SUMMARY", "Intake")
_ORDERS = (
    "<open> <~dx prior family?>\n<~size d_size d_site grade d_grade stage d_stage rec d_rec d_side?>\n<~ros? neg plan>",
    "<dx> <~size grade stage rec d_size d_grade d_rec>\n<~open prior family?>\n<~d_site d_stage neg>\n<plan>",
    "<~open prior family?>\n<~size grade d_grade d_size>\n<~dx d_site>\n<~stage d_stage rec d_rec>\n<exam> <plan>",
    "<~open dx size d_size grade d_grade>\n<~stage d_stage rec d_rec prior family d_site d_side>\n<labs> <plan>",
    "<open>\n<prior>\n<~dx d_site d_size grade stage rec>\n<~size d_grade d_stage d_rec neg>\n<~ros exam labs?> <plan>",
    "<~|size d_size grade d_grade stage d_stage rec d_rec>\n<~|dx d_site prior family? open>\n<plan>",
    "<open>\n<~|dx prior size d_size d_site grade d_grade stage d_stage rec d_rec family? d_side>\n<~neg plan>",
)
_LISTED = (
    "<open>\n<~|hist site side size d_size grade d_grade stage d_stage rec d_rec prior d_site>\n<~neg plan>",
    "<|hist site side>\n<~|size grade stage rec>\n<~|d_size d_grade d_stage d_rec d_site prior family?>\n<open> <neg>",
    "<~|size grade stage rec d_size d_site>\n<~|site hist side>\n<~|prior d_grade d_stage d_rec>\n<open> <plan>",
)


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
        new = rng.choice(("{h} ({k})", "{h} - {k}", "{k} {h}")).format(k=of[1], h=of[2])
    elif found and shape < 0.6:
        new = rng.choice(NAMES[kind]).format(k=found[1], h=found[2])
    if terse and rng.random() < 0.6:
        dot = rng.choice((".", ".", ""))
        new = " ".join(cut(word, dot, rng) for word in new.split())
    return words if new in TAKEN else new


def cut(word: str, dot: str, rng: random.Random) -> str:
    """A long word shortened to its first letters."""
    return word[: rng.randint(3, 5)] + dot if re.fullmatch("[a-z]{6,}", word) and rng.random() < 0.7 else word


def graded(system: str, grade: int, fixed: Wording, rng: random.Random) -> str:
    """A template for the grade: one of the fixed styles' or one of this file's."""
    low, well, poor = _SCALE[grade]
    gleason, total = _GLEASON[grade]
    new = rng.choice(_SYSTEMS[system]).format(
        g=grade, R=ROMAN[grade], low=low, well=well, poor=poor, gl=gleason, sum=total
    )
    return new if new not in TAKEN and rng.random() < 0.6 else rng.choice((fixed.full, fixed.short))


def placed(organ: str, sided: bool, rng: random.Random) -> str:
    """A template of where: the place, its side, and the organ where the place does not name it."""
    place = "{site}" if not organ else rng.choice(("{site} of the " + organ, organ + ", {site}", organ + " - {site}", organ + " {site}", "{site}, " + organ, organ + ": {site}"))
    if not sided:
        return place
    return rng.choice((place + ", {side}", place + " - {side}", "{side} " + place, place + " ({side} side)", place + ", {side} side", "{side}-sided " + place, place + " to the {side}", "{side} side, " + place, place + " / {side}"))  # fmt: skip


def varied(surgical: bool, rng: random.Random) -> Style:
    """A style drawn from `rng`. `surgical`: the case's tumor is one that is cut out and reported by parts."""
    pick = rng.choice
    listed = rng.random() < 0.45
    terse = rng.random() < 0.35
    parts = listed and surgical and rng.random() < 0.5
    fixed = BANKS[pick(("clinic", "terse", "dictated", "board", "nursing", "surgical")) if not terse else "terse"]
    separator = pick((": ", " - ", ": ", " -> ", " .. ", "; ", " ", ":  ", "> "))
    case = pick((str, str.upper, str.lower, str))
    bank = dict(fixed)
    for key in ("no_size", "no_grade", "no_stage", "no_rec", "ros", "exam", "labs", "plan", "neg", "d_side", "open"):
        bank[key] = fixed.get(key) or BANKS["clinic"][key]
    lines = parts or rng.random() < 0.5
    for key, templates in (_labelled(rng, separator, case) if listed else _spoken(rng)).items():
        told = templates if lines or not listed else tuple(one + "." for one in templates)
        bank[key] = told + (fixed.get(key, ()) if key.startswith("d_") else ())
    sides = pick((("left", "right"), ("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"), ("Lt.", "Rt."), ("l.", "r.")))  # fmt: skip
    words = {key: tuple(rng.sample(forms, min(3, len(forms)))) for key, forms in _RESULTS.items()}
    words |= {
        "size": _SIZES, "join": tuple(rng.sample(_JOIN, 4)), "stage": tuple(rng.sample(_STAGES, 3)),
        "left": (sides[0],), "right": (sides[1],), "bilateral": (pick(("bilateral", "two-sided", "bilat.")),),
        "listing": (pick((", ", "; ", " and ", " + ", ". ")),),
    }  # fmt: skip
    order = pick(_LISTED if parts else _ORDERS)
    layout = pick(_TITLES) + "\n" + (re.sub(r"<~(?!\|)", "<~|", order) if listed and lines else order)
    return Style("varied", (layout,), bank, words, pathology=surgical and rng.random() < 0.4, terse=terse, varied=True)


def _labelled(rng: random.Random, separator: str, case: type[str]) -> dict[str, tuple[str, ...]]:
    """Facts as lines "Label: value", each label drawn once a note; what is not an answer says so in its label."""
    name = {key: case(rng.choice(forms)).replace("{YEAR}", "{year}") for key, forms in LABELS.items()}
    old = case(rng.choice(_OLD))
    bank = {key: (f"{name[key]}{separator}{{{key}}}",) for key in ("hist", "site", "side", "grade", "stage", "rec", "family")}
    bank["dx"] = (f"{name['dx']}{separator}{{dx}}", f"{name['dx']}{separator}{{dx}}, {{grade}}", f"{name['dx']}{separator}{{dx}}; {{size}}")
    bank["size"] = (f"{name['size']}{separator}{{size}}", f"{name['size']}{separator}{{size}}, second focus {{size_less}}", f"{name['size']}{separator}{{size}} ({old}{separator}{{size_old}})")
    bank["prior"] = (f"{name['prior']}{separator}{{rival}}", f"{name['prior']} {{year}}{separator}{{rival}}")
    bank["d_size"] = (f"{name['size']} ({old}){separator}{{size_old}}", case("margin") + separator + "{mm} mm", "{benign}" + separator + "{size_any}", "{need_nodes}" + case("node deposit") + separator + "{mm} mm", case("scar") + separator + "{size_small}")
    bank["d_grade"] = (f"{name['grade']} ({old}){separator}{{grade_old}}", case("toxicity") + separator + "grade {g} fatigue", case("regression") + separator + "grade {g}")
    bank["d_stage"] = (f"{name['stage']} ({old}){separator}{{stage_old}}", f"{name['stage']} ({old}){separator}{{tnm_old}}", case("kidneys") + separator + "CKD stage 3")
    bank["d_site"] = (f"{name['hist']} ({old}){separator}{{other_type}}", f"{name['site']} ({old}){separator}{{other_site}}", case("not involved") + separator + "{other_site}", f"{{need_paired}}{name['side']} ({old}){separator}{{other_side}}", case("excluded") + separator + "{other_type}")
    bank["d_rec"] = (f"{{need_breast}}{name['rec']} ({old}){separator}{{rec_old}}",)
    return bank


def _spoken(rng: random.Random) -> dict[str, tuple[str, ...]]:
    """Facts in sentences put together from pieces."""

    def of(*pieces: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(" ".join(" ".join(rng.choice(piece) for piece in pieces).split()) for _ in range(3))

    measures = ("measures", "is", "has a diameter of", "reaches", "extends over", "was sized at", "came out at", "is given as", "takes up", "is put at", "=")
    tails = (".", ".", " by the pathologist.", " on the final report.", " at its largest.", " in the specimen.", " as of now.")
    called = ("is", "was read as", "was called", "came back", "looks", "was rated", "has been signed out as", "is classed as")
    source, past = rng.choice(_FROM), rng.choice(_OLD)
    size = tuple(re.sub(r" \.", ".", one) for one in of(_IT, measures, ("{size}",), tails))
    two = ("Two tumors, {size} and {size_less}.", f"{{size}}, not {{size_old}} as {source} said.", f"{rng.choice(_IT)}: {{size}} (beside it a smaller one, {{size_less}}).", f"{{size}} now; {{size_old}} {past}.")
    return {
        "dx": of(_LEAD, ("{dx}.",)) + of(_LEAD, ("{dx}, {grade}.", "{dx}, {size}.", "{dx}; {stage}.")),
        "size": size + tuple(rng.sample(two, 2)),
        "grade": of(_IT, called, ("{grade}.",)) + ("{grade}.",), "stage": of(("this makes", "overall", "we staged it as", "the extent corresponds to", "final staging gives", "it stands at", "counted as"), ("{stage}.",)),
        "rec": of(("receptor tests:", "the tumor cells:", "receptors are", "staining gave", "marker results,", "panel:"), ("{rec}.",)),
        "prior": of(_PAST, ("{rival}.",)), "family": of(_KIN, ("{family}.",)),
        "d_size": (f"{source} had it at {{size_old}}, which is {past}.", "a {benign} of {size_any} needs nothing.", "clear by {mm} mm at the edge.", f"({past}) {rng.choice(_IT)} {rng.choice(measures)} {{size_old}}."),
        "d_grade": (f"{source} had {{grade_old}}, {past}.", "side effects: grade {g} neuropathy.", f"({past}) {rng.choice(_IT)} {rng.choice(called)} {{grade_old}}."),
        "d_stage": (f"by {source}, {past}: {{stage_old}}.", f"({past}) {{tnm_old}}.", "chronic kidney disease stage 3 is known."),
        "d_site": (f"{source} wrote {{other_type}}, {past}.", "{other_site}: nothing found.", f"{{need_paired}}{source} wrote {{other_side}}, {past}.", f"{source} named the {{other_site}}, {past}."),
        "d_rec": (f"{{need_breast}}{source} had {{rec_old}}, {past}.",),
    }  # fmt: skip
