"""The metrics of predictions that lie in a file, by the names of `metrics.json`; torch is all that they need."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from vlm_calibration.estimators.predictions import VERBALIZED, EstimatedPrediction, estimators_of
from vlm_calibration.metrics import TaskTable, UndefinedMetricWarning, summarize
from vlm_calibration.metrics.functional import REPORTED
from vlm_calibration.metrics.groups import ConfidenceGroups, group_values
from vlm_calibration.metrics.summary import table_values
from vlm_calibration.records import category_groups


def summarize_predictions(predictions: Sequence[EstimatedPrediction]) -> dict[str, float]:
    """Every metric over all predictions, and with `/group` behind its name over each group of categories.

    What further estimators say of all of them is scored as well, as `METRIC@ESTIMATOR`. Confidences are taken as they are,
    not rounded to a grid.

    Returns:
        name -> value, NaN where it is undefined.
    """
    groups: dict[str, list[EstimatedPrediction]] = {}
    for prediction in predictions:
        for group in category_groups(prediction.category):
            groups.setdefault(group, []).append(prediction)
    ordered = dict(sorted(groups.items()))
    with warnings.catch_warnings():
        # Expected, as in an evaluation. Tables show a dash, files null.
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        values = summarize(
            _levels(predictions, VERBALIZED),
            _task(predictions),
            categories={group: _levels(part, VERBALIZED) for group, part in ordered.items()},
            task_categories={group: _task(part) for group, part in ordered.items()},
        )
    for name in estimators_of(predictions)[1:]:
        for suffix, part in {
            "": predictions,
            **{f"/{group}": part for group, part in ordered.items()},
        }.items():
            values |= table_values(_levels(part, name), REPORTED[1:], f"@{name}{suffix}")
    return values


def _levels(predictions: Sequence[EstimatedPrediction], estimator: str) -> ConfidenceGroups:
    """The distinct confidences with their counts; None counts as one that could not be read."""
    rows = [(p.confidence_of(estimator), p.correct) for p in predictions]
    known = [(confidence, right) for confidence, right in rows if confidence is not None]
    levels = group_values(
        torch.tensor([confidence for confidence, _ in known], dtype=torch.float64),
        torch.tensor([right for _, right in known], dtype=torch.bool),
    )
    return levels._replace(unparsed=torch.tensor(len(rows) - len(known)))


def _task(predictions: Sequence[EstimatedPrediction]) -> TaskTable:
    return TaskTable.from_predictions(
        [p.predicted for p in predictions], [p.answer for p in predictions], [p.correct for p in predictions]
    )
