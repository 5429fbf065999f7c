"""ConfidenceGroups: the distinct confidences of a set of answers, with the number of correct and wrong answers at each.

Every metric is a function of `ConfidenceGroups`. A `ConfidenceTable` (integers on a grid) and raw values convert to them, and
bootstrap replicates are a batch of counts over the same confidences. Binning lives here too, so that bin edges are defined
once.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Binning = Literal["uniform", "quantile"]


class UndefinedMetricWarning(UserWarning):
    """A metric is undefined on the given answers, such as AUROC when all are correct, and is NaN."""


class ConfidenceGroups(NamedTuple):
    """Distinct confidences and the answers at each, on the CPU.

    Attributes:
        value: float64 [L], ascending and distinct, in [0, 1].
        counts: int64 [..., L, 2]; `[..., 0]` counts wrong answers, `[..., 1]` correct ones. Leading dimensions are
            bootstrap replicates.
        cell: [L], what binning compares: integer grid levels, or raw values in their own dtype.
        grid_steps: the number of grid steps if `cell` holds integers, None if it holds raw values.
        unparsed: int64 [...], the answers without a readable confidence.
    """

    value: Tensor
    counts: Tensor
    cell: Tensor
    grid_steps: int | None
    unparsed: Tensor

    def groups(self) -> "ConfidenceGroups":
        """Return `self`, so that functions accept groups and tables alike."""
        return self

    @property
    def wrong(self) -> Tensor:
        """Wrong answers at each confidence, float64 [..., L]."""
        return self.counts[..., 0].double()

    @property
    def correct(self) -> Tensor:
        """Correct answers at each confidence, float64 [..., L]."""
        return self.counts[..., 1].double()

    @property
    def answers(self) -> Tensor:
        """Answers at each confidence, float64 [..., L]."""
        return self.counts.sum(-1).double()

    @property
    def total(self) -> Tensor:
        """Answers with a readable confidence, float64 [...]."""
        return self.counts.sum((-1, -2)).double()


class HasGroups(Protocol):
    """A `ConfidenceTable` or `ConfidenceGroups`."""

    def groups(self) -> ConfidenceGroups: ...


class BinSums(NamedTuple):
    """Sums over the answers of each bin; an empty bin holds zeros.

    Attributes:
        answers: number of answers, float64 [..., B].
        correct: number of correct answers, float64 [..., B].
        confidence: sum of their confidences, float64 [..., B].
    """

    answers: Tensor
    correct: Tensor
    confidence: Tensor

    @property
    def gap(self) -> Tensor:
        """Sum of (confidence - correctness) in each bin, float64 [..., B]: positive where the bin is overconfident."""
        return self.confidence - self.correct

    @property
    def mean_gap(self) -> Tensor:
        """Mean of (confidence - correctness) in each bin, float64 [..., B]; 0 where the bin is empty."""
        return torch.where(self.answers > 0, self.gap / self.answers.clamp_min(1), 0.0)


class GapNorm(NamedTuple):
    """A calibration error as a norm of K gaps, each a mean of (confidence - correctness).

    Attributes:
        weights: from groups to float64 [L, K], the weight of an answer of each confidence in each gap.
        norm: from gaps [..., K] to the error [...].
        of_bin: whether a gap is the mean over its bin; else it is the sum over its bin divided by the number of all answers.
    """

    weights: Callable[[ConfidenceGroups], Tensor]
    norm: Callable[[Tensor], Tensor]
    of_bin: bool = False


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """The declaration of a metric.

    Attributes:
        name: flat name, the key in `metrics.json`.
        heading: short name for table columns.
        undefined: when the value is NaN, as the end of a sentence.
        higher_is_better: None where neither direction is better by itself.
        lower: smallest possible value.
        upper: largest possible value; infinity if there is none.
        format: format of the value in tables.
    """

    name: str
    heading: str
    undefined: str
    higher_is_better: bool | None = None
    lower: float = 0.0
    upper: float = 1.0
    format: str = ".3f"


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec(MetricSpec):
    """The declaration of a calibration metric.

    Attributes:
        function: the formula, a function of `ConfidenceGroups`; NaN where undefined.
        gaps: the metric as a norm of gaps, for its confidence interval; None if it is no calibration error.
    """

    function: Callable[..., Tensor]
    gaps: GapNorm | None = None

    def __call__(self, table: HasGroups, **options: Any) -> Tensor:
        """The value on a table or a batch of replicates, float64, NaN where undefined, without a warning."""
        return self.function(table.groups(), **options)

    @property
    def summary(self) -> str:
        """The first line of the formula's docstring, with bounds, direction and when the value is undefined."""
        first = (self.function.__doc__ or "").split("\n", 1)[0]
        direction = {True: ", higher is better", False: ", lower is better", None: ""}[self.higher_is_better]
        end = ")" if self.upper == float("inf") else "]"
        undefined = f"; NaN where {self.undefined}" if self.undefined else ""
        return f"{first} In [{self.lower:g}, {self.upper:g}{end}{direction}{undefined}."


def check_correct(correct: Tensor, shape: torch.Size) -> Tensor:
    """`correct`, bool or integers 0 and 1 of the shape of the confidences, as a bool tensor; ValueError for anything else."""
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
    """Raise a ValueError unless `confidence` is a floating vector [N] in [0, 1], or NaN where that is allowed for unparsed ones.

    The message names the index of the first bad value, to which `offset` is added.
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
        problem = (
            "is not a number; leave out answers without a confidence"
            if value != value
            else "is outside [0, 1]"
        )
        raise ValueError(f"confidence[{offset + index}] = {value} {problem}")


def group_values(confidence: Tensor, correct: Tensor) -> ConfidenceGroups:
    """Group raw confidences, float [N] in [0, 1], by value, exactly for any float, with one sort.

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


def uniform_bin_of_level(level: Tensor, grid_steps: int, n_bins: int) -> Tensor:
    """The equal-width bin of each grid level, int64 in [0, grid_steps], in integer arithmetic.

    Bin `b` holds the confidences in `[b / n_bins, (b + 1) / n_bins)`; the last bin also holds 1. An edge belongs to
    the bin above it, as in `numpy.histogram`, netcal and torchmetrics, so that results compare. Edges are computed as
    `level * n_bins // grid_steps` and never rounded.
    """
    return (level * n_bins).div(grid_steps, rounding_mode="floor").clamp_max(n_bins - 1)


def uniform_bin_of_value(value: Tensor, n_bins: int) -> Tensor:
    """The equal-width bin of each raw confidence, with the convention of `uniform_bin_of_level`.

    An edge is the number nearest to `b / n_bins` in the dtype of `value`, which is what a literal such as 0.3
    is in that dtype. 0.3 is therefore in the bin that starts at 0.3 in bfloat16, float32 and float64 alike.
    """
    edges = (torch.arange(1, n_bins, dtype=torch.float64) / n_bins).to(value)
    return torch.bucketize(value, edges, right=True)


def quantile_bin(count: Tensor, n_bins: int) -> Tensor:
    """The equal-mass bin of each distinct confidence, int64 [..., L] in [0, n_bins - 1]; equal confidences share a bin.

    This equals binning at the edges `numpy.quantile(confidences, b / n_bins)`, an edge in the bin above it,
    in integers: `(rank of the last answer with this confidence - 1) * n_bins // (N - 1)`.

    Args:
        count: int64 [..., L], answers at each confidence, ascending in confidence.
        n_bins: number of bins, 1 or more.
    """
    rank = count.cumsum(-1)
    last = (rank[..., -1:] - 1).clamp_min(1)
    return ((rank - 1) * n_bins).div(last, rounding_mode="floor").clamp(0, n_bins - 1)


def bin_index(groups: ConfidenceGroups, n_bins: int, binning: Binning) -> Tensor:
    """The bin of each distinct confidence, int64 [L] in [0, n_bins - 1]; [..., L] for `quantile`, which depends on counts.

    Raises:
        ValueError: on a non-positive `n_bins`.
    """
    if not isinstance(n_bins, int) or isinstance(n_bins, bool) or n_bins < 1:
        raise ValueError(f"n_bins must be a positive integer, got {n_bins!r}")
    if binning == "quantile":
        return quantile_bin(groups.counts.sum(-1), n_bins)
    if groups.grid_steps is not None:
        return uniform_bin_of_level(groups.cell, groups.grid_steps, n_bins)
    return uniform_bin_of_value(groups.cell, n_bins)


def bin_sums(groups: ConfidenceGroups, n_bins: int, binning: Binning) -> BinSums:
    """Sum answers, correct answers and confidence over bins of equal width (`uniform`) or equal mass (`quantile`); see `bin_index`."""
    answers = groups.answers
    sums = BinSums(answers, groups.correct, answers * groups.value)
    index = bin_index(groups, n_bins, binning).expand_as(answers)
    empty = answers.new_zeros((*answers.shape[:-1], n_bins))
    return BinSums(*(empty.scatter_add(-1, index, part) for part in sums))


def warn_undefined(name: str, reason: str) -> None:
    """Warn that a metric is NaN, and why."""
    warnings.warn(f"{name} is undefined (NaN): {reason}", UndefinedMetricWarning, stacklevel=3)
