"""Drift of confidences: against SciPy's test, false alarms on simulated answers, and power."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vlm_calibration.metrics.drift import drift_test

from ..performance.drift import LEVELS, SHARES, false_alarms

LOWER = np.array([0.02, 0.12, 0.14, 0.16, 0.20, 0.18, 0.12, 0.06])
# The mean of `SHARES`, with more answers at both ends.
WIDER = np.array([0.02, 0.13, 0.08, 0.05, 0.10, 0.17, 0.20, 0.25])


def draw(rng: np.random.Generator, n: int, shares: np.ndarray = SHARES) -> np.ndarray:
    return rng.choice(LEVELS, n, p=shares / shares.sum())


@pytest.mark.parametrize("power", [1.0, 1.4])
def test_without_ties_it_is_scipy_s_exact_test(power: float) -> None:
    rng = np.random.default_rng(3)
    reference, new = rng.permutation(1001)[:90] / 1000, (rng.permutation(1000)[:60] + 0.4) / 1000
    new = new**power
    ours, theirs = drift_test(reference, new, 20_000), stats.ks_2samp(reference, new, method="exact")
    assert ours.difference == pytest.approx(theirs.statistic, abs=0.02), "confidences are rounded"
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=0.25)


def test_neither_order_nor_last_digits_matter() -> None:
    rng = np.random.default_rng(5)
    reference, new = draw(rng, 200), draw(rng, 500, LOWER)
    assert drift_test(np.sort(reference), np.sort(new)) == drift_test(reference, new)
    assert drift_test(reference, reference[::-1]) == (0, 1)
    expected = rng.choice([0.8123456, 0.95, 0.9500004], 300)
    assert drift_test(expected, np.round(expected, 6)).p_value == 1


@pytest.mark.parametrize("correlation", [0.0, 0.25])
@pytest.mark.parametrize("questions", [1, 4, 18])
def test_false_alarms_are_rarer_than_the_error(questions: int, correlation: float) -> None:
    """As few as promised, and not none: one of several dependent answers about an image counts."""
    rate = false_alarms(questions, correlation, 200)
    # With a rate of exactly the error, more alarms than this come once in a thousand.
    assert 0 < rate <= stats.binom.ppf(0.999, 200, 0.05) / 200


@pytest.mark.parametrize(("shares", "n"), [(LOWER, 150), (WIDER, 300)], ids=["mean", "shape"])
def test_a_shift_of_mean_or_shape_is_found(shares: np.ndarray, n: int) -> None:
    rng = np.random.default_rng(6)
    tests = [drift_test(draw(rng, 500), draw(rng, n, shares), 199) for _ in range(50)]
    assert sum(test.p_value <= 0.05 for test in tests) >= 40


def test_unparsed_answers_are_a_level_of_their_own() -> None:
    test = drift_test(np.zeros(50), np.full(20, math.nan))
    assert test.difference == 1
    assert test.p_value < 0.01
