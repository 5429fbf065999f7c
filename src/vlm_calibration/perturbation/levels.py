"""ConfidenceLevels: which confidence to state for which amount of noise, and back.

`LinearLevels` is the paper's mapping, confidence falling evenly with the noise step. `AnchoredLevels` teaches what
the base model was measured to achieve at each step, per answer type, since a yes/no question is still answered
right half the time when nothing is left to see.
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
    """The confidence as a float; ValueError unless it is in [0, 1] (NaN is not)."""
    value = float(confidence)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"confidence must be in [0, 1], got {confidence!r}")
    return value


def nominal_step(confidence: float, total_steps: int) -> int:
    """`round((1 - confidence) * total_steps)`: the paper's noise step for a confidence in [0, 1]."""
    return round((1.0 - check_confidence(confidence)) * total_steps)


class ConfidenceLevels(ABC):
    """A finite set of noise steps with the confidence that each one stands for.

    Attributes:
        steps: noise steps in rising order; `steps[0]` is 0, the clean image, and its confidence the highest.
    """

    steps: tuple[int, ...]

    @abstractmethod
    def confidence(self, step: int, answer_type: str) -> float:
        """The confidence in [0, 1] to state at a noise step; ValueError for a step outside `[0, steps[-1]]`."""

    @abstractmethod
    def step(self, confidence: float, answer_type: str | None = None) -> int:
        """The noise step at which `confidence` is the one to state."""


@dataclass(frozen=True)
class LinearLevels(ConfidenceLevels):
    """The paper's levels: confidences 1, ..., 0 evenly spaced, `step = round((1 - c) * total_steps)`.

    Args:
        n_levels: number of levels; 11 gives 100%, 90%, ..., 0%.
        total_steps: the schedule's number of steps.

    Raises:
        ValueError: if there are fewer than two levels or they do not fall on distinct steps.
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
        """The noise steps of the levels, from the clean image on."""
        last = self.n_levels - 1
        return tuple(nominal_step((last - i) / last, self.total_steps) for i in range(self.n_levels))

    def confidence(self, step: int, answer_type: str = "") -> float:
        """`1 - step / total_steps`, or the level's own value where `step` is one of `steps`; any answer type."""
        _check_range(step, self.total_steps)
        if step in self.steps:
            last = self.n_levels - 1
            return (last - self.steps.index(step)) / last
        return (self.total_steps - step) / self.total_steps

    def step(self, confidence: float, answer_type: str | None = None) -> int:
        """`round((1 - confidence) * total_steps)`, the same for any answer type."""
        return nominal_step(confidence, self.total_steps)


class AnchoredLevels(ConfidenceLevels):
    """ConfidenceLevels that state the base model's measured accuracy at each noise step, per answer type.

    Accuracies are made monotone (never rising with the noise) by isotonic regression weighted by `n`, and
    interpolated linearly between measured steps. `accuracy` gives that fit as it is; `confidence` rounds it to a
    grid, ties up. The grid (5% by default) makes the targets few and round: a model learns and reads "85%" more
    easily than 101 near-synonymous numbers, and accuracies measured on some hundred queries are no finer than that.
    The price is a rounding error of at most half a grid step (2.5%), 1.25% on average; `grid=1` states whole percents.

    `groups` makes the targets fewer still without that bias: neighbouring steps are merged so that their accuracies differ
    least from the mean of their group (Jenks' natural breaks), and each step states that mean.

    Args:
        path: a JSON file written by `save`; or else give `table`.
        table: the measurements themselves.
        grid: percent between confidences that may be stated; divides 100.
        groups: most confidences stated per answer type; None: as many as the grid allows.

    Raises:
        ValueError: if neither or both of `path` and `table` are given, the file is not a level table or one that teaches
            nothing (see `LevelTable.check_usable`; names the file), `grid` does not divide 100, or `groups` is below 1.
        FileNotFoundError: if there is no such file.
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
        """ConfidenceLevels from measurements: answer type -> `(step, n, n_correct)` rows, in any order."""
        table = LevelTable({kind: tuple(rows) for kind, rows in counts.items()}, dict(provenance or {}))
        return cls(table=table, grid=grid)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, grid: int = 5) -> "AnchoredLevels":
        """ConfidenceLevels from a file that `save` wrote."""
        return cls(path, grid=grid)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON; a reader sees the old file or the whole new one, never a part.

        Raises:
            DataError: it cannot be written.
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
        """The answer types that were measured."""
        return tuple(self.table.counts)

    def accuracy(self, step: int, answer_type: str) -> float:
        """The fitted accuracy in [0, 1], unrounded, interpolated linearly between measured steps.

        Raises:
            ValueError: for an answer type that was not measured, or a step outside `[0, steps[-1]]`.
        """
        fit = self._fit(answer_type)
        _check_range(step, self.steps[-1])
        return float(np.interp(step, self.steps, fit))

    def confidence(self, step: int, answer_type: str) -> float:
        """`accuracy`, or the mean of the group of the nearest measured step, rounded to the grid; raises as `accuracy` does."""
        value = self.accuracy(step, answer_type)
        if self.groups is not None:
            nearest = min(range(len(self.steps)), key=lambda i: abs(self.steps[i] - step))
            value = float(self._stated[answer_type][nearest])
        cells = 100 // self.grid
        # The small term makes interpolated ties go up whatever the last bit of the interpolation.
        return math.floor(value * cells + 0.5 + 1e-9) / cells

    def step(self, confidence: float, answer_type: str | None = None) -> int:
        """The least noisy step whose fitted accuracy is at most `confidence`.

        Raises:
            ValueError: without an answer type, or if no amount of noise brings the model down to `confidence`.
        """
        target = check_confidence(confidence)
        if answer_type is None:
            raise ValueError(
                f"anchored levels differ by answer type: name one of {', '.join(self.answer_types)}"
            )
        fit = self._fit(answer_type)
        if target < fit[-1]:
            raise ValueError(
                f"no noise step brings {answer_type!r} answers down to {target:g}: the lowest accuracy is {fit[-1]:g}"
            )
        steps = np.arange(self.steps[-1] + 1)
        return int(np.argmax(np.interp(steps, self.steps, fit) <= target + 1e-12))

    def _fit(self, answer_type: str) -> np.ndarray:
        if answer_type not in self._fits:
            raise ValueError(
                f"no levels were measured for answer type {answer_type!r}; known: {', '.join(self.answer_types)}"
            )
        return self._fits[answer_type]

    def __repr__(self) -> str:
        return f"AnchoredLevels({', '.join(self.answer_types)}; {len(self.steps)} steps, grid={self.grid})"


def _group_means(accuracy: np.ndarray, weights: Sequence[int], groups: int) -> np.ndarray:
    """Each value replaced by the weighted mean of its group: at most `groups` runs with the least sum of squared errors.

    Exact dynamic programme over the last run: `best[g][j]` is (error, start of the last run) for the first j values in g runs.
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
