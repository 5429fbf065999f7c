"""Drift of confidences: a naive martingale, scipy, false alarms on simulated streams, and power."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vlm_calibration.metrics.drift import (
    BETS,
    BINS,
    anderson_darling,
    conformal_p_values,
    detect_drift,
    log_wealth,
    two_sample_p_value,
)

LEVELS = np.array([math.nan, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
SHARES = np.array([0.02, 0.05, 0.08, 0.10, 0.20, 0.25, 0.20, 0.10])
LOWER = np.array([0.02, 0.12, 0.14, 0.16, 0.20, 0.18, 0.12, 0.06])
# The mean of `SHARES`, with more answers at both ends.
WIDER = np.array([0.02, 0.13, 0.08, 0.05, 0.10, 0.17, 0.20, 0.25])
ERROR = 0.05


def draw(rng: np.random.Generator, n: int, shares: np.ndarray = SHARES) -> np.ndarray:
    return rng.choice(LEVELS, n, p=shares / shares.sum())


def naive_log_wealth(reference: list[float], new: list[float], u: np.ndarray) -> list[float]:
    """The martingale from its definition, answer by answer."""
    seen = [-1.0 if math.isnan(c) else c for c in reference]
    counts = {(bins, bet): [0.0] * bins for bins in BINS for bet in BETS}
    wealth = dict.fromkeys(counts, 1.0)
    logs = []
    for i, confidence in enumerate(new):
        value = -1.0 if math.isnan(confidence) else confidence
        seen.append(value)
        p = (sum(s < value for s in seen) + u[i] * sum(s == value for s in seen)) / len(seen)
        for (bins, bet), held in counts.items():
            memory, prior = bet
            b = min(int(p * bins), bins - 1)
            wealth[bins, bet] *= bins * (held[b] + prior) / (sum(held) + prior * bins)
            counts[bins, bet] = [(1 - 1 / memory) * h + (j == b) for j, h in enumerate(held)]
        logs.append(math.log(sum(wealth.values()) / len(wealth)))
    return logs


@pytest.mark.parametrize("kind", ["stated", "continuous"])
def test_the_wealth_is_that_of_a_naive_loop(kind: str) -> None:
    rng = np.random.default_rng(3)
    # More than one chunk of answers.
    reference, new = (
        (draw(rng, 200), draw(rng, 600, LOWER))
        if kind == "stated"
        else (rng.random(200), rng.random(600) ** 1.5)
    )
    u = np.random.default_rng(7).random(len(new))
    drift = detect_drift(reference, new, ERROR, seed=7)
    expected = naive_log_wealth(reference.tolist(), new.tolist(), u)
    assert drift.log_wealth == pytest.approx(expected, rel=1e-9, abs=1e-9)
    alarm = next((i for i, w in enumerate(expected, start=1) if w >= math.log(1 / ERROR)), None)
    assert alarm is not None
    assert drift.alarm == alarm


def test_a_longer_stream_continues_a_shorter_one() -> None:
    rng = np.random.default_rng(4)
    reference, new = draw(rng, 100), draw(rng, 700)
    whole = detect_drift(reference, new, ERROR).log_wealth
    assert np.array_equal(detect_drift(reference, new[:300], ERROR).log_wealth, whole[:300])


def test_the_order_of_the_reference_and_the_scale_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    reference, new = draw(rng, 200), draw(rng, 500, LOWER)
    drift = detect_drift(reference, new, ERROR)
    for same in (rng.permutation(reference), np.sort(reference)):
        assert np.array_equal(detect_drift(same, new, ERROR).log_wealth, drift.log_wealth)
        assert two_sample_p_value(same, new) == two_sample_p_value(reference, new)
    assert np.array_equal(detect_drift(reference**2, new**2, ERROR).log_wealth, drift.log_wealth)


def test_p_values_of_ties_are_uniform() -> None:
    """Even where all answers are the same: the random rank alone decides."""
    tied = conformal_p_values(np.full(50, 0.9), np.full(5000, 0.9))
    assert stats.kstest(tied, "uniform").pvalue > 0.01
    rng = np.random.default_rng(0)
    # Far in a stream, and each from a stream of its own.
    last = [conformal_p_values(draw(rng, 20), draw(rng, 30), seed)[[0, -1]] for seed in range(2000)]
    for p_values in np.array(last).T:
        assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert abs(stats.spearmanr(np.array(last)).statistic) < 0.06


def test_unparsed_answers_are_a_level_of_their_own() -> None:
    rng = np.random.default_rng(1)
    reference, new = draw(rng, 500), draw(rng, 500)
    new[rng.random(500) < 0.3] = math.nan
    assert detect_drift(reference, new, ERROR).alarm is not None
    assert two_sample_p_value(reference, new) < 0.001
    # Below 0%, not equal to it.
    assert conformal_p_values(np.zeros(99), np.array([math.nan]))[0] < 0.01


# --- Errors of the sequential test ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 1000])
def test_false_alarms_at_any_time_are_rarer_than_the_error(size: int) -> None:
    """The alarm looks at every answer: 1,200 streams of 1,000 answers, whose wealth may reach the line at any of them."""
    rng = np.random.default_rng(size)
    streams = 1200
    highest = np.array(
        [
            detect_drift(draw(rng, size), draw(rng, 1000), ERROR, seed).log_wealth.max()
            for seed in range(streams)
        ]
    )
    for error in (ERROR, 0.2):
        alarms = int((highest >= -math.log(error)).sum())
        # With a rate of exactly the error, more alarms than this come once in a thousand.
        assert alarms <= stats.binom.ppf(0.999, streams, error)
        assert alarms > 0, "a test that never gives an alarm would pass"
    assert (highest >= -math.log(ERROR)).mean() <= ERROR


def test_the_mean_wealth_of_fair_bets_is_one() -> None:
    """At the start, a fixed time and a random one that depends on the wealth."""
    rng = np.random.default_rng(2)
    wealth = np.exp([log_wealth(rng.random(60)) for _ in range(4000)])
    rises = wealth >= 1.5
    stopped = np.where(rises.any(1), rises.argmax(1), 59)
    for at in (np.zeros(4000, int), np.full(4000, 59), stopped):
        values = wealth[np.arange(4000), at]
        assert abs(values.mean() - 1) < 4 * values.std() / math.sqrt(4000) + 1e-12


@pytest.mark.parametrize(("shares", "within"), [(LOWER, 300), (WIDER, 500)], ids=["mean", "shape"])
@pytest.mark.parametrize("before", [0, 1000])
def test_a_shift_of_mean_or_shape_is_found(shares: np.ndarray, within: int, before: int) -> None:
    """Also where the stream begins like the reference."""
    rng = np.random.default_rng(6)
    found = 0
    for seed in range(50):
        stream = np.concatenate([draw(rng, before), draw(rng, within, shares)])
        alarm = detect_drift(draw(rng, 500), stream, ERROR, seed).alarm
        found += alarm is not None and alarm > before
    assert found >= 40


def test_the_wider_shares_have_the_same_mean() -> None:
    assert np.nansum(LEVELS * (WIDER - SHARES)) == pytest.approx(0, abs=0.005)


# --- The two-sample test --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(30, 50), (200, 15)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_statistic_is_scipy_s(sizes: tuple[int, int]) -> None:
    """scipy standardises it: (statistic - 1) / a constant of the sizes."""
    rng = np.random.default_rng(8)
    ours, theirs = [], []
    for _ in range(6):
        first, second = (rng.choice(LEVELS[1:], n) for n in sizes)
        pooled = np.concatenate([first, second])
        levels = np.unique(pooled)
        total, drawn = (
            np.bincount(np.searchsorted(levels, v), minlength=len(levels)) for v in (pooled, second)
        )
        ours.append(float(anderson_darling(total, drawn)))
        theirs.append(stats.anderson_ksamp([first, second]).statistic)
    scale = (ours[0] - 1) / theirs[0]
    assert scale > 0
    assert np.array(ours) - 1 == pytest.approx(scale * np.array(theirs), rel=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_p_value_is_scipy_s_by_permutation() -> None:
    rng = np.random.default_rng(9)
    for shares in (SHARES, LOWER):
        first, second = draw(rng, 40), draw(rng, 60, shares)
        values = [np.where(np.isnan(v), -1, v) for v in (first, second)]
        method = stats.PermutationMethod(n_resamples=1999, rng=np.random.default_rng(0))
        theirs = stats.anderson_ksamp(values, method=method).pvalue
        assert two_sample_p_value(first, second) == pytest.approx(theirs, abs=0.045)


def test_p_values_without_drift_are_no_smaller_than_uniform() -> None:
    rng = np.random.default_rng(10)
    p_values = np.array([two_sample_p_value(draw(rng, 100), draw(rng, 60), 199, s) for s in range(1000)])
    for error in (0.01, 0.05, 0.2, 0.5):
        assert (p_values <= error).mean() <= error + 3 * math.sqrt(error * (1 - error) / 1000)
    assert (p_values <= 0.5).mean() > 0.42


@pytest.mark.parametrize("shares", [LOWER, WIDER], ids=["mean", "shape"])
def test_the_two_sample_test_finds_shifts(shares: np.ndarray) -> None:
    rng = np.random.default_rng(11)
    p_values = [two_sample_p_value(draw(rng, 500), draw(rng, 300, shares), 999) for _ in range(30)]
    assert np.mean(np.array(p_values) <= 0.05) >= 0.9


def test_many_levels_are_grouped_and_one_level_says_nothing() -> None:
    rng = np.random.default_rng(12)
    first = rng.random(3000)
    assert two_sample_p_value(first, rng.random(3000), 499) > 0.01
    assert two_sample_p_value(first, rng.random(3000) ** 1.2, 499) == 1 / 500
    assert two_sample_p_value(np.full(9, 0.9), np.full(5, 0.9)) == 1.0


@pytest.mark.parametrize("bad", [[1.5], [-0.1, math.nan], [math.inf], []])
def test_what_is_no_confidence_is_refused(bad: list[float]) -> None:
    for reference, new in ((bad, [0.5]), ([0.5], bad)):
        for test in (conformal_p_values, two_sample_p_value):
            with pytest.raises(ValueError, match="confidences must be|at least one"):
                test(np.array(reference), np.array(new))


@pytest.mark.parametrize("error", [0.0, 1.0, -1.0])
def test_an_error_outside_its_range_is_refused(error: float) -> None:
    with pytest.raises(ValueError, match=str(error)):
        detect_drift(np.array([0.5]), np.array([0.5]), error)
