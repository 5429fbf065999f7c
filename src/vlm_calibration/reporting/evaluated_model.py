"""One system of an evaluation: the answers that thresholds are chosen on, and the model that gave them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from vlm_calibration.estimators.decision import By
from vlm_calibration.estimators.predictions import (
    CALIBRATION,
    PREDICTIONS,
    EstimatedPrediction,
    estimators_of,
)
from vlm_calibration.models.base import (
    BaseModel,
    adapter_digest,
    adapter_weights_digest,
    base_of_adapters,
    find_adapter,
    read_object,
)
from vlm_calibration.records import DataError
from vlm_calibration.reporting.report.data import BASE, ORACLE, System, read_systems
from vlm_calibration.reporting.report.summary import subject_of
from vlm_calibration.reporting.report.thresholds import grouped
from vlm_calibration.reporting.runs import RECORD, systems_of
from vlm_calibration.text.prompts import ElicitationPrompt


class Evaluated(NamedTuple):
    """The answers that a threshold is chosen on.

    Attributes:
        system: the model that answered.
        path: file of the answers.
        split: "calibration", or "predictions" without a calibration split.
        answers: the answers.
        groups: group -> its answers.
        without_group: how many answers have no group and are left out.
    """

    system: System
    path: Path
    split: Literal["calibration", "predictions"]
    answers: Sequence[EstimatedPrediction]
    groups: Mapping[str, list[EstimatedPrediction]]
    without_group: int

    @property
    def questions(self) -> str:
        """Which questions the answers are to, as `guarantee` names them."""
        return "those of the calibration split" if self.split == "calibration" else "the evaluated ones"


def read_evaluated(run: Path, name: str | None, estimator: str, by: By | None) -> Evaluated:
    """The answers of one system of an evaluation, in groups.

    Raises:
        DataError: there are none, there is no such system, or they lack the estimator or a category.
    """
    system, folder = _system_of(run, name)
    split: Literal["calibration", "predictions"] = (
        "predictions" if system.calibration is None else "calibration"
    )
    answers = system.predictions if system.calibration is None else system.calibration
    path = folder / (PREDICTIONS if system.calibration is None else CALIBRATION)
    if estimator not in (known := estimators_of(answers)):
        raise DataError(f"{path}: no estimator {estimator!r}; it has {', '.join(known)}")
    groups = grouped(answers, by)
    if not groups:
        raise DataError(f"{path}: no answer has a category: leave --by out")
    left_out = len(answers) - sum(map(len, groups.values()))
    return Evaluated(system, path, split, answers, groups, left_out)


def _system_of(run: Path, name: str | None) -> tuple[System, Path]:
    """A system of an evaluation, and its folder."""
    systems = {s.name: s for s in read_systems([str(run)]) if s.name != ORACLE}
    if not systems:
        raise DataError(f"{run}: holds no answers of a model")
    if name is not None and name not in systems:
        raise DataError(f"--system: no system {name!r} that is a model; there are {', '.join(systems)}")
    system = systems[name] if name is not None else subject_of(list(systems.values()))
    folder = system.folder / system.name
    if not (folder / PREDICTIONS).is_file() or system.name not in systems_of(system.config or {}):
        raise DataError(
            f"{run}: not an evaluation of `vlm-calibration test`, whose configuration names the adapters"
        )
    return system, folder


# --- The model ------------------------------------------------------------------------------------------------------


class EvaluatedModel(NamedTuple):
    """The model that a rule is for.

    Attributes:
        base: its base model.
        weights: digest of the weights, as `DecisionRule` has it.
        prompt: template of the evaluation's prompt.
        folder: where the rule belongs.
        has_adapter: whether that is an adapter's folder.
    """

    base: BaseModel
    weights: str
    prompt: str
    folder: Path
    has_adapter: bool


def model_of(system: System) -> EvaluatedModel:
    """The model behind a system, as the evaluation's configuration names it.

    Raises:
        DataError: the adapter is gone or was trained again since.
    """
    config = system.config or {}
    settings = config["model"].get("init_args") or {}
    adapters, endpoints = (settings.get(kind) or {} for kind in ("adapters", "endpoints"))
    if system.name not in (BASE, *adapters, *endpoints):
        raise DataError(f"{system.folder}: its configuration names no adapter {system.name!r}")
    template = ((config.get("data") or {}).get("prompt") or {}).get("template")
    prompt, folder = template or ElicitationPrompt().template, system.folder / system.name
    if system.name in endpoints:
        # Nobody knows the weights behind an address.
        return EvaluatedModel(BaseModel(endpoints[system.name]["model"]), "", prompt, folder, False)
    base = BaseModel(**settings["base"]) if settings.get("base") else base_of_adapters(adapters)
    if system.name == BASE:
        from vlm_calibration.models.loading import (
            weights_digest,  # imports transformers, which no adapter needs
        )

        return EvaluatedModel(base, weights_digest(base) or "", prompt, folder, False)
    adapter, record = find_adapter(adapters[system.name]), system.folder / RECORD
    inputs = read_object(record).get("inputs", {}) if record.is_file() else {}
    recorded = inputs.get(f"model.init_args.adapters.{system.name}")
    if recorded not in (None, adapter_digest(adapter)):
        raise DataError(f"{adapter}: not the adapter that {system.folder} evaluated: evaluate it first")
    # A download in the Hub's cache belongs to the cache.
    is_local = Path(adapters[system.name]).exists()
    return EvaluatedModel(
        base, adapter_weights_digest(adapter), prompt, adapter if is_local else folder, True
    )
