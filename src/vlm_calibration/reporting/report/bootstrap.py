"""Confidence intervals and paired p-values from a bootstrap over images.

Answers about one image are correlated, so images are drawn with replacement, each with all its answers. Systems that answered
the same questions are measured on the same draws, which pairs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from vlm_calibration.estimators.predictions import EstimatedPrediction
from vlm_calibration.metrics.bootstrap import Interval, bootstrap_replicates, interval_of, percentile_interval
from vlm_calibration.metrics.functional import METRICS, REPORTED
from vlm_calibration.metrics.table import ConfidenceTable

MEASURED = ("accuracy", *(name for name in REPORTED if name != "n"))
"""Metrics of every confidence: the accuracy over all answers, and the calibration metrics of `metrics.json`."""


class Measured(NamedTuple):
    """The interval of each metric of one confidence, NaN if undefined, and its value in each draw of images, float64 [B]."""

    intervals: Mapping[str, Interval]
    drawn: Mapping[str, Tensor]


def p_value(first: Measured, second: Measured, name: str) -> float:
    """Two-sided p-value of the difference in a metric between two confidences that were measured on the same draws.

    The share of draws whose difference is as far from the observed one as that is from 0 (Hall & Wilson, 1991); at least
    1 / (draws + 1), NaN if a metric is undefined.
    """
    observed = first.intervals[name].value - second.intervals[name].value
    deviations = (first.drawn[name] - second.drawn[name] - observed).abs()
    deviations = deviations[~deviations.isnan()]
    if observed != observed or len(deviations) == 0:
        return float("nan")
    return (1 + int((deviations >= abs(observed) - 1e-12).sum())) / (1 + len(deviations))


class ImageBootstrap:
    """Bootstrap draws of the images behind some answers.

    Args:
        predictions: the answers; an answer without an image name counts as an image of its own.
        replicates: number of draws, B.
        seed: the draws are a function of the seed and the names of the images.
    """

    def __init__(
        self, predictions: Sequence[EstimatedPrediction], replicates: int = 1000, seed: int = 0
    ) -> None:
        units = [("id", p.id) if p.image is None else ("image", p.image) for p in predictions]
        index = {unit: i for i, unit in enumerate(sorted(set(units)))}
        n = len(index)
        self.correct = np.array([p.correct for p in predictions])
        self.unit_of = np.array([index[unit] for unit in units])
        """Number of each answer's image, int [N]."""
        self.weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=replicates).T
        """How often each draw contains each image, int [images, B]."""
        self.rarer = min(len(np.unique(self.unit_of[self.correct == kind])) for kind in (True, False))
        """Number of images with a correct answer, or with a wrong one, whichever is smaller."""

    def measure(self, confidence: Sequence[float | None]) -> Measured:
        """Measure one confidence in each of the answers; None counts as unparsed."""
        values = np.array([np.nan if c is None else c for c in confidence], dtype=np.float64)
        correct = torch.from_numpy(self.correct)
        table = ConfidenceTable.from_predictions(torch.from_numpy(values), correct, None)
        # The cell of each answer: two for each level, wrong and correct, and one for unparsed answers.
        cell = 2 * np.searchsorted(table.value.numpy(), values) + self.correct
        cell[np.isnan(values)] = 2 * len(table.value)
        shape = (2 * len(table.value) + 1, len(self.weights))
        per_unit = csr_matrix((np.ones(len(values), dtype=np.int64), (cell, self.unit_of)), shape=shape)
        counts = torch.from_numpy(np.ascontiguousarray((per_unit @ self.weights).T))
        drawn = table._replace(counts=counts[:, :-1].reshape(len(counts), -1, 2), unparsed=counts[:, -1])
        accuracy = self._drawn_sums(self.correct) / self._drawn_sums(np.ones(len(self.correct)))
        of_draws = {"accuracy": torch.from_numpy(accuracy)}
        value = float(self.correct.mean())
        intervals = {"accuracy": percentile_interval(value, of_draws["accuracy"], self.rarer)}
        for name in MEASURED[1:]:
            of_draws[name] = bootstrap_replicates(drawn, METRICS[name])
            intervals[name] = interval_of(METRICS[name], table, drawn, of_draws[name], self.rarer)
        return Measured(intervals, of_draws)

    def mean(self, values: Sequence[float | None]) -> Interval:
        """The mean of one number for each answer with its 95% interval; None is left out, and there is at least one number."""
        used = np.array([value is not None for value in values])
        numbers = np.array([0.0 if value is None else value for value in values])
        drawn = self._drawn_sums(used)
        means = torch.from_numpy(self._drawn_sums(numbers) / np.where(drawn > 0, drawn, np.nan))
        units = len(np.unique(self.unit_of[used]))
        return percentile_interval(float(numbers[used].mean()), means, units)

    def _drawn_sums(self, numbers: np.ndarray) -> np.ndarray:
        """The sum of one number for each answer in each draw, float64 [B]."""
        of_units = np.bincount(self.unit_of, weights=numbers.astype(np.float64), minlength=len(self.weights))
        return of_units @ self.weights
