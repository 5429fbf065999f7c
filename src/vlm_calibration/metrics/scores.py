"""Proper scores of a table and its first moments: Brier and its decomposition, log loss, means, sharpness."""

from typing import NamedTuple

import torch
from torch import Tensor

from vlm_calibration.metrics.binned import NO_ANSWERS
from vlm_calibration.metrics.groups import ConfidenceGroups, HasLevels, quiet, table_metric, warn_undefined

FLOAT64_EPS = torch.finfo(torch.float64).eps


class BrierDecomposition(NamedTuple):
    """Murphy's parts of the Brier score: `brier = reliability - resolution + uncertainty`, all float64."""

    reliability: Tensor
    resolution: Tensor
    uncertainty: Tensor


@table_metric("there is no answer")
def answer_count(levels: ConfidenceGroups) -> Tensor:
    """The number of all answers, those without a readable confidence included; never NaN."""
    return levels.total + levels.unparsed


@table_metric("there is no answer")
def parse_failure_rate(levels: ConfidenceGroups) -> Tensor:
    """The share of all answers whose confidence could not be read, in [0, 1]; NaN without answers."""
    return levels.unparsed / (levels.total + levels.unparsed)


@table_metric(NO_ANSWERS)
def mean_confidence(levels: ConfidenceGroups) -> Tensor:
    """Mean confidence in [0, 1]; NaN without answers."""
    return (levels.answers * levels.value).sum(-1) / levels.total


@table_metric(NO_ANSWERS)
def parsed_accuracy(levels: ConfidenceGroups) -> Tensor:
    """Accuracy in [0, 1] over the answers with a readable confidence; NaN without answers."""
    return levels.right.sum(-1) / levels.total


@table_metric(NO_ANSWERS)
def overconfidence(levels: ConfidenceGroups) -> Tensor:
    """Mean confidence minus accuracy, signed, in [-1, 1]: positive is overconfident; NaN without answers."""
    return (levels.answers * levels.value - levels.right).sum(-1) / levels.total


@table_metric(NO_ANSWERS)
def sharpness(levels: ConfidenceGroups) -> Tensor:
    """Variance of the stated confidences, in [0, 1/4]: 0 says one number always; NaN without answers.

    Sharpness is a property of the forecasts alone, Gneiting, Balabdaoui & Raftery (2007): of two calibrated
    models the sharper one is the more useful.
    """
    mean = ((levels.answers * levels.value).sum(-1) / levels.total).unsqueeze(-1)
    return (levels.answers * (levels.value - mean).square()).sum(-1) / levels.total


@table_metric(NO_ANSWERS)
def brier_score(levels: ConfidenceGroups) -> Tensor:
    r"""Brier score (1950): :math:`\frac{1}{N} \sum_i (c_i - y_i)^2`, in [0, 1]; NaN without answers."""
    squares = levels.wrong * levels.value.square() + levels.right * (1 - levels.value).square()
    return squares.sum(-1) / levels.total


@table_metric(NO_ANSWERS)
def brier_reliability(levels: ConfidenceGroups) -> Tensor:
    r"""Murphy's reliability :math:`\sum_k w_k (c_k - acc_k)^2` over levels, in [0, 1], lower is better."""
    gap = levels.answers * levels.value - levels.right
    return (gap.square() / levels.answers.clamp_min(1)).sum(-1) / levels.total


@table_metric(NO_ANSWERS)
def brier_resolution(levels: ConfidenceGroups) -> Tensor:
    r"""Murphy's resolution :math:`\sum_k w_k (acc_k - acc)^2` over levels, in [0, 1/4], higher is better."""
    base = (levels.right.sum(-1) / levels.total).unsqueeze(-1)
    accuracy = levels.right / levels.answers.clamp_min(1)
    return (levels.answers * (accuracy - base).square()).sum(-1) / levels.total


@table_metric(NO_ANSWERS)
def brier_uncertainty(levels: ConfidenceGroups) -> Tensor:
    """Murphy's uncertainty `acc * (1 - acc)`, in [0, 1/4]: what the task is, whatever is stated."""
    base = levels.right.sum(-1) / levels.total
    return base * (1 - base)


def brier_decomposition(table: HasLevels) -> BrierDecomposition:
    """The Brier score in Murphy's parts (1973), over distinct levels, so that they add up exactly.

    Reliability and resolution depend on how finely confidences are told apart: they are those at the grid of
    the table (or of the raw values, where every value may be a level of its own).

    Args:
        table: a table.

    Returns:
        reliability, resolution and uncertainty, float64 scalars; NaN without answers, with one warning.
    """
    levels = table.levels()
    parts = BrierDecomposition(
        *(quiet(part)(levels) for part in (brier_reliability, brier_resolution, brier_uncertainty))
    )
    if bool(parts.uncertainty.isnan().any()):
        warn_undefined("brier_decomposition", NO_ANSWERS)
    return parts


@table_metric(NO_ANSWERS)
def log_loss(levels: ConfidenceGroups, *, eps: float = FLOAT64_EPS) -> Tensor:
    r"""Logarithmic loss in nats: :math:`-\frac{1}{N} \sum_i [y_i \ln c_i + (1 - y_i) \ln (1 - c_i)]`.

    A wrong answer at 100% costs infinity, which no average survives and JSON cannot write; as in scikit-learn,
    confidences are therefore read as if at least `eps` away from 0 and 1. `eps=0` gives the infinity.

    Args:
        levels: a table.
        eps: in [0, 0.5). The default, float64's 2.2e-16, makes certainty that is wrong cost 36.04 nats.

    Returns:
        float64 scalar, 0 or more; NaN without answers.

    Raises:
        ValueError: if `eps` is outside [0, 0.5).
    """
    if not 0 <= eps < 0.5:
        raise ValueError(f"eps must be in [0, 0.5), got {eps}")
    value = levels.value.clamp(eps, 1 - eps)
    likelihood = torch.xlogy(levels.right, value) + torch.xlogy(levels.wrong, 1 - value)
    return (0 - likelihood).sum(-1) / levels.total
