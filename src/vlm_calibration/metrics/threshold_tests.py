"""Exact tests of confidence thresholds, for one set of answers or a batch of replicates: see `risk_control`, which chooses with them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import beta, binom
from torch import Tensor

from vlm_calibration.metrics.bootstrap import Interval
from vlm_calibration.metrics.groups import ConfidenceGroups
from vlm_calibration.metrics.table import ConfidenceTable, as_confidence_tensor

Counts = npt.NDArray[np.int64]

GRID_STEPS = 1000
"""Thresholds are tenths of a percent, fine enough for confidences that crowd near 100%."""


class GradedAnswers(NamedTuple):
    """The counts that thresholds are chosen on.

    Attributes:
        groups: confidences with their counts; answers without a readable confidence count as `unparsed` and are never given.
        unparsed_correct: int64 [...], how many of those are correct.
    """

    groups: ConfidenceGroups
    unparsed_correct: Tensor


# --- Counts ---------------------------------------------------------------------------------------------------------


def graded_answers(
    confidence: Tensor | Sequence[float | None],
    correct: Tensor | Sequence[bool],
    grid_steps: int = GRID_STEPS,
) -> GradedAnswers:
    """Count answers at the highest threshold that gives them.

    A confidence counts at the level below it, where metrics take the nearest: so an answer is at or above a threshold in the counts
    if and only if its confidence is.

    Args:
        confidence: [N] in [0, 1]; NaN (or None in a list) where it could not be parsed.
        correct: bool [N].
        grid_steps: number of steps between the thresholds 0 and 1.

    Raises:
        ValueError: on a confidence outside [0, 1], or inputs of different lengths.
    """
    values = as_confidence_tensor(confidence).to(torch.float64)
    correct = torch.as_tensor(correct, dtype=torch.bool)
    level = (values * grid_steps).round()
    level -= (level / grid_steps > values).to(level)
    table = ConfidenceTable.from_predictions(level / grid_steps, correct, grid_steps)
    return GradedAnswers(table.groups(), (values.isnan() & correct).sum())


class CountsAbove(NamedTuple):
    """Counts at or above each threshold, int64 [..., L] with thresholds ascending; `n` int64 [...] counts all answers."""

    answers: Counts
    wrong: Counts
    n: Counts


def counts_above(groups: ConfidenceGroups) -> CountsAbove:
    counts = groups.counts.numpy()
    above = np.flip(np.flip(counts, -2).cumsum(-2), -2)
    return CountsAbove(above.sum(-1), above[..., 0], counts.sum((-1, -2)) + groups.unparsed.numpy())


# --- Tests ----------------------------------------------------------------------------------------------------------


def p_value(events: npt.ArrayLike, trials: npt.ArrayLike, limit: float) -> npt.NDArray[np.float64]:
    """Exact p-value of "the rate exceeds `limit`": the probability of at most `events` in `trials` at the rate `limit`.

    >>> round(float(p_value(0, 59, 0.05)), 4)
    0.0485
    """
    return np.asarray(binom.cdf(events, trials, limit))


def exact_interval(events: int, trials: int, certainty: float) -> Interval:
    """The share of events with its two-sided Clopper-Pearson interval; NaN in [0, 1] without trials."""
    if trials == 0:
        return Interval(float("nan"), 0.0, 1.0)
    tail = (1 - certainty) / 2
    low = float(beta.ppf(tail, events, trials - events + 1)) if events else 0.0
    high = float(beta.ppf(1 - tail, events + 1, trials - events)) if events < trials else 1.0
    return Interval(events / trials, low, high)


@lru_cache(maxsize=64)
def start_bounds(limit: float, level: float) -> tuple[int, int]:
    """The smallest number of answers that pass without a wrong one, and that pass with an even chance at half the limit."""
    fewest = max(1, int(np.ceil(np.log(level) / np.log1p(-limit))))
    while p_value(0, fewest, limit) > level:
        fewest += 1
    first = fewest
    while True:
        trials = np.arange(first, 2 * first + 16)
        allowed = binom.ppf(level, trials, limit)
        allowed -= p_value(allowed, trials, limit) > level
        passes = binom.cdf(allowed, trials, limit / 2) >= 0.5
        if passes.any():
            return fewest, int(trials[passes.argmax()])
        first = int(trials[-1]) + 1


def starting_answers(n: npt.ArrayLike, limit: float, level: float) -> Counts:
    """How many answers the first threshold tested must give: enough for a test that can succeed, at most half of many.

    Args:
        n: number of all answers.
        limit: largest error rate, in (0, 1).
        level: level of the test, in (0, 1).

    >>> [int(starting_answers(n, 0.05, 0.05)) for n in (50, 200, 10_000)]
    [59, 100, 181]
    """
    fewest, even = start_bounds(limit, level)
    return np.maximum(fewest, np.minimum(even, np.asarray(n) // 2))


def lowest_controlled(groups: ConfidenceGroups, max_error: float, level: float) -> Counts:
    """The lowest threshold at which "the error rate among the answers given exceeds `max_error`" is rejected.

    Thresholds are tested from the first with `starting_answers` downwards, and the sequence ends at the first that is not rejected. Which
    threshold is the first depends on the confidences alone. The error probability is at most `level` if the error rate does not fall when
    the threshold is lowered: each level of confidence below the first threshold that breaks the limit then has at least the error
    rate `max_error`, and so the number of wrong answers is, given all numbers of answers, at least binomial.

    Args:
        groups: the answers; leading dimensions are replicates.
        max_error: in (0, 1).
        level: of the test, in (0, 1).

    Returns:
        int64 [...], position in `groups.value`; -1 where no threshold is rejected.
    """
    above = counts_above(groups)
    tested = above.answers >= starting_answers(above.n, max_error, level)[..., None]
    rejected = p_value(above.wrong, above.answers, max_error) <= level
    # From the highest threshold down, as long as all that were tested are rejected.
    unbroken = np.flip(np.logical_and.accumulate(np.flip(rejected | ~tested, -1), -1), -1)
    # A level without answers repeats the test of the one above it.
    holds_answers = np.diff(above.answers, axis=-1, append=0) < 0
    chosen = unbroken & tested & holds_answers
    return np.where(chosen.any(-1), chosen.argmax(-1), -1) if chosen.shape[-1] else np.full(above.n.shape, -1)


def is_controlled(above: CountsAbove, max_error: float, level: float) -> npt.NDArray[np.bool_]:
    """Whether `lowest_controlled` finds a threshold, bool [...]: if the first one tested is rejected."""
    tested = above.answers >= starting_answers(above.n, max_error, level)[..., None]
    # Thresholds ascend, and the first one tested is the highest.
    first = tested.shape[-1] - 1 - np.flip(tested, -1).argmax(-1)[..., None]
    answers, wrong = (np.take_along_axis(counts, first, -1)[..., 0] for counts in above[:2])
    return tested.any(-1) & (p_value(wrong, answers, max_error) <= level)


def highest_controlled(answers: GradedAnswers, max_sent_away: float, level: float) -> Counts:
    """The highest threshold at which "the share of correct answers that are not given exceeds `max_sent_away`" is rejected.

    Thresholds are tested from the lowest upwards. The share cannot fall when the threshold rises, and all tests have the same number of
    trials, so the error probability is at most `level` without an assumption.

    Args:
        answers: leading dimensions are replicates.
        max_sent_away: in (0, 1).
        level: of the test, in (0, 1).

    Returns:
        int64 [...], position in `groups.value`; -1 where no threshold is rejected.
    """
    correct = answers.groups.counts[..., 1].numpy()
    unparsed = answers.unparsed_correct.numpy()[..., None]
    sent_away = correct.cumsum(-1) - correct + unparsed
    rejected = p_value(sent_away, correct.sum(-1, keepdims=True) + unparsed, max_sent_away) <= level
    return np.logical_and.accumulate(rejected, -1).sum(-1) - 1
