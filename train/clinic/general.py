"""Notes of patients without cancer, for the general text that a nano base learns English and numbers from."""

from __future__ import annotations

import random

from train.clinic.markup import choose, fill, sentence
from train.clinic.terms import read

GENERAL = read("general")


def general_note(rng: random.Random) -> str:
    """One note of a person who has no cancer."""
    size = rng.choice(("{x} cm", "{x} x {y} cm", "{m} mm"))
    side = rng.choice(("left", "right"))

    def slot(name: str) -> str:
        if name == "problem":
            return fill(choose(rng.choice(GENERAL["problems"]), rng), slot)
        if name == "size":
            x, y = rng.randint(4, 60), rng.randint(3, 50)
            return size.replace("{x}", f"{x / 10:.1f}").replace("{y}", f"{y / 10:.1f}").replace("{m}", str(x))
        values = {
            "age": rng.randint(19, 92),
            "a": rng.randint(1, 4),
            "b": rng.randint(1, 9),
            "side": side,
            "year": rng.randint(1996, 2023),
            "date": f"{rng.randint(1, 12)}/{rng.randint(1, 28)}",
            "bp": f"{rng.randint(100, 170)}/{rng.randint(58, 96)}",
            "pulse": rng.randint(54, 112),
            "kg": rng.randint(48, 120),
            "kg2": rng.randint(50, 124),
            "plt": rng.randint(100, 400),
            "lobe": rng.choice(("upper lobe", "lower lobe")),
            "limb": rng.choice(("forearm", "shoulder", "thigh", "wrist", "calf")),
        }
        return str(values[name])

    sentences = GENERAL["sentences"]
    kinds = [sentences[0], *rng.sample(sentences[1:-1], rng.randint(4, 6)), sentences[-1]]
    return " ".join(sentence(fill(choose(rng.choice(kind), rng), slot)) for kind in kinds)
