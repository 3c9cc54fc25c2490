"""How far a mean can be trusted: intervals and tests that draw patients, because one patient's questions hang together.

`interval` is the percentile bootstrap over patients. Where it would claim certainty (every patient alike at 0 or 100,
or one patient alone) the exact binomial bound on patients takes its place: 10 patients all right say "at least 69 %",
not "100 ± 0".

    >>> low, high = interval([100.0] * 10, list("abcdefghij"))
    >>> round(low, 1), high
    (69.2, 100.0)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

DRAWS = 2000


def interval(
    values: Sequence[float], patients: Sequence[Hashable], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The interval of the mean of `values` (percent), resampling whole patients. The same input gives the same bits."""
    sums, counts = _by_patient(values, patients)
    n, tail = len(sums), (1 - level) / 2
    means = sums / counts
    if (means == 100).all():
        return 100 * tail ** (1 / n), 100.0
    if (means == 0).all():
        return 0.0, 100 * (1 - tail ** (1 / n))
    if n == 1:
        return 0.0, 100.0
    drawn = _draws(n, seed)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), (tail, 1 - tail))
    if low == high:  # patients alike, though not at a bound
        room = 100 * (1 - tail ** (1 / n))
        low, high = max(0.0, low - room), min(100.0, high + room)
    return float(low), float(high)


def paired(a: Sequence[float], b: Sequence[float], patients: Sequence[Hashable], seed: int = 0) -> dict[str, float]:
    """What system B adds to system A on the same questions: the difference of means, its interval, and the p-value of a
    test that flips the sign of whole patients' differences (all 2^n flips up to 12 patients, else 10,000 drawn
    ones)."""
    difference, counts = _by_patient([y - x for x, y in zip(a, b, strict=True)], patients)
    n = len(difference)
    observed = float(difference.sum() / counts.sum())
    drawn = _draws(n, seed)
    low, high = np.quantile((drawn @ difference) / (drawn @ counts), (0.025, 0.975))
    if low == high:  # every patient alike, or one alone: no certainty, but the binomial bound on patients
        room = 100 * (1 - 0.025 ** (1 / n))
        low, high = max(-100.0, observed - room), min(100.0, observed + room)
    if n <= 12:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        extreme, total = _extreme(signs, difference), 2**n
    else:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(10_000, n))
        extreme, total = _extreme(signs, difference) + 1, 10_001
    return {
        "difference": observed,
        "low": float(low),
        "high": float(high),
        "p": extreme / total,
        "n": len(a),
        "patients": n,
        "better": int((np.asarray(b) > np.asarray(a)).sum()),
        "worse": int((np.asarray(b) < np.asarray(a)).sum()),
    }


def slope(
    x: Sequence[float], values: Sequence[Sequence[float]], patients: Sequence[Hashable], seed: int = 0
) -> dict[str, float]:
    """The least-squares slope of the mean against x, where the same questions were answered at every x (`values[i]` at
    x[i]), with the interval from resampling whole patients.

    >>> falling = slope([0, 1, 2], [[100, 100], [50, 60], [0, 20]], ["a", "b"])
    >>> falling["slope"], falling["low"], falling["high"]
    (-45.0, -50.0, -40.0)
    """
    sums_XP, counts = zip(*(_by_patient(row, patients) for row in values), strict=True)
    centred = np.asarray(x, dtype=float) - np.mean(x)
    weights_X = centred / (centred**2).sum()
    means = np.asarray([sums.sum() for sums in sums_XP]) / counts[0].sum()
    drawn = _draws(len(counts[0]), seed)
    means_DX = (drawn @ np.asarray(sums_XP).T) / (drawn @ counts[0])[:, None]
    low, high = np.quantile(means_DX @ weights_X, (0.025, 0.975))
    return {"slope": float(means @ weights_X), "low": float(low), "high": float(high)}


def _extreme(signs: np.ndarray, difference: np.ndarray) -> int:
    return int((np.abs(signs @ difference) >= abs(difference.sum()) - 1e-9).sum())


def _by_patient(values: Sequence[float], patients: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    places = {patient: place for place, patient in enumerate(dict.fromkeys(patients))}
    index = np.array([places[patient] for patient in patients], dtype=int)
    counts = np.bincount(index, minlength=len(places)).astype(float)
    return np.bincount(index, weights=np.asarray(values, dtype=float), minlength=len(places)), counts


def _draws(n: int, seed: int) -> np.ndarray:
    """How often each of n patients is drawn, one row a resample."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float)
