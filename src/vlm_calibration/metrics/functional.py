"""Every metric, declared once: here as a pure function of `(confidence, correct)`, and in `METRICS` by its flat name.

A declaration gives the formula (a function of `ConfidenceGroups`, in the module that it comes from), heading, bounds, direction
and figure. The torchmetrics classes, the documentation, the columns of tables and the tests follow from it.

Common to all functions: `confidence` is float [N] in [0, 1] without NaN, `correct` is bool [N]; a ValueError names the
first value that is neither. Values are grouped by one sort and not rounded. The result is a float64 scalar on the device of
`confidence` (float32 on MPS), NaN with one `UndefinedMetricWarning` where the metric is undefined. For many predictions
prefer a `ConfidenceTable`, which `METRICS[name](table)` takes. A table is exact for confidences on its grid; other
confidences move to the nearest grid level, by at most `1 / (2 * grid_steps)`.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from vlm_calibration.metrics import binned, ranking, scores, selective, smooth
from vlm_calibration.metrics.groups import ConfidenceGroups, MetricSpec, group_values, warn_undefined

P = ParamSpec("P")
R = TypeVar("R", covariant=True)

METRICS: dict[str, MetricSpec] = {}
"""The declarations of all metrics by flat name, those of `metrics.json` first and in their order there."""


class ValueFunction(Protocol[P, R]):
    """A function of raw values and the options of its formula."""

    def __call__(self, confidence: Tensor, correct: Tensor, *args: P.args, **kwargs: P.kwargs) -> R: ...


def to_device_of(value: Tensor, like: Tensor) -> Tensor:
    """Move a float64 result to another tensor's device; MPS has no float64 and gets float32."""
    return value.to(like.device, torch.float32 if like.device.type == "mps" else torch.float64)


def _of_values(
    formula: Callable[Concatenate[ConfidenceGroups, P], R], undefined: str = ""
) -> ValueFunction[P, R]:
    """Turn a formula of `ConfidenceGroups` into a function of raw values with its own signature and documentation."""

    @wraps(formula)
    def function(confidence: Tensor, correct: Tensor, *args: P.args, **kwargs: P.kwargs) -> Any:
        value: Any = formula(group_values(confidence, correct), *args, **kwargs)
        parts = value if isinstance(value, tuple) else (value,)
        if any(bool(part.isnan().any()) for part in parts):
            warn_undefined(formula.__name__, undefined)
        moved = [to_device_of(part, confidence) for part in parts]
        return type(value)(*moved) if isinstance(value, tuple) else moved[0]

    signature = inspect.signature(formula)
    values = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Tensor)
        for name in ("confidence", "correct")
    ]
    parameters = [*values, *list(signature.parameters.values())[1:]]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    function.__module__ = __name__
    function.__doc__ = (formula.__doc__ or "").replace(
        "groups: the answers.", "confidence: float [N] in [0, 1].\n        correct: bool [N]."
    )
    return cast(ValueFunction[P, R], function)


def metric(
    name: str,
    formula: Callable[Concatenate[ConfidenceGroups, P], Tensor],
    heading: str,
    undefined: str = "there is no answer with a readable confidence",
    **declaration: Any,
) -> ValueFunction[P, Tensor]:
    """Declare a metric: enter it in `METRICS` and return its functional form.

    Args:
        name: flat name, not yet taken.
        formula: the metric as a function of `ConfidenceGroups`.
        heading: short name for table columns.
        undefined: when the value is NaN.
        declaration: further fields of `MetricSpec`.

    Raises:
        ValueError: if the name is taken.
    """
    if name in METRICS:
        raise ValueError(f"the metric {name!r} is declared twice")
    METRICS[name] = MetricSpec(name, formula, heading, undefined, **declaration)
    return _of_values(formula, undefined)


answer_count = metric("n", scores.answer_count, "n", "", upper=float("inf"), reported=True)
expected_calibration_error = metric(
    "ece",
    binned.expected_calibration_error,
    "ECE",
    higher_is_better=False,
    figure="reliability_diagram",
    gaps=binned.ECE_GAPS,
    reported=True,
)
adaptive_calibration_error = metric(
    "ace",
    binned.adaptive_calibration_error,
    "ACE",
    higher_is_better=False,
    figure="reliability_diagram",
    gaps=binned.ACE_GAPS,
    reported=True,
)
maximum_calibration_error = metric(
    "mce",
    binned.maximum_calibration_error,
    "MCE",
    higher_is_better=False,
    figure="reliability_diagram",
    gaps=binned.MCE_GAPS,
    reported=True,
)
brier_score = metric("brier", scores.brier_score, "Brier", higher_is_better=False, reported=True)
brier_reliability = metric(
    "brier_reliability",
    scores.brier_reliability,
    "reliability",
    higher_is_better=False,
    figure="reliability_diagram",
    reported=True,
)
brier_resolution = metric(
    "brier_resolution",
    scores.brier_resolution,
    "resolution",
    higher_is_better=True,
    upper=0.25,
    figure="reliability_diagram",
    reported=True,
)
brier_uncertainty = metric(
    "brier_uncertainty",
    scores.brier_uncertainty,
    "uncertainty",
    upper=0.25,
    figure="reliability_diagram",
    reported=True,
)
log_loss = metric(
    "log_loss",
    scores.log_loss,
    "log loss",
    higher_is_better=False,
    upper=float("inf"),
    class_name="ConfidenceLogLoss",
    reported=True,
)
auroc = metric(
    "auroc",
    ranking.auroc,
    "AUROC",
    "all answers are correct or all are wrong",
    higher_is_better=True,
    class_name="ConfidenceAUROC",
    reported=True,
)
area_under_risk_coverage = metric(
    "aurc",
    selective.area_under_risk_coverage,
    "AURC",
    higher_is_better=False,
    figure="risk_coverage_figure",
    reported=True,
)
smooth_calibration_error = metric(
    "smooth_ece",
    smooth.smooth_calibration_error,
    "smooth ECE",
    higher_is_better=False,
    figure="reliability_diagram",
    gaps=smooth.SMOOTH_GAPS,
    reported=True,
)
mean_confidence = metric("mean_confidence", scores.mean_confidence, "mean conf.", reported=True)
overconfidence = metric(
    "overconfidence",
    scores.overconfidence,
    "overconf.",
    lower=-1.0,
    format="+.3f",
    figure="reliability_diagram",
    reported=True,
)
parse_failure_rate = metric(
    "parse_failure_rate",
    scores.parse_failure_rate,
    "unparsed",
    "there is no answer",
    higher_is_better=False,
    format=".1%",
    reported=True,
)
debiased_calibration_error = metric(
    "debiased_l2_ece",
    binned.debiased_calibration_error,
    "debiased l2 ECE",
    "no bin holds two answers",
    higher_is_better=False,
    figure="reliability_diagram",
)
average_precision = metric(
    "average_precision",
    ranking.average_precision,
    "AP",
    "there is no answer of the positive class",
    higher_is_better=True,
    class_name="ConfidenceAveragePrecision",
)
excess_area_under_risk_coverage = metric(
    "excess_aurc",
    selective.excess_area_under_risk_coverage,
    "excess AURC",
    higher_is_better=False,
    figure="risk_coverage_figure",
)
area_under_generalized_risk_coverage = metric(
    "augrc",
    selective.area_under_generalized_risk_coverage,
    "AUGRC",
    higher_is_better=False,
    upper=0.5,
    figure="risk_coverage_figure",
)
accuracy_at_coverage = metric(
    "accuracy_at_coverage",
    selective.accuracy_at_coverage,
    "acc. at 80%",
    higher_is_better=True,
    figure="risk_coverage_figure",
)
coverage_at_risk = metric(
    "coverage_at_risk",
    selective.coverage_at_risk,
    "cov. at 5% risk",
    higher_is_better=True,
    figure="risk_coverage_figure",
)
parsed_accuracy = metric(
    "parsed_accuracy",
    scores.parsed_accuracy,
    "accuracy (parsed)",
    higher_is_better=True,
    figure="reliability_diagram",
)
sharpness = metric("sharpness", scores.sharpness, "sharpness", upper=0.25)

brier_decomposition = _of_values(scores.brier_decomposition, "there is no answer with a readable confidence")
risk_coverage_curve = _of_values(selective.risk_coverage_curve)

REPORTED = tuple(name for name, spec in METRICS.items() if spec.reported)
"""The names that `metrics.json` holds: `n` to `parse_failure_rate`."""

__doc__ = (__doc__ or "") + "".join(f"\n- `{name}`: {s.summary} {s.range}" for name, s in METRICS.items())
