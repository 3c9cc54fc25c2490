"""Example notes with answers marked in the text: right, wrong, missed."""

from __future__ import annotations

from typing import Any

from eval.failures import is_right
from eval.metrics.text import clinical
from eval.questions import Question, questions_of

Json = dict[str, Any]
_ORDER = ("right", "wrong", "missed")  # of overlapping marks the last in this order is shown


def examples(references: list[Json], predictions: list[Json], count: int) -> list[Json]:
    """Up to `count` notes, evenly spaced over the file, each with its questions and its text split at the marks."""
    by_id = {record["id"]: record for record in reversed(predictions)}
    answered = [record for record in references if record["id"] in by_id]
    step = max(1, len(answered) // count) if count else 1
    return [_example(record, by_id[record["id"]]) for record in answered[::step][:count]]


def _example(record: Json, prediction: Json) -> Json:
    rows, marks = [], []
    for one in questions_of(record, prediction):
        right = is_right(one)
        rows.append(
            {
                "question": one.name,
                "right": right,
                "gold": "; ".join(one.gold) or "not relevant",
                "answered": "; ".join(one.predicted) or ("(empty)" if one.empty_output else "not relevant"),
            }
        )
        if one.task == "phenotype":
            marks += _marks(record, prediction, one, right)
    return {"id": record["id"], "style": record.get("style", ""), "rows": rows, "pieces": pieces(record["text"], marks)}


def _marks(record: Json, prediction: Json, one: Question, right: bool) -> list[tuple[int, int, str, str]]:
    """(start, end, kind, question) of each answer at its own offsets, and of each missed span at the annotation's."""
    spans = record["phenotypes"][one.name]
    gold = [span for span in spans if isinstance(span, dict) and span.get("start") is not None]
    found = prediction.get("phenotypes", {}).get(one.name)
    given = found.get("answers") or [] if isinstance(found, dict) else []
    placed = [answer for answer in given if isinstance(answer, dict) and answer.get("start") is not None]
    gold_forms = {clinical(span["text"]) for span in gold}
    placed_forms = {clinical(answer["text"]) for answer in placed}
    marks = []
    for answer in placed:
        kind = "right" if right or clinical(answer["text"]) in gold_forms else "wrong"
        marks.append((answer["start"], answer["end"], kind, one.name))
    for span in gold:
        if clinical(span["text"]) not in placed_forms:  # answered without offsets, or missed
            answered = right or span["text"] in one.predicted
            marks.append((span["start"], span["end"], "right" if answered else "missed", one.name))
    return marks


def pieces(text: str, marks: list[tuple[int, int, str, str]]) -> list[Json]:
    """`text` split at the marks' ends; each piece has the kind to show it in and the questions that it answers."""
    size = len(text)
    marks = [(max(0, start), min(size, end), kind, name) for start, end, kind, name in marks if start < end]
    edges = sorted({0, size, *(edge for start, end, *_ in marks for edge in (start, end) if edge <= size)})
    found = []
    for start, end in zip(edges, edges[1:], strict=False):
        over = [mark for mark in marks if mark[0] <= start and end <= mark[1]]
        kind = max((mark[2] for mark in over), key=_ORDER.index, default="")
        names = "; ".join(dict.fromkeys(f"{mark[3].replace('_', ' ')}: {mark[2]}" for mark in over))
        found.append({"text": text[start:end], "kind": kind, "names": names})
    return found
