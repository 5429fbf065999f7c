"""Confidence thresholds with a guarantee: "at most 5% of the answers given are wrong, with 95% certainty".

A threshold t gives the answers whose confidence is at least t and sends the others to a person. Its selective risk R(t) is the
probability that an answer given is wrong. Learn then test (Angelopoulos et al., arXiv 2110.01052) tests, for one threshold after
another, the hypothesis that R(t) exceeds the limit, with an exact binomial p-value, and stops at the first that it cannot reject. A
threshold that breaks the limit is therefore chosen with a probability of at most 1 - certainty.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlm_calibration.metrics.bootstrap import Interval
from vlm_calibration.metrics.groups import ConfidenceGroups
from vlm_calibration.metrics.threshold_tests import (
    CountsAbove,
    GradedAnswers,
    counts_above,
    exact_interval,
    graded_answers,
    highest_controlled,
    is_controlled,
    lowest_controlled,
    p_value,
    start_bounds,
)

__all__ = [
    "ASSUMPTIONS",
    "Choice",
    "GradedAnswers",
    "Limits",
    "RiskControl",
    "ThresholdScores",
    "answers_needed",
    "control_risk",
    "graded_answers",
    "guarantee",
    "percent",
    "threshold_scores",
]

MAX_GROWTH = 1000
"""How many times the answers at hand are searched for a number that would be enough."""
ASSUMPTIONS = (
    "The answers that a threshold is chosen on, and those that it is used on, are independent draws from one source: the same kind of "
    "images and questions, in the same proportions. Several questions about one image are not quite independent.",
    "The share of wrong answers among those given does not fall when the threshold is lowered: tests begin at the first threshold "
    "with enough answers.",
    "Model, prompt and estimator of the confidence are those that were measured.",
)
"""What a guarantee rests on, in words."""


@dataclass(frozen=True)
class Limits:
    """What is promised, and how surely.

    Attributes:
        max_error: largest share of wrong answers among the answers given, in (0, 1).
        certainty: probability that the promise is kept, in (0, 1).
        max_sent_away: largest share of the correct answers that are not given, in (0, 1); None: no limit.

    Raises:
        ValueError: on a value outside (0, 1).
    """

    max_error: float
    certainty: float = 0.95
    max_sent_away: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("max_error", "certainty", "max_sent_away"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must be between 0 and 1 (exclusive), got {value}")


class ThresholdScores(NamedTuple):
    """What a threshold does on a set of answers; the bounds are exact (Clopper & Pearson, 1934).

    Attributes:
        n: all answers.
        answers: answers given.
        wrong: wrong answers among those given.
        correct: correct answers, given or not.
        sent_away: correct answers that are not given.
        coverage: share of all answers that are given.
        error: share of wrong answers among those given; NaN if none is given.
        sent_away_share: share of the correct answers that are not given; NaN if none is correct.
    """

    n: int
    answers: int
    wrong: int
    correct: int
    sent_away: int
    coverage: Interval
    error: Interval
    sent_away_share: Interval

    @classmethod
    def of(
        cls, n: int, answers: int, wrong: int, correct: int, sent_away: int, certainty: float
    ) -> "ThresholdScores":
        """The scores of counts; `certainty` is that of each interval, in (0, 1)."""
        return cls(
            n,
            answers,
            wrong,
            correct,
            sent_away,
            exact_interval(answers, n, certainty),
            exact_interval(wrong, answers, certainty),
            exact_interval(sent_away, correct, certainty),
        )


class Choice(NamedTuple):
    """The threshold of one group of answers, or why there is none.

    Attributes:
        threshold: lowest confidence that is answered; None if no threshold keeps all limits.
        scores: what the threshold does on the answers that it was chosen on; None without a threshold.
        p_error: p-value of "the error exceeds its limit" at the threshold.
        p_sent_away: p-value of "the share sent away exceeds its limit" at the threshold; None without such a limit.
        reason: why there is no threshold, and what would help, as a sentence; empty with a threshold.
        more_answers: how many more answers like these would be enough for a threshold; None if there is one, or no number would be.
    """

    threshold: float | None
    scores: ThresholdScores | None = None
    p_error: float | None = None
    p_sent_away: float | None = None
    reason: str = ""
    more_answers: int | None = None


class RiskControl(NamedTuple):
    """Thresholds with one guarantee for all of them together.

    Attributes:
        limits: what is promised.
        choices: group -> its threshold; the key of all answers as one group is "".
        level: the level of every single test.
    """

    limits: Limits
    choices: Mapping[str, Choice]
    level: float

    @property
    def found(self) -> bool:
        """Whether any group has a threshold."""
        return any(choice.threshold is not None for choice in self.choices.values())

    @property
    def correction(self) -> str:
        """How the tests share the error probability, in words."""
        tests = len(self.choices) * (1 if self.limits.max_sent_away is None else 2)
        shared = f"Bonferroni over {tests} sequences" if tests > 1 else "none needed for one sequence"
        return f"fixed sequence testing of thresholds at level {self.level:.4g}; {shared}"


# --- Choice ---------------------------------------------------------------------------------------------------------


def threshold_scores(answers: GradedAnswers, threshold: float, certainty: float) -> "ThresholdScores":
    """What a threshold does on answers, which need not be those that it was chosen on.

    Args:
        answers: one set of answers, without replicates.
        threshold: lowest confidence that is answered, on the grid of `graded_answers`.
        certainty: of each interval, in (0, 1).
    """
    groups, unparsed_correct = answers.groups, int(answers.unparsed_correct)
    given = groups.counts[groups.value >= threshold].sum(0)
    n, correct = int(groups.counts.sum() + groups.unparsed), int(groups.counts[:, 1].sum()) + unparsed_correct
    return ThresholdScores.of(n, int(given.sum()), int(given[0]), correct, correct - int(given[1]), certainty)


def control_risk(answers: Mapping[str, GradedAnswers], limits: Limits) -> RiskControl:
    """Choose a threshold for each group of answers, so that all limits hold for all groups at once with the certainty asked for.

    Args:
        answers: group -> its answers, without replicates; one group "" for all answers.
        limits: what is promised. Each of the G groups is tested at (1 - certainty) / G, and with two limits each limit at half of it.

    Raises:
        ValueError: without a group.

    Example:
        >>> control = control_risk({"": graded_answers([0.9] * 100 + [0.4] * 20, [True] * 100 + [False] * 20)}, Limits(0.05))
        >>> control.choices[""].threshold
        0.9
    """
    if not answers:
        raise ValueError("there is no group of answers")
    level = (1 - limits.certainty) / len(answers) / (1 if limits.max_sent_away is None else 2)
    return RiskControl(limits, {name: _choose(part, limits, level) for name, part in answers.items()}, level)


def _choose(answers: GradedAnswers, limits: Limits, level: float) -> Choice:
    groups = answers.groups
    lowest = int(lowest_controlled(groups, limits.max_error, level))
    highest = len(groups.value) - 1
    if limits.max_sent_away is not None:
        highest = int(highest_controlled(answers, limits.max_sent_away, level))
    if lowest < 0:
        reason, more = _why_none(groups, limits.max_error, level)
        return Choice(None, reason=reason, more_answers=more)
    threshold = float(groups.value[lowest])
    scores = threshold_scores(answers, threshold, limits.certainty)
    if lowest > highest:
        return Choice(None, reason=_conflict(answers, limits, scores, threshold, highest))
    p_sent_away = None
    if limits.max_sent_away is not None:
        p_sent_away = float(p_value(scores.sent_away, scores.correct, limits.max_sent_away))
    p_error = float(p_value(scores.wrong, scores.answers, limits.max_error))
    return Choice(threshold, scores, p_error, p_sent_away)


# --- In words -------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share in percent, with a decimal only where it needs one: 5%, 2.5%."""
    return f"{round(100 * share, 1):g}%" if share >= 0.001 else f"{100 * share:.2g}%"


def answers_needed(groups: ConfidenceGroups, max_error: float, level: float) -> int | None:
    """The smallest number of answers, with the same shares at each confidence, of which a threshold would pass.

    Wrong answers are rounded up and answers down. Numbers above 1,000 are tried in steps of 0.1%.

    Returns:
        None if no number up to 1,000 times that of these answers would be enough.
    """
    above = counts_above(groups)
    n, total = int(above.n), 1
    while n and total <= MAX_GROWTH * n:
        step = max(1, total // 1000)
        totals = total + step * np.arange(512)
        answers = totals[:, None] * above.answers // n
        wrong = np.minimum(-(-totals[:, None] * above.wrong // n), answers)
        passes = is_controlled(CountsAbove(answers, wrong, totals), max_error, level)
        if passes.any():
            return int(totals[passes.argmax()])
        total = int(totals[-1]) + step
    return None


def _why_none(groups: ConfidenceGroups, max_error: float, level: float) -> tuple[str, int | None]:
    """Why no threshold keeps the limit of the error, and how many more answers would be enough, if any number would."""
    above = counts_above(groups)
    if not above.answers.any():
        return "no answer has a confidence", None
    tested = above.answers >= start_bounds(max_error, level)[0]
    if not tested.any():
        most, fewest = int(above.answers.max()), start_bounds(max_error, level)[0]
        few = f"{most} answers with a confidence are too few: even without a wrong one it takes {fewest}"
    else:
        few = "no threshold passes the test"
    rates = above.wrong / np.maximum(above.answers, 1)
    best = len(rates) - 1 - int(np.flip(rates).argmin())
    lowest = f"the lowest error found is {percent(rates[best])}, from {percent(float(groups.value[best]))} on"
    if rates[best] >= max_error:
        return f"{few}. No number of answers like these would help: {lowest}", None
    needed = answers_needed(groups, max_error, level)
    if needed is None:
        why = f"More answers like these would not help, since the most confident ones are not right more often: {lowest}"
        return f"{few}. {why}", None
    more = max(needed - int(above.n), 1)
    return f"{few}. About {needed:,} answers like these would be enough ({more:,} more): {lowest}", more


def _conflict(
    answers: GradedAnswers, limits: Limits, scores: ThresholdScores, threshold: float, highest: int
) -> str:
    """Which of two limits must give, with what each costs."""
    assert limits.max_sent_away is not None
    away = (
        f"from {percent(threshold)} on at most {percent(limits.max_error)} of the answers given are wrong, but "
        f"{percent(scores.sent_away_share.value)} of the correct answers are sent away (limit {percent(limits.max_sent_away)})"
    )
    if highest < 0:
        return f"{away}, and no threshold keeps that limit: raise the limit of those sent away, or give more answers"
    other = float(answers.groups.value[highest])
    error = threshold_scores(answers, other, limits.certainty).error.value
    return (
        f"{away}; from {percent(other)} on the limit of those sent away holds, but {percent(error)} of the answers given are wrong: "
        "raise one of the two limits"
    )


def guarantee(control: RiskControl, questions: str = "those of the calibration split") -> str:
    """The promise as a sentence; empty if no group has a threshold.

    Args:
        control: thresholds of one or several groups.
        questions: which questions the promise is for, after "questions like".

    Example:
        >>> answers = graded_answers([0.9] * 100 + [0.4] * 20, [True] * 100 + [False] * 20)
        >>> print(guarantee(control_risk({"": answers}, Limits(0.05))))
        At most 5% of the answers given are wrong, with 95% certainty, for questions like those of the calibration split: answer from 90% on, 83% of the questions.
    """
    if not control.found:
        return ""
    limits, several = control.limits, list(control.choices) != [""]
    promise = f"At most {percent(limits.max_error)} of the answers given are wrong"
    if limits.max_sent_away is not None:
        promise += f" and at most {percent(limits.max_sent_away)} of the correct answers are sent away"
    promise += " in every group" if several else ""
    certainty = f"with {percent(limits.certainty)} certainty{' for all groups together' if several else ''}"
    rules = "; ".join(
        f"{f'{name}: ' if several else ''}{_rule(choice)}" for name, choice in control.choices.items()
    )
    return f"{promise}, {certainty}, for questions like {questions}: {rules}."


def _rule(choice: Choice) -> str:
    if choice.threshold is None or choice.scores is None:
        return "answer nothing"
    return f"answer from {percent(choice.threshold)} on, {choice.scores.coverage.value:.0%} of the questions"
