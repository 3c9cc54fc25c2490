# ruff: noqa: E501  (a table of wordings: one a line)
"""Notes of patients without cancer, for the general text that a nano base learns English and numbers from."""

from __future__ import annotations

import random

from train.clinic.markup import choose, fill, sentence

PROBLEMS: tuple[str, ...] = (
    "[poorly controlled|stable] hypertension", "type 2 diabetes, last A1c {a}.{b}", "[acute|chronic] low back pain", "community acquired pneumonia in the {side} {lobe}",
    "a simple cyst of the {side} kidney, {size}", "a benign fibroadenoma of the {side} breast, {size}", "a colloid nodule in the {side} lobe of the thyroid, {size}",
    "a {size} lipoma of the {side} {limb}", "a {side} {limb} fracture", "osteoarthritis of the {side} knee", "a {size} uterine fibroid", "an adrenal adenoma on the {side} measuring {size}",
    "chronic kidney disease stage {a}", "a stage {a} pressure ulcer of the {side} heel, {size}", "gastroesophageal reflux", "a hyperplastic polyp of the sigmoid colon, {size}",
    "a {size} stone in the {side} ureter", "an uncomplicated cataract of the {side} eye", "grade {a} ankle sprain on the {side}", "atrial fibrillation",
)  # fmt: skip
SENTENCES: tuple[tuple[str, ...], ...] = (
    ("{age}-year-old [man|woman] seen for {problem}.", "This is a {age} year old [male|female] with {problem}.", "Follow-up of {problem} in a [man|woman] of {age}."),
    ("Past history: {problem} and {problem}.", "Also known: {problem}.", "There is a background of {problem}.", "History of {problem}, treated in {year}."),
    ("Ultrasound shows {problem}, it was {size} before.", "[CT|MRI] of {date} again shows {problem}.", "Imaging was unremarkable.", "The lesion measured {size} in {year} and {size} today, clearly benign."),
    ("Blood pressure {bp}, pulse {pulse}, temperature 36.{b}.", "Vitals: BP {bp}, HR {pulse}, weight {kg} kg.", "Weight {kg} kg, down from {kg2} kg."),
    ("Hemoglobin 1{b}.{a}, platelets {plt}, creatinine 0.{b}.", "Sodium 13{b}, potassium {a}.{b}, glucose {plt}.", "Laboratory tests were normal."),
    ("No fever, no chills, no weight loss.", "Denies chest pain and shortness of breath.", "[Mild|Occasional] headache, no visual change.", "Sleep and appetite are [good|fair]."),
    ("Biopsy of the lesion was benign; no malignancy.", "No evidence of cancer.", "Screening was negative.", "No suspicious nodes on the {side}."),
    ("Plan: continue medication, return in {a} months.", "Advised rest and ibuprofen {plt} mg.", "Refer to [orthopedics|cardiology|surgery].", "Recheck in {a} weeks with repeat imaging."),
)  # fmt: skip


def general_note(rng: random.Random) -> str:
    """One note of a person who has no cancer."""
    size = rng.choice(("{x} cm", "{x} x {y} cm", "{m} mm"))
    side = rng.choice(("left", "right"))

    def slot(name: str) -> str:
        if name == "problem":
            return fill(choose(rng.choice(PROBLEMS), rng), slot)
        if name == "size":
            x, y = rng.randint(4, 60), rng.randint(3, 50)
            return size.replace("{x}", f"{x / 10:.1f}").replace("{y}", f"{y / 10:.1f}").replace("{m}", str(x))
        values = {
            "age": rng.randint(19, 92), "a": rng.randint(1, 4), "b": rng.randint(1, 9), "side": side, "year": rng.randint(1996, 2023),
            "date": f"{rng.randint(1, 12)}/{rng.randint(1, 28)}", "bp": f"{rng.randint(100, 170)}/{rng.randint(58, 96)}", "pulse": rng.randint(54, 112),
            "kg": rng.randint(48, 120), "kg2": rng.randint(50, 124), "plt": rng.randint(100, 400),
            "lobe": rng.choice(("upper lobe", "lower lobe")), "limb": rng.choice(("forearm", "shoulder", "thigh", "wrist", "calf")),
        }  # fmt: skip
        return str(values[name])

    kinds = [SENTENCES[0], *rng.sample(SENTENCES[1:-1], rng.randint(4, 6)), SENTENCES[-1]]
    return " ".join(sentence(fill(choose(rng.choice(kind), rng), slot)) for kind in kinds)
