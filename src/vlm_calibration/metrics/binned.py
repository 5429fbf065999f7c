"""Binned calibration errors: expected, maximum, adaptive and debiased calibration error."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vlm_calibration.metrics.groups import (
    Binning,
    BinSums,
    ConfidenceGroups,
    GapNorm,
    bin_index,
    bin_sums,
)

Norm = Literal["l1", "l2", "max"]


def _mean_gap(sums: BinSums) -> Tensor:
    """Mean of (confidence - correctness) in each bin; 0 where the bin is empty."""
    return torch.where(sums.answers > 0, sums.gap / sums.answers.clamp_min(1), 0.0)


def _max_gap(gap: Tensor, total: Tensor) -> Tensor:
    """The largest absolute value over the last dimension; NaN where there is no answer."""
    if gap.shape[-1] == 0:
        return torch.full_like(total, torch.nan)
    return torch.where(total > 0, gap.abs().amax(-1), torch.nan)


def expected_calibration_error(
    groups: ConfidenceGroups, *, n_bins: int = 10, binning: Binning = "uniform", norm: Norm = "l1"
) -> Tensor:
    r"""Expected calibration error (ECE), Naeini et al. (AAAI 2015) and Guo et al. (arXiv 1706.04599).

    With the share of answers `w_b`, mean confidence `conf_b` and accuracy `acc_b` of each bin:
    `l1` is :math:`\sum_b w_b |acc_b - conf_b|`, `l2` is :math:`\sqrt{\sum_b w_b (acc_b - conf_b)^2}` and
    `max` is :math:`\max_b |acc_b - conf_b|` over the bins that hold an answer.

    Args:
        groups: the answers.
        n_bins: number of bins; `levels` binning does not use it.
        binning: `uniform`: equal width, an edge belongs to the bin above it and 1 to the last bin;
            `quantile`: equal mass; `levels`: one bin for each distinct confidence.
        norm: `l1`, `l2` or `max`.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.

    Raises:
        ValueError: on another binning or norm, or a non-positive `n_bins`.

    Example:
        Bins [0.3, 0.4) and [0.9, 1]: 2/3 * |0.5 - 0.9| + 1/3 * |0 - 0.3|.

        >>> import torch
        >>> from vlm_calibration.metrics.functional import expected_calibration_error
        >>> expected_calibration_error(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.3667, dtype=torch.float64)
    """
    sums = bin_sums(groups, n_bins, binning)
    if norm == "l1":
        return sums.gap.abs().sum(-1) / groups.total
    if norm == "l2":
        return (sums.gap * _mean_gap(sums)).sum(-1).div(groups.total).clamp_min(0).sqrt()
    if norm == "max":
        return _max_gap(_mean_gap(sums), groups.total)
    raise ValueError(f"norm must be l1, l2 or max; got {norm!r}")


def maximum_calibration_error(
    groups: ConfidenceGroups, *, n_bins: int = 10, binning: Binning = "uniform"
) -> Tensor:
    r"""Maximum calibration error (MCE), :math:`\max_b |acc_b - conf_b|` over the bins that hold an answer.

    Args:
        groups: the answers.
        n_bins: see `expected_calibration_error`.
        binning: see `expected_calibration_error`.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import maximum_calibration_error
        >>> maximum_calibration_error(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.4000, dtype=torch.float64)
    """
    return _max_gap(_mean_gap(bin_sums(groups, n_bins, binning)), groups.total)


def adaptive_calibration_error(
    groups: ConfidenceGroups, *, n_bins: int = 10, binning: Binning = "quantile"
) -> Tensor:
    r"""Adaptive calibration error (ACE), Nixon et al. (arXiv 1904.01685): mean gap over equal-mass bins.

    :math:`\frac{1}{B} \sum_b |acc_b - conf_b|` over the B bins that hold an answer, as in netcal. Equal confidences stay in
    one bin, so the order of ties does not matter. With `uniform` binning this is the *average* calibration error of Neumann
    et al. (2018).

    Args:
        groups: the answers.
        n_bins: see `expected_calibration_error`.
        binning: see `expected_calibration_error`.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import adaptive_calibration_error
        >>> adaptive_calibration_error(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.3500, dtype=torch.float64)
    """
    sums = bin_sums(groups, n_bins, binning)
    return _mean_gap(sums).abs().sum(-1) / (sums.answers > 0).sum(-1).double()


def debiased_calibration_error(
    groups: ConfidenceGroups, *, n_bins: int = 15, binning: Binning = "levels"
) -> Tensor:
    r"""Debiased l2 calibration error, Kumar, Liang & Ma (arXiv 1909.10155).

    The sampling variance of each bin's accuracy inflates the squared l2 error, and is subtracted:
    :math:`\sum_b w_b [(acc_b - conf_b)^2 - acc_b (1 - acc_b) / (n_b - 1)]`. The value is the root, or 0 where the sum is
    negative. A bin with a single answer counts as 0, as in the authors' code. Where no bin holds two answers the value is
    NaN; the authors' code returns 0.

    Args:
        groups: the answers.
        n_bins: see `expected_calibration_error`.
        binning: see `expected_calibration_error`; for continuous confidences choose `uniform` or `quantile`.

    Returns:
        float64 scalar in [0, 1]; NaN if no bin holds two answers.

    Example:
        >>> import torch
        >>> from vlm_calibration.metrics.functional import debiased_calibration_error
        >>> confidence = torch.tensor([0.9, 0.9, 0.9, 0.9])
        >>> debiased_calibration_error(confidence, torch.tensor([True, False, False, False]))
        tensor(0.6000, dtype=torch.float64)
    """
    sums = bin_sums(groups, n_bins, binning)
    accuracy = sums.correct / sums.answers.clamp_min(1)
    variance = accuracy * (1 - accuracy) / (sums.answers - 1).clamp_min(1)
    error = torch.where(sums.answers > 1, _mean_gap(sums).square() - variance, 0.0)
    squared = (sums.answers * error).sum(-1) / groups.total
    return torch.where((sums.answers > 1).any(-1), squared.clamp_min(0).sqrt(), torch.nan)


def _membership(binning: Binning) -> Callable[[ConfidenceGroups], Tensor]:
    """A function to float64 [L, K]: which confidence is in which of the ten bins; bins without an answer are left out."""

    def membership(groups: ConfidenceGroups) -> Tensor:
        one_hot = torch.nn.functional.one_hot(bin_index(groups, 10, binning), 10).double()
        return one_hot[:, groups.answers @ one_hot > 0]

    return membership


ECE_GAPS = GapNorm(_membership("uniform"), lambda gaps: gaps.abs().sum(-1))
"""`expected_calibration_error` with its defaults."""
MCE_GAPS = GapNorm(_membership("uniform"), lambda gaps: gaps.abs().amax(-1), of_bin=True)
"""`maximum_calibration_error` with its defaults."""
ACE_GAPS = GapNorm(_membership("quantile"), lambda gaps: gaps.abs().mean(-1), of_bin=True)
"""`adaptive_calibration_error` with its defaults, in the bins of these answers."""
