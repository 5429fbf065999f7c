"""Every metric, declared once: here as a pure function of `(confidence, correct)`, and in `METRICS` by its flat name.

A declaration gives the formula (a function of `ConfidenceGroups`, in the module that it comes from), heading, bounds and
direction. The torchmetrics classes, the documentation, the columns of tables and the tests follow from it.

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

from vlm_calibration.metrics import binned, ranking, scores, smooth
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


answer_count = metric("n", scores.answer_count, "n", "", upper=float("inf"))
expected_calibration_error = metric(
    "ece",
    binned.expected_calibration_error,
    "ECE",
    higher_is_better=False,
    gaps=binned.ECE_GAPS,
)
adaptive_calibration_error = metric(
    "ace",
    binned.adaptive_calibration_error,
    "ACE",
    higher_is_better=False,
    gaps=binned.ACE_GAPS,
)
maximum_calibration_error = metric(
    "mce",
    binned.maximum_calibration_error,
    "MCE",
    higher_is_better=False,
    gaps=binned.MCE_GAPS,
)
brier_score = metric("brier", scores.brier_score, "Brier", higher_is_better=False)
brier_reliability = metric(
    "brier_reliability",
    scores.brier_reliability,
    "reliability",
    higher_is_better=False,
)
brier_resolution = metric(
    "brier_resolution",
    scores.brier_resolution,
    "resolution",
    higher_is_better=True,
    upper=0.25,
)
brier_uncertainty = metric(
    "brier_uncertainty",
    scores.brier_uncertainty,
    "uncertainty",
    upper=0.25,
)
log_loss = metric(
    "log_loss",
    scores.log_loss,
    "log loss",
    higher_is_better=False,
    upper=float("inf"),
    class_name="ConfidenceLogLoss",
)
auroc = metric(
    "auroc",
    ranking.auroc,
    "AUROC",
    "all answers are correct or all are wrong",
    higher_is_better=True,
    class_name="ConfidenceAUROC",
)
area_under_risk_coverage = metric(
    "aurc",
    ranking.area_under_risk_coverage,
    "AURC",
    higher_is_better=False,
)
smooth_calibration_error = metric(
    "smooth_ece",
    smooth.smooth_calibration_error,
    "smooth ECE",
    higher_is_better=False,
    gaps=smooth.SMOOTH_GAPS,
)
mean_confidence = metric("mean_confidence", scores.mean_confidence, "mean conf.")
overconfidence = metric(
    "overconfidence",
    scores.overconfidence,
    "overconf.",
    lower=-1.0,
    format="+.3f",
)
parse_failure_rate = metric(
    "parse_failure_rate",
    scores.parse_failure_rate,
    "unparsed",
    "there is no answer",
    higher_is_better=False,
    format=".1%",
)
parsed_accuracy = metric(
    "parsed_accuracy",
    scores.parsed_accuracy,
    "accuracy (parsed)",
    higher_is_better=True,
    reported=False,
)

brier_decomposition = _of_values(scores.brier_decomposition, "there is no answer with a readable confidence")
risk_coverage_curve = _of_values(ranking.risk_coverage_curve)

REPORTED = tuple(name for name, spec in METRICS.items() if spec.reported)
"""The names that `metrics.json` holds: `n` to `parse_failure_rate`."""

__doc__ = (__doc__ or "") + "".join(f"\n- `{name}`: {s.summary} {s.range}" for name, s in METRICS.items())
