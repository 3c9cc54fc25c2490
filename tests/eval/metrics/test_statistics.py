"""Intervals draw patients, never claim certainty from sameness, and cover what they say that they cover."""

import numpy as np
import pytest

from eval.metrics.statistics import interval, paired


def test_one_patients_questions_are_not_independent():
    values = [0.0] * 20 + [100.0] * 20
    apart, together = interval(values, range(40)), interval(values, [i // 10 for i in range(40)])
    assert together[1] - together[0] > 1.5 * (apart[1] - apart[0])


def test_all_right_is_not_certain():
    for n in (1, 3, 10, 40):
        low, high = interval([100.0] * n, range(n))
        assert high == 100 and low == pytest.approx(100 * 0.025 ** (1 / n))
        assert interval([0.0] * n, range(n)) == (0.0, pytest.approx(100 - low))
    assert interval([50.0, 100.0], ["a", "a"]) == (0.0, 100.0)
    low, high = interval([50.0] * 3, range(3))
    assert low == 0 and high == 100


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), 0
    for trial in range(200):
        rates = rng.beta(4, 2, size=40)
        values = 100.0 * (rng.random((40, 6)) < rates[:, None])
        low, high = interval(values.ravel().tolist(), np.repeat(np.arange(40), 6).tolist(), seed=trial)
        hits += low <= 100 * 4 / 6 <= high
    assert 180 <= hits <= 198


def test_same_input_same_bits():
    values, patients = [10.0, 50.0, 90.0, 20.0], ["a", "b", "c", "c"]
    assert interval(values, patients) == interval(values, patients)


def test_paired_counts_every_flip_of_few_patients():
    result = paired([0.0] * 4, [100.0] * 4, range(4))
    assert result["difference"] == 100 and result["p"] == 2 / 16 and (result["better"], result["worse"]) == (4, 0)
    assert result["low"] < 100
    assert paired([5.0, 7.0], [5.0, 7.0], "ab")["p"] == 1


def test_paired_p_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(0)
    small = sum(paired(*(100.0 * rng.integers(0, 2, (2, 30))), range(30), seed=s)["p"] <= 0.1 for s in range(100))
    assert 2 <= small <= 20


def test_paired_sees_a_real_difference():
    rng = np.random.default_rng(3)
    a = 100.0 * (rng.random(60) < 0.5)
    assert paired(a.tolist(), np.maximum(a, 100.0 * (rng.random(60) < 0.5)).tolist(), range(60))["p"] < 0.001
