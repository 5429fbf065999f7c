"""Scores what further estimators say, beside the stated confidence, the same in one process as in many.

Names are those of the calibration metrics with "@" and the estimator behind them, before the group: `ece@expected`,
`ece@expected/existence`. `forward_passes@expected` is what the estimator costs a query, `forward_passes@verbalized` what the
answer itself costs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from vlm_calibration.estimators.predictions import VERBALIZED, EstimatedPrediction
from vlm_calibration.metrics import CalibrationMetrics, UndefinedMetricWarning
from vlm_calibration.metrics.table_metrics import REPORTED
from vlm_calibration.records import category_groups

RESOLUTION = 10_000
"""Grid steps from 0 to 1: probabilities are not stated in whole percents."""
REPORTED_FOR_ESTIMATORS = tuple(name for name in REPORTED if name != "n")


class PassCount(Metric):
    """The mean number of forward passes a query, for each of several estimators."""

    full_state_update = False
    passes: Tensor
    queries: Tensor

    def __init__(self, estimators: int) -> None:
        super().__init__()
        self.add_state("passes", torch.zeros(estimators, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("queries", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, passes: Sequence[Sequence[int]]) -> None:
        """For each estimator the passes of each of N queries."""
        self.passes += torch.tensor([sum(p) for p in passes], device=self.passes.device)
        self.queries += len(passes[0])

    def compute(self) -> Tensor:
        """float64 [estimators], NaN without queries."""
        return self.passes.double() / self.queries


class EstimateScorer(nn.Module):
    """Calibration metrics of each of some estimators, over all answers and over each group, and what each costs.

    Args:
        names: the estimators beside the verbalized confidence.
        groups: to break results down by; they must be known before the first update, since every process has to hold the
            same state.
    """

    def __init__(self, names: Sequence[str], groups: Iterable[str] = ()) -> None:
        super().__init__()
        self.names = list(names)
        self.set_groups(groups)

    def set_groups(self, groups: Iterable[str]) -> None:
        """Forget everything and count in these groups from here on."""
        self.groups = sorted(set(groups))
        self.passes = PassCount(len(self.names) + 1)
        metrics = partial(CalibrationMetrics, resolution=RESOLUTION, metrics=REPORTED_FOR_ESTIMATORS)
        self.overall = nn.ModuleList(metrics() for _ in self.names)
        self.by_group = nn.ModuleList(metrics(categories=self.groups) for _ in self.names)

    def update(self, predictions: Sequence[EstimatedPrediction], passes: Mapping[str, Sequence[int]]) -> None:
        """Count predictions that have all the estimates, and the passes of each by estimator, verbalized included."""
        self.passes.update([passes[name] for name in (VERBALIZED, *self.names)])
        known = set(self.groups)
        rows = [(p, g) for p in predictions for g in category_groups(p.category) if g in known]
        for name, overall, by_group in zip(self.names, self.overall, self.by_group, strict=True):
            _update(cast(CalibrationMetrics, overall), name, predictions)
            if rows:
                grouped = [p for p, _ in rows]
                _update(cast(CalibrationMetrics, by_group), name, grouped, [g for _, g in rows])

    def compute(self) -> dict[str, float]:
        """Every metric; NaN where it is undefined."""
        costs = self.passes.compute().tolist()
        found = {f"forward_passes@{n}": c for n, c in zip((VERBALIZED, *self.names), costs, strict=True)}
        with warnings.catch_warnings():
            # Expected: a group may be all right, and then has no AUROC.
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            for name, overall, by_group in zip(self.names, self.overall, self.by_group, strict=True):
                values = {**cast(CalibrationMetrics, overall).compute()}
                if self.groups:
                    grouped = cast(CalibrationMetrics, by_group).compute()
                    values |= {k: v for k, v in grouped.items() if "/" in k}
                found |= {_key(key, name): float(value) for key, value in values.items()}
        return found


def _key(metric: str, estimator: str) -> str:
    metric, slash, group = metric.partition("/")
    return f"{metric}@{estimator}{slash}{group}"


def _update(
    metrics: CalibrationMetrics,
    estimator: str,
    predictions: Sequence[EstimatedPrediction],
    groups: Sequence[str] | None = None,
) -> None:
    if not predictions:
        return
    nan = float("nan")
    said = [p.confidence_of(estimator) for p in predictions]
    confidence = torch.tensor([nan if c is None else c for c in said], dtype=torch.float64)
    metrics.update(confidence, torch.tensor([p.correct for p in predictions]), groups)
