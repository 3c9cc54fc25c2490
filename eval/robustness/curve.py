"""F1 against the rate of corruption, with the same questions at every rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.metrics.statistics import format_interval, slope
from eval.questions import Question, f1_of, figures, pair, paired_f1, read_predictions, read_references
from eval.score import groups
from model.support.cli import UserError

Json = dict[str, Any]
TASKS = ("phenotype", "diagnosis")


def name_of(rate: float) -> str:
    """A rate as part of a file name, in tenths of a percent."""
    return f"rate-{round(1000 * rate):03d}"


def check_rates(rates: Sequence[float]) -> None:
    """Raises UserError unless the rates are within 0 … 1, have distinct names and include 0."""
    option = f"--rates {' '.join(map(str, rates))}"
    if 0.0 not in rates or any(not 0 <= rate <= 1 for rate in rates):
        raise UserError(f"{option}: give rates between 0 and 1, including 0")
    if len(set(map(name_of, rates))) < len(rates):
        raise UserError(f"{option}: two of them are the same tenth of a percent")


def questions(references: Path, predictions: Path, limit: int = 0) -> list[Question]:
    """The questions of the first `limit` references (0: all), paired with these predictions."""
    return pair(read_references(references)[: limit or None], read_predictions(predictions))[0]


def curve(series: Mapping[str, Mapping[float, list[Question]]]) -> Json:
    """Each series' figures at each rate, and the slope of its average F1 per ten percentage points of rate.

    {"rates", "patients", "series": {name: {"rates", "phenotype": [figures, …], "phenotype, unanswerable": …,
    "diagnosis": …, "slope": {task: {"slope", "low", "high"}}}}}
    """
    found: Json = {"rates": sorted({rate for asked in series.values() for rate in asked}), "series": {}}
    for name, asked in series.items():
        rates = sorted(asked)
        split = {rate: groups(asked[rate]) for rate in rates}
        entry: Json = {"rates": rates, "slope": {}}
        for task in split[rates[0]]:
            entry[task] = [figures(split[rate][task]) for rate in rates]
        for task in TASKS:
            rows = [[f1_of(one, "average_f1") for one in split[rate][task]] for rate in rates]
            if len(rates) > 1 and rows[0]:
                patients = [one.patient for one in split[rates[0]][task]]
                entry["slope"][task] = slope([10 * rate for rate in rates], rows, patients)
        found["series"][name] = entry
        found["patients"] = len({one.patient for one in asked[rates[0]]})
    return found


def recovery(clean: Sequence[Question], corrupted: Sequence[Question], repaired: Sequence[Question]) -> Json:
    """For each task: the average F1 lost to corruption, the part recovered by repair (with interval and p-value), and
    their ratio, null if less than one point was lost, where it would be noise."""
    found: Json = {}
    for task in TASKS:
        before, after, fixed = (groups(list(asked))[task] for asked in (clean, corrupted, repaired))
        loss, gain = paired_f1(before, after, "average_f1"), paired_f1(after, fixed, "average_f1")
        if loss and gain:
            lost, recovered = -loss["difference"], gain["difference"]
            found[task] = {key: gain[key] for key in ("low", "high", "p", "n")}
            found[task] |= {"lost": lost, "recovered": recovered, "share": recovered / lost if lost >= 1 else None}
    return found


def text_table(part: Json) -> str:
    """The curve as text: average F1 with its interval at every rate, one column per series and task."""
    columns = [(name, task) for name in part["series"] for task in TASKS if part["series"][name].get(task, [None])[0]]
    width = max(24, *(len(f"{name}, {task}") for name, task in columns))
    lines = [f"{'rate':>5}  " + "  ".join(f"{f'{name}, {task}':<{width}}" for name, task in columns)]
    for rate in part["rates"]:
        cells = []
        for name, task in columns:
            entry = part["series"][name]
            figure = entry[task][entry["rates"].index(rate)]["average_f1"] if rate in entry["rates"] else None
            cells.append(f"{figure['f1']:5.1f} {format_interval(figure['low'], figure['high'])}" if figure else "–")
        lines.append(f"{100 * rate:>4.0f}%  " + "  ".join(f"{cell:<{width}}" for cell in cells))
    for name, task in columns:
        if one := part["series"][name]["slope"].get(task):
            lines.append(
                f"{name}, {task}: {one['slope']:+.2f} {format_interval(one['low'], one['high'], 2)} points of average "
                "F1 for ten points of rate"
            )
    return "\n".join(lines)


def recovery_lines(rows: Sequence[Json]) -> list[str]:
    """The results of `recovery` as text."""
    lines = []
    for row in rows:
        for task in (task for task in TASKS if task in row):
            one = row[task]
            share = "" if one["share"] is None else f", {100 * one['share']:.0f} % of it"
            lines.append(
                f"at {100 * row['rate']:.0f} %, {task}: lost {one['lost']:.1f}, recovered "
                f"{one['recovered']:+.1f} {format_interval(one['low'], one['high'])}{share}"
            )
    return lines
