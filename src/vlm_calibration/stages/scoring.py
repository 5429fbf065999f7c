"""Scores predictions as they come in, over all of them and over each group, the same in one process as in many."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import nn

from vlm_calibration.metrics import CalibrationMetrics, TaskMetrics
from vlm_calibration.metrics.groups import UndefinedMetricWarning
from vlm_calibration.records import Prediction, category_groups

Results = dict[str, dict[str, float]]
"""System name -> metrics by flat name; the system "" is the run itself."""


class HasResults(Protocol):
    """What a module that scores offers to callbacks: the last results."""

    results: Results


class Scorer(nn.Module):
    """Calibration and task metrics of predictions, flat names to numbers, `/group` behind the name where broken down.

    The groups must be known before the first update, since every process has to hold the same state.
    """

    def __init__(self, groups: Sequence[str] = ()) -> None:
        super().__init__()
        self.set_groups(groups)

    def set_groups(self, groups: Iterable[str]) -> None:
        """Forget everything and count in these groups from here on."""
        self.groups = sorted(set(groups))
        self.calibration = CalibrationMetrics()
        self.task = TaskMetrics()
        self.group_calibration = CalibrationMetrics(categories=self.groups)
        self.group_task = TaskMetrics(categories=self.groups)

    def reset(self) -> None:
        for metric in (self.calibration, self.task, self.group_calibration, self.group_task):
            metric.reset()

    def update(self, predictions: Sequence[Prediction]) -> None:
        _update(self.calibration, self.task, [(p, None) for p in predictions])
        if not self.groups:
            return
        known = set(self.groups)
        _update(
            self.group_calibration,
            self.group_task,
            [(p, g) for p in predictions for g in category_groups(p.category) if g in known],
        )

    def compute(self) -> dict[str, float]:
        """Every metric; NaN where it is undefined."""
        with warnings.catch_warnings():
            # Expected: a group of short answers has no yes ratio. Tables show a dash, files null.
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            found = {**self.calibration.compute(), **self.task.compute()}
            if self.groups:
                broken_down = {**self.group_calibration.compute(), **self.group_task.compute()}
                found.update((k, v) for k, v in broken_down.items() if "/" in k)
        return {name: float(value) for name, value in found.items()}


def _update(
    calibration: CalibrationMetrics, task: TaskMetrics, rows: Sequence[tuple[Prediction, str | None]]
) -> None:
    if not rows:
        return
    nan = float("nan")
    confidence = torch.tensor(
        [nan if p.confidence is None else p.confidence for p, _ in rows], dtype=torch.float64
    )
    correct = torch.tensor([p.correct for p, _ in rows])
    category = [g for _, g in rows] if rows[0][1] is not None else None
    calibration.update(confidence, correct, category)
    task.update([p.predicted for p, _ in rows], [p.answer for p, _ in rows], correct, category)
