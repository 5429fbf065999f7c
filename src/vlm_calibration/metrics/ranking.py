"""Ranking metrics: how well confidence ranks correct answers above wrong ones."""

from typing import Literal

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


def average_precision(groups: ConfidenceGroups, *, positive: Literal["right", "wrong"] = "right") -> Tensor:
    r"""Average precision :math:`\sum_k (R_k - R_{k-1}) P_k` over distinct confidences, without interpolation.

    Args:
        groups: the answers.
        positive: `right` finds correct answers among the most confident; `wrong` finds errors among the least.

    Returns:
        float64 scalar in [0, 1]; NaN without an answer of the positive class.

    Raises:
        ValueError: on another `positive`.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import average_precision
        >>> average_precision(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.5000, dtype=torch.float64)
    """
    if positive == "right":
        positives, answers = groups.correct.flip(-1), groups.answers.flip(-1)
    elif positive == "wrong":
        positives, answers = groups.wrong, groups.answers
    else:
        raise ValueError(f"positive must be right or wrong, got {positive!r}")
    precision = positives.cumsum(-1) / answers.cumsum(-1).clamp_min(1)
    return (positives * precision).sum(-1) / positives.sum(-1)
