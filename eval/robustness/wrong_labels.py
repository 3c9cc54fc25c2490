"""Wrong labels: training answers replaced by another record's answer of the same type (BioRAB's counterfactual test).

Within a type the wrong values come from a derangement: the values are shuffled once and each is replaced by the next
one in that circle, so none stays and none is invented. Which records are wrong is fixed by a number from each record's
id (the lowest are wrong), so the records wrong at 10 % are among those wrong at 20 %. The notes' texts are
untouched.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any


def place(record: Mapping[str, Any], seed: int = 0) -> float:
    """A record's place in [0, 1), decided by its id."""
    digest = hashlib.sha256(f"labels:{seed}:{record['id']}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def wrong_ids(records: Sequence[Mapping[str, Any]], rate: float, seed: int = 0) -> set[str]:
    """The ids of the records that are wrong at a rate: the nearest whole number of them."""
    ranked = sorted(records, key=lambda record: place(record, seed))
    return {record["id"] for record in ranked[: round(rate * len(ranked))]}


def derangement(values: Sequence[str], seed: int = 0) -> dict[str, str]:
    """{value: another value} over the distinct values; {} where there are fewer than two."""
    circle = sorted(set(values))
    if len(circle) < 2:
        return {}
    random.Random(seed).shuffle(circle)
    return dict(zip(circle, circle[1:] + circle[:1], strict=True))


def corrupt(records: Sequence[Mapping[str, Any]], rate: float, seed: int = 0) -> list[dict[str, Any]]:
    """The records, `rate` of them with every answer (the diagnosis too) replaced by a wrong one of its type.

    A wrong phenotype's span is null: it does not occur in the note. "Not relevant" stays, having no type's value.
    Raises ValueError where the rate is outside 0 … 1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"a rate of {rate} is not between 0 and 1")
    seen: dict[str, list[str]] = {}
    for record in records:
        for name, spans in (record.get("phenotypes") or {}).items():
            seen.setdefault(name, []).extend(span["text"] for span in spans)
        if record.get("diagnosis"):
            seen.setdefault("diagnosis", []).append(json.dumps(record["diagnosis"], sort_keys=True))
    wrong = {name: derangement(values, seed) for name, values in seen.items()}
    chosen = wrong_ids(records, rate, seed)
    changed = []
    for record in records:
        new = copy.deepcopy(dict(record))
        if record["id"] in chosen:
            for name, spans in (new.get("phenotypes") or {}).items():
                for span in spans:
                    if span["text"] in wrong[name]:
                        span |= {"text": wrong[name][span["text"]], "start": None, "end": None}
            if new.get("diagnosis") and wrong["diagnosis"]:
                new["diagnosis"] = json.loads(wrong["diagnosis"][json.dumps(new["diagnosis"], sort_keys=True)])
        changed.append(new)
    return changed
