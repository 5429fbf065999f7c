"""Selective answering: the risk-coverage curve and the metrics computed from it.

A table does not record the order of equally confident answers. Where a threshold would split them, their expected
contribution over random orders is computed in closed form. Without ties this is the usual curve.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vlm_calibration.metrics.groups import ConfidenceGroups


class RiskCoverageCurve(NamedTuple):
    """One point for each distinct confidence, from the most confident down.

    Attributes:
        threshold: the lowest confidence that is answered, float64 [L].
        coverage: share of the questions that are answered, float64 [L] in (0, 1].
        risk: share of wrong answers among the answered questions (selective risk), float64 [L].
        generalized_risk: questions that are answered wrongly, as a share of all, float64 [L].
    """

    threshold: Tensor
    coverage: Tensor
    risk: Tensor
    generalized_risk: Tensor


def risk_coverage_curve(groups: ConfidenceGroups) -> RiskCoverageCurve:
    """Risk-coverage curve, El-Yaniv & Wiener (2010): one point for each distinct confidence, from the most confident down.

    Args:
        groups: the answers.

    Returns:
        the curve; empty without answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import risk_coverage_curve
        >>> risk_coverage_curve(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False])).risk
        tensor([0.5000, 0.6667], dtype=torch.float64)
    """
    answers, wrong = groups.answers.flip(-1).cumsum(-1), groups.wrong.flip(-1).cumsum(-1)
    total = groups.total.unsqueeze(-1)
    return RiskCoverageCurve(
        groups.value.flip(-1), answers / total, wrong / answers.clamp_min(1), wrong / total
    )


def _harmonic_difference(start: Tensor, length: Tensor) -> Tensor:
    """`1/(start+1) + ... + 1/(start+length)`."""
    return torch.digamma(start + length + 1) - torch.digamma(start + 1)


def area_under_risk_coverage(groups: ConfidenceGroups) -> Tensor:
    r"""Area under the risk-coverage curve (AURC), Geifman & El-Yaniv (arXiv 1805.08206).

    :math:`\frac{1}{N} \sum_{k=1}^N risk_k`, where `risk_k` is the error rate of the `k` most confident answers, in
    expectation over the order of ties.

    Args:
        groups: the answers.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import area_under_risk_coverage
        >>> area_under_risk_coverage(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.5556, dtype=torch.float64)
    """
    answers, wrong = groups.answers.flip(-1), groups.wrong.flip(-1)
    answers_before = answers.cumsum(-1) - answers
    wrong_before = wrong.cumsum(-1) - wrong
    rate = wrong / answers.clamp_min(1)
    # E[risk after k answers] = (wrong_before + (k - answers_before) * rate) / k, summed over the k of one confidence.
    area = wrong + (wrong_before - answers_before * rate) * _harmonic_difference(answers_before, answers)
    return area.sum(-1) / groups.total


def excess_area_under_risk_coverage(groups: ConfidenceGroups) -> Tensor:
    r"""Excess AURC, Geifman, Uziel & El-Yaniv (arXiv 1805.08206): AURC minus that of the best ranking of the same answers.

    The best ranking puts all `m` correct answers first; its AURC is
    :math:`\frac{1}{N} \sum_{k=m+1}^N (k - m) / k` exactly. The published :math:`e + (1 - e) \ln (1 - e)` is its limit.

    Args:
        groups: the answers.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import excess_area_under_risk_coverage
        >>> excess_area_under_risk_coverage(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.1667, dtype=torch.float64)
    """
    correct, wrong = groups.correct.sum(-1), groups.wrong.sum(-1)
    best = (wrong - correct * _harmonic_difference(correct, wrong)) / groups.total
    return (area_under_risk_coverage(groups) - best).clamp_min(0)


def area_under_generalized_risk_coverage(groups: ConfidenceGroups) -> Tensor:
    """Area under the generalized risk-coverage curve (AUGRC), Traub et al. (arXiv 2407.01032).

    The curve is that of the share answered wrongly over coverage. It starts at the origin and is linear between thresholds, so that
    `AUGRC = (1 - AUROC) * acc * (1 - acc) + (1 - acc)^2 / 2` exactly.

    Args:
        groups: the answers.

    Returns:
        float64 scalar in [0, 1/2]; NaN without answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import area_under_generalized_risk_coverage
        >>> area_under_generalized_risk_coverage(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.2778, dtype=torch.float64)
    """
    answers, wrong = groups.answers.flip(-1), groups.wrong.flip(-1)
    height = wrong.cumsum(-1) - wrong / 2
    return (answers * height).sum(-1) / groups.total.square()


def accuracy_at_coverage(groups: ConfidenceGroups, *, coverage: float = 0.8) -> Tensor:
    """Accuracy of the most confident `coverage` share of the answers.

    The share need not be a whole number of answers: ties at the cut, and the answer at the cut, count in part.

    Args:
        groups: the answers.
        coverage: in (0, 1].

    Returns:
        float64 scalar in [0, 1]; NaN without answers.

    Raises:
        ValueError: if `coverage` is outside (0, 1].

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import accuracy_at_coverage
        >>> accuracy_at_coverage(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]), coverage=0.5)
        tensor(0.5000, dtype=torch.float64)
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be in (0, 1], got {coverage}")
    answers, correct = groups.answers.flip(-1), groups.correct.flip(-1)
    answered = coverage * groups.total
    before = answers.cumsum(-1) - answers
    share = ((answered.unsqueeze(-1) - before) / answers.clamp_min(1)).clamp(0, 1)
    return (correct * share).sum(-1) / answered


def coverage_at_risk(groups: ConfidenceGroups, *, risk: float = 0.05) -> Tensor:
    """Largest coverage of a confidence threshold whose error rate is at most `risk`.

    Equally confident questions are all answered or all declined.

    Args:
        groups: the answers.
        risk: in [0, 1].

    Returns:
        float64 scalar in [0, 1]: 0 if every threshold is riskier; NaN without answers.

    Raises:
        ValueError: if `risk` is outside [0, 1].

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import coverage_at_risk
        >>> coverage_at_risk(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]), risk=0.5)
        tensor(0.6667, dtype=torch.float64)
    """
    if not 0 <= risk <= 1:
        raise ValueError(f"risk must be in [0, 1], got {risk}")
    curve = risk_coverage_curve(groups)
    answers = groups.answers.flip(-1).cumsum(-1)
    allowed = torch.where(curve.risk <= risk, answers, 0.0)
    largest = allowed.amax(-1) if allowed.shape[-1] else torch.zeros_like(groups.total)
    return largest / groups.total
