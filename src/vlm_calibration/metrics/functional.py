"""The metrics as pure functions of `(confidence, correct)`, exact for any float confidences.

Values are grouped (one sort of N values) and handed to the same formulas as a table; nothing is rounded to a
grid, so these are also what a table is tested against. For many predictions prefer a `ConfidenceTable`.

Common to all of them: `confidence` is `(N,)` floating in [0, 1] without NaN, `correct` is `(N,)` bool; a
ValueError names the first value that is neither. The result is a float64 scalar on the device of `confidence`
(float32 on MPS), NaN with one `UndefinedMetricWarning` where the metric has no value. Formulas, papers and
ranges are in the docstrings of the same names in `table_metrics`.
"""

from typing import Literal

import torch
from torch import Tensor

from vlm_calibration.metrics import table_metrics as on_table
from vlm_calibration.metrics.binned import Norm
from vlm_calibration.metrics.groups import Binning, group_values
from vlm_calibration.metrics.scores import FLOAT64_EPS, BrierDecomposition
from vlm_calibration.metrics.selective import RiskCoverageCurve


def to_device_of(value: Tensor, like: Tensor) -> Tensor:
    """Move a float64 result to another tensor's device; MPS has no float64 and gets float32."""
    return value.to(like.device, torch.float32 if like.device.type == "mps" else torch.float64)


def expected_calibration_error(
    confidence: Tensor, correct: Tensor, *, n_bins: int = 10, binning: Binning = "uniform", norm: Norm = "l1"
) -> Tensor:
    """Expected calibration error (`norm` l1, l2 or max; `binning` uniform, quantile or levels), in [0, 1].

    Example:
        >>> import torch
        >>> expected_calibration_error(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, False]))
        tensor(0.3667, dtype=torch.float64)
    """
    levels = group_values(confidence, correct)
    value = on_table.expected_calibration_error(levels, n_bins=n_bins, binning=binning, norm=norm)
    return to_device_of(value, confidence)


def maximum_calibration_error(
    confidence: Tensor, correct: Tensor, *, n_bins: int = 10, binning: Binning = "uniform"
) -> Tensor:
    """Largest gap between accuracy and mean confidence of any bin, in [0, 1]."""
    value = on_table.maximum_calibration_error(
        group_values(confidence, correct), n_bins=n_bins, binning=binning
    )
    return to_device_of(value, confidence)


def adaptive_calibration_error(
    confidence: Tensor, correct: Tensor, *, n_bins: int = 10, binning: Binning = "quantile"
) -> Tensor:
    """Mean gap over equal-mass bins (Nixon et al.), in [0, 1]."""
    value = on_table.adaptive_calibration_error(
        group_values(confidence, correct), n_bins=n_bins, binning=binning
    )
    return to_device_of(value, confidence)


def debiased_calibration_error(
    confidence: Tensor, correct: Tensor, *, n_bins: int = 15, binning: Binning = "levels"
) -> Tensor:
    """Debiased l2 calibration error (Kumar et al.), in [0, 1].

    The default bins are distinct values; for continuous confidences choose `quantile` or `uniform`.
    """
    value = on_table.debiased_calibration_error(
        group_values(confidence, correct), n_bins=n_bins, binning=binning
    )
    return to_device_of(value, confidence)


def smooth_calibration_error(
    confidence: Tensor, correct: Tensor, *, bandwidth: float | None = None
) -> Tensor:
    """Smooth ECE (Błasiok & Nakkiran), in [0, 1]; accurate to about 1e-5."""
    value = on_table.smooth_calibration_error(group_values(confidence, correct), bandwidth=bandwidth)
    return to_device_of(value, confidence)


def brier_score(confidence: Tensor, correct: Tensor) -> Tensor:
    """Mean squared difference of confidence and correctness, in [0, 1]."""
    return to_device_of(on_table.brier_score(group_values(confidence, correct)), confidence)


def brier_decomposition(confidence: Tensor, correct: Tensor) -> BrierDecomposition:
    """Murphy's reliability, resolution and uncertainty over distinct confidences."""
    parts = on_table.brier_decomposition(group_values(confidence, correct))
    return BrierDecomposition(*(to_device_of(part, confidence) for part in parts))


def log_loss(confidence: Tensor, correct: Tensor, *, eps: float = FLOAT64_EPS) -> Tensor:
    """Mean negative log-likelihood in nats, confidences read as at least `eps` away from 0 and 1."""
    return to_device_of(on_table.log_loss(group_values(confidence, correct), eps=eps), confidence)


def auroc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Probability that a right answer states more confidence than a wrong one (ties half), in [0, 1]."""
    return to_device_of(on_table.auroc(group_values(confidence, correct)), confidence)


def average_precision(
    confidence: Tensor, correct: Tensor, *, positive: Literal["right", "wrong"] = "right"
) -> Tensor:
    """Average precision for finding right (or wrong) answers by confidence, in [0, 1]."""
    return to_device_of(
        on_table.average_precision(group_values(confidence, correct), positive=positive), confidence
    )


def area_under_risk_coverage(confidence: Tensor, correct: Tensor) -> Tensor:
    """AURC (Geifman & El-Yaniv), ties in expectation over their order, in [0, 1]."""
    return to_device_of(on_table.area_under_risk_coverage(group_values(confidence, correct)), confidence)


def excess_area_under_risk_coverage(confidence: Tensor, correct: Tensor) -> Tensor:
    """AURC minus that of the best ranking of the same answers, in [0, 1]."""
    return to_device_of(
        on_table.excess_area_under_risk_coverage(group_values(confidence, correct)), confidence
    )


def area_under_generalized_risk_coverage(confidence: Tensor, correct: Tensor) -> Tensor:
    """AUGRC (Traub et al.), in [0, 1/2]."""
    return to_device_of(
        on_table.area_under_generalized_risk_coverage(group_values(confidence, correct)), confidence
    )


def risk_coverage_curve(confidence: Tensor, correct: Tensor) -> RiskCoverageCurve:
    """One point for each distinct confidence, from the most confident down."""
    curve = on_table.risk_coverage_curve(group_values(confidence, correct))
    return RiskCoverageCurve(*(to_device_of(part, confidence) for part in curve))


def accuracy_at_coverage(confidence: Tensor, correct: Tensor, *, coverage: float = 0.8) -> Tensor:
    """Accuracy of the most confident `coverage` share of the answers, in [0, 1]."""
    value = on_table.accuracy_at_coverage(group_values(confidence, correct), coverage=coverage)
    return to_device_of(value, confidence)


def coverage_at_risk(confidence: Tensor, correct: Tensor, *, risk: float = 0.05) -> Tensor:
    """Largest share of answers that a threshold can give with an error rate of at most `risk`, in [0, 1]."""
    return to_device_of(on_table.coverage_at_risk(group_values(confidence, correct), risk=risk), confidence)


def mean_confidence(confidence: Tensor, correct: Tensor) -> Tensor:
    """Mean confidence, in [0, 1]."""
    return to_device_of(on_table.mean_confidence(group_values(confidence, correct)), confidence)


def overconfidence(confidence: Tensor, correct: Tensor) -> Tensor:
    """Mean confidence minus accuracy, signed, in [-1, 1]."""
    return to_device_of(on_table.overconfidence(group_values(confidence, correct)), confidence)


def overconfident_error(
    confidence: Tensor, correct: Tensor, *, n_bins: int = 10, binning: Binning = "uniform"
) -> Tensor:
    """The part of the ECE that comes from overconfident bins, in [0, 1]."""
    value = on_table.overconfident_error(group_values(confidence, correct), n_bins=n_bins, binning=binning)
    return to_device_of(value, confidence)


def underconfident_error(
    confidence: Tensor, correct: Tensor, *, n_bins: int = 10, binning: Binning = "uniform"
) -> Tensor:
    """The part of the ECE that comes from underconfident bins, in [0, 1]."""
    value = on_table.underconfident_error(group_values(confidence, correct), n_bins=n_bins, binning=binning)
    return to_device_of(value, confidence)


def sharpness(confidence: Tensor, correct: Tensor) -> Tensor:
    """Variance of the confidences, in [0, 1/4]."""
    return to_device_of(on_table.sharpness(group_values(confidence, correct)), confidence)


def monotonicity(confidence: Tensor, correct: Tensor) -> Tensor:
    """Spearman's correlation of confidence and the accuracy of its level, in [-1, 1]."""
    return to_device_of(on_table.monotonicity(group_values(confidence, correct)), confidence)
