"""How well confidence ranks correct answers above wrong ones: AUROC, and the risk-coverage curve of selective answering.

A table does not record the order of equally confident answers. Where a threshold would split them, their expected
contribution over random orders is computed in closed form. Without ties this is the usual curve.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vlm_calibration.metrics.groups import ConfidenceGroups


def auroc(groups: ConfidenceGroups) -> Tensor:
    r"""Area under the ROC curve: the probability that a correct answer has more confidence than a wrong one.

    :math:`\frac{1}{n_+ n_-} \sum_{i: y_i = 1} \sum_{j: y_j = 0} [c_i > c_j] + \frac{1}{2} [c_i = c_j]` (Mann-Whitney).

    Args:
        groups: the answers.

    Returns:
        float64 scalar in [0, 1]; NaN when all answers are correct or all are wrong.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import auroc
        >>> auroc(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.7500, dtype=torch.float64)
    """
    wrong, correct = groups.wrong, groups.correct
    wrong_below = wrong.cumsum(-1) - wrong
    pairs_won = (correct * (wrong_below + wrong / 2)).sum(-1)
    return pairs_won / (correct.sum(-1) * wrong.sum(-1))


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
