"""Scores the predictions of a system as they come in, the same in one process as in many.

Metrics have flat names: `ece`, `ece/existence` for a group of categories, `ece@expected/existence` for an estimator beside the stated
confidence, `probe_image_change/existence` for a probe. The cost of a query is `forward_passes@expected` for an estimator,
`forward_passes@verbalized` for the answer and `forward_passes@probes` for all probes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torchmetrics import MeanMetric

from vlm_calibration.estimators.base import PROBES
from vlm_calibration.metrics import CalibrationMetrics, TaskMetrics, UndefinedMetricWarning
from vlm_calibration.metrics.counting import ProbeMetrics
from vlm_calibration.metrics.functional import REPORTED
from vlm_calibration.metrics.table import PROBABILITY_STEPS, as_confidence_tensor
from vlm_calibration.records import VERBALIZED, Prediction, category_groups

Results = dict[str, dict[str, float]]
"""System name -> metrics by flat name; the system "" is the run itself."""


class Scorer(nn.Module):
    """Calibration and task metrics of the answers of one system, over all of them and over each group of categories.

    Args:
        groups: to break results down by; set before the first update, since every process needs the same state.
        estimators: names of further estimators, beside the stated confidence, that every prediction has.
        probes: names of the probes that every prediction has.
    """

    task: TaskMetrics
    probes: ProbeMetrics

    def __init__(
        self, groups: Iterable[str] = (), estimators: Sequence[str] = (), probes: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.confidences = [VERBALIZED, *estimators]
        self.probe_names = tuple(probes)
        # Alone, the answer's own passes are no comparison.
        self.counted = [*self.confidences, *([PROBES] if probes else [])] if estimators or probes else []
        self.set_groups(groups)

    def set_groups(self, groups: Iterable[str]) -> None:
        """Reset, and break results down by these groups from now on."""
        self.groups = sorted(set(groups))
        self.task = TaskMetrics(categories=self.groups)
        finer: dict[str, Any] = {"grid_steps": PROBABILITY_STEPS, "metrics": REPORTED[1:]}
        self.calibration = nn.ModuleList(
            CalibrationMetrics(categories=self.groups, **({} if name == VERBALIZED else finer))
            for name in self.confidences
        )
        # The sum of float64 passes is exact.
        self.passes = nn.ModuleList(MeanMetric().set_dtype(torch.float64) for _ in self.counted)
        self.probes = ProbeMetrics(self.probe_names, self.groups)

    def update(
        self, predictions: Sequence[Prediction], passes: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        """Count predictions; `passes` are the forward passes of each by estimator, or `PROBES`, and None without these."""
        if not predictions:
            return
        known = set(self.groups)
        groups = [[g for g in category_groups(p.category) if g in known] for p in predictions]
        correct = torch.tensor([p.correct for p in predictions])
        self.task.update([p.predicted for p in predictions], [p.answer for p in predictions], correct, groups)
        for name, metrics in zip(self.confidences, self.calibration, strict=True):
            confidences = [p.confidence if name == VERBALIZED else p.estimates[name] for p in predictions]
            cast(CalibrationMetrics, metrics).update(as_confidence_tensor(confidences), correct, groups)
        if self.probe_names:
            self.probes.update([p.probes for p in predictions], groups)
        if self.counted:
            assert passes is not None
            for name, metric in zip(self.counted, self.passes, strict=True):
                mean = cast(MeanMetric, metric)
                mean.update(torch.tensor(passes[name], device=mean.device))

    def compute(self) -> dict[str, float]:
        """All metrics, NaN where undefined: overall, by group, then forward passes and metrics of estimators and probes."""
        with warnings.catch_warnings():
            # A group of short answers has no yes ratio, and one without errors no AUROC. Tables show a dash, files null.
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            stated, *others = (cast(CalibrationMetrics, metrics).compute() for metrics in self.calibration)
            values = stated | self.task.compute()
        results = {name: float(values[name]) for name in sorted(values, key=lambda name: "/" in name)}
        for name, mean in zip(self.counted, self.passes, strict=True):
            results[f"forward_passes@{name}"] = float(cast(MeanMetric, mean).compute())
        for estimator, values in zip(self.confidences[1:], others, strict=True):
            for key, value in values.items():
                metric, slash, group = key.partition("/")
                results[f"{metric}@{estimator}{slash}{group}"] = float(value)
        if self.probe_names:
            results |= {name: float(value) for name, value in self.probes.compute().items()}
        return results
