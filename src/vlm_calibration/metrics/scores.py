"""Proper scores and first moments: Brier score and its decomposition, log loss, means."""

from typing import NamedTuple

import torch
from torch import Tensor

from vlm_calibration.metrics.groups import ConfidenceGroups

FLOAT64_EPS = torch.finfo(torch.float64).eps


class BrierDecomposition(NamedTuple):
    """Murphy's parts of the Brier score: `brier = reliability - resolution + uncertainty`.

    Attributes:
        reliability: float64 scalar in [0, 1], lower is better.
        resolution: float64 scalar in [0, 1/4], higher is better.
        uncertainty: float64 scalar in [0, 1/4], a property of the task.
    """

    reliability: Tensor
    resolution: Tensor
    uncertainty: Tensor


def answer_count(groups: ConfidenceGroups) -> Tensor:
    """Number of all answers, unparsed ones included.

    Args:
        groups: the answers.

    Returns:
        float64 scalar, never NaN.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import answer_count
        >>> answer_count(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(3., dtype=torch.float64)
    """
    return groups.total + groups.unparsed


def parse_failure_rate(groups: ConfidenceGroups) -> Tensor:
    """Share of all answers whose confidence could not be read.

    Args:
        groups: the answers.

    Returns:
        float64 scalar in [0, 1]; NaN without answers. Raw values are all readable, so their rate is 0.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import parse_failure_rate
        >>> parse_failure_rate(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0., dtype=torch.float64)
    """
    return groups.unparsed / (groups.total + groups.unparsed)


def mean_confidence(groups: ConfidenceGroups) -> Tensor:
    r"""Mean confidence :math:`\frac{1}{N} \sum_i c_i`.

    Args:
        groups: the answers.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import mean_confidence
        >>> mean_confidence(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.7000, dtype=torch.float64)
    """
    return (groups.answers * groups.value).sum(-1) / groups.total


def parsed_accuracy(groups: ConfidenceGroups) -> Tensor:
    """Accuracy over the answers with a readable confidence.

    Args:
        groups: the answers.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import parsed_accuracy
        >>> parsed_accuracy(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.3333, dtype=torch.float64)
    """
    return groups.correct.sum(-1) / groups.total


def overconfidence(groups: ConfidenceGroups) -> Tensor:
    """Mean confidence minus accuracy, signed: positive is overconfident.

    Args:
        groups: the answers.

    Returns:
        float64 scalar in [-1, 1]; NaN without answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import overconfidence
        >>> overconfidence(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.3667, dtype=torch.float64)
    """
    return (groups.answers * groups.value - groups.correct).sum(-1) / groups.total


def brier_score(groups: ConfidenceGroups) -> Tensor:
    r"""Brier score (1950), :math:`\frac{1}{N} \sum_i (c_i - y_i)^2`.

    Args:
        groups: the answers.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import brier_score
        >>> brier_score(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.3033, dtype=torch.float64)
    """
    squares = groups.wrong * groups.value.square() + groups.correct * (1 - groups.value).square()
    return squares.sum(-1) / groups.total


def brier_reliability(groups: ConfidenceGroups) -> Tensor:
    r"""Murphy's reliability :math:`\sum_k w_k (c_k - acc_k)^2` over distinct confidences.

    Args:
        groups: the answers.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import brier_reliability
        >>> brier_reliability(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.1367, dtype=torch.float64)
    """
    gap = groups.answers * groups.value - groups.correct
    return (gap.square() / groups.answers.clamp_min(1)).sum(-1) / groups.total


def brier_resolution(groups: ConfidenceGroups) -> Tensor:
    r"""Murphy's resolution :math:`\sum_k w_k (acc_k - acc)^2` over distinct confidences.

    Args:
        groups: the answers.

    Returns:
        float64 scalar in [0, 1/4]; NaN without answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import brier_resolution
        >>> brier_resolution(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.0556, dtype=torch.float64)
    """
    base = parsed_accuracy(groups).unsqueeze(-1)
    accuracy = groups.correct / groups.answers.clamp_min(1)
    return (groups.answers * (accuracy - base).square()).sum(-1) / groups.total


def brier_uncertainty(groups: ConfidenceGroups) -> Tensor:
    """Murphy's uncertainty `acc * (1 - acc)`, which does not depend on the confidences.

    Args:
        groups: the answers.

    Returns:
        float64 scalar in [0, 1/4]; NaN without answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import brier_uncertainty
        >>> brier_uncertainty(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.2222, dtype=torch.float64)
    """
    accuracy = parsed_accuracy(groups)
    return accuracy * (1 - accuracy)


def brier_decomposition(groups: ConfidenceGroups) -> BrierDecomposition:
    """Murphy's parts of the Brier score (1973), over distinct confidences, so that they add up exactly.

    Reliability and resolution depend on the number of distinct confidences: those of a table are at its grid.

    Args:
        groups: the answers.

    Returns:
        reliability, resolution and uncertainty, float64 scalars; NaN without answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import brier_decomposition
        >>> parts = brier_decomposition(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        >>> parts.reliability - parts.resolution + parts.uncertainty
        tensor(0.3033, dtype=torch.float64)
    """
    return BrierDecomposition(brier_reliability(groups), brier_resolution(groups), brier_uncertainty(groups))


def log_loss(groups: ConfidenceGroups, *, eps: float = FLOAT64_EPS) -> Tensor:
    r"""Logarithmic loss in nats, :math:`-\frac{1}{N} \sum_i [y_i \ln c_i + (1 - y_i) \ln (1 - c_i)]`.

    A wrong answer at 100% would cost infinity, which makes every mean infinite and which JSON cannot write. As in
    scikit-learn, confidences are clipped to [eps, 1 - eps]; `eps=0` gives the infinity.

    Args:
        groups: the answers.
        eps: in [0, 0.5). With the default, float64's 2.2e-16, a wrong answer at 100% costs 36.04 nats.

    Returns:
        float64 scalar, 0 or more; NaN without answers.

    Raises:
        ValueError: if `eps` is outside [0, 0.5).

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import log_loss
        >>> log_loss(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.9215, dtype=torch.float64)
    """
    if not 0 <= eps < 0.5:
        raise ValueError(f"eps must be in [0, 0.5), got {eps}")
    value = groups.value.clamp(eps, 1 - eps)
    likelihood = torch.xlogy(groups.correct, value) + torch.xlogy(groups.wrong, 1 - value)
    return (0 - likelihood).sum(-1) / groups.total
