"""Promises: thresholds with a guarantee against MAPIE and closed forms, drift of confidences against SciPy's test, and both by simulation."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from mapie.risk_control.fwer_control import FWERFixedSequenceTesting
from scipy.stats import binom, binomtest, ks_2samp

from vlm_calibration.metrics.drift import drift_test
from vlm_calibration.metrics.risk_control import (
    GRID_STEPS,
    LATER_START,
    GradedAnswers,
    Limits,
    ThresholdScores,
    control_risk,
    fewest_answers,
    graded_answers,
    guarantee,
    lowest_controlled,
)
from vlm_calibration.reporting.report.thresholds import one_an_image

from ..performance.drift import LEVELS as DRAWN
from ..performance.drift import SHARES, false_alarms
from ..performance.thresholds import LEVEL, LIMIT, POPULATIONS, Population, broken

DRAWS = 300


@pytest.mark.parametrize("seed", range(8))
def test_the_threshold_is_that_of_a_loop_over_the_answers(seed: int) -> None:
    """Confidences are whole percents; confident answers are more often correct."""
    rng = np.random.default_rng(seed)
    confidence = np.round(rng.beta(4, 1, 600), (1, 2)[seed % 2])
    correct = rng.random(600) < 1 - (1 - confidence) * 0.4
    limit, level = (0.05, 0.1)[seed % 2], 0.1
    falling = np.unique(confidence)[::-1]
    fewest = fewest_answers(limit, level)
    starts = [(0, level)]
    if (confidence >= falling[0]).sum() < fewest:
        starts = [(fewest_answers(limit, level / 2), level / 2), (LATER_START * fewest, level / 2)]
    passed, alpha = [], 0.0
    for t in falling:
        given = correct[confidence >= t]
        alpha += sum(share for start, share in starts if len(given) >= start)
        starts = [(start, share) for start, share in starts if len(given) < start]
        if alpha and binom.cdf((~given).sum(), len(given), limit) <= alpha:
            passed.append(t)
        else:
            alpha = 0.0
    chosen = lowest_controlled(graded_answers(list(confidence), list(correct)), limit, level)
    assert chosen == min(passed, default=None)


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_threshold_is_never_above_that_of_a_fixed_sequence(name: str) -> None:
    """MAPIE's controller begins its sequence at the lowest threshold where the measured error rises; here it begins at the highest."""
    for n in (100, 300, 1000):
        for answers in POPULATIONS[name].draw(n, np.random.default_rng(n), 20):
            falling = np.unique(answers.confidence)[::-1]
            given = answers.confidence >= falling[:, None]
            p_values = binom.cdf((given & ~answers.correct).sum(1), given.sum(1), LIMIT)
            passed = FWERFixedSequenceTesting().run(p_values, LEVEL)
            ours = lowest_controlled(answers, LIMIT, LEVEL)
            assert not len(passed) or (ours is not None and ours <= falling[passed[-1]])


@pytest.mark.parametrize(("limit", "level"), [(0.05, 0.05), (0.1, 0.01), (0.4, 0.05), (0.001, 0.1)])
def test_the_sequence_starts_with_enough_answers(limit: float, level: float) -> None:
    fewest = fewest_answers(limit, level)
    assert (1 - limit) ** fewest <= level < (1 - limit) ** (fewest - 1)


def test_an_answer_counts_at_a_threshold_if_and_only_if_it_reaches_it() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(GRID_STEPS + 1) / GRID_STEPS
    confidence = np.concatenate([rng.random(500), steps, np.nextafter(steps[1:], 0)])
    answers = graded_answers(list(confidence), [True] * len(confidence))
    for threshold in steps[::7].tolist():
        assert ((answers.confidence >= threshold) == (confidence >= threshold)).all()


def test_scores_of_a_threshold_with_unparsed_answers() -> None:
    """Their intervals are SciPy's."""
    confidence = [0.9] * 8 + [0.5] * 4 + [None] * 3
    correct = [True] * 7 + [False] + [True, False, False, False] + [True, True, False]
    answers = graded_answers(confidence, correct)
    scores = ThresholdScores.of(answers.confidence >= 0.9, answers.correct, 0.9)
    assert scores[:5] == (15, 8, 1, 10, 3)
    for interval, events, trials in zip(scores[5:], (8, 1, 3), (15, 8, 10), strict=True):
        theirs = binomtest(events, trials).proportion_ci(0.9, "exact")
        assert interval == pytest.approx((events / trials, theirs.low, theirs.high))
    none = ThresholdScores.of(np.zeros(17, dtype=bool), np.ones(17, dtype=bool), 0.9)
    theirs = binomtest(17, 17).proportion_ci(0.9, "exact")
    assert none.sent_away_share == pytest.approx((1, theirs.low, 1))
    assert none.coverage[:2] == (0, 0)
    assert none.error[1:] == (0, 1)


@pytest.mark.parametrize(("top", "fewest"), [([0.8], 59), ([0.9, 0.85, 0.8], 72)])
def test_a_threshold_without_a_wrong_answer(top: list[float], fewest: int) -> None:
    """It takes 59 answers of one confidence, 72 of several."""
    for n, threshold in ((fewest - 1, None), (fewest, 0.8)):
        confidence = top + [0.8] * (n - len(top))
        choice = control_risk({"": graded_answers(confidence, [True] * n)}, Limits(0.05)).choices[""]
        assert choice.threshold == threshold
        if threshold:
            assert choice.p_error == pytest.approx(0.95**fewest)
        else:
            assert f"it takes {fewest}" in choice.reason


def test_groups_share_the_error_probability() -> None:
    part, more = (graded_answers([0.8] * n, [True] * n) for n in (59, 72))
    assert control_risk({"a": part}, Limits(0.05)).found
    two = control_risk({"a": part, "b": part}, Limits(0.05))
    assert not two.found
    assert "Bonferroni over 2" in two.correction
    choices = control_risk({"a": more, "b": part}, Limits(0.05)).choices
    assert [choice.threshold for choice in choices.values()] == [0.8, None]


def test_two_limits_agree_or_one_must_give() -> None:
    confidence = [0.9] * 300 + [0.5] * 300
    correct = [True] * 300 + [True] * 150 + [False] * 150
    answers = graded_answers(confidence, correct)
    choice = control_risk({"": answers}, Limits(0.05, 0.95, 0.5)).choices[""]
    assert choice.threshold == 0.9
    assert choice.p_sent_away == pytest.approx(binom.cdf(150, 450, 0.5))
    reason = control_risk({"": answers}, Limits(0.05, 0.95, 0.2)).choices[""].reason
    assert "33.3% of the correct answers are sent away (limit 20%)" in reason
    unparsed = graded_answers([None] * 300 + [0.9] * 300, [True] * 600)
    assert "50% of the correct" in control_risk({"": unparsed}, Limits(0.05, 0.95, 0.4)).choices[""].reason


def test_where_there_is_no_threshold_the_lowest_error_is_named() -> None:
    answers = graded_answers([0.9] * 100 + [0.4] * 100, ([True] * 80 + [False] * 20) * 2)
    assert "20% of 100 answers, from 90% on" in control_risk({"": answers}, Limits(0.05)).choices[""].reason
    none = control_risk({"": graded_answers([None], [True])}, Limits(0.05)).choices[""].reason
    assert none == "no answer has a confidence"


def test_the_sentence() -> None:
    good = graded_answers([0.8] * 300 + [0.2] * 100, [True] * 300 + [False] * 100)
    bad = graded_answers([0.8], [False])
    text = guarantee(control_risk({"": good}, Limits(0.05)))
    assert text == (
        "At most 5% of the answers given are wrong, with 95% certainty, for questions like those of the calibration split: answer from 80% "
        "on, 75% of the questions."
    )
    text = guarantee(control_risk({"a": good, "b": bad}, Limits(0.025, 0.9, 0.5)), "mine")
    assert text == (
        "At most 2.5% of the answers given are wrong and at most 50% of the correct answers are sent away in every group, with 90% "
        "certainty for all groups together, for questions like mine: a: answer from 80% on, 75% of the questions; b: answer nothing."
    )
    assert guarantee(control_risk({"": bad}, Limits(0.05))) == ""


def _allowed(level: float) -> float:
    """The share of draws that a true rate of `level` exceeds once in 10,000."""
    return float(binom.ppf(1 - 1e-4, DRAWS, level)) / DRAWS


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize("name", POPULATIONS)
def test_the_promise_is_broken_as_rarely_as_promised(name: str, n: int) -> None:
    assert broken(POPULATIONS[name], n, DRAWS, seed=len(name)) <= _allowed(0.05)


@pytest.mark.parametrize("name", ["falling, few levels", "falling, many levels", "constant, few levels"])
def test_both_limits_hold_at_once(name: str) -> None:
    population, rng = POPULATIONS[name], np.random.default_rng(0)
    # A limit just below what a threshold in the middle does.
    middle = len(population.value) // 2
    risk, away = (float(of_all[middle]) - 1e-6 for of_all in (population.risk, population.sent_away))
    for max_error, max_away in ((0.05, away), (risk, 0.3)):
        count = found = 0
        for answers in population.draw(1000, rng, DRAWS):
            threshold = control_risk({"": answers}, Limits(max_error, 0.8, max_away)).choices[""].threshold
            if threshold is not None:
                place = population.index(threshold)
                found += 1
                count += population.risk[place] > max_error or population.sent_away[place] > max_away
        assert count / DRAWS <= _allowed(0.2)
    assert found or name.startswith("constant")


@pytest.mark.parametrize("correlation", [0.0, 0.25])
@pytest.mark.parametrize("questions", [1, 4, 18])
def test_the_promise_holds_with_several_questions_an_image(correlation: float, questions: int) -> None:
    """Answers at one confidence just over the limit, of which those about an image are wrong together with this correlation."""
    rng, images = np.random.default_rng([questions, int(100 * correlation)]), 500
    over = Population(np.array([0.9]), np.ones(1), np.array([LIMIT + 1e-4]))
    asked = [SimpleNamespace(id=f"{i}-{j}", image=str(i)) for i in range(images) for j in range(questions)]
    assert len(one_an_image([SimpleNamespace(id="a", image=None)] * 5)) == 5, "without an image all count"
    counted = np.array([tuple(map(int, answer.id.split("-"))) for answer in one_an_image(asked)])
    assert counted[:, 0].tolist() == list(range(images))
    assert len(set(counted[:, 1])) == questions, "not always the first"
    count = 0
    for _ in range(DRAWS):
        shared, own = rng.random((images, 1)), rng.random((images, questions))
        alike = rng.random((images, questions)) < np.sqrt(correlation)
        wrong = (np.where(alike, shared, own) < over.error[0])[tuple(counted.T)]
        answers = GradedAnswers(np.full(images, 0.9), ~wrong)
        count += lowest_controlled(answers, LIMIT, 0.05) is not None
    assert count / DRAWS <= _allowed(0.05)


# --- drift


LOWER = np.array([0.02, 0.12, 0.14, 0.16, 0.20, 0.18, 0.12, 0.06])
# The mean of `SHARES`, with more answers at both ends.
WIDER = np.array([0.02, 0.13, 0.08, 0.05, 0.10, 0.17, 0.20, 0.25])


def draw(rng: np.random.Generator, n: int, shares: np.ndarray = SHARES) -> np.ndarray:
    return rng.choice(DRAWN, n, p=shares / shares.sum())


@pytest.mark.parametrize("power", [1.0, 1.4])
def test_without_ties_it_is_scipy_s_exact_test(power: float) -> None:
    rng = np.random.default_rng(3)
    reference, new = rng.permutation(1001)[:90] / 1000, (rng.permutation(1000)[:60] + 0.4) / 1000
    new = new**power
    ours, theirs = drift_test(reference, new, 20_000), ks_2samp(reference, new, method="exact")
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
    assert 0 < rate <= binom.ppf(0.999, 200, 0.05) / 200


@pytest.mark.parametrize(("shares", "n"), [(LOWER, 150), (WIDER, 300)], ids=["mean", "shape"])
def test_a_shift_of_mean_or_shape_is_found(shares: np.ndarray, n: int) -> None:
    rng = np.random.default_rng(6)
    tests = [drift_test(draw(rng, 500), draw(rng, n, shares), 199) for _ in range(50)]
    assert sum(test.p_value <= 0.05 for test in tests) >= 40


def test_unparsed_answers_are_a_level_of_their_own() -> None:
    test = drift_test(np.zeros(50), np.full(20, math.nan))
    assert test.difference == 1
    assert test.p_value < 0.01
