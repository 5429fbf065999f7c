"""The flat summary of tables, with the names of `metrics.json`, for scoring prediction files."""

import math
import warnings
from collections.abc import Iterable, Mapping

from vlm_calibration.metrics.functional import METRICS, REPORTED
from vlm_calibration.metrics.groups import HasGroups, MetricSpec, UndefinedMetricWarning
from vlm_calibration.metrics.task import TASK_METRICS, TaskTable, task_scores

ALL_METRICS: dict[str, MetricSpec] = {**TASK_METRICS, **METRICS}
"""The declarations of task and calibration metrics by flat name."""


def check_category(category: str) -> None:
    """Raise a ValueError for an empty category, whose metric names would end in a bare slash."""
    if not isinstance(category, str) or not category:
        raise ValueError(f"a category must be a non-empty string, got {category!r}")


def warn_undefined_values(values: Mapping[str, float]) -> None:
    """Issue one warning that names all values of declared metrics that are NaN, and why they are."""
    by_reason: dict[str, list[str]] = {}
    for name, value in values.items():
        spec = ALL_METRICS.get(name.split("/", 1)[0])
        if spec is not None and math.isnan(value):
            by_reason.setdefault(spec.undefined, []).append(name)
    if by_reason:
        message = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
        warnings.warn(f"undefined (NaN): {message}", UndefinedMetricWarning, stacklevel=3)


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple; a ValueError names the first that is not in `METRICS`."""
    names = tuple(names)
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; known are {', '.join(METRICS)}")
    return names


def table_values(table: HasGroups, names: Iterable[str], suffix: str = "") -> dict[str, float]:
    """The named metrics of one table, NaN where undefined, without a warning."""
    groups = table.groups()
    return {name + suffix: float(METRICS[name](groups)) for name in names}


def summarize(
    table: HasGroups | None = None,
    task: TaskTable | None = None,
    *,
    categories: Mapping[str, HasGroups] | None = None,
    task_categories: Mapping[str, TaskTable] | None = None,
    positive: str = "yes",
    metrics: Iterable[str] = REPORTED,
) -> dict[str, float]:
    """Every reported metric by its flat name, with a `/category` suffix where broken down, and one warning for all that are NaN.

    Args:
        table: all answers, for the calibration metrics; None: no calibration metrics.
        task: all answers, for `accuracy, precision, recall, f1, yes_ratio`; None: no task metrics.
        categories: a table for each category.
        task_categories: a task table for each category.
        positive: the positive class of precision, recall and F1, `yes` or `no`.
        metrics: names from `METRICS`, by default those of `metrics.json`.

    Raises:
        ValueError: on an unknown metric, an empty category or another `positive`.

    Example:
        >>> from vlm_calibration.metrics import ConfidenceTable
        >>> table = ConfidenceTable.from_predictions([0.9, 0.9, 0.3, None], [True, False, False, True])
        >>> summarize(table, metrics=("n", "auroc", "parse_failure_rate"))
        {'n': 4.0, 'auroc': 0.75, 'parse_failure_rate': 0.25}
    """
    names = check_names(metrics)
    values: dict[str, float] = {}
    if table is not None:
        values |= table_values(table, names)
    if task is not None:
        values |= task_scores(task, positive=positive)
    for category, part in (categories or {}).items():
        check_category(category)
        values |= table_values(part, names, f"/{category}")
    for category, part_task in (task_categories or {}).items():
        check_category(category)
        values |= {
            f"{name}/{category}": value for name, value in task_scores(part_task, positive=positive).items()
        }
    warn_undefined_values(values)
    return values
