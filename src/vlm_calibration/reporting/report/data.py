"""The systems that a report compares, read from the prediction files and configurations of evaluations and runs."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vlm_calibration.estimators.predictions import (
    CALIBRATION,
    PREDICTIONS,
    VERBALIZED,
    EstimatedPrediction,
    estimators_of,
    probes_of,
    read_predictions,
)
from vlm_calibration.files import name_some, read_json
from vlm_calibration.metrics import TaskTable, UndefinedMetricWarning, summarize
from vlm_calibration.metrics.functional import REPORTED
from vlm_calibration.metrics.groups import ConfidenceGroups, group_values
from vlm_calibration.metrics.probes import count_probes, probe_values
from vlm_calibration.metrics.summary import table_values
from vlm_calibration.models.base import ADAPTER
from vlm_calibration.records import DataError, category_groups
from vlm_calibration.reporting.report.origin import (
    BASE,
    CONFIG,
    ORACLE,
    Origin,
    adapters_of,
    origin_of,
    read_config,
    read_versions,
)
from vlm_calibration.reporting.runs import systems_of

METRICS = "metrics.json"


@dataclass(frozen=True, eq=False)
class System:
    """A model that answered the questions: the base model, an adapter, or a run.

    Attributes:
        name: its name in tables.
        predictions: its answers.
        metrics: the metrics that the evaluation wrote beside them; may be empty.
        folder: folder of the whole evaluation.
        config: configuration of the evaluation, None if there is none.
        calibration: its answers to the calibration set, to fit recalibration on; None if there are none.
        origin: what it is.
        versions: name -> version of the software that answered; empty if the run did not record them.
    """

    name: str
    predictions: Sequence[EstimatedPrediction]
    metrics: Mapping[str, float | None]
    folder: Path
    config: Mapping[str, Any] | None
    calibration: Sequence[EstimatedPrediction] | None = None
    origin: Origin = field(default_factory=Origin)
    versions: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def estimators(self) -> tuple[str, ...]:
        """The estimators of all its answers, the verbalized confidence first."""
        return estimators_of(self.predictions)

    @cached_property
    def by_id(self) -> dict[str, EstimatedPrediction]:
        return {p.id: p for p in self.predictions}

    @cached_property
    def values(self) -> dict[str, float]:
        """All metrics of the answers, as in `metrics.json`; NaN if undefined."""
        return summarize_predictions(self.predictions)

    @property
    def adapter(self) -> str | None:
        """Its adapter as commands take it: a run, the folder of an adapter or a name on the Hub; None for a base model."""
        named = adapters_of(self.config).get(self.name.removeprefix(f"{self.folder}/"))
        if named is not None:
            return named.removesuffix(f"/{ADAPTER}")
        is_run = (self.folder / ADAPTER).is_dir()
        return str(self.folder) if is_run else None

    def passes(self, estimator: str) -> float | None:
        """Forward passes of an estimator for each query, None if they were not counted."""
        return self.metrics.get(f"forward_passes@{estimator}")


def read_systems(folders: Sequence[str]) -> list[System]:
    """Read the systems of evaluations and runs; names that occur twice get their folder in front.

    Raises:
        DataError: a folder holds no predictions, a file in it cannot be used, or two systems answered different questions.
    """
    by_folder = [_read_folder(Path(folder)) for folder in dict.fromkeys(folders)]
    if not by_folder:
        raise DataError("give at least one folder of a run or an evaluation")
    first, *others = (s for systems in by_folder for s in systems)
    for other in others:
        _check_same_questions(first, other)
    count = Counter(s.name for systems in by_folder for s in systems)
    return [
        replace(s, name=f"{s.folder}/{s.name}") if count[s.name] > 1 else s
        for systems in by_folder
        for s in systems
    ]


def _check_same_questions(first: System, other: System) -> None:
    asked, also = ({p.id: (p.question, p.answer) for p in s.predictions} for s in (first, other))
    if asked != also:
        differing = [i for i in {**asked, **also} if asked.get(i) != also.get(i)]
        raise DataError(
            f"{first.name!r} in {first.folder} and {other.name!r} in {other.folder} did not answer the same questions: "
            f"{name_some(differing, len(differing))}: evaluate them together, or report on each alone"
        )


def _read_folder(folder: Path) -> list[System]:
    """Read the systems that the configuration of an evaluation names; without one those in `folder`, the base model first."""
    config, versions = read_config(folder / CONFIG), read_versions(folder)
    if named := systems_of(config or {}):
        paths = [folder / name for name in named]
    else:
        paths = [folder, *sorted(p.parent for p in folder.glob(f"*/{PREDICTIONS}"))]
        paths.sort(key=lambda p: (p.name == ORACLE, p.name != BASE))
    paths = [p for p in paths if (p / PREDICTIONS).is_file()]
    if not paths:
        raise DataError(
            f"no {PREDICTIONS} in {folder} or a folder in it: evaluate first, or name another folder"
        )
    return [
        System(
            path.resolve().name,
            read_predictions(path / PREDICTIONS),
            _read_metrics(path / METRICS),
            folder,
            config,
            read_predictions(path / CALIBRATION) if (path / CALIBRATION).is_file() else None,
            origin_of(path, folder, config),
            versions,
        )
        for path in paths
    ]


def _read_metrics(path: Path) -> dict[str, float | None]:
    if not path.is_file():
        return {}
    metrics = read_json(path)
    return metrics if isinstance(metrics, dict) else {}


def read_calibration(folder: str, systems: Sequence[System]) -> list[System]:
    """Add to each system its answers in another evaluation, to fit recalibration on; None for systems without any.

    Raises:
        DataError: the evaluation has answers of none of the systems.
    """
    by_name = {s.name: s.predictions for s in read_systems([folder])}
    if not by_name.keys() & {s.name for s in systems}:
        raise DataError(
            f"--calibration {folder}: holds answers of {', '.join(by_name)}, but of none of "
            f"{', '.join(s.name for s in systems)}"
        )
    return [replace(s, calibration=by_name.get(s.name)) for s in systems]


# --- Metrics --------------------------------------------------------------------------------------------------------


def summarize_predictions(predictions: Sequence[EstimatedPrediction]) -> dict[str, float]:
    """Compute every metric over all predictions, and as `METRIC/GROUP` over each group of categories.

    Further estimators that all predictions have are scored as `METRIC@ESTIMATOR`, their probes as `probe_NAME_change` and others.
    Confidences are not rounded to a grid.

    Returns:
        Name -> value, NaN if undefined.
    """
    groups: dict[str, list[EstimatedPrediction]] = {}
    for prediction in predictions:
        for group in category_groups(prediction.category):
            groups.setdefault(group, []).append(prediction)
    ordered = dict(sorted(groups.items()))
    with warnings.catch_warnings():
        # Undefined metrics are expected here: tables show a dash, files null.
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        values = summarize(
            _confidence_groups(predictions, VERBALIZED),
            _task_table(predictions),
            categories={group: _confidence_groups(members, VERBALIZED) for group, members in ordered.items()},
            task_categories={group: _task_table(members) for group, members in ordered.items()},
        )
    for name in estimators_of(predictions)[1:]:
        for suffix, members in {
            "": predictions,
            **{f"/{g}": members for g, members in ordered.items()},
        }.items():
            values |= table_values(_confidence_groups(members, name), REPORTED[1:], f"@{name}{suffix}")
    probes = probes_of(predictions)
    if probes:
        row_of = {group: row for row, group in enumerate(ordered, start=1)}
        rows = [[0, *(row_of[g] for g in category_groups(p.category))] for p in predictions]
        counts = count_probes((p.probes for p in predictions), probes, rows, 1 + len(ordered))
        for suffix, counted in zip(["", *(f"/{group}" for group in ordered)], counts, strict=True):
            values |= probe_values(counted, probes, suffix)
    return values


def _confidence_groups(predictions: Sequence[EstimatedPrediction], estimator: str) -> ConfidenceGroups:
    """The distinct confidences with their counts; None counts as unparsed."""
    rows = [(p.confidence_of(estimator), p.correct) for p in predictions]
    parsed = [(confidence, correct) for confidence, correct in rows if confidence is not None]
    levels = group_values(
        torch.tensor([confidence for confidence, _ in parsed], dtype=torch.float64),
        torch.tensor([correct for _, correct in parsed], dtype=torch.bool),
    )
    return levels._replace(unparsed=torch.tensor(len(rows) - len(parsed)))


def _task_table(predictions: Sequence[EstimatedPrediction]) -> TaskTable:
    return TaskTable.from_predictions(
        [p.predicted for p in predictions], [p.answer for p in predictions], [p.correct for p in predictions]
    )
