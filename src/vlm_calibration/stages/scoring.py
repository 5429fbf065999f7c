"""Scoring of predictions as they come in: one accumulator for the answers of a system, the same in one process as in many.

Metrics have flat names, with `/group` behind them for each group of categories. Those of an estimator beside the stated
confidence have "@" and its name before the group: `ece@expected`, `ece@expected/existence`. `forward_passes@expected` is the cost
of the estimator a query, `forward_passes@verbalized` that of the answer. Those of probes are `probe_image_change`,
`probe_image_change/existence`, ... (`metrics.probes`), and their cost `forward_passes@probes`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from vlm_calibration.estimators.predictions import VERBALIZED, EstimatedPrediction
from vlm_calibration.estimators.system import PROBES
from vlm_calibration.metrics import CalibrationMetrics, TaskMetrics, UndefinedMetricWarning
from vlm_calibration.metrics.counting import ProbeMetrics
from vlm_calibration.metrics.functional import REPORTED
from vlm_calibration.metrics.table import PROBABILITY_STEPS, as_confidence_tensor
from vlm_calibration.records import Prediction, category_groups

Results = dict[str, dict[str, float]]
"""System name -> metrics by flat name; the system "" is the run itself."""
REPORTED_FOR_ESTIMATORS = tuple(name for name in REPORTED if name != "n")


class HasResults(Protocol):
    """A module that scores predictions.

    Attributes:
        results: of the last evaluation or validation.
    """

    results: Results


class PassCount(Metric):
    """Mean number of forward passes a query, for each of several estimators."""

    full_state_update = False
    passes: Tensor
    queries: Tensor

    def __init__(self, estimators: int) -> None:
        super().__init__()
        self.add_state("passes", torch.zeros(estimators, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("queries", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, passes: Sequence[Sequence[int]]) -> None:
        """Add the passes of each of N queries, for each estimator."""
        self.passes += torch.tensor([sum(p) for p in passes], device=self.passes.device)
        self.queries += len(passes[0])

    def compute(self) -> Tensor:
        """float64 [estimators], NaN without queries."""
        return self.passes.double() / self.queries


class Scorer(nn.Module):
    """Calibration and task metrics of the answers of one system, over all of them and over each group of categories.

    Args:
        groups: to break results down by. They must be set before the first update, since every process needs the same state.
        estimators: names of further estimators, beside the stated confidence, that every prediction has.
        probes: names of the probes that every prediction has.
    """

    task: TaskMetrics
    passes: PassCount
    probes: ProbeMetrics

    def __init__(
        self, groups: Iterable[str] = (), estimators: Sequence[str] = (), probes: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.confidences = [VERBALIZED, *estimators]
        self.probe_names = tuple(probes)
        self.counted = [*self.confidences, *([PROBES] if probes else [])]
        if len(self.counted) == 1:
            self.counted = []  # the answer's own passes are no comparison
        self.set_groups(groups)

    def set_groups(self, groups: Iterable[str]) -> None:
        """Reset, and break results down by these groups from now on."""
        self.groups = sorted(set(groups))
        self.task = TaskMetrics(categories=self.groups)
        finer: dict[str, Any] = {"grid_steps": PROBABILITY_STEPS, "metrics": REPORTED_FOR_ESTIMATORS}
        self.calibration = nn.ModuleList(
            CalibrationMetrics(categories=self.groups, **({} if name == VERBALIZED else finer))
            for name in self.confidences
        )
        self.passes = PassCount(len(self.counted))
        self.probes = ProbeMetrics(self.probe_names, self.groups)

    def reset(self) -> None:
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()

    def update(
        self, predictions: Sequence[Prediction], passes: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        """Count predictions.

        Args:
            predictions: if the scorer has estimators or probes, `EstimatedPrediction`s with the confidence of each.
            passes: the forward passes of each prediction by estimator, the stated confidence and `PROBES` included, if the scorer
                has estimators or probes.
        """
        if not predictions:
            return
        known = set(self.groups)
        groups = [[g for g in category_groups(p.category) if g in known] for p in predictions]
        correct = torch.tensor([p.correct for p in predictions])
        self.task.update([p.predicted for p in predictions], [p.answer for p in predictions], correct, groups)
        for name, metrics in zip(self.confidences, self.calibration, strict=True):
            confidences = [
                p.confidence if name == VERBALIZED else cast(EstimatedPrediction, p).estimates[name]
                for p in predictions
            ]
            cast(CalibrationMetrics, metrics).update(as_confidence_tensor(confidences), correct, groups)
        if self.probe_names:
            self.probes.update([cast(EstimatedPrediction, p).probes for p in predictions], groups)
        if self.counted:
            assert passes is not None
            self.passes.update([passes[name] for name in self.counted])

    def compute(self) -> dict[str, float]:
        """All metrics, NaN where undefined: overall, by group, then forward passes and metrics of estimators and probes."""
        with warnings.catch_warnings():
            # A group of short answers has no yes ratio, and one without errors no AUROC. Tables show a dash, files null.
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            stated, *others = (cast(CalibrationMetrics, metrics).compute() for metrics in self.calibration)
            values = stated | self.task.compute()
        results = {name: float(values[name]) for name in sorted(values, key=lambda name: "/" in name)}
        costs = self.passes.compute().tolist() if self.counted else []
        for name, cost in zip(self.counted, costs, strict=True):
            results[f"forward_passes@{name}"] = cost
        for estimator, values in zip(self.confidences[1:], others, strict=True):
            for key, value in values.items():
                metric, slash, group = key.partition("/")
                results[f"{metric}@{estimator}{slash}{group}"] = float(value)
        if self.probe_names:
            results |= {name: float(value) for name, value in self.probes.compute().items()}
        return results
