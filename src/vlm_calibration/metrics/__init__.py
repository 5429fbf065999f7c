"""Calibration metrics: one table of integer counts, every metric an exact function of it.

`functional` declares every metric as a function of raw values, and `functional.METRICS` holds the declarations, which take
tables. Figures are in `figures`. The torchmetrics classes are imported on first use: importing torchmetrics takes seconds, and
scoring a file does not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlm_calibration.metrics.bootstrap import Interval, bootstrap_intervals
from vlm_calibration.metrics.groups import UndefinedMetricWarning
from vlm_calibration.metrics.scores import BrierDecomposition
from vlm_calibration.metrics.summary import summarize
from vlm_calibration.metrics.table import ConfidenceTable, tables_by_category
from vlm_calibration.metrics.task import TaskTable, task_scores

if TYPE_CHECKING:
    from vlm_calibration.metrics.calibration_metrics import CalibrationMetrics
    from vlm_calibration.metrics.counting import CalibrationMetric
    from vlm_calibration.metrics.task_metrics import TaskMetric, TaskMetrics

__all__ = [
    "BrierDecomposition",
    "CalibrationMetric",
    "CalibrationMetrics",
    "ConfidenceTable",
    "Interval",
    "TaskMetric",
    "TaskMetrics",
    "TaskTable",
    "UndefinedMetricWarning",
    "bootstrap_intervals",
    "summarize",
    "tables_by_category",
    "task_scores",
]

_MODULES = {
    "CalibrationMetric": "counting",
    "CalibrationMetrics": "calibration_metrics",
    "TaskMetric": "task_metrics",
    "TaskMetrics": "task_metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
