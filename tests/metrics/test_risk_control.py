"""Thresholds with a guarantee: against MAPIE and closed forms, and the guarantee itself by simulation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from mapie.risk_control import BinaryClassificationController, precision
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from scipy.stats import binom, binomtest

from vlm_calibration.metrics.groups import ConfidenceGroups
from vlm_calibration.metrics.risk_control import (
    GradedAnswers,
    Limits,
    answers_needed,
    control_risk,
    graded_answers,
    guarantee,
    threshold_scores,
)
from vlm_calibration.metrics.threshold_tests import (
    exact_interval,
    highest_controlled,
    lowest_controlled,
    p_value,
    starting_answers,
)

DRAWS = 600


def _random_answers(seed: int, n: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Confidences at whole percents and correctness; confident answers are more often correct."""
    rng = np.random.default_rng(seed)
    confidence = np.round(rng.beta(4, 1, n), (1, 2)[seed % 2])
    return confidence, rng.random(n) < 1 - (1 - confidence) * 0.4


# --- Against MAPIE ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.02, 0.05, 0.3])
def test_p_values_are_those_of_mapie(limit: float) -> None:
    answers = np.repeat(np.array([1, 20, 64, 512, 4096]), 5)
    wrong = np.floor(answers * np.tile([0, 0.25, 0.5, 1, 2], 5) * limit).astype(int)
    theirs = compute_hoeffding_bentkus_p_value(wrong / answers, answers, limit, binary=True)[:, 0]
    ours = p_value(wrong, answers, limit)
    # MAPIE recovers the number of wrong answers from their share, which rounding can raise by one.
    exact = np.ceil(answers * (wrong / answers)) == wrong
    assert exact.sum() > 15
    assert ours[exact] == pytest.approx(theirs[exact], rel=1e-9)
    assert (ours <= theirs * (1 + 1e-9)).all()


@pytest.mark.parametrize("seed", range(8))
def test_the_threshold_is_that_of_mapie(seed: int) -> None:
    confidence, correct = _random_answers(seed)
    limit, certainty = (0.05, 0.1)[seed % 2], 0.9
    groups = graded_answers(torch.tensor(confidence), torch.tensor(correct)).groups
    start = starting_answers(len(confidence), limit, 1 - certainty)
    falling = np.unique(confidence)[::-1]
    tested = [t for t in falling if (confidence >= t).sum() >= start]
    controller = BinaryClassificationController(
        lambda x: np.stack([1 - x, x], -1),
        precision,
        1 - limit,
        certainty,
        list_predict_params=np.array(tested),
        fwer_method="fixed_sequence",
    )
    controller.calibrate(confidence, correct.astype(int))
    chosen = int(lowest_controlled(groups, limit, 1 - certainty))
    ours = None if chosen < 0 else float(groups.value[chosen])
    assert ours == (
        None if not len(controller.valid_predict_params) else min(controller.valid_predict_params)
    )


# --- By hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "level"), [(0.05, 0.05), (0.1, 0.01), (0.4, 0.05), (0.001, 0.1)])
def test_the_sequence_starts_with_enough_answers(limit: float, level: float) -> None:
    fewest, even = (int(starting_answers(n, limit, level)) for n in (0, 10**9))
    assert (1 - limit) ** fewest <= level < (1 - limit) ** (fewest - 1)

    def power(n: int) -> float:
        allowed = [k for k in range(n + 1) if binom.cdf(k, n, limit) <= level]
        return float(binom.cdf(max(allowed), n, limit / 2)) if allowed else 0.0

    if even < 500:
        assert power(even) >= 0.5
        assert all(power(n) < 0.5 for n in range(fewest, even))
    assert int(starting_answers(fewest + even, limit, level)) == max(fewest, (fewest + even) // 2)


@pytest.mark.parametrize(("events", "trials"), [(0, 20), (3, 40), (17, 17), (250, 1000)])
def test_intervals_are_scipy_s(events: int, trials: int) -> None:
    theirs = binomtest(events, trials).proportion_ci(0.9, "exact")
    assert exact_interval(events, trials, 0.9) == pytest.approx((events / trials, theirs.low, theirs.high))
    assert exact_interval(0, 0, 0.9)[1:] == (0, 1)


@pytest.mark.parametrize("grid_steps", [7, 100, 1000])
def test_an_answer_counts_at_a_threshold_if_and_only_if_it_reaches_it(grid_steps: int) -> None:
    rng = np.random.default_rng(0)
    confidence = np.concatenate(
        [rng.random(500), np.arange(101) / 100, np.nextafter(np.arange(1, 101) / 100, 0)]
    )
    answers = graded_answers(
        torch.tensor(confidence), torch.ones(len(confidence), dtype=torch.bool), grid_steps
    )
    assert int(answers.groups.counts.sum()) == len(confidence)
    for threshold in answers.groups.value.tolist():
        given = threshold_scores(answers, threshold, 0.95).answers
        assert given == (confidence >= threshold).sum()


def test_counts_of_a_threshold_with_unparsed_answers() -> None:
    confidence = [0.9] * 8 + [0.5] * 4 + [None] * 3
    correct = [True] * 7 + [False] + [True, False, False, False] + [True, True, False]
    scores = threshold_scores(graded_answers(confidence, correct), 0.9, 0.95)
    assert scores[:5] == (15, 8, 1, 10, 3)
    assert (scores.coverage.value, scores.error.value, scores.sent_away_share.value) == (
        8 / 15,
        1 / 8,
        3 / 10,
    )


def test_a_threshold_without_a_wrong_answer_needs_59_of_them() -> None:
    for n, threshold in ((58, None), (59, 0.8)):
        control = control_risk({"": graded_answers([0.8] * n, [True] * n)}, Limits(0.05))
        assert control.choices[""].threshold == threshold
    assert control.choices[""].p_error == pytest.approx(0.95**59)
    few = control_risk({"": graded_answers([0.8] * 58, [True] * 58)}, Limits(0.05)).choices[""].reason
    assert "About 59 answers" in few
    assert "(1 more)" in few


def test_a_sequence_ends_at_the_first_threshold_that_fails() -> None:
    # 0.9 fails, 0.5 would pass alone.
    answers = graded_answers([0.9] * 200 + [0.5] * 2000, [True] * 180 + [False] * 20 + [True] * 2000)
    assert binom.cdf(20, 2200, 0.05) < 0.05
    assert control_risk({"": answers}, Limits(0.05)).choices[""].threshold is None


def test_groups_share_the_error_probability() -> None:
    part = graded_answers([0.8] * 59, [True] * 59)
    assert control_risk({"a": part}, Limits(0.05)).found
    two = control_risk({"a": part, "b": part}, Limits(0.05))
    assert not two.found
    assert two.level == pytest.approx(0.025)
    assert "Bonferroni over 2" in two.correction
    more = graded_answers([0.8] * 72, [True] * 72)
    assert [c.threshold for c in control_risk({"a": more, "b": part}, Limits(0.05)).choices.values()] == [
        0.8,
        None,
    ]


def test_two_limits_agree_or_one_must_give() -> None:
    confidence = [0.9] * 300 + [0.5] * 300
    correct = [True] * 300 + [True] * 150 + [False] * 150
    answers = graded_answers(confidence, correct)
    choice = control_risk({"": answers}, Limits(0.05, 0.95, 0.5)).choices[""]
    assert choice.threshold == 0.9
    assert choice.p_sent_away == pytest.approx(binom.cdf(150, 450, 0.5))
    reason = control_risk({"": answers}, Limits(0.05, 0.95, 0.2)).choices[""].reason
    assert "33.3% of the correct answers are sent away" in reason
    assert "25% of the answers given are wrong" in reason
    unparsed = graded_answers([None] * 300 + [0.9] * 300, [True] * 600)
    assert (
        "no threshold keeps that limit"
        in control_risk({"": unparsed}, Limits(0.05, 0.95, 0.4)).choices[""].reason
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_number_of_answers_that_would_be_enough(seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidence = rng.choice([0.5, 0.7, 0.9], 40)
    correct = rng.random(40) < np.where(confidence == 0.9, 0.98, 0.5)
    groups = graded_answers(torch.tensor(confidence), torch.tensor(correct)).groups

    def passes(n: int) -> bool:
        above = groups.counts.flip(0).cumsum(0).numpy()  # from the highest confidence down
        given = n * above.sum(-1) // 40
        wrong = np.minimum(-(-n * above[:, 0] // 40), given)
        for answers, bad in zip(given, wrong, strict=True):
            if answers >= starting_answers(n, 0.1, 0.05):
                return bool(binom.cdf(bad, answers, 0.1) <= 0.05)
        return False

    smallest = next((n for n in range(1, 1000) if passes(n)), None)
    needed = answers_needed(groups, 0.1, 0.05)
    assert needed == smallest or (smallest is None and (needed is None or needed >= 1000))


def test_the_number_of_further_answers_is_that_of_the_reason() -> None:
    groups = graded_answers([0.9] * 40 + [0.4] * 60, [True] * 40 + [False] * 60)
    choice = control_risk({"": groups}, Limits(0.05)).choices[""]
    needed = answers_needed(groups.groups, 0.05, 0.05)
    assert needed is not None
    assert choice.more_answers == needed - 100 > 0
    assert f"({choice.more_answers:,} more)" in choice.reason
    hopeless = graded_answers([0.9] * 100, [True] * 80 + [False] * 20)
    found = graded_answers([0.9] * 100, [True] * 100)
    for answers in (hopeless, found):
        assert control_risk({"": answers}, Limits(0.05)).choices[""].more_answers is None


def test_where_no_number_of_answers_helps_the_lowest_error_is_named() -> None:
    answers = graded_answers([0.9] * 100 + [0.4] * 100, ([True] * 80 + [False] * 20) * 2)
    reason = control_risk({"": answers}, Limits(0.05)).choices[""].reason
    assert "No number of answers like these would help" in reason
    assert "20%, from 90% on" in reason
    assert (
        control_risk({"": graded_answers([None], [True])}, Limits(0.05)).choices[""].reason
        == "no answer has a confidence"
    )


def test_the_sentence() -> None:
    good, bad = (
        graded_answers([0.8] * 300 + [0.2] * 100, [True] * 300 + [False] * 100),
        graded_answers([0.8], [False]),
    )
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


@pytest.mark.parametrize("values", [(0, 0.95, None), (1, 0.95, None), (0.05, 1, None), (0.05, 0.95, 0)])
def test_limits_outside_the_range_are_refused(values: tuple[float, float, float | None]) -> None:
    with pytest.raises(ValueError, match=r"must be between 0 and 1 \(exclusive\)"):
        Limits(*values)


# --- The guarantee, by simulation -------------------------------------------------------------------------------


class Population:
    """Answers at L confidences: their shares, and the error rate at each."""

    def __init__(self, value: np.ndarray, share: np.ndarray, error: np.ndarray) -> None:
        self.value, self.share, self.error = value, share / share.sum(), np.clip(error, 0, 1)
        above = np.flip(np.flip(self.share).cumsum())
        self.risk = np.flip(np.flip(self.share * self.error).cumsum()) / above
        right = self.share * (1 - self.error)
        self.sent_away = (right.cumsum() - right) / right.sum()

    def draw(self, n: int, rng: np.random.Generator) -> GradedAnswers:
        """Counts of n answers, `DRAWS` times."""
        cells = np.stack([self.share * self.error, self.share * (1 - self.error)], -1)
        counts = torch.from_numpy(rng.multinomial(n, cells.reshape(-1), DRAWS).reshape(DRAWS, -1, 2))
        zero = torch.zeros(DRAWS, dtype=torch.int64)
        return GradedAnswers(
            ConfidenceGroups(
                torch.tensor(self.value), counts, torch.arange(len(self.value)), len(self.value) - 1, zero
            ),
            zero,
        )


def _few(error: Callable[[np.ndarray], np.ndarray]) -> Population:
    value = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    return Population(value, np.array([1, 1, 2, 3, 4, 2.0]), error(value))


def _many(error: Callable[[np.ndarray], np.ndarray]) -> Population:
    value = np.arange(101) / 100
    return Population(value, value**3 + 0.01, error(value))


POPULATIONS = {
    # The hardest case: every threshold is just over the limit.
    "constant, few levels": _few(lambda c: np.full_like(c, 0.0501)),
    "constant, many levels": _many(lambda c: np.full_like(c, 0.0501)),
    "falling, few levels": _few(lambda c: 0.4 * (1 - c) + 0.01),
    "falling, many levels": _many(lambda c: 0.3 * (1 - c)),
    "calibrated": _many(lambda c: 1 - c),
    # Assumption broken: the most confident answers are the worst.
    "most confident are wrong": _few(lambda c: np.where(c == 1, 0.25, 0.02 + 0.1 * (c < 0.8))),
    "waves": _many(lambda c: 0.05 + 0.045 * np.sin(25 * c)),
}


def _allowed(level: float) -> float:
    """The share of draws that a true rate of `level` exceeds once in 10,000."""
    return float(binom.ppf(1 - 1e-4, DRAWS, level)) / DRAWS


@pytest.mark.parametrize("n", [100, 1000, 10_000])
@pytest.mark.parametrize("name", POPULATIONS)
def test_the_promise_is_broken_as_rarely_as_promised(name: str, n: int) -> None:
    population, rng = POPULATIONS[name], np.random.default_rng([n, len(name)])
    for limit, level in ((0.05, 0.05), (0.05, 0.2)):
        chosen = lowest_controlled(population.draw(n, rng).groups, limit, level)
        broken = (chosen >= 0) & (population.risk[chosen] > limit)
        assert broken.mean() <= _allowed(level)
        if n == 10_000 and name.startswith("falling"):
            assert (chosen >= 0).mean() > 0.99, "a threshold exists and is found"


@pytest.mark.parametrize("n", [100, 1000, 10_000])
def test_the_promise_for_groups_holds_for_all_at_once(n: int) -> None:
    rng, level = np.random.default_rng(n), 0.2
    broken = np.zeros(DRAWS, dtype=bool)
    for name in ("constant, few levels", "constant, many levels", "falling, few levels", "calibrated"):
        population = POPULATIONS[name]
        chosen = lowest_controlled(population.draw(n, rng).groups, 0.05, level / 4)
        broken |= (chosen >= 0) & (population.risk[chosen] > 0.05)
    assert broken.mean() <= _allowed(level)


@pytest.mark.parametrize("n", [100, 1000, 10_000])
@pytest.mark.parametrize("name", ["falling, few levels", "falling, many levels", "constant, few levels"])
def test_both_limits_hold_at_once(name: str, n: int) -> None:
    population, rng, level = POPULATIONS[name], np.random.default_rng(n), 0.2
    # A limit just below what a threshold in the middle sends away.
    middle = len(population.value) // 2
    for max_error, max_away in (
        (0.05, population.sent_away[middle] - 1e-6),
        (population.risk[middle] - 1e-6, 0.3),
    ):
        answers = population.draw(n, rng)
        lowest = lowest_controlled(answers.groups, max_error, level / 2)
        highest = highest_controlled(answers, max_away, level / 2)
        away_broken = (highest >= 0) & (population.sent_away[highest] > max_away)
        assert away_broken.mean() <= _allowed(level / 2)
        found = (lowest >= 0) & (lowest <= highest)
        broken = found & ((population.risk[lowest] > max_error) | (population.sent_away[lowest] > max_away))
        assert broken.mean() <= _allowed(level)


def test_replicates_choose_what_single_tables_choose() -> None:
    population = POPULATIONS["falling, few levels"]
    answers = population.draw(500, np.random.default_rng(0))
    lowest, highest = lowest_controlled(answers.groups, 0.08, 0.025), highest_controlled(answers, 0.4, 0.025)
    assert len(set(lowest.tolist())) > 2
    for i in range(50):
        counts = answers.groups.counts[i]
        value = np.repeat(np.repeat(population.value, 2), counts.reshape(-1))
        correct = np.repeat(np.tile([False, True], len(population.value)), counts.reshape(-1))
        one = graded_answers(torch.tensor(value), torch.tensor(correct))
        choice = control_risk({"": one}, Limits(0.08, 0.95, 0.4)).choices[""]
        agree = 0 <= lowest[i] <= highest[i]
        assert choice.threshold == (float(population.value[lowest[i]]) if agree else None)
