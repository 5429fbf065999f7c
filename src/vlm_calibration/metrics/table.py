"""ConfidenceTable: integer counts of (confidence level, correctness), from which every metric is computed.

A model states integer percents, so a 101 x 2 table of counts is a sufficient statistic of any number of
predictions. It is updated by one `bincount`, added across processes by one sum, and never rounded.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from vlm_calibration.metrics.groups import ConfidenceGroups, check_confidence, check_correct

C = TypeVar("C", bound=Hashable)

CHUNK = 1 << 18
"""Predictions counted at a time, which bounds the memory of an update."""
PROBABILITY_STEPS = 10_000
"""Grid steps from 0 to 1 for confidences that are not whole percents, as those of estimators."""


def check_grid_steps(grid_steps: int) -> None:
    """Raise a ValueError unless `grid_steps` is a positive integer."""
    if not isinstance(grid_steps, int) or isinstance(grid_steps, bool) or grid_steps < 1:
        raise ValueError(f"grid_steps must be a positive integer, got {grid_steps!r}")


def to_level(confidence: Tensor, grid_steps: int) -> Tensor:
    """The nearest grid level of each confidence, int64 [N], computed in float64; NaN becomes `grid_steps + 1`.

    The product with `grid_steps` is rounded to the nearest integer, halves to even: 0.29 is level 29
    in float64, float32, float16 and bfloat16. No confidence moves by more than `1 / (2 * grid_steps)`.
    """
    if confidence.device.type != "mps":
        confidence = confidence.to(torch.float64)
    return (confidence * grid_steps).round_().nan_to_num_(nan=grid_steps + 1).long()


def count_cells(
    confidence: Tensor, correct: Tensor, grid_steps: int, row: Tensor | None = None, rows: int = 1
) -> Tensor:
    """Count predictions by row, level and correctness: one `bincount` for each `CHUNK` of them.

    Args:
        confidence: float [N] in [0, 1], NaN where it could not be parsed.
        correct: bool [N].
        grid_steps: grid steps from 0 to 1.
        row: int64 [N] in [0, rows), or None for row 0.
        rows: number of rows.

    Returns:
        int64 [rows, grid_steps + 2, 2] on the device of `confidence`; the last level counts the unparsed.

    Raises:
        ValueError: on a confidence outside [0, 1] (not NaN) or a `correct` of another shape or kind.
    """
    correct = check_correct(correct, confidence.shape)
    cells = rows * (grid_steps + 2) * 2
    count = torch.zeros(cells, dtype=torch.int64, device=confidence.device)
    for start in range(0, max(confidence.numel(), 1), CHUNK):
        part = slice(start, start + CHUNK)
        check_confidence(confidence[part], nan_is_unparsed=True, offset=start)
        index = to_level(confidence[part].detach(), grid_steps)
        if row is not None:
            index += row[part] * (grid_steps + 2)
        index = index.mul_(2).add_(correct[part].to(index.device))
        count += torch.bincount(index, minlength=cells)
    return count.view(rows, grid_steps + 2, 2)


def as_confidence_tensor(confidence: Tensor | Sequence[float | None]) -> Tensor:
    """Confidences as a float tensor [N]; None, an unparsed one, becomes NaN."""
    if isinstance(confidence, Tensor):
        return confidence
    return torch.tensor([math.nan if c is None else c for c in confidence], dtype=torch.float64)


def as_correct_tensor(correct: Tensor | Sequence[bool]) -> Tensor:
    """Correctness as a tensor [N]."""
    return correct if isinstance(correct, Tensor) else torch.tensor(list(correct), dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class ConfidenceTable:
    """Counts of correct and wrong answers at each confidence level.

    Attributes:
        counts: int64 [grid_steps + 1, 2] on the CPU; `counts[i, 1]` correct answers at confidence
            `i / grid_steps`, `counts[i, 0]` wrong ones.
        unparsed: answers whose confidence could not be read. Only `n` and `parse_failure_rate` count them;
            nothing is imputed.

    Raises:
        ValueError: on another shape or dtype, or a negative count.

    Example:
        >>> import torch
        >>> table = ConfidenceTable.from_predictions(
        ...     torch.tensor([0.9, 0.9, 0.1, float("nan")]), torch.tensor([True, False, False, True])
        ... )
        >>> table.n, table.parsed, table.unparsed, table.counts[90].tolist()
        (4, 3, 1, [1, 1])
    """

    counts: Tensor
    unparsed: int = 0

    def __post_init__(self) -> None:
        """Check the invariants and take a private copy on the CPU."""
        counts = self.counts
        if counts.ndim != 2 or counts.shape[1] != 2 or len(counts) < 2:
            raise ValueError(f"counts must have shape (grid_steps + 1, 2), got {tuple(counts.shape)}")
        if counts.dtype != torch.int64:
            raise ValueError(f"counts must be int64, got {counts.dtype}")
        if int(counts.min()) < 0 or self.unparsed < 0:
            raise ValueError("counts must not be negative")
        object.__setattr__(self, "counts", counts.detach().cpu().clone())

    @classmethod
    def empty(cls, grid_steps: int = 100) -> "ConfidenceTable":
        """A table of no answers, the neutral element of `+`."""
        check_grid_steps(grid_steps)
        return cls(torch.zeros(grid_steps + 1, 2, dtype=torch.int64))

    @classmethod
    def from_predictions(
        cls,
        confidence: Tensor | Sequence[float | None],
        correct: Tensor | Sequence[bool],
        grid_steps: int = 100,
    ) -> "ConfidenceTable":
        """Count predictions.

        Args:
            confidence: [N] in [0, 1]; NaN (or None in a list) where it could not be parsed. A value
                between two grid levels goes to the nearer one, see `to_level`.
            correct: bool [N].
            grid_steps: grid steps from 0 to 1; 100 for stated percentages, `PROBABILITY_STEPS` for others.

        Raises:
            ValueError: on a confidence outside [0, 1], or inputs of different lengths.
        """
        check_grid_steps(grid_steps)
        confidence = as_confidence_tensor(confidence)
        return cls.from_cells(count_cells(confidence, as_correct_tensor(correct), grid_steps)[0])

    @classmethod
    def from_cells(cls, cells: Tensor) -> "ConfidenceTable":
        """A table from one row of `count_cells`: int64 [grid_steps + 2, 2], the last level unparsed."""
        return cls(cells[:-1], int(cells[-1].sum()))

    @property
    def grid_steps(self) -> int:
        """Grid steps from 0 to 1."""
        return len(self.counts) - 1

    @property
    def parsed(self) -> int:
        """Answers with a readable confidence."""
        return int(self.counts.sum())

    @property
    def n(self) -> int:
        """All answers, unparsed ones included."""
        return self.parsed + self.unparsed

    def groups(self) -> ConfidenceGroups:
        """The levels that hold answers, as metrics take them."""
        cell = self.counts.sum(1).nonzero()[:, 0]
        value = cell.double() / self.grid_steps
        return ConfidenceGroups(value, self.counts[cell], cell, self.grid_steps, torch.tensor(self.unparsed))

    def __add__(self, other: "ConfidenceTable") -> "ConfidenceTable":
        """The table of both sets of answers; ValueError if the grids differ."""
        if not isinstance(other, ConfidenceTable):
            return NotImplemented
        if self.grid_steps != other.grid_steps:
            raise ValueError(f"cannot add tables of {self.grid_steps} and {other.grid_steps} grid steps")
        return ConfidenceTable(self.counts + other.counts, self.unparsed + other.unparsed)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same counts on the same grid."""
        if not isinstance(other, ConfidenceTable):
            return NotImplemented
        return self.unparsed == other.unparsed and torch.equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]


def tables_by_category(
    confidence: Tensor | Sequence[float | None],
    correct: Tensor | Sequence[bool],
    category: Sequence[C | None],
    grid_steps: int = 100,
) -> dict[C, ConfidenceTable]:
    """One table for each category, in order of first appearance, of N answers; see `ConfidenceTable.from_predictions`.

    `category` has N names or other keys, None for answers that are left out.
    """
    check_grid_steps(grid_steps)
    confidence, correct = as_confidence_tensor(confidence), as_correct_tensor(correct)
    if len(category) != len(confidence):
        raise ValueError(f"{len(confidence)} confidences but {len(category)} categories")
    names = list(dict.fromkeys(c for c in category if c is not None))
    row_of = {name: i for i, name in enumerate(names, start=1)}
    row = torch.tensor([0 if c is None else row_of[c] for c in category], dtype=torch.int64)
    cells = count_cells(confidence.cpu(), correct.cpu(), grid_steps, row, len(names) + 1)
    return {name: ConfidenceTable.from_cells(cells[row_of[name]]) for name in names}
