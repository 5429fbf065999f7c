"""Confidence levels: the mapping between noise steps and the confidence to state.

`LinearLevels` is the paper's mapping: the confidence falls linearly with the noise step. `AnchoredLevels` states the base
model's measured accuracy at each step, per answer type, since a yes/no question is answered correctly half of the time even
if the object is invisible.
"""

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_calibration.files import write_text
from vlm_calibration.perturbation.level_table import (
    FORMAT,
    LevelTable,
    StepCount,
    isotonic_accuracy,
    read_table,
)


def check_confidence(confidence: float) -> float:
    """Convert a confidence to float; ValueError if it is outside [0, 1] or NaN."""
    value = float(confidence)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"confidence must be in [0, 1], got {confidence!r}")
    return value


def nominal_step(confidence: float, total_steps: int) -> int:
    """The paper's noise step for a confidence in [0, 1]: `round((1 - confidence) * total_steps)`."""
    return round((1.0 - check_confidence(confidence)) * total_steps)


class ConfidenceLevels(ABC):
    """A finite set of noise steps with a confidence for each.

    Attributes:
        steps: noise steps in rising order; `steps[0]` is 0, the clean image, which has the highest confidence.
    """

    steps: tuple[int, ...]

    @abstractmethod
    def confidence(self, step: int, answer_type: str) -> float:
        """The confidence in [0, 1] at a noise step; ValueError for a step outside `[0, steps[-1]]`."""


@dataclass(frozen=True)
class LinearLevels(ConfidenceLevels):
    """The paper's levels: evenly spaced confidences 1, ..., 0 with `step = round((1 - c) * total_steps)`.

    Args:
        n_levels: number of levels; 11 gives 100%, 90%, ..., 0%.
        total_steps: number of steps of the schedule.

    Raises:
        ValueError: fewer than two levels, or more levels than steps.
    """

    n_levels: int = 11
    total_steps: int = 1000

    def __post_init__(self) -> None:
        if self.n_levels < 2 or self.total_steps < self.n_levels - 1:
            raise ValueError(
                f"need n_levels >= 2 and total_steps >= n_levels - 1, got {self.n_levels} and {self.total_steps}"
            )

    @property
    def steps(self) -> tuple[int, ...]:  # type: ignore[override]
        """The noise steps of the levels, from 0 to `total_steps`."""
        last = self.n_levels - 1
        return tuple(nominal_step((last - i) / last, self.total_steps) for i in range(self.n_levels))

    def confidence(self, step: int, answer_type: str = "") -> float:
        """`1 - step / total_steps`, or the exact level if `step` is one of `steps`; the same for all answer types."""
        _check_range(step, self.total_steps)
        if step in self.steps:
            last = self.n_levels - 1
            return (last - self.steps.index(step)) / last
        return (self.total_steps - step) / self.total_steps


class AnchoredLevels(ConfidenceLevels):
    """Levels with the base model's measured accuracy at each noise step, per answer type.

    Isotonic regression weighted by `n` makes the accuracies monotone (not increasing with the noise); between measured steps
    they are interpolated linearly. `accuracy` is this fit; `confidence` rounds it to a grid, ties up. The default grid of 5%
    gives few, round targets: a model learns "85%" more easily than 101 near-synonymous numbers, and accuracies measured on a
    few hundred queries are no finer. The rounding error is at most half a grid step (2.5%), 1.25% on average; `grid=1` states
    whole percents.

    `groups` reduces the number of targets without that bias: it merges neighbouring steps so that accuracies differ least from
    the mean of their group (Jenks' natural breaks), and each step states that mean.

    Args:
        path: a JSON file written by `save`; alternative to `table`.
        table: the measurements; alternative to `path`.
        grid: percent between two confidences; divides 100.
        groups: maximum number of confidences per answer type; None: as many as the grid allows.

    Raises:
        ValueError: neither or both of `path` and `table` are given, the file is not a usable level table (see
            `LevelTable.check_usable`), `grid` does not divide 100, or `groups` is below 1.
        FileNotFoundError: there is no such file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        table: LevelTable | None = None,
        grid: int = 5,
        groups: int | None = None,
    ) -> None:
        if (path is None) == (table is None):
            raise ValueError("AnchoredLevels needs either a path or a table")
        if isinstance(grid, bool) or not isinstance(grid, int) or grid < 1 or 100 % grid:
            raise ValueError(f"grid must be a whole number of percent that divides 100, got {grid!r}")
        if groups is not None and groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        if path is not None:
            table = read_table(Path(path))
        self.source = "the level table" if path is None else os.fspath(path)
        assert table is not None  # for the type checker: one of the two was given
        self.table = table
        self.grid = grid
        self.groups = groups
        self.steps = tuple(row.step for row in next(iter(table.counts.values())))
        self._fits = {kind: isotonic_accuracy(rows) for kind, rows in table.counts.items()}
        self._stated = self._fits
        if groups is not None:
            self._stated = {
                kind: _group_means(fit, [row.n for row in table.counts[kind]], groups)
                for kind, fit in self._fits.items()
            }

    @classmethod
    def fit(
        cls,
        counts: Mapping[str, Sequence[StepCount]],
        *,
        provenance: Mapping[str, Any] | None = None,
        grid: int = 5,
    ) -> "AnchoredLevels":
        """Create levels from measurements.

        Args:
            counts: answer type -> rows `(step, n, n_correct)`, in any order.
            provenance: as in `LevelTable`.
            grid: as in the constructor.
        """
        table = LevelTable({kind: tuple(rows) for kind, rows in counts.items()}, dict(provenance or {}))
        return cls(table=table, grid=grid)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, atomically.

        Raises:
            DataError: the file cannot be written.
        """
        kinds = {
            kind: [
                {**row._asdict(), "accuracy": float(accuracy)}
                for row, accuracy in zip(rows, self._fits[kind], strict=True)
            ]
            for kind, rows in self.table.counts.items()
        }
        content = {"format": FORMAT, "provenance": dict(self.table.provenance), "answer_types": kinds}
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        write_text(Path(path), text)

    @property
    def answer_types(self) -> tuple[str, ...]:
        """The measured answer types."""
        return tuple(self.table.counts)

    def accuracy(self, step: int, answer_type: str) -> float:
        """The fitted accuracy in [0, 1], unrounded, interpolated linearly between measured steps.

        Raises:
            ValueError: an answer type that was not measured, or a step outside `[0, steps[-1]]`.
        """
        fit = self._fit(answer_type)
        _check_range(step, self.steps[-1])
        return float(np.interp(step, self.steps, fit))

    def confidence(self, step: int, answer_type: str) -> float:
        """`accuracy`, or with `groups` the group mean of the nearest measured step, rounded to the grid.

        Raises:
            ValueError: as `accuracy`.
        """
        value = self.accuracy(step, answer_type)
        if self.groups is not None:
            nearest = min(range(len(self.steps)), key=lambda i: abs(self.steps[i] - step))
            value = float(self._stated[answer_type][nearest])
        cells = 100 // self.grid
        # The small term rounds interpolated ties up despite floating-point error.
        return math.floor(value * cells + 0.5 + 1e-9) / cells

    def _fit(self, answer_type: str) -> np.ndarray:
        if answer_type not in self._fits:
            raise ValueError(
                f"no levels were measured for answer type {answer_type!r}; known: {', '.join(self.answer_types)}"
            )
        return self._fits[answer_type]

    def __repr__(self) -> str:
        return f"AnchoredLevels({', '.join(self.answer_types)}; {len(self.steps)} steps, grid={self.grid})"


def _group_means(accuracy: np.ndarray, weights: Sequence[int], groups: int) -> np.ndarray:
    """Replace each value by the weighted mean of its group: at most `groups` runs with the least sum of squared errors.

    Exact dynamic programming: `best[g][j]` is (error, start of the last run) for the first j values in g runs.
    """
    n, w = len(accuracy), np.asarray(weights, dtype=np.float64)

    def run(i: int, j: int) -> tuple[float, float]:
        mean = float(np.average(accuracy[i:j], weights=w[i:j]))
        return float((w[i:j] * (accuracy[i:j] - mean) ** 2).sum()), mean

    groups = min(groups, n)
    best = [[(0.0 if j == 0 else math.inf, 0) for j in range(n + 1)]]
    for g in range(1, groups + 1):
        best.append(
            [
                min(((best[g - 1][i][0] + run(i, j)[0], i) for i in range(j)), default=(math.inf, 0))
                for j in range(n + 1)
            ]
        )
    means, j = np.empty(n), n
    for g in range(groups, 0, -1):
        i = best[g][j][1]
        means[i:j] = run(i, j)[1]
        j = i
    return means


def _check_range(step: int, last: int) -> None:
    if not 0 <= step <= last:
        raise ValueError(f"noise step must be in [0, {last}], got {step!r}")
