"""ConfidenceGroups: the distinct confidences of a set of answers, and how many answers with each were right.

Every metric of this package is a function of `ConfidenceGroups`. A confidence table is one way to get them (integers
on a grid), grouping raw values is the other, and bootstrap replicates are a batch of counts over the same
levels. Binning lives here too, so that an edge is defined in exactly one place.
"""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, Literal, NamedTuple, ParamSpec, Protocol, cast

import torch
from torch import Tensor

Binning = Literal["uniform", "quantile", "levels"]
BINNINGS: tuple[Binning, ...] = ("uniform", "quantile", "levels")

P = ParamSpec("P")


class UndefinedMetricWarning(UserWarning):
    """A metric has no value on the given answers (for example AUROC when all are right); NaN is returned."""


class ConfidenceGroups(NamedTuple):
    """Distinct confidences and the answers at each; the CPU side of every metric.

    Attributes:
        value: `(L,)` float64, ascending and distinct, in [0, 1].
        counts: `(..., L, 2)` int64; `[..., 0]` counts wrong answers and `[..., 1]` right ones. Leading
            dimensions are bootstrap replicates.
        cell: `(L,)` what binning compares: the integer level of a grid, or raw values in their own dtype.
        resolution: the number of grid steps if `cell` holds integers, None if it holds raw values.
        unparsed: `(...,)` int64, the answers without a readable confidence.
    """

    value: Tensor
    counts: Tensor
    cell: Tensor
    resolution: int | None
    unparsed: Tensor

    def levels(self) -> "ConfidenceGroups":
        """These levels themselves, so that a metric takes levels and tables alike."""
        return self

    @property
    def wrong(self) -> Tensor:
        """Wrong answers a level, `(..., L)` float64."""
        return self.counts[..., 0].double()

    @property
    def right(self) -> Tensor:
        """Right answers a level, `(..., L)` float64."""
        return self.counts[..., 1].double()

    @property
    def answers(self) -> Tensor:
        """Answers a level, `(..., L)` float64."""
        return self.counts.sum(-1).double()

    @property
    def total(self) -> Tensor:
        """Answers with a readable confidence, `(...,)` float64."""
        return self.counts.sum((-1, -2)).double()


class HasLevels(Protocol):
    """Whatever can be read as levels: a `ConfidenceTable`, or `ConfidenceGroups` themselves."""

    def levels(self) -> ConfidenceGroups:
        """The occupied levels and their counts."""
        ...


class BinSums(NamedTuple):
    """Sums over the answers of each bin, every field `(..., B)` float64; an empty bin holds zeros."""

    answers: Tensor
    right: Tensor
    confidence: Tensor

    @property
    def gap(self) -> Tensor:
        """Sum of (confidence - correctness) over the bin: positive where the bin is overconfident."""
        return self.confidence - self.right


def check_correct(correct: Tensor, shape: torch.Size) -> Tensor:
    """`correct` as a bool tensor.

    Args:
        correct: bool, or integers that are all 0 or 1.
        shape: the shape of the confidences, which it must share.

    Raises:
        ValueError: on another shape, a floating dtype, or an integer other than 0 and 1.
    """
    if correct.shape != shape:
        raise ValueError(f"confidence has shape {tuple(shape)} but correct has {tuple(correct.shape)}")
    if correct.dtype == torch.bool:
        return correct
    if correct.is_floating_point() or correct.is_complex():
        raise ValueError(f"correct must be a bool tensor, got {correct.dtype}")
    if not bool(((correct == 0) | (correct == 1)).all()):
        raise ValueError("correct must hold only 0 and 1 (or be a bool tensor)")
    return correct.bool()


def check_confidence(confidence: Tensor, *, nan_is_unparsed: bool, offset: int = 0) -> None:
    """Refuse a confidence that is no probability.

    Args:
        confidence: `(N,)` floating.
        nan_is_unparsed: whether NaN is allowed, as the mark of a confidence that could not be read.
        offset: added to the index that an error names.

    Raises:
        ValueError: if `confidence` is not a floating vector, holds a value outside [0, 1], or holds NaN while
            `nan_is_unparsed` is false.
    """
    if not confidence.is_floating_point():
        raise ValueError(
            f"confidence must be a floating tensor with values in [0, 1], got {confidence.dtype}"
        )
    if confidence.ndim != 1:
        raise ValueError(f"confidence must be a vector, got shape {tuple(confidence.shape)}")
    bad = (confidence < 0) | (confidence > 1)
    if not nan_is_unparsed:
        bad |= confidence.isnan()
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        value = float(confidence[index])
        what = (
            "is not a number; leave answers without a confidence out"
            if value != value
            else "is outside [0, 1]"
        )
        raise ValueError(f"confidence[{offset + index}] = {value} {what}")


def group_values(confidence: Tensor, correct: Tensor) -> ConfidenceGroups:
    """Group raw confidences by value: exact for any float, at the price of one sort.

    Args:
        confidence: `(N,)` floating, in [0, 1].
        correct: `(N,)` bool.

    Raises:
        ValueError: see `check_confidence` and `check_correct`; NaN is refused.
    """
    check_confidence(confidence, nan_is_unparsed=False)
    correct = check_correct(correct, confidence.shape)
    confidence = confidence.detach()
    cell, inverse = torch.unique(confidence, sorted=True, return_inverse=True)
    count = torch.bincount(inverse * 2 + correct, minlength=2 * len(cell)).view(-1, 2)
    unparsed = torch.zeros((), dtype=torch.int64)
    return ConfidenceGroups(cell.double().cpu(), count.cpu(), cell.cpu(), None, unparsed)


def _check_bins(n_bins: int) -> None:
    if not isinstance(n_bins, int) or isinstance(n_bins, bool) or n_bins < 1:
        raise ValueError(f"n_bins must be a positive integer, got {n_bins!r}")


def uniform_bin_of_level(level: Tensor, resolution: int, n_bins: int) -> Tensor:
    """The equal-width bin of each grid level, in integer arithmetic.

    Bin `b` holds the confidences in `[b / n_bins, (b + 1) / n_bins)`; the last bin also holds 1. An edge thus
    belongs to the bin above it, as in `numpy.histogram`, netcal and torchmetrics, so that results compare;
    being computed as `level * n_bins // resolution`, no edge is ever a rounded float.

    Args:
        level: int64 tensor with values in [0, resolution].
        resolution: grid steps from 0 to 1.
        n_bins: number of bins, 1 or more.
    """
    _check_bins(n_bins)
    return (level * n_bins).div(resolution, rounding_mode="floor").clamp_max(n_bins - 1)


def uniform_bin_of_value(value: Tensor, n_bins: int) -> Tensor:
    """The equal-width bin of each raw confidence, with the convention of `uniform_bin_of_level`.

    An edge is the number nearest to `b / n_bins` in the dtype of `value`, which is what a literal such as 0.3
    is in that dtype; 0.3 is therefore in the bin that starts at 0.3 in bfloat16, float32 and float64 alike.
    """
    _check_bins(n_bins)
    edges = (torch.arange(1, n_bins, dtype=torch.float64) / n_bins).to(value)
    return torch.bucketize(value, edges, right=True)


def quantile_bin(count: Tensor, n_bins: int) -> Tensor:
    """The equal-mass bin of each level; all answers of a level share a bin, so that ties have no order.

    This equals binning at the edges `numpy.quantile(confidences, b / n_bins)` with the edge in the upper bin,
    in integers: `(rank of the level's last answer - 1) * n_bins // (N - 1)`.

    Args:
        count: `(..., L)` int64, answers a level, ascending in confidence.
        n_bins: number of bins, 1 or more.

    Returns:
        `(..., L)` int64 in [0, n_bins - 1].
    """
    _check_bins(n_bins)
    rank = count.cumsum(-1)
    last = (rank[..., -1:] - 1).clamp_min(1)
    return ((rank - 1) * n_bins).div(last, rounding_mode="floor").clamp(0, n_bins - 1)


def bin_sums(levels: ConfidenceGroups, n_bins: int, binning: Binning) -> BinSums:
    """Sum answers, right answers and confidence over bins.

    Args:
        levels: the answers.
        n_bins: number of bins; not used by `levels` binning, where every level is its own bin.
        binning: `uniform` (equal width), `quantile` (equal mass) or `levels`.

    Raises:
        ValueError: on another binning or a non-positive `n_bins`.
    """
    answers, right = levels.answers, levels.right
    sums = BinSums(answers, right, answers * levels.value)
    if binning == "levels":
        return sums
    index = bin_index(levels, n_bins, binning).expand_as(answers)
    empty = answers.new_zeros((*answers.shape[:-1], n_bins))
    return BinSums(*(empty.scatter_add(-1, index, part) for part in sums))


def bin_index(levels: ConfidenceGroups, n_bins: int, binning: Binning) -> Tensor:
    """The bin of each level, int64 `(L,)` in [0, n_bins - 1]; `(..., L)` for `quantile`, where it depends on the counts.

    Raises:
        ValueError: on a binning other than `uniform` and `quantile`, or a non-positive `n_bins`.
    """
    if binning == "uniform" and levels.resolution is not None:
        return uniform_bin_of_level(levels.cell, levels.resolution, n_bins)
    if binning == "uniform":
        return uniform_bin_of_value(levels.cell, n_bins)
    if binning == "quantile":
        return quantile_bin(levels.counts.sum(-1), n_bins)
    raise ValueError(f"binning must be one of {', '.join(BINNINGS)}; got {binning!r}")


class GapNorm(NamedTuple):
    """A calibration error as a norm of gaps: means of (confidence - correctness), which vary as any mean does.

    Attributes:
        weights: levels to `(L, K)` float64, how much an answer of each level weighs in each of K gaps.
        norm: gaps `(..., K)` to `(...,)`, the error.
        of_bin: whether a gap is the mean over the answers of its bin; else the sum over them, divided by all answers.
    """

    weights: Callable[[ConfidenceGroups], Tensor]
    norm: Callable[[Tensor], Tensor]
    of_bin: bool = False


def warn_undefined(name: str, reason: str) -> None:
    """Issue the one warning that goes with a NaN."""
    warnings.warn(f"{name} is undefined (NaN): {reason}", UndefinedMetricWarning, stacklevel=3)


def table_metric(
    undefined: str,
) -> Callable[
    [Callable[Concatenate[ConfidenceGroups, P], Tensor]], Callable[Concatenate[HasLevels, P], Tensor]
]:
    """Turn a function of `ConfidenceGroups` into one of tables that warns once when its value is NaN.

    Args:
        undefined: when the metric has no value; becomes the warning's text.
    """

    def decorate(
        function: Callable[Concatenate[ConfidenceGroups, P], Tensor],
    ) -> Callable[Concatenate[HasLevels, P], Tensor]:
        @wraps(function)
        def metric(table: HasLevels, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
            value = function(table.levels(), *args, **kwargs)
            if bool(value.isnan().any()):
                warn_undefined(function.__name__, undefined)
            return value

        metric.undefined = undefined  # type: ignore[attr-defined]
        return cast(Callable[Concatenate[HasLevels, P], Tensor], metric)

    return decorate


def quiet(metric: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of `ConfidenceGroups` inside a table metric, which returns NaN without a warning."""
    return cast(Callable[..., Tensor], metric.__wrapped__)  # type: ignore[attr-defined]
