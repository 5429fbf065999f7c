"""How far chance reaches: intervals and paired p-values from resampled images.

Answers about one image are right or wrong together, so what is drawn with replacement are images, each with all its answers.
Whoever answered the same questions is measured on the same draws, which pairs systems with each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.metrics.bootstrap import (
    Interval,
    bootstrap_replicates,
    interval_of,
    percentile_interval,
)
from vlm_calibration.metrics.functional import METRICS, REPORTED
from vlm_calibration.metrics.groups import ConfidenceGroups, group_values

MEASURED = ("accuracy", *(name for name in REPORTED if name != "n"))
"""What is measured of every confidence: the accuracy over all answers, and the calibration metrics of `metrics.json`."""


class Measured(NamedTuple):
    """intervals: by metric, NaN where undefined. drawn: float64 [B], of each draw of images."""

    intervals: Mapping[str, Interval]
    drawn: Mapping[str, Tensor]

    @property
    def values(self) -> dict[str, float]:
        """The metrics of the answers themselves."""
        return {name: interval.value for name, interval in self.intervals.items()}


def p_value(one: Measured, other: Measured, name: str) -> float:
    """Two-sided p-value of a difference between two confidences that were measured on the same draws.

    How often the drawn difference is as far from the one found as that is from none (Hall & Wilson, 1991); at least
    1 / (draws + 1), NaN where a metric is undefined.
    """
    found = one.values[name] - other.values[name]
    away = (one.drawn[name] - other.drawn[name] - found).abs()
    away = away[~away.isnan()]
    if found != found or len(away) == 0:
        return float("nan")
    return (1 + int((away >= abs(found) - 1e-12).sum())) / (1 + len(away))


class ImageBootstrap:
    """Draws of the images of some answers.

    Args:
        predictions: the answers; one that does not say what its image is stands for itself.
        replicates: number of draws. seed: of the draws, which are a function of it and of the names of the images.
    """

    def __init__(
        self, predictions: Sequence[EstimatedPrediction], replicates: int = 1000, seed: int = 0
    ) -> None:
        self.units = [("id", p.id) if p.image is None else ("image", p.image) for p in predictions]
        self.correct = np.array([p.correct for p in predictions])
        self.replicates = replicates
        self.seed = seed

    @cached_property
    def _unit_of(self) -> np.ndarray:
        """Which of the sorted units each answer belongs to, int [N]."""
        place = {unit: i for i, unit in enumerate(sorted(set(self.units)))}
        return np.array([place[unit] for unit in self.units])

    @cached_property
    def weights(self) -> np.ndarray:
        """How often each unit is in each draw, int [units, B]."""
        n = len(set(self.units))
        return np.random.default_rng(self.seed).multinomial(n, np.full(n, 1 / n), size=self.replicates).T

    @cached_property
    def _rarer(self) -> int:
        """How many units hold a right answer, or a wrong one if those are fewer."""
        return min(len(np.unique(self._unit_of[self.correct == kind])) for kind in (True, False))

    def measure(self, confidence: Sequence[float | None]) -> Measured:
        """The metrics of one confidence in each of the answers, None where there is none."""
        levels, drawn = self._levels(confidence)
        right, n = (
            np.bincount(self._unit_of, weights=w, minlength=len(self.weights))
            for w in (self.correct.astype(np.float64), np.ones(len(self.correct)))
        )
        accuracy = torch.from_numpy((right @ self.weights) / (n @ self.weights))
        of_draws = {name: bootstrap_replicates(drawn, METRICS[name]) for name in MEASURED[1:]}
        intervals = {
            name: interval_of(METRICS[name], levels, drawn, values, self._rarer)
            for name, values in of_draws.items()
        }
        return Measured(
            {"accuracy": percentile_interval(float(self.correct.mean()), accuracy, self._rarer), **intervals},
            {"accuracy": accuracy, **of_draws},
        )

    def _levels(self, confidence: Sequence[float | None]) -> tuple[ConfidenceGroups, ConfidenceGroups]:
        """The levels of the answers, and those of every draw."""
        said = np.array([np.nan if c is None else c for c in confidence], dtype=np.float64)
        read = ~np.isnan(said)
        known = torch.from_numpy(said[read])
        levels = group_values(known, torch.from_numpy(self.correct[read]))
        unparsed = torch.tensor(int((~read).sum()))
        # The cell of each answer: two a level, wrong and right, and one for what could not be read.
        cell = np.full(len(said), 2 * len(levels.value))
        cell[read] = 2 * torch.searchsorted(levels.value, known).numpy() + self.correct[read]
        shape = (2 * len(levels.value) + 1, len(self.weights))
        held = csr_matrix((np.ones(len(said), dtype=np.int64), (cell, self._unit_of)), shape=shape)
        counts = torch.from_numpy(np.ascontiguousarray((held @ self.weights).T))
        drawn = counts[:, :-1].reshape(self.replicates, -1, 2)
        return levels._replace(unparsed=unparsed), levels._replace(counts=drawn, unparsed=counts[:, -1])
