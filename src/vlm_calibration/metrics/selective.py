"""Answering only when confident enough: the risk-coverage curve of a table and the numbers read from it.

A table cannot say in which order equally confident answers came, so where a level is cut its answers are
taken in random order and the expectation is computed, in closed form. Without ties this is the usual curve.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vlm_calibration.metrics.binned import NO_ANSWERS
from vlm_calibration.metrics.groups import ConfidenceGroups, HasLevels, table_metric


class RiskCoverageCurve(NamedTuple):
    """One point for each stated level, from the most confident down; every field `(L,)` float64.

    Attributes:
        threshold: answer if the confidence is at least this.
        coverage: share of the answers given, in (0, 1].
        risk: share of wrong answers among those given (selective risk).
        generalized_risk: answers that are given and wrong, as a share of all answers.
    """

    threshold: Tensor
    coverage: Tensor
    risk: Tensor
    generalized_risk: Tensor


def risk_coverage_curve(table: HasLevels) -> RiskCoverageCurve:
    """The risk-coverage curve, El-Yaniv & Wiener (2010): empty without answers."""
    levels = table.levels()
    answers, wrong = levels.answers.flip(-1).cumsum(-1), levels.wrong.flip(-1).cumsum(-1)
    total = levels.total.unsqueeze(-1)
    return RiskCoverageCurve(
        levels.value.flip(-1), answers / total, wrong / answers.clamp_min(1), wrong / total
    )


def _harmonic_difference(start: Tensor, length: Tensor) -> Tensor:
    """`1/(start+1) + ... + 1/(start+length)`."""
    return torch.digamma(start + length + 1) - torch.digamma(start + 1)


def _aurc(levels: ConfidenceGroups) -> Tensor:
    answers, wrong = levels.answers.flip(-1), levels.wrong.flip(-1)
    answers_before = answers.cumsum(-1) - answers
    wrong_before = wrong.cumsum(-1) - wrong
    rate = wrong / answers.clamp_min(1)
    # E[risk after k answers] = (wrong_before + (k - answers_before) * rate) / k, summed over the level's k.
    area = wrong + (wrong_before - answers_before * rate) * _harmonic_difference(answers_before, answers)
    return area.sum(-1) / levels.total


@table_metric(NO_ANSWERS)
def area_under_risk_coverage(levels: ConfidenceGroups) -> Tensor:
    r"""AURC, Geifman & El-Yaniv (arXiv 1805.08206): :math:`\frac{1}{N} \sum_{k=1}^N risk_k`, lower is better.

    `risk_k` is the error rate of the `k` most confident answers, in expectation over the order of ties.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.
    """
    return _aurc(levels)


@table_metric(NO_ANSWERS)
def excess_area_under_risk_coverage(levels: ConfidenceGroups) -> Tensor:
    r"""Excess AURC: the AURC minus that of the best ranking of the same answers, lower is better.

    The best ranking puts all `m` right answers first; its AURC is
    :math:`\frac{1}{N} \sum_{k=m+1}^N (k - m) / k` exactly, of which the published
    :math:`e + (1 - e) \ln (1 - e)` is the limit.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.
    """
    right, wrong = levels.right.sum(-1), levels.wrong.sum(-1)
    best = (wrong - right * _harmonic_difference(right, wrong)) / levels.total
    return (_aurc(levels) - best).clamp_min(0)


@table_metric(NO_ANSWERS)
def area_under_generalized_risk_coverage(levels: ConfidenceGroups) -> Tensor:
    """AUGRC, Traub et al. (arXiv 2407.01032): area under (coverage, answers given and wrong), lower is better.

    The curve starts at the origin and is linear within a level, which makes
    `AUGRC = (1 - AUROC) * acc * (1 - acc) + (1 - acc)^2 / 2` exact.

    Returns:
        float64 scalar in [0, 1/2]; NaN without answers.
    """
    answers, wrong = levels.answers.flip(-1), levels.wrong.flip(-1)
    height = wrong.cumsum(-1) - wrong / 2
    return (answers * height).sum(-1) / levels.total.square()


@table_metric(NO_ANSWERS)
def accuracy_at_coverage(levels: ConfidenceGroups, *, coverage: float = 0.8) -> Tensor:
    """Accuracy of the most confident `coverage` share of the answers.

    The share need not be a whole number of answers: the level where it ends, and the answer where it ends,
    count in part.

    Args:
        levels: a table.
        coverage: in (0, 1].

    Returns:
        float64 scalar in [0, 1]; NaN without answers.

    Raises:
        ValueError: if `coverage` is outside (0, 1].
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be in (0, 1], got {coverage}")
    answers, right = levels.answers.flip(-1), levels.right.flip(-1)
    given = coverage * levels.total
    before = answers.cumsum(-1) - answers
    share = ((given.unsqueeze(-1) - before) / answers.clamp_min(1)).clamp(0, 1)
    return (right * share).sum(-1) / given


@table_metric(NO_ANSWERS)
def coverage_at_risk(levels: ConfidenceGroups, *, risk: float = 0.05) -> Tensor:
    """The largest share of answers that a confidence threshold can give with an error rate of at most `risk`.

    Only thresholds are considered, so a level is answered wholly or not at all.

    Args:
        levels: a table.
        risk: in [0, 1].

    Returns:
        float64 scalar in [0, 1]: 0 if every threshold is riskier; NaN without answers.

    Raises:
        ValueError: if `risk` is outside [0, 1].
    """
    if not 0 <= risk <= 1:
        raise ValueError(f"risk must be in [0, 1], got {risk}")
    answers, wrong = levels.answers.flip(-1).cumsum(-1), levels.wrong.flip(-1).cumsum(-1)
    allowed = torch.where(wrong / answers.clamp_min(1) <= risk, answers, 0.0)
    best = allowed.amax(-1) if allowed.shape[-1] else torch.zeros_like(levels.total)
    return best / levels.total
