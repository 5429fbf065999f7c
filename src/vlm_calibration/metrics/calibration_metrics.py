"""The calibration metrics as torchmetrics: one thin class for each, and `CalibrationMetrics`, all of them."""

from collections.abc import Iterable
from typing import Any

from vlm_calibration.metrics.counting import CalibrationMetric, SharedStateCollection
from vlm_calibration.metrics.summary import check_names
from vlm_calibration.metrics.table_metrics import REPORTED


class AnswerCount(CalibrationMetric):
    """The number of all answers, unparsed ones included."""

    name = "n"
    plot_upper_bound = None


class ExpectedCalibrationError(CalibrationMetric):
    """Expected calibration error over equal-width bins."""

    name = "ece"
    higher_is_better = False
    figure = "reliability_diagram"
    binned = True


class AdaptiveCalibrationError(CalibrationMetric):
    """Adaptive calibration error over equal-mass bins."""

    name = "ace"
    higher_is_better = False
    figure = "reliability_diagram"
    binned = True


class MaximumCalibrationError(CalibrationMetric):
    """Maximum calibration error over equal-width bins."""

    name = "mce"
    higher_is_better = False
    figure = "reliability_diagram"
    binned = True


class BrierScore(CalibrationMetric):
    """Brier score."""

    name = "brier"
    higher_is_better = False


class BrierReliability(CalibrationMetric):
    """Murphy's reliability, over levels."""

    name = "brier_reliability"
    higher_is_better = False
    figure = "reliability_diagram"


class BrierResolution(CalibrationMetric):
    """Murphy's resolution, over levels."""

    name = "brier_resolution"
    higher_is_better = True
    figure = "reliability_diagram"
    plot_upper_bound = 0.25


class BrierUncertainty(CalibrationMetric):
    """Murphy's uncertainty."""

    name = "brier_uncertainty"
    figure = "reliability_diagram"
    plot_upper_bound = 0.25


class ConfidenceLogLoss(CalibrationMetric):
    """Logarithmic loss in nats."""

    name = "log_loss"
    higher_is_better = False
    plot_upper_bound = None


class ConfidenceAUROC(CalibrationMetric):
    """AUROC of confidence for telling right answers from wrong ones."""

    name = "auroc"
    higher_is_better = True


class AreaUnderRiskCoverage(CalibrationMetric):
    """Area under the risk-coverage curve."""

    name = "aurc"
    higher_is_better = False
    figure = "risk_coverage_figure"


class SmoothCalibrationError(CalibrationMetric):
    """Smooth calibration error."""

    name = "smooth_ece"
    higher_is_better = False
    figure = "reliability_diagram"


class MeanConfidence(CalibrationMetric):
    """Mean confidence."""

    name = "mean_confidence"


class Overconfidence(CalibrationMetric):
    """Mean confidence minus accuracy, signed."""

    name = "overconfidence"
    figure = "reliability_diagram"
    plot_lower_bound = -1.0


class ParseFailureRate(CalibrationMetric):
    """Share of the answers whose confidence could not be read."""

    name = "parse_failure_rate"
    higher_is_better = False


class DebiasedCalibrationError(CalibrationMetric):
    """Debiased l2 calibration error over levels."""

    name = "debiased_l2_ece"
    higher_is_better = False
    figure = "reliability_diagram"


class OverconfidentError(CalibrationMetric):
    """The part of the ECE from overconfident bins."""

    name = "overconfident_error"
    higher_is_better = False
    figure = "reliability_diagram"
    binned = True


class UnderconfidentError(CalibrationMetric):
    """The part of the ECE from underconfident bins."""

    name = "underconfident_error"
    higher_is_better = False
    figure = "reliability_diagram"
    binned = True


class ConfidenceAveragePrecision(CalibrationMetric):
    """Average precision of confidence for finding right answers."""

    name = "average_precision"
    higher_is_better = True


class ExcessAreaUnderRiskCoverage(CalibrationMetric):
    """AURC minus that of the best ranking."""

    name = "excess_aurc"
    higher_is_better = False
    figure = "risk_coverage_figure"


class AreaUnderGeneralizedRiskCoverage(CalibrationMetric):
    """Area under the generalized risk-coverage curve."""

    name = "augrc"
    higher_is_better = False
    figure = "risk_coverage_figure"
    plot_upper_bound = 0.5


class AccuracyAtCoverage(CalibrationMetric):
    """Accuracy of the most confident 80% of the answers."""

    name = "accuracy_at_coverage"
    higher_is_better = True
    figure = "risk_coverage_figure"


class CoverageAtRisk(CalibrationMetric):
    """Share of the answers that a threshold can give with at most 5% errors."""

    name = "coverage_at_risk"
    higher_is_better = True
    figure = "risk_coverage_figure"


class ParsedAccuracy(CalibrationMetric):
    """Accuracy over the answers with a readable confidence."""

    name = "parsed_accuracy"
    higher_is_better = True
    figure = "reliability_diagram"


class Sharpness(CalibrationMetric):
    """Variance of the stated confidences."""

    name = "sharpness"
    plot_upper_bound = 0.25


class Monotonicity(CalibrationMetric):
    """Spearman's correlation of confidence and the accuracy of its level."""

    name = "monotonicity"
    higher_is_better = True
    figure = "reliability_diagram"
    plot_lower_bound = -1.0


CALIBRATION_CLASSES: dict[str, type[CalibrationMetric]] = {
    cls.name: cls
    for cls in (
        AnswerCount,
        ExpectedCalibrationError,
        AdaptiveCalibrationError,
        MaximumCalibrationError,
        BrierScore,
        BrierReliability,
        BrierResolution,
        BrierUncertainty,
        ConfidenceLogLoss,
        ConfidenceAUROC,
        AreaUnderRiskCoverage,
        SmoothCalibrationError,
        MeanConfidence,
        Overconfidence,
        ParseFailureRate,
        DebiasedCalibrationError,
        OverconfidentError,
        UnderconfidentError,
        ConfidenceAveragePrecision,
        ExcessAreaUnderRiskCoverage,
        AreaUnderGeneralizedRiskCoverage,
        AccuracyAtCoverage,
        CoverageAtRisk,
        ParsedAccuracy,
        Sharpness,
        Monotonicity,
    )
}
"""The class of each metric by its flat name."""


class CalibrationMetrics(SharedStateCollection):
    """All calibration metrics over one shared table; keys are those of `metrics.json`.

    `compute()` returns `n, ece, ace, mce, brier, brier_reliability, brier_resolution, brier_uncertainty, log_loss,
    auroc, aurc, smooth_ece, mean_confidence, overconfidence, parse_failure_rate`, float64, each again with a
    `/category` suffix for every category. `n` counts all answers, the others are over those whose confidence
    could be read.

    Args:
        prefix: put before every key.
        postfix: put after every key, category included.
        categories: names to break down by; None for no breakdown.
        resolution: grid steps from 0 to 1.
        n_bins: bins of the binned metrics.
        metrics: names from `METRICS`, by default those above.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: on an unknown metric, a bad resolution, an empty or repeated category.

    Example:
        >>> import torch
        >>> metrics = CalibrationMetrics(prefix="val/", metrics=("n", "ece", "brier"))
        >>> metrics.update(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        >>> {name: round(float(value), 3) for name, value in metrics.compute().items()}
        {'val/n': 3.0, 'val/ece': 0.367, 'val/brier': 0.303}
    """

    def __init__(
        self,
        prefix: str | None = None,
        postfix: str | None = None,
        categories: Iterable[str] | None = None,
        resolution: int = 100,
        n_bins: int = 10,
        metrics: Iterable[str] = REPORTED,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        categories = categories if categories is None or isinstance(categories, str) else tuple(categories)
        options = {"categories": categories, "resolution": resolution, "n_bins": n_bins, **kwargs}
        members = {name: CALIBRATION_CLASSES[name](**options) for name in check_names(metrics)}
        super().__init__(members, prefix, postfix)
