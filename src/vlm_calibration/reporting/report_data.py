"""What a report is made of: the prediction files of evaluations and runs, with what their folders say about them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from vlm_calibration.estimators.predictions import (
    CALIBRATION,
    PREDICTIONS,
    EstimatedPrediction,
    estimators_of,
    read_predictions,
)
from vlm_calibration.records import DataError
from vlm_calibration.reporting.summary import summarize_predictions

METRICS, CONFIG = "metrics.json", "config.yaml"
BASE, ORACLE = "base", "oracle"


@dataclass(frozen=True, eq=False)
class System:
    """Who answered: the base model, an adapter, or a run.

    Attributes:
        name: as in tables. label: what it is, empty where its folder does not say.
        predictions: its answers. metrics: what the evaluation wrote beside them; empty if nothing.
        calibration: its answers to the calibration set, to fit recalibration on; None if there is none.
        folder: of the whole evaluation. config: the evaluation's configuration, None if there is none.
    """

    name: str
    label: str
    predictions: Sequence[EstimatedPrediction]
    metrics: Mapping[str, float | None]
    folder: Path
    config: Mapping[str, Any] | None
    calibration: Sequence[EstimatedPrediction] | None = None

    @cached_property
    def estimators(self) -> tuple[str, ...]:
        """The estimators that all its answers have, the verbalized confidence first."""
        return estimators_of(self.predictions)

    @cached_property
    def by_id(self) -> dict[str, EstimatedPrediction]:
        return {p.id: p for p in self.predictions}

    @cached_property
    def values(self) -> dict[str, float]:
        """All metrics of the answers, as in `metrics.json`, NaN where undefined."""
        return summarize_predictions(self.predictions)

    def passes(self, estimator: str) -> float | None:
        """Forward passes a query that the estimator took, None where that was not counted."""
        return self.metrics.get(f"forward_passes@{estimator}")


def read_systems(folders: Sequence[str]) -> list[System]:
    """The systems of evaluations and runs, with names that are all different.

    Raises:
        DataError: a folder holds no predictions, or a file in it cannot be used.
    """
    found = [_systems_in(Path(folder)) for folder in dict.fromkeys(folders)]
    if not found:
        raise DataError("give at least one folder of a run or an evaluation")
    count = Counter(s.name for systems in found for s in systems)
    return [
        replace(s, name=f"{s.folder}/{s.name}") if count[s.name] > 1 else s
        for systems in found
        for s in systems
    ]


def _systems_in(folder: Path) -> list[System]:
    """The systems of one evaluation, the base model first; or the run itself, under the folder's name."""
    config = _config(folder / CONFIG)
    adapters = _adapters(config)
    order = {name: i for i, name in enumerate([BASE, *adapters])}
    parts = [folder / name for name in order] + sorted(p.parent for p in folder.glob(f"*/{PREDICTIONS}"))
    parts = [p for p in dict.fromkeys([folder, *parts]) if (p / PREDICTIONS).is_file()]
    if not parts:
        raise DataError(
            f"no {PREDICTIONS} in {folder} or a folder in it: evaluate first, or name another folder"
        )
    parts.sort(key=lambda p: (p.name == ORACLE, order.get(p.name, len(order))))
    return [
        System(
            part.resolve().name,
            _label(part, folder, adapters),
            read_predictions(part / PREDICTIONS),
            _metrics(part / METRICS),
            folder,
            config,
            read_predictions(part / CALIBRATION) if (part / CALIBRATION).is_file() else None,
        )
        for part in parts
    ]


def _label(part: Path, folder: Path, adapters: Mapping[str, str]) -> str:
    if part == folder:
        return _trained(_config(part / CONFIG))
    if part.name == BASE:
        return "the model as it came"
    if part.name == ORACLE:
        return "the base model's answers, stated with its measured accuracy at the true noise step"
    if part.name in adapters:
        return _trained(_config(Path(adapters[part.name]).parent / CONFIG))
    return ""


def _trained(config: Mapping[str, Any] | None) -> str:
    """How a run was trained, in a few words, if this is the configuration of one."""
    model, data = (config or {}).get("model") or {}, (config or {}).get("data") or {}
    stage, settings = _class(model), model.get("init_args") or {}
    if stage not in ("SFTModule", "DPOModule"):
        return ""
    how = "SFT" if stage == "SFTModule" else f"SFT + {_class(settings.get('loss') or {}) or 'DPO'}"
    levels = _class((data.get("noise") or {}).get("levels") or {}).removesuffix("Levels").lower()
    return f"{how}, {levels} levels" if levels else how


def _class(settings: Any) -> str:
    path = settings.get("class_path", "") if isinstance(settings, Mapping) else ""
    return str(path).rsplit(".", 1)[-1]


def _adapters(config: Mapping[str, Any] | None) -> dict[str, str]:
    settings = ((config or {}).get("model") or {}).get("init_args") or {}
    return {str(k): str(v) for k, v in (settings.get("adapters") or {}).items()}


def _config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a configuration: {error}") from error
    return found if isinstance(found, dict) else None


def _metrics(path: Path) -> dict[str, float | None]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def read_calibration(folder: str, systems: Sequence[System]) -> list[System]:
    """The systems, each with the answers of an evaluation to fit recalibration on, as far as that has such a system.

    Raises:
        DataError: it holds answers of none of the systems.
    """
    found = {s.name: s.predictions for s in read_systems([folder])}
    if not found.keys() & {s.name for s in systems}:
        raise DataError(
            f"--calibration {folder}: holds answers of {', '.join(found)}, and of none of "
            f"{', '.join(s.name for s in systems)}"
        )
    return [replace(s, calibration=found.get(s.name)) for s in systems]
