"""How well a table's confidence ranks right answers above wrong ones: AUROC, average precision, monotonicity."""

from typing import Literal

import torch
from torch import Tensor

from vlm_calibration.metrics.groups import ConfidenceGroups, table_metric


def _before(count: Tensor) -> Tensor:
    """Exclusive cumulative sum over the last dimension."""
    return count.cumsum(-1) - count


@table_metric("it needs at least one right and one wrong answer")
def auroc(levels: ConfidenceGroups) -> Tensor:
    """Area under the ROC curve: the probability that a right answer states more confidence than a wrong one.

    A pair at the same level counts one half, so ties are in no particular order (Mann-Whitney).

    Returns:
        float64 scalar in [0, 1]; NaN when all answers are right or all are wrong.
    """
    wrong, right = levels.wrong, levels.right
    won = (right * (_before(wrong) + wrong / 2)).sum(-1)
    return won / (right.sum(-1) * wrong.sum(-1))


@table_metric("it needs at least one answer of the positive class")
def average_precision(levels: ConfidenceGroups, *, positive: Literal["right", "wrong"] = "right") -> Tensor:
    r"""Average precision :math:`\sum_k (R_k - R_{k-1}) P_k` over the levels, without interpolation.

    Args:
        levels: a table.
        positive: `right` finds right answers among the most confident; `wrong` finds errors among the least.

    Returns:
        float64 scalar in [0, 1]; NaN without an answer of the positive class.

    Raises:
        ValueError: on another `positive`.
    """
    if positive == "right":
        found, answers = levels.right.flip(-1), levels.answers.flip(-1)
    elif positive == "wrong":
        found, answers = levels.wrong, levels.answers
    else:
        raise ValueError(f"positive must be right or wrong, got {positive!r}")
    precision = found.cumsum(-1) / answers.cumsum(-1).clamp_min(1)
    return (found * precision).sum(-1) / found.sum(-1)


@table_metric("it needs two stated levels of different accuracy")
def monotonicity(levels: ConfidenceGroups) -> Tensor:
    """Does a higher stated level mean a higher accuracy? Spearman's correlation of the two over the answers.

    Every answer contributes the pair (its confidence, the accuracy of its level), so that a level weighs as
    much as it is used. 1: accuracy rises with every level; -1: it falls. On raw values that are all distinct
    the accuracy of a level is the answer's own correctness.

    Returns:
        float64 scalar in [-1, 1]; NaN with a single level, or when all levels have the same accuracy.
    """
    if levels.value.numel() == 0:
        return torch.full_like(levels.total, torch.nan)
    weight = levels.answers
    accuracy = levels.right / weight.clamp_min(1)
    rank_confidence = _before(weight) + (weight + 1) / 2
    rank_accuracy = _midranks(accuracy, weight)
    centre = ((levels.total + 1) / 2).unsqueeze(-1)
    x, y = rank_confidence - centre, rank_accuracy - centre
    covariance = (weight * x * y).sum(-1)
    spread = ((weight * x * x).sum(-1) * (weight * y * y).sum(-1)).sqrt()
    return torch.where(spread > 0, covariance / spread, torch.nan).clamp(-1, 1)


def _midranks(key: Tensor, weight: Tensor) -> Tensor:
    """Mean rank of each item among `weight` copies of every item sorted by `key`; equal keys share a rank."""
    order = key.argsort(-1)
    ascending = key.gather(-1, order).contiguous()
    below = torch.nn.functional.pad(weight.gather(-1, order).cumsum(-1), (1, 0))
    first = torch.searchsorted(ascending, key.contiguous(), right=False)
    last = torch.searchsorted(ascending, key.contiguous(), right=True)
    return (below.gather(-1, first) + below.gather(-1, last) + 1) / 2
