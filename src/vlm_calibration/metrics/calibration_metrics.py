"""The calibration metrics as torchmetrics: one class for each metric of `METRICS`, and `CalibrationMetrics`, all of them.

The classes are generated: `ExpectedCalibrationError` from the declaration of `expected_calibration_error`, and so on;
`CALIBRATION_CLASSES` lists them.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vlm_calibration.metrics.counting import CalibrationMetric, SharedStateCollection, class_of
from vlm_calibration.metrics.functional import METRICS, REPORTED
from vlm_calibration.metrics.summary import check_names

CALIBRATION_CLASSES: dict[str, type[CalibrationMetric]] = {
    name: class_of(spec, CalibrationMetric, __name__) for name, spec in METRICS.items()
}
"""The class of each metric by its flat name."""

globals().update({cls.__name__: cls for cls in CALIBRATION_CLASSES.values()})

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[CalibrationMetric]:
        """The generated classes, for type checkers."""
        ...


class CalibrationMetrics(SharedStateCollection):
    """All calibration metrics over one shared table; keys are those of `metrics.json`.

    `compute()` returns `n, ece, ace, mce, brier, brier_reliability, brier_resolution, brier_uncertainty, log_loss,
    auroc, aurc, smooth_ece, mean_confidence, overconfidence, parse_failure_rate`, float64, each again with a
    `/category` suffix for every category. `n` counts all answers; the other metrics are over the answers whose confidence
    could be read.

    Args:
        prefix: put before every key.
        postfix: put after every key, category included.
        categories: names to break down by; None for no breakdown.
        grid_steps: grid steps from 0 to 1.
        n_bins: bins of the binned metrics.
        metrics: names from `METRICS`, by default those above.
        kwargs: those of `torchmetrics.Metric`.

    Raises:
        ValueError: on an unknown metric, bad grid steps, an empty or repeated category.

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
        grid_steps: int = 100,
        n_bins: int = 10,
        metrics: Iterable[str] = REPORTED,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        categories = categories if categories is None or isinstance(categories, str) else tuple(categories)
        options = {"categories": categories, "grid_steps": grid_steps, "n_bins": n_bins, **kwargs}
        members = {name: CALIBRATION_CLASSES[name](**options) for name in check_names(metrics)}
        super().__init__(members, prefix, postfix)
