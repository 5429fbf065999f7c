"""Confidence thresholds with a guarantee: "at most 5% of the answers given are wrong, with 95% certainty".

A threshold t gives the answers whose confidence is at least t and sends the others to a person. Its selective risk R(t) is the
probability that an answer given is wrong. Learn then test (Angelopoulos et al., arXiv 2110.01052) tests, for one threshold after
another, the hypothesis that R(t) exceeds the limit, with an exact binomial p-value. A threshold that breaks the limit is chosen with
a probability of at most 1 - certainty.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import beta, binom

from vlm_calibration.metrics.bootstrap import Interval

BoolArray = npt.NDArray[np.bool_]
GRID_STEPS = 1000  # thresholds are tenths of a percent, fine enough for confidences that crowd near 100%
LATER_START = 4
"""Where the second half of the error probability enters, in multiples of the fewest answers that can pass: there some may be wrong."""
ASSUMPTIONS = (
    "The images that a threshold is chosen on, and those that it is used on, are independent draws from one source: the same kind of "
    "images and questions, in the same proportions. Of several questions about one image one counts.",
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
    """

    max_error: float
    certainty: float = 0.95
    max_sent_away: float | None = None


class GradedAnswers(NamedTuple):
    """N independent answers, at most one about an image.

    `confidence` is the highest threshold that gives an answer; NaN without a readable confidence.
    """

    confidence: npt.NDArray[np.float64]
    correct: BoolArray


class ThresholdScores(NamedTuple):
    """What a threshold does on a set of answers; the bounds are exact (Clopper & Pearson, 1934).

    Attributes:
        n: all answers.
        answers, wrong: answers given, and wrong ones among them.
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
    def of(cls, given: BoolArray, correct: BoolArray, certainty: float) -> "ThresholdScores":
        """The scores of N answers, of which some are given; `certainty` is that of each interval, in (0, 1)."""
        n, answers, n_correct = len(correct), int(given.sum()), int(correct.sum())
        right = int((given & correct).sum())
        wrong, sent_away = answers - right, n_correct - right
        shares = ((answers, n), (wrong, answers), (sent_away, n_correct))
        intervals = (exact_interval(*share, certainty) for share in shares)
        return cls(n, answers, wrong, n_correct, sent_away, *intervals)


class Choice(NamedTuple):
    """The threshold of one group of answers, or why there is none.

    Attributes:
        threshold: lowest confidence that is answered; None if no threshold keeps all limits.
        scores: what the threshold does on the answers that it was chosen on; None without a threshold.
        p_error: p-value of "the error exceeds its limit".
        p_sent_away: p-value of "the share sent away exceeds its limit"; None without such a limit.
        reason: why there is no threshold; empty with a threshold.
    """

    threshold: float | None
    scores: ThresholdScores | None = None
    p_error: float | None = None
    p_sent_away: float | None = None
    reason: str = ""


class RiskControl(NamedTuple):
    """Thresholds with one guarantee for all of them together.

    `choices`: group -> its threshold; the key of all answers as one group is "".
    """

    limits: Limits
    choices: Mapping[str, Choice]

    @property
    def found(self) -> bool:
        return any(choice.threshold is not None for choice in self.choices.values())

    @property
    def correction(self) -> str:
        """How the tests share the error probability, in words."""
        sequences = len(self.choices) * (1 + (self.limits.max_sent_away is not None))
        return f"fallback testing of thresholds from the highest down; Bonferroni over {sequences} sequences"


def graded_answers(confidence: Sequence[float | None], correct: Sequence[bool]) -> GradedAnswers:
    """Round confidences in [0, 1], None or NaN where they could not be parsed, down to the highest threshold that gives the answer."""
    values = np.array([np.nan if c is None else c for c in confidence], dtype=np.float64)
    level = np.round(values * GRID_STEPS)
    level -= level / GRID_STEPS > values
    return GradedAnswers(level / GRID_STEPS, np.array(correct, dtype=bool))


def exact_interval(events: int, trials: int, certainty: float) -> Interval:
    """The share of events with its two-sided Clopper-Pearson interval; NaN in [0, 1] without trials."""
    if trials == 0:
        return Interval(float("nan"), 0.0, 1.0)
    tail = (1 - certainty) / 2
    low = float(beta.ppf(tail, events, trials - events + 1)) if events else 0.0
    high = float(beta.ppf(1 - tail, events + 1, trials - events)) if events < trials else 1.0
    return Interval(events / trials, low, high)


def fewest_answers(limit: float, level: float) -> int:
    """How many answers pass at `level` without a wrong one among them.

    >>> fewest_answers(0.05, 0.05)
    59
    """
    return int(np.ceil(np.log(level) / np.log1p(-limit) - 1e-9))


def lowest_controlled(answers: GradedAnswers, max_error: float, level: float) -> float | None:
    """The lowest threshold at which "the error rate among the answers given exceeds `max_error`" is rejected; None if there is none.

    Thresholds are tested from the highest down, each at the error probability that the one above it hands on after a rejection (the fallback
    procedure, Wiens, 2003). All of `level`, in (0, 1), enters at the highest confidence if enough answers have it to pass; otherwise a half
    enters at the first threshold with enough answers, and the other half at `LATER_START` times as many. Where it enters depends on the
    confidences alone, and not on how many answers there are in all, so further answers with little confidence take no threshold
    away. The probability of a wrong rejection is at most `level` if the error rate does not fall when the threshold is lowered:
    each level of confidence below the first threshold that breaks the limit then has at least the error rate `max_error`, and so the
    number of wrong answers is, given all numbers of answers, at least binomial.
    """
    thresholds, given, wrong = _steps(answers)
    fewest = fewest_answers(max_error, level)
    entering = np.zeros(len(given) + 1)
    if len(given) and given[0] >= fewest:
        entering[0] = level
    else:
        for enough in (fewest_answers(max_error, level / 2), LATER_START * fewest):
            entering[np.searchsorted(given, enough)] += level / 2
    # The exact p-value: the probability of at most so many wrong answers at the limit.
    p_values = binom.cdf(wrong, given, max_error)
    lowest, available = None, 0.0
    for threshold, p_value, enters in zip(thresholds, p_values, entering, strict=False):
        available += enters
        if 0 < available >= p_value:
            lowest = float(threshold)
        else:
            available = 0.0
    return lowest


def _steps(answers: GradedAnswers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The thresholds that give further answers, from the highest down, and how many answers and wrong answers each gives, [L] each."""
    read = ~np.isnan(answers.confidence)
    negative, place = np.unique(-answers.confidence[read], return_inverse=True)
    wrong = place[~answers.correct[read]]
    given, wrong = (np.bincount(places, minlength=len(negative)).cumsum() for places in (place, wrong))
    return -negative, given, wrong


def control_risk(answers: Mapping[str, GradedAnswers], limits: Limits) -> RiskControl:
    """Choose a threshold for each group of answers, so that all limits hold for all groups at once with the certainty asked for.

    `answers`: group -> its answers; one group "" for all answers. Each of the G groups is tested at (1 - certainty) / G, and with two
    limits each limit at half of it.

    >>> control = control_risk({"": graded_answers([0.9] * 100 + [0.4] * 20, [True] * 100 + [False] * 20)}, Limits(0.05))
    >>> control.choices[""].threshold
    0.9
    """
    level = (1 - limits.certainty) / len(answers) / (1 if limits.max_sent_away is None else 2)
    return RiskControl(limits, {name: _choose(part, limits, level) for name, part in answers.items()})


def _choose(answers: GradedAnswers, limits: Limits, level: float) -> Choice:
    if (threshold := lowest_controlled(answers, limits.max_error, level)) is None:
        return Choice(None, reason=_why_none(answers, limits.max_error, level))
    scores = ThresholdScores.of(answers.confidence >= threshold, answers.correct, limits.certainty)
    p_error = float(binom.cdf(scores.wrong, scores.answers, limits.max_error))
    if limits.max_sent_away is None:
        return Choice(threshold, scores, p_error)
    # Tests from the lowest threshold upwards pass this one if and only if its own test does: trials stay, and events do not get fewer.
    p_sent_away = float(binom.cdf(scores.sent_away, scores.correct, limits.max_sent_away))
    if p_sent_away <= level:
        return Choice(threshold, scores, p_error, p_sent_away)
    kept = f"from {percent(threshold)} on at most {percent(limits.max_error)} of the answers given are wrong"
    lost = f"{percent(scores.sent_away_share.value)} of the correct answers are sent away"
    advice = f"(limit {percent(limits.max_sent_away)}): raise one of the two limits, or give more answers"
    return Choice(None, reason=f"{kept}, but {lost} {advice}")


def percent(share: float) -> str:
    """A share in percent, with a decimal only where it needs one: 5%, 2.5%."""
    return f"{round(100 * share, 1):g}%" if share >= 0.001 else f"{100 * share:.2g}%"


def _why_none(answers: GradedAnswers, max_error: float, level: float) -> str:
    thresholds, given, wrong = _steps(answers)
    fewest = fewest_answers(max_error, level if len(given) == 1 else level / 2)
    if not len(given):
        return "no answer has a confidence"
    if (n := given[-1]) < fewest:
        return f"{n} answers with a confidence are too few: even without a wrong one it takes {fewest}"
    rates = np.where(given >= fewest, wrong / given, np.inf)
    best = int(rates.argmin())
    lowest = f"{percent(rates[best])} of {given[best]} answers, from {percent(thresholds[best])} on"
    return f"no threshold passes the test: the lowest error found is {lowest}"


def guarantee(control: RiskControl, questions: str = "those of the calibration split") -> str:
    """The promise as a sentence; empty if no group has a threshold. `questions` says for which, after "questions like"."""
    if not control.found:
        return ""
    limits, several = control.limits, list(control.choices) != [""]
    promise = f"At most {percent(limits.max_error)} of the answers given are wrong"
    if limits.max_sent_away is not None:
        promise += f" and at most {percent(limits.max_sent_away)} of the correct answers are sent away"
    if several:
        promise += " in every group"
    certainty = f"with {percent(limits.certainty)} certainty{' for all groups together' if several else ''}"
    rules = []
    for name, (threshold, scores, *_) in control.choices.items():
        rule = "answer nothing"
        if threshold is not None and scores is not None:
            rule = f"answer from {percent(threshold)} on, {scores.coverage.value:.0%} of the questions"
        rules.append(f"{name}: {rule}" if several else rule)
    return f"{promise}, {certainty}, for questions like {questions}: {'; '.join(rules)}."
