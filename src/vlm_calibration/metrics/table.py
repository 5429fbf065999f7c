"""The distinct confidences of a set of answers with their counts, of which every metric is an exact function; and their bins."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Binning = Literal["uniform", "quantile"]

PROBABILITY_STEPS = 10_000
"""Grid steps from 0 to 1 for confidences that are not whole percents, as those of estimators."""


def check_predictions(confidence: Tensor, correct: Tensor) -> None:
    """Raise a ValueError that names the first bad value, unless `confidence` is floating [N] in [0, 1] or NaN, and `correct` bool [N]."""
    if not confidence.is_floating_point() or confidence.ndim != 1:
        found = f"{confidence.dtype} of shape {tuple(confidence.shape)}"
        raise ValueError(f"confidence must be a floating vector with values in [0, 1], got {found}")
    if correct.dtype != torch.bool or correct.shape != confidence.shape:
        found = f"{correct.dtype} of shape {tuple(correct.shape)}"
        raise ValueError(f"correct must be bool of shape {tuple(confidence.shape)}, got {found}")
    if (bad := (confidence < 0) | (confidence > 1)).any():
        index = int(bad.nonzero()[0])
        raise ValueError(f"confidence[{index}] = {float(confidence[index])} is outside [0, 1]")


def as_confidence_tensor(confidence: Tensor | Sequence[float | None]) -> Tensor:
    """Confidences as a float tensor [N]; None, an unparsed one, becomes NaN."""
    if isinstance(confidence, Tensor):
        return confidence
    return torch.tensor([math.nan if c is None else c for c in confidence], dtype=torch.float64)


def to_level(confidence: Tensor, grid_steps: int) -> Tensor:
    """The nearest grid level of each confidence, int64 [N], halves to even; NaN becomes `grid_steps + 1`."""
    # In float64, 0.29 is level 29 in any dtype.
    if confidence.device.type != "mps":
        confidence = confidence.to(torch.float64)
    return (confidence * grid_steps).round_().nan_to_num_(nan=grid_steps + 1).long()


class ConfidenceTable(NamedTuple):
    """Counts of wrong and correct answers at each distinct confidence, on the CPU.

    Attributes:
        value: float64 [L], the confidences, ascending and distinct, in [0, 1].
        counts: int64 [..., L, 2], wrong and correct answers; leading dimensions are bootstrap replicates.
        unparsed: int64 [...], answers whose confidence could not be read; only `n` and `parse_failure_rate` count them.
        dtype: of the confidences as they were given, in which they are compared with the edges of bins.
        wrong, correct, answers: float64 [..., L], of each confidence; `total` is float64 [...], of all readable ones.

    Example:
        >>> import torch
        >>> table = ConfidenceTable.from_predictions(
        ...     torch.tensor([0.9, 0.9, 0.1, float("nan")]), torch.tensor([True, False, False, True])
        ... )
        >>> table.n, table.parsed, table.value.tolist(), table.counts.tolist()
        (4, 3, [0.1, 0.9], [[1, 0], [1, 1]])
    """

    value: Tensor
    counts: Tensor
    unparsed: Tensor
    dtype: torch.dtype = torch.float64

    @classmethod
    def from_predictions(
        cls,
        confidence: Tensor | Sequence[float | None],
        correct: Tensor | Sequence[bool],
        grid_steps: int | None = 100,
    ) -> "ConfidenceTable":
        """Count N predictions; a confidence is NaN, or None in a list, where it could not be parsed. ValueError if one is not in [0, 1].

        Each confidence goes to the nearest of `grid_steps` steps from 0 to 1; None: they are grouped by value, exactly for any float.
        """
        confidence = as_confidence_tensor(confidence).detach()
        correct = correct if isinstance(correct, Tensor) else torch.tensor(list(correct), dtype=torch.bool)
        check_predictions(confidence, correct)
        parsed = ~confidence.isnan()
        confidence, correct = confidence[parsed], correct[parsed.to(correct.device)]
        if grid_steps is not None:
            confidence = to_level(confidence, grid_steps).cpu().double() / grid_steps
        value, place = torch.unique(confidence, sorted=True, return_inverse=True)
        counts = torch.bincount(place * 2 + correct.to(place.device), minlength=2 * len(value)).view(-1, 2)
        return cls(value.cpu().double(), counts.cpu(), (~parsed).sum().cpu(), value.dtype)

    @property
    def wrong(self) -> Tensor:
        return self.counts[..., 0].double()

    @property
    def correct(self) -> Tensor:
        return self.counts[..., 1].double()

    @property
    def answers(self) -> Tensor:
        return self.counts.sum(-1).double()

    @property
    def total(self) -> Tensor:
        return self.counts.sum((-1, -2)).double()

    @property
    def parsed(self) -> int:
        return int(self.total)

    @property
    def n(self) -> int:
        return self.parsed + int(self.unparsed)


class BinSums(NamedTuple):
    """Answers, correct answers and the sum of confidences in each bin, float64 [..., B]; an empty bin holds zeros."""

    answers: Tensor
    correct: Tensor
    confidence: Tensor

    @property
    def gap(self) -> Tensor:
        """Sum of (confidence - correctness) in each bin: positive where the bin is overconfident."""
        return self.confidence - self.correct

    @property
    def mean_gap(self) -> Tensor:
        """Mean of (confidence - correctness) in each bin; 0 where the bin is empty."""
        return torch.where(self.answers > 0, self.gap / self.answers.clamp_min(1), 0.0)


class GapNorm(NamedTuple):
    """A calibration error as a norm of K gaps, each a mean of (confidence - correctness).

    Attributes:
        weights: from a table to float64 [L, K], the weight of an answer of each confidence in each gap.
        norm: from gaps [..., K] to the error [...].
        of_bin: whether a gap is the mean over its bin; else it is the sum over its bin divided by the number of all answers.
    """

    weights: Callable[[ConfidenceTable], Tensor]
    norm: Callable[[Tensor], Tensor]
    of_bin: bool = False


def bin_index(table: ConfidenceTable, n_bins: int, binning: Binning) -> Tensor:
    """The bin of each distinct confidence, int64 [L] in [0, n_bins - 1]; [..., L] for `quantile`, which depends on counts.

    Bin `b` of equal width (`uniform`) holds the confidences in `[b / n_bins, (b + 1) / n_bins)`, as in `numpy.histogram`, netcal and
    torchmetrics; the last bin also holds 1. An edge is the number nearest to `b / n_bins` in the dtype of the given confidences, as are the
    literal 0.3 and the level 30 / 100: none of them falls on the wrong side.

    Bins of equal mass (`quantile`) equal binning at the edges `numpy.quantile(confidences, b / n_bins)`, an edge in the bin above it, in
    integers: `(rank of the last answer with this confidence - 1) * n_bins // (N - 1)`. Equal confidences share a bin.
    """
    if binning == "uniform":
        edges = (torch.arange(1, n_bins, dtype=torch.float64) / n_bins).to(table.dtype).double()
        return torch.bucketize(table.value, edges, right=True)
    rank = table.counts.sum(-1).cumsum(-1)
    last = (rank[..., -1:] - 1).clamp_min(1)
    return ((rank - 1) * n_bins).div(last, rounding_mode="floor").clamp(0, n_bins - 1)


def bin_sums(table: ConfidenceTable, n_bins: int, binning: Binning) -> BinSums:
    """Sum answers, correct answers and confidence over bins of equal width (`uniform`) or equal mass (`quantile`); see `bin_index`."""
    answers = table.answers
    sums = BinSums(answers, table.correct, answers * table.value)
    index = bin_index(table, n_bins, binning).expand_as(answers)
    empty = answers.new_zeros((*answers.shape[:-1], n_bins))
    return BinSums(*(empty.scatter_add(-1, index, part) for part in sums))
