"""How far a mean can be trusted: one interval, over patients, because one patient's questions are correlated.

`interval` adds two patients of average size to those that were seen, one with every answer right and one with every
answer wrong, and takes the cluster-robust t-interval of the mean of all, with n - 1 degrees of freedom for n patients.
With one binary question a patient this is close to Agresti and Coull's interval; the added patients keep it from zero
width where all patients are alike, and keep its coverage near 0 and 100, where the plain t-interval covers 83 to 88 %
(simulated; tests/eval/metrics/test_statistics.py requires at least 93 % of this one). `paired` is the same interval of
differences, whose bounds are -100 and 100, and its p-value inverts it: p < 0.05 where 0 lies outside. Fewer than 10
patients have no interval.

It says how the mean varies between samples of *patients*; another training of the same model varies beyond it.

    >>> low, high = interval([100.0] * 10, list("abcdefghij"))
    >>> round(low, 1), high
    (72.8, 100.0)
    >>> low, high = interval([100.0] * 9 + [90.0], list("abcdefghij"))
    >>> round(low, 1), high
    (72.1, 100.0)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

FEWEST = 10
"""Patients below which no interval is given."""
Interval = tuple[float, float] | tuple[None, None]


@dataclass(frozen=True)
class _Estimate:
    """The mean of n patients and of two more at the bounds, with its standard error."""

    centre: float
    error: float
    patients: int

    def interval(self, bounds: tuple[float, float]) -> Interval:
        if self.patients < FEWEST:
            return None, None
        half_width = t_quantile(self.patients - 1) * self.error
        return max(bounds[0], self.centre - half_width), min(bounds[1], self.centre + half_width)

    def p(self) -> float | None:
        """Of a true mean of 0."""
        return None if self.patients < FEWEST else two_sided_p(self.centre / self.error, self.patients - 1)


def interval(
    values: Sequence[float], patients: Sequence[Hashable], bounds: tuple[float, float] = (0.0, 100.0)
) -> Interval:
    """The 95 % interval of the mean of `values` (each within `bounds`); (None, None) below 10 patients."""
    return _estimate(values, patients, bounds).interval(bounds)


def paired(a: Sequence[float], b: Sequence[float], patients: Sequence[Hashable]) -> dict[str, float | None]:
    """What system B adds to system A on the same questions (percent): the difference of means, its interval and the
    p-value that inverts it, and how many questions are better and worse."""
    difference = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    bounds = (-100.0, 100.0)
    estimate = _estimate(difference, patients, bounds)
    low, high = estimate.interval(bounds)
    return {
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "p": estimate.p(),
        "n": len(difference),
        "patients": estimate.patients,
        "better": int((difference > 0).sum()),
        "worse": int((difference < 0).sum()),
    }


def slope(
    x: Sequence[float], values: Sequence[Sequence[float]], patients: Sequence[Hashable]
) -> dict[str, float | None]:
    """The least-squares slope of the mean against x, where the same questions were answered at every x (`values[i]` at
    x[i], percent): the mean of each question's own slope, with the interval of that mean.

    >>> falling = slope([0, 1, 2], [[100, 100], [50, 60], [0, 20]], ["a", "b"])
    >>> falling["slope"], falling["low"]
    (-45.0, None)
    """
    centred = np.asarray(x, dtype=float) - np.mean(x)
    weights_X = centred / (centred**2).sum()
    steepest = 100 * np.abs(weights_X).sum() / 2
    slopes = weights_X @ np.asarray(values, dtype=float)
    low, high = interval(slopes.tolist(), patients, (-steepest, steepest))
    return {"slope": float(slopes.mean()), "low": low, "high": high}


def format_interval(low: float | None, high: float | None, digits: int = 1) -> str:
    """The interval in brackets; nothing where there is none."""
    return "" if low is None or high is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def format_f1(figures: Mapping[str, Any] | None, digits: int = 1) -> str:
    """An F1 with its interval (`digits` after the point); "–" where nothing was asked."""
    if not figures:
        return "–"
    return f"{figures['f1']:.1f} {format_interval(figures['low'], figures['high'], digits)}".rstrip()


def format_p(p: float | None) -> str:
    return "" if p is None else f"p = {p:.4f}" if p >= 1e-4 else "p < 0.0001"


def _estimate(
    values: Sequence[float] | np.ndarray, patients: Sequence[Hashable], bounds: tuple[float, float]
) -> _Estimate:
    places = {patient: place for place, patient in enumerate(dict.fromkeys(patients))}
    index = [places[patient] for patient in patients]
    sums_P = np.bincount(index, weights=np.asarray(values, dtype=float))
    counts_P = np.bincount(index).astype(float)
    typical = counts_P.mean()
    sums_P = np.append(sums_P, np.asarray(bounds) * typical)
    counts_P = np.append(counts_P, (typical, typical))
    centre = float(sums_P.sum() / counts_P.sum())
    residuals_P = sums_P - centre * counts_P
    n = len(sums_P)
    error = math.sqrt((residuals_P**2).sum() * n / (n - 1)) / float(counts_P.sum())
    return _Estimate(centre, error, len(places))


# Student's t with a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).


def two_sided_p(t: float, degrees: int) -> float:
    """The probability of a value as far from 0 as t, on either side."""
    angle = math.atan2(abs(t), math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= (k - 1) / k * cosine**2
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1 - within)


@cache
def t_quantile(degrees: int, level: float = 0.95) -> float:
    """The t within which `level` of the distribution lies."""
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, degrees) > 1 - level else (low, middle)
    return high
