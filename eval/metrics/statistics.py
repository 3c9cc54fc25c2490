"""95 % confidence intervals and paired tests, clustered by patient because one patient's questions are correlated.

`interval` adds two pseudo-patients of average size to the n that were seen, one with every answer right and one with
every answer wrong, and returns the cluster-robust t-interval of the mean over all, with n - 1 degrees of freedom. For
one binary question per patient this is close to the Agresti-Coull interval. The pseudo-patients keep the width above
zero where all patients agree, and keep the coverage for means near 0 and 100, where the plain t-interval covers only
83 to 88 % (simulated; tests/eval/metrics/test_statistics.py requires at least 93 % here). `paired` is the same interval
for differences, with bounds -100 and 100; its p-value inverts the interval: p < 0.05 exactly if 0 lies outside. Below
10 patients there is no interval.

The interval covers the sampling of *patients* only; repeated trainings of one model vary in addition.

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
"""No interval is given below this number of patients."""
Interval = tuple[float, float] | tuple[None, None]


@dataclass(frozen=True)
class _Estimate:
    """Mean over the patients and the two pseudo-patients at the bounds, with its standard error."""

    centre: float
    error: float
    patients: int

    def interval(self, bounds: tuple[float, float]) -> Interval:
        if self.patients < FEWEST:
            return None, None
        half_width = t_quantile(self.patients - 1) * self.error
        return max(bounds[0], self.centre - half_width), min(bounds[1], self.centre + half_width)

    def p(self) -> float | None:
        """Two-sided p-value of the hypothesis that the true mean is 0."""
        return None if self.patients < FEWEST else two_sided_p(self.centre / self.error, self.patients - 1)


def interval(
    values: Sequence[float], patients: Sequence[Hashable], bounds: tuple[float, float] = (0.0, 100.0)
) -> Interval:
    """95 % interval of the mean of `values` (each within `bounds`); (None, None) below 10 patients."""
    return _estimate(values, patients, bounds).interval(bounds)


def paired(a: Sequence[float], b: Sequence[float], patients: Sequence[Hashable]) -> dict[str, float | None]:
    """System B minus system A on the same questions, in percent: the difference of means with its interval and p-value,
    and how many questions got better and worse."""
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
    """Least-squares slope of the mean score against x, with its interval.

    `values[i]` holds the scores (percent) of all questions at x[i], the same questions at every x. The slope is the
    mean of the questions' own slopes, so the interval is that of a mean over patients.

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
    """The interval in brackets; "" if there is none."""
    return "" if low is None or high is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def format_f1(figures: Mapping[str, Any] | None, digits: int = 1) -> str:
    """An F1 with its interval (to `digits` decimals); "–" if there was no question."""
    if not figures:
        return "–"
    return f"{figures['f1']:.1f} {format_interval(figures['low'], figures['high'], digits)}".rstrip()


def format_p(p: float | None) -> str:
    return "" if p is None else f"p = {p:.4f}" if p >= 1e-4 else "p < 0.0001"


def _estimate(
    values: Sequence[float] | np.ndarray, patients: Sequence[Hashable], bounds: tuple[float, float]
) -> _Estimate:
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
    index = [numbers[patient] for patient in patients]
    sums_P = np.bincount(index, weights=np.asarray(values, dtype=float))
    counts_P = np.bincount(index).astype(float)
    average = counts_P.mean()
    sums_P = np.append(sums_P, np.asarray(bounds) * average)
    counts_P = np.append(counts_P, (average, average))
    centre = float(sums_P.sum() / counts_P.sum())
    residuals_P = sums_P - centre * counts_P
    n = len(sums_P)
    error = math.sqrt((residuals_P**2).sum() * n / (n - 1)) / float(counts_P.sum())
    return _Estimate(centre, error, len(numbers))


# Student's t for integer degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).


def two_sided_p(t: float, degrees: int) -> float:
    """Probability of a value at least as far from 0 as t."""
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
    """The t such that `level` of the distribution lies within ±t."""
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, degrees) > 1 - level else (low, middle)
    return high
