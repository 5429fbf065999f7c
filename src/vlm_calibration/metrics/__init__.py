"""Calibration metrics: one table of integer counts, every metric an exact function of it.

The torchmetrics classes are imported on first use: importing torchmetrics takes seconds, and scoring a file does not need it.
"""

from typing import TYPE_CHECKING, Any

from vlm_calibration.metrics.functional import BrierDecomposition, UndefinedMetricWarning
from vlm_calibration.metrics.table import ConfidenceTable

if TYPE_CHECKING:
    from vlm_calibration.metrics.counting import CalibrationMetrics, TaskMetrics

__all__ = [
    "BrierDecomposition",
    "CalibrationMetrics",
    "ConfidenceTable",
    "TaskMetrics",
    "UndefinedMetricWarning",
]


def __getattr__(name: str) -> Any:
    if name not in ("CalibrationMetrics", "TaskMetrics"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlm_calibration.metrics import counting

    return getattr(counting, name)
