"""Binned calibration errors: expected, maximum and adaptive calibration error."""

from collections.abc import Callable

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


def _mean_gap(sums: BinSums) -> Tensor:
    """Mean of (confidence - correctness) in each bin; 0 where the bin is empty."""
    return torch.where(sums.answers > 0, sums.gap / sums.answers.clamp_min(1), 0.0)


def _max_gap(gap: Tensor, total: Tensor) -> Tensor:
    """The largest absolute value over the last dimension; NaN where there is no answer."""
    if gap.shape[-1] == 0:
        return torch.full_like(total, torch.nan)
    return torch.where(total > 0, gap.abs().amax(-1), torch.nan)


def expected_calibration_error(
    groups: ConfidenceGroups, *, n_bins: int = 10, binning: Binning = "uniform"
) -> Tensor:
    r"""Expected calibration error (ECE), Naeini et al. (AAAI 2015) and Guo et al. (arXiv 1706.04599).

    :math:`\sum_b w_b |acc_b - conf_b|`, with the share of answers `w_b`, mean confidence `conf_b` and accuracy `acc_b` of each bin.

    Args:
        groups: the answers.
        n_bins: number of bins.
        binning: `uniform`: equal width, an edge belongs to the bin above it and 1 to the last bin;
            `quantile`: equal mass.

    Returns:
        float64 scalar in [0, 1]; NaN without answers.

    Raises:
        ValueError: on another binning or a non-positive `n_bins`.

    Example:
        Bins [0.3, 0.4) and [0.9, 1]: 2/3 * |0.5 - 0.9| + 1/3 * |0 - 0.3|.

        >>> import torch
        >>> from vlm_calibration.metrics.functional import expected_calibration_error
        >>> expected_calibration_error(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.3667, dtype=torch.float64)
    """
    return bin_sums(groups, n_bins, binning).gap.abs().sum(-1) / groups.total


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
