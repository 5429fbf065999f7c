"""Drift of confidences: a naive martingale, false alarms on simulated streams, and power."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vlm_calibration.metrics.drift import (
    BINS,
    MEMORY,
    PRIOR,
    conformal_p_values,
    detect_drift,
    log_wealth,
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
    held, log, logs = [0.0] * BINS, 0.0, []
    for i, confidence in enumerate(new):
        value = -1.0 if math.isnan(confidence) else confidence
        seen.append(value)
        p = (sum(s < value for s in seen) + u[i] * sum(s == value for s in seen)) / len(seen)
        b = min(int(p * BINS), BINS - 1)
        log += math.log(BINS * (held[b] + PRIOR) / (sum(held) + PRIOR * BINS))
        held = [(1 - 1 / MEMORY) * h + (j == b) for j, h in enumerate(held)]
        logs.append(log)
    return logs


@pytest.mark.parametrize("kind", ["stated", "continuous"])
def test_the_wealth_is_that_of_a_naive_loop(kind: str) -> None:
    rng = np.random.default_rng(3)
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
    assert np.array_equal(detect_drift(reference**2, new**2, ERROR).log_wealth, drift.log_wealth)


def test_p_values_of_ties_are_uniform() -> None:
    """Even where all answers are the same: the random rank alone decides."""
    tied = conformal_p_values(np.full(50, 0.9), np.full(5000, 0.9))
    assert stats.kstest(tied, "uniform").pvalue > 0.01
    rng = np.random.default_rng(0)
    # Far in a stream, and each from a stream of its own.
    last = [conformal_p_values(draw(rng, 20), draw(rng, 30), seed)[[0, -1]] for seed in range(1000)]
    for p_values in np.array(last).T:
        assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert abs(stats.spearmanr(np.array(last)).statistic) < 0.09


def test_unparsed_answers_are_a_level_of_their_own() -> None:
    rng = np.random.default_rng(1)
    reference, new = draw(rng, 500), draw(rng, 500)
    new[rng.random(500) < 0.3] = math.nan
    assert detect_drift(reference, new, ERROR).alarm is not None
    # Below 0%, not equal to it.
    assert conformal_p_values(np.zeros(99), np.array([math.nan]))[0] < 0.01


# --- Errors of the sequential test ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 1000])
def test_false_alarms_at_any_time_are_rarer_than_the_error(size: int) -> None:
    """The alarm looks at every answer: 600 streams of 300 answers, whose wealth may reach the line at any of them."""
    rng = np.random.default_rng(size)
    streams = 600
    highest = np.array(
        [
            detect_drift(draw(rng, size), draw(rng, 300), ERROR, seed).log_wealth.max()
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
    wealth = np.exp([log_wealth(rng.random(60)) for _ in range(2000)])
    rises = wealth >= 1.5
    stopped = np.where(rises.any(1), rises.argmax(1), 59)
    for at in (np.zeros(2000, int), np.full(2000, 59), stopped):
        values = wealth[np.arange(2000), at]
        assert abs(values.mean() - 1) < 4 * values.std() / math.sqrt(2000) + 1e-12


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


@pytest.mark.parametrize("bad", [[1.5], [-0.1, math.nan], [math.inf], []])
def test_what_is_no_confidence_is_refused(bad: list[float]) -> None:
    for reference, new in ((bad, [0.5]), ([0.5], bad)):
        with pytest.raises(ValueError, match="confidences must be|at least one"):
            conformal_p_values(np.array(reference), np.array(new))


@pytest.mark.parametrize("error", [0.0, 1.0, -1.0])
def test_an_error_outside_its_range_is_refused(error: float) -> None:
    with pytest.raises(ValueError, match=str(error)):
        detect_drift(np.array([0.5]), np.array([0.5]), error)
