"""Every metric as a function of a table, under one roof, with the registry that names them.

A metric takes a `ConfidenceTable` (or `Levels`) and returns a float64 scalar, NaN with one warning where it is
undefined. `METRICS` maps the flat names of `metrics.json`, and some more, to them.

A table is exact for confidences on its grid. Others move to the nearest level, by `d = 1 / (2 * resolution)`
at most; `rounding_bounds` says what that can do to each metric.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from vlm_calibration.metrics.binned import (
    ACE_GAPS,
    ECE_GAPS,
    MCE_GAPS,
    adaptive_calibration_error,
    debiased_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    overconfident_error,
    underconfident_error,
)
from vlm_calibration.metrics.groups import Binning, GapNorm, HasLevels, quiet
from vlm_calibration.metrics.ranking import auroc, average_precision, monotonicity
from vlm_calibration.metrics.scores import (
    BrierDecomposition,
    answer_count,
    brier_decomposition,
    brier_reliability,
    brier_resolution,
    brier_score,
    brier_uncertainty,
    log_loss,
    mean_confidence,
    overconfidence,
    parse_failure_rate,
    parsed_accuracy,
    sharpness,
)
from vlm_calibration.metrics.selective import (
    RiskCoverageCurve,
    accuracy_at_coverage,
    area_under_generalized_risk_coverage,
    area_under_risk_coverage,
    coverage_at_risk,
    excess_area_under_risk_coverage,
    risk_coverage_curve,
)
from vlm_calibration.metrics.smooth import SMOOTH_GAPS, smooth_calibration_error

__all__ = [
    "METRICS",
    "REPORTED",
    "Binning",
    "BrierDecomposition",
    "MetricSpec",
    "RiskCoverageCurve",
    "accuracy_at_coverage",
    "adaptive_calibration_error",
    "answer_count",
    "area_under_generalized_risk_coverage",
    "area_under_risk_coverage",
    "auroc",
    "average_precision",
    "brier_decomposition",
    "brier_reliability",
    "brier_resolution",
    "brier_score",
    "brier_uncertainty",
    "coverage_at_risk",
    "debiased_calibration_error",
    "excess_area_under_risk_coverage",
    "expected_calibration_error",
    "log_loss",
    "maximum_calibration_error",
    "mean_confidence",
    "monotonicity",
    "overconfidence",
    "overconfident_error",
    "parse_failure_rate",
    "parsed_accuracy",
    "risk_coverage_curve",
    "sharpness",
    "smooth_calibration_error",
    "underconfident_error",
]


@dataclass(frozen=True)
class MetricSpec:
    """What is known about a metric beside its value.

    Attributes:
        function: the table metric; calling the spec is the same without the warning.
        higher_is_better: None where neither direction is better by itself.
        lower: smallest possible value.
        upper: largest possible value; infinity if there is none.
        gaps: the same as a norm of gaps, for its interval; None for what is no calibration error.
    """

    function: Callable[..., Tensor]
    higher_is_better: bool | None
    lower: float = 0.0
    upper: float = 1.0
    gaps: GapNorm | None = None

    def __call__(self, table: HasLevels, **options: Any) -> Tensor:
        """The value on a table or a batch of replicates, float64, NaN where undefined, without a warning."""
        return quiet(self.function)(table.levels(), **options)

    @property
    def undefined(self) -> str:
        """When the value is NaN."""
        return cast(str, self.function.undefined)  # type: ignore[attr-defined]


METRICS: dict[str, MetricSpec] = {
    "n": MetricSpec(answer_count, None, upper=float("inf")),
    "ece": MetricSpec(expected_calibration_error, False, gaps=ECE_GAPS),
    "ace": MetricSpec(adaptive_calibration_error, False, gaps=ACE_GAPS),
    "mce": MetricSpec(maximum_calibration_error, False, gaps=MCE_GAPS),
    "brier": MetricSpec(brier_score, False),
    "brier_reliability": MetricSpec(brier_reliability, False),
    "brier_resolution": MetricSpec(brier_resolution, True, upper=0.25),
    "brier_uncertainty": MetricSpec(brier_uncertainty, None, upper=0.25),
    "log_loss": MetricSpec(log_loss, False, upper=float("inf")),
    "auroc": MetricSpec(auroc, True),
    "aurc": MetricSpec(area_under_risk_coverage, False),
    "smooth_ece": MetricSpec(smooth_calibration_error, False, gaps=SMOOTH_GAPS),
    "mean_confidence": MetricSpec(mean_confidence, None),
    "overconfidence": MetricSpec(overconfidence, None, lower=-1.0),
    "parse_failure_rate": MetricSpec(parse_failure_rate, False),
    "debiased_l2_ece": MetricSpec(debiased_calibration_error, False),
    "overconfident_error": MetricSpec(overconfident_error, False),
    "underconfident_error": MetricSpec(underconfident_error, False),
    "average_precision": MetricSpec(average_precision, True),
    "excess_aurc": MetricSpec(excess_area_under_risk_coverage, False),
    "augrc": MetricSpec(area_under_generalized_risk_coverage, False, upper=0.5),
    "accuracy_at_coverage": MetricSpec(accuracy_at_coverage, True),
    "coverage_at_risk": MetricSpec(coverage_at_risk, True),
    "parsed_accuracy": MetricSpec(parsed_accuracy, True),
    "sharpness": MetricSpec(sharpness, None, upper=0.25),
    "monotonicity": MetricSpec(monotonicity, True, lower=-1.0),
}
"""All metrics by flat name."""

REPORTED = tuple(METRICS)[:15]
"""The names that `metrics.json` holds: `n` to `parse_failure_rate`."""
