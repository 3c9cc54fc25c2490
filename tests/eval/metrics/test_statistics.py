"""Intervals cover what they say, over patients; the p-value is the same interval read the other way."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics.statistics import FEWEST, interval, paired, slope, t_quantile, two_sided_p

TRIALS = 1000


def rates(kind, mean, rng, shape):
    """Each patient's chance of a right answer: all the same, or spread widely around the mean."""
    return np.full(shape, mean) if kind == "alike" else rng.beta(2 * mean, 2 * (1 - mean), shape)


@pytest.mark.parametrize("patients", [10, 30])
@pytest.mark.parametrize("mean", [0.05, 0.5, 0.95])
@pytest.mark.parametrize(("kind", "most"), [("alike", 1), ("alike", 6), ("spread", 6)])
def test_the_interval_covers_the_mean(patients, mean, kind, most):
    """At least 93 % of the samples, with no slack taken for chance."""
    rng, hits = np.random.default_rng([patients, int(100 * mean), most]), 0
    for _ in range(TRIALS):
        counts = rng.integers(max(1, most // 2), most + 1, patients)
        right = rng.binomial(counts, rates(kind, mean, rng, patients))
        values = np.concatenate([[100.0] * r + [0.0] * (c - r) for r, c in zip(right, counts, strict=True)])
        low, high = interval(values, np.repeat(np.arange(patients), counts).tolist())
        hits += low <= 100 * mean <= high
    assert hits >= 0.93 * TRIALS


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (0.5, 0.7), (0.95, 0.95), (0.05, 0.1)])
@pytest.mark.parametrize("patients", [10, 30])
def test_the_interval_of_a_difference_covers_it(patients, a, b):
    """B shares A's answers but for those that it draws anew; p < 0.05 as often as 0 lies outside."""
    rng, hits = np.random.default_rng([patients, int(100 * b)]), 0
    for _ in range(TRIALS):
        chance = rng.random((patients, 3))
        first, second = 100.0 * (chance < a), 100.0 * (chance < b)
        again = rng.random((patients, 3)) < 0.3
        second[again] = 100.0 * (rng.random(int(again.sum())) < b)
        found = paired(first.ravel(), second.ravel(), np.repeat(np.arange(patients), 3).tolist())
        hits += found["low"] <= 100 * (b - a) <= found["high"]
        assert (found["p"] < 0.05) == (not found["low"] <= 0 <= found["high"])
    assert hits >= 0.93 * TRIALS


percents = st.sampled_from([0.0, 25.0, 50.0, 80.0, 100.0])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(percents, percents, st.integers(0, 14)), min_size=10, max_size=60))
def test_the_interval_holds_the_mean_has_width_and_agrees_with_p(rows):
    a, b, patients = zip(*rows, strict=True)
    low, high = interval(a, patients)
    found = paired(a, b, patients)
    if len(set(patients)) < FEWEST:
        assert low is high is found["low"] is found["high"] is found["p"] is None
        return
    assert 0 <= low < high <= 100 and low - 1e-9 <= np.mean(a) <= high + 1e-9
    assert -100 <= found["low"] < found["high"] <= 100
    assert (found["p"] < 0.05) == (not found["low"] <= 0 <= found["high"]) and 0 <= found["p"] <= 1
    assert found["low"] - 1e-9 <= found["difference"] <= found["high"] + 1e-9


def test_nearly_all_right_is_close_to_all_right():
    all_right, nearly = interval([100.0] * 10, range(10)), interval([100.0] * 9 + [90.0], range(10))
    assert abs(all_right[0] - nearly[0]) < 2 and all_right[1] == nearly[1] == 100


def test_one_patients_questions_are_not_independent():
    values = [0.0] * 60 + [100.0] * 60
    apart, together = interval(values, range(120)), interval(values, [i // 10 for i in range(120)])
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])


def test_same_systems_do_not_differ():
    found = paired([5.0] * 12, [5.0] * 12, range(12))
    assert found["p"] == 1 and found["low"] == -found["high"] < 0


def test_a_slope_of_one_patient_repeated_is_that_of_its_means():
    values = [[100, 0, 50] * 10, [50, 0, 40] * 10, [0, 0, 30] * 10]
    found = slope([0, 1, 2], values, range(30))
    assert math.isclose(found["slope"], -20) and found["low"] < -20 < found["high"]
    assert slope([0, 1, 2], [row[:3] for row in values], "abc") == {"slope": found["slope"], "low": None, "high": None}


@pytest.mark.parametrize("degrees", [1, 2, 9, 22, 39, 200])
def test_students_t_is_the_integral_of_its_density(degrees):
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    for t in (0.0, 0.3, 1.0, 2.5, 8.0):
        grid = np.linspace(-t, t, 20001)
        density = constant * (1 + grid**2 / degrees) ** (-(degrees + 1) / 2)
        within = ((density[1:] + density[:-1]) / 2 * np.diff(grid)).sum()
        assert two_sided_p(t, degrees) == pytest.approx(1 - within, abs=1e-6)
    assert two_sided_p(t_quantile(degrees), degrees) == pytest.approx(0.05)
