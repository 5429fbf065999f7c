"""Binned calibration errors of a table: expected, maximum, adaptive and debiased calibration error."""

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
    table_metric,
)

Norm = Literal["l1", "l2", "max"]
NO_ANSWERS = "there is no answer with a readable confidence"


def _mean_gap(sums: BinSums) -> Tensor:
    """Mean of (confidence - correctness) in each bin; 0 where the bin is empty."""
    return torch.where(sums.answers > 0, sums.gap / sums.answers.clamp_min(1), 0.0)


def _largest(gap: Tensor, total: Tensor) -> Tensor:
    """The largest absolute value over the last dimension; NaN where there is no answer."""
    if gap.shape[-1] == 0:
        return torch.full_like(total, torch.nan)
    return torch.where(total > 0, gap.abs().amax(-1), torch.nan)


@table_metric(NO_ANSWERS)
def expected_calibration_error(
    levels: ConfidenceGroups, *, n_bins: int = 10, binning: Binning = "uniform", norm: Norm = "l1"
) -> Tensor:
    r"""Expected calibration error, Naeini et al. (AAAI 2015) and Guo et al. (arXiv 1706.04599).

    With the share of answers `w_b`, mean confidence `conf_b` and accuracy `acc_b` of each bin:
    `l1` is :math:`\sum_b w_b |acc_b - conf_b|`, `l2` is :math:`\sqrt{\sum_b w_b (acc_b - conf_b)^2}` and
    `max` is :math:`\max_b |acc_b - conf_b|` over the bins that hold an answer.

    Args:
        levels: a table.
        n_bins: number of bins; `levels` binning does not use it.
        binning: `uniform`: equal width, an edge belongs to the bin above it and 1 to the last bin;
            `quantile`: equal mass; `levels`: one bin for each stated confidence.
        norm: `l1`, `l2` or `max`.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.

    Raises:
        ValueError: on another binning or norm, or a non-positive `n_bins`.
    """
    sums = bin_sums(levels, n_bins, binning)
    if norm == "l1":
        return sums.gap.abs().sum(-1) / levels.total
    if norm == "l2":
        return (sums.gap * _mean_gap(sums)).sum(-1).div(levels.total).clamp_min(0).sqrt()
    if norm == "max":
        return _largest(_mean_gap(sums), levels.total)
    raise ValueError(f"norm must be l1, l2 or max; got {norm!r}")


@table_metric(NO_ANSWERS)
def maximum_calibration_error(
    levels: ConfidenceGroups, *, n_bins: int = 10, binning: Binning = "uniform"
) -> Tensor:
    """Maximum calibration error: the largest gap between accuracy and mean confidence of any bin.

    Args and errors as for `expected_calibration_error`, of which this is the `max` norm.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.
    """
    return _largest(_mean_gap(bin_sums(levels, n_bins, binning)), levels.total)


@table_metric(NO_ANSWERS)
def adaptive_calibration_error(
    levels: ConfidenceGroups, *, n_bins: int = 10, binning: Binning = "quantile"
) -> Tensor:
    """Adaptive calibration error, Nixon et al. (arXiv 1904.01685): mean gap over equal-mass bins.

    Every bin that holds an answer weighs the same, which is what netcal's ACE does. All answers of one level
    stay in one bin, so ties are in no particular order. With `uniform` binning this is the *average*
    calibration error of Neumann et al. (2018).

    Args and errors as for `expected_calibration_error`.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.
    """
    sums = bin_sums(levels, n_bins, binning)
    return _mean_gap(sums).abs().sum(-1) / (sums.answers > 0).sum(-1).double()


@table_metric("no bin holds two answers")
def debiased_calibration_error(
    levels: ConfidenceGroups, *, n_bins: int = 15, binning: Binning = "levels"
) -> Tensor:
    r"""Debiased l2 calibration error, Kumar, Liang & Ma (arXiv 1909.10155).

    The squared l2 error is too large by the sampling variance of each bin's accuracy, which is subtracted:
    :math:`\sum_b w_b [(acc_b - conf_b)^2 - acc_b (1 - acc_b) / (n_b - 1)]`; its root is returned, and 0 where
    it is negative. A bin with a single answer counts as 0, as in the authors' code; where no bin holds two, so
    that nothing was measured, the value is NaN and not the 0 of that code.

    Args and errors as for `expected_calibration_error`; the default bins are the stated levels, which raw
    continuous values do not share: give those `uniform` or `quantile` binning.

    Returns:
        float64 scalar in [0, 1]; NaN if no bin holds two answers.
    """
    sums = bin_sums(levels, n_bins, binning)
    accuracy = sums.right / sums.answers.clamp_min(1)
    variance = accuracy * (1 - accuracy) / (sums.answers - 1).clamp_min(1)
    error = torch.where(sums.answers > 1, _mean_gap(sums).square() - variance, 0.0)
    squared = (sums.answers * error).sum(-1) / levels.total
    return torch.where((sums.answers > 1).any(-1), squared.clamp_min(0).sqrt(), torch.nan)


@table_metric(NO_ANSWERS)
def overconfident_error(
    levels: ConfidenceGroups, *, n_bins: int = 10, binning: Binning = "uniform"
) -> Tensor:
    r"""The part of the ECE that comes from overconfident bins: :math:`\sum_b w_b \max(conf_b - acc_b, 0)`.

    `overconfident_error + underconfident_error` is the l1 ECE, and their difference is `overconfidence`.

    Args and errors as for `expected_calibration_error`.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.
    """
    return bin_sums(levels, n_bins, binning).gap.clamp_min(0).sum(-1) / levels.total


@table_metric(NO_ANSWERS)
def underconfident_error(
    levels: ConfidenceGroups, *, n_bins: int = 10, binning: Binning = "uniform"
) -> Tensor:
    r"""The part of the ECE that comes from underconfident bins: :math:`\sum_b w_b \max(acc_b - conf_b, 0)`.

    Args and errors as for `expected_calibration_error`.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.
    """
    return (-bin_sums(levels, n_bins, binning).gap).clamp_min(0).sum(-1) / levels.total


def _members(binning: Binning) -> Callable[[ConfidenceGroups], Tensor]:
    """Which level is in which of ten bins, `(L, K)`; bins without an answer are left out."""

    def members(levels: ConfidenceGroups) -> Tensor:
        one_hot = torch.nn.functional.one_hot(bin_index(levels, 10, binning), 10).double()
        return one_hot[:, levels.answers @ one_hot > 0]

    return members


ECE_GAPS = GapNorm(_members("uniform"), lambda gaps: gaps.abs().sum(-1))
"""`expected_calibration_error` with its defaults."""
MCE_GAPS = GapNorm(_members("uniform"), lambda gaps: gaps.abs().amax(-1), of_bin=True)
"""`maximum_calibration_error` with its defaults."""
ACE_GAPS = GapNorm(_members("quantile"), lambda gaps: gaps.abs().mean(-1), of_bin=True)
"""`adaptive_calibration_error` with its defaults, in the bins of these answers."""
