"""The systems that a report compares, and what they are: read from the files of evaluations and runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm_calibration.errors import did_you_mean
from vlm_calibration.estimators.decision import DecisionRule, read_rule, rule_of_adapter
from vlm_calibration.estimators.predictions import (
    CALIBRATION,
    PREDICTIONS,
    estimators_of,
    probes_of,
    read_predictions,
)
from vlm_calibration.files import name_some
from vlm_calibration.metrics.functional import REPORTED, table_values
from vlm_calibration.metrics.probes import count_probes, probe_values
from vlm_calibration.metrics.table import ConfidenceTable
from vlm_calibration.metrics.task import count_answers, task_scores
from vlm_calibration.models.base import ADAPTER, read_object
from vlm_calibration.models.base import CONFIG as WEIGHTS
from vlm_calibration.records import VERBALIZED, DataError, Prediction, category_groups
from vlm_calibration.reporting.card import load_card
from vlm_calibration.reporting.runs import CONFIG, METRICS, NOTES, read_config, read_record, systems_of
from vlm_calibration.settings import file_digest

Answers = Sequence[Prediction]
BASE, ORACLE = "base", "oracle"
LABELS = {
    BASE: "the base model, not fine-tuned",
    ORACLE: "the base model's answers, stated with its measured accuracy at the true kind and strength of perturbation",
}


@dataclass(frozen=True, eq=False)
class System:
    """A model that answered the questions: the base model, an adapter, or a run.

    Attributes:
        metrics: those that the evaluation wrote beside the predictions; may be empty.
        folder, config: of the whole evaluation; the configuration is empty if there is none.
        calibration: its answers to the calibration set; None if there are none.
        label: how it was trained, in a few words; empty if that is not known.
        facts: heading -> text: base model, adapter, training, guarantee of the thresholds, and the notes of the evaluation.
        versions: name -> version of the software that answered; may be empty.
    """

    name: str
    predictions: Sequence[Prediction]
    metrics: Mapping[str, float | None]
    folder: Path
    config: Mapping[str, Any]
    calibration: Sequence[Prediction] | None = None
    label: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def adapter(self) -> str | None:
        """Its adapter as commands take it: a run, the folder of an adapter or a name on the Hub; None for a base model."""
        named = model_settings(self.config, "adapters").get(self.name.removeprefix(f"{self.folder}/"))
        if named is not None:
            return str(named).removesuffix(f"/{ADAPTER}")
        return str(self.folder) if (self.folder / ADAPTER).is_dir() else None


def read_systems(folders: Sequence[str]) -> list[System]:
    """Read the systems of evaluations and runs; names that occur twice get their folder in front.

    DataError if a folder holds no predictions, a file in it cannot be used, or two systems answered different questions.
    """
    systems = [system for folder in dict.fromkeys(folders) for system in _read_folder(Path(folder))]
    if not systems:
        raise DataError("give at least one folder of a run or an evaluation")
    first, *others = systems
    asked = {p.id: (p.question, p.answer) for p in first.predictions}
    for other in others:
        also = {p.id: (p.question, p.answer) for p in other.predictions}
        if asked != also:
            differing = [i for i in {**asked, **also} if asked.get(i) != also.get(i)]
            raise DataError(
                f"{first.name!r} in {first.folder} and {other.name!r} in {other.folder} did not answer the same questions: "
                f"{name_some(differing, len(differing))}: evaluate them together, or report on each alone"
            )
    count = Counter(s.name for s in systems)
    return [replace(s, name=f"{s.folder}/{s.name}") if count[s.name] > 1 else s for s in systems]


def system_named(systems: Sequence[System], name: str) -> System:
    """The system of this name; DataError if there is none."""
    by_name = {system.name: system for system in systems}
    if name not in by_name:
        similar = did_you_mean(name, by_name)
        raise DataError(f"--system: no system {name!r}{similar}; there are {', '.join(by_name)}")
    return by_name[name]


def check_estimator(estimator: str, answers: Sequence[Prediction], where: Path) -> None:
    """Raise a DataError if not all of the answers in a file or folder have the confidence of an estimator."""
    if estimator not in (known := estimators_of(answers)):
        similar = did_you_mean(estimator, known)
        raise DataError(f"--estimator: {where}: no {estimator!r}{similar}; it has {', '.join(known)}")


def _read_folder(folder: Path) -> list[System]:
    """Read the systems that the configuration of an evaluation names; without one those in `folder`, the base model first."""
    config, record = read_config(folder / CONFIG), read_record(folder)
    if named := systems_of(config):
        paths = [folder / name for name in named]
    else:
        paths = [folder, *sorted(p.parent for p in folder.glob(f"*/{PREDICTIONS}"))]
        paths.sort(key=lambda p: (p.name == ORACLE, p.name != BASE))
    if not (paths := [p for p in paths if (p / PREDICTIONS).is_file()]):
        where = f"{folder} or a folder in it"
        raise DataError(f"no {PREDICTIONS} in {where}: evaluate first, or name another folder")
    return [
        System(
            path.resolve().name,
            read_predictions(path / PREDICTIONS),
            read_object(path / METRICS) if (path / METRICS).is_file() else {},
            folder,
            config,
            read_predictions(path / CALIBRATION) if (path / CALIBRATION).is_file() else None,
            *origin_of(path, folder, config),
            record.versions if record else {},
        )
        for path in paths
    ]


def read_calibration(folder: str, systems: Sequence[System]) -> list[System]:
    """Give each system its answers in another evaluation as those to the calibration set; DataError if it has answers of none."""
    by_name = {s.name: s.predictions for s in read_systems([folder])}
    if not by_name.keys() & {s.name for s in systems}:
        known, asked = ", ".join(by_name), ", ".join(s.name for s in systems)
        raise DataError(f"--calibration {folder}: holds answers of {known}, but of none of {asked}")
    return [replace(s, calibration=by_name.get(s.name)) for s in systems]


def origin_of(path: Path, folder: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Label and facts of the `System` whose predictions lie in `path`: a run if that is `folder`, else a system of the evaluation there.

    Its adapter may be gone, or on the Hub; then only its name is known. DataError if a file cannot be read.
    """
    adapters: Mapping[str, str] = model_settings(config, "adapters")
    base = model_settings(config, "base").get("name_or_path")
    label = ""
    facts: dict[str, str] = {}
    rule: DecisionRule | None = None
    if (is_run := path == folder) or path.name in adapters:
        adapter = folder / ADAPTER if is_run else _adapter_folder(adapters[path.name])
        card = load_card(adapter)
        recorded = card.training if card else {}
        training = read_config(adapter.parent / CONFIG) if adapter.name == ADAPTER else {}
        optimizer = model_settings(training, "optimizer")
        rule = rule_of_adapter(adapter) or (None if is_run else _rule_in(path))
        label = _training_label(training)
        base = base or (card.base if card else None) or model_settings(training, "base").get("name_or_path")
        own = str(adapter) if (adapter / WEIGHTS).is_file() else ""
        facts = {"adapter": own if is_run else str(adapters[path.name]), "stage": recorded.get("stage", "")}
        facts |= {"steps": recorded.get("steps", ""), "adapter settings": recorded.get("adapter", "")}
        if "name" in optimizer and "lr" in optimizer:
            facts["optimizer"] = f"{optimizer['name']}, learning rate {optimizer['lr']}"
    elif path.name in LABELS:
        cards = (load_card(_adapter_folder(adapter)) for adapter in adapters.values())
        label, rule = LABELS[path.name], _rule_in(path)
        base = base or next((card.base for card in cards if card), None)
    else:
        base = None
    facts = {"base model": base or "", **facts, "guarantee": rule.guarantee if rule else ""}
    notes = read_object(path / NOTES) if (path / NOTES).is_file() else {}
    return label, {heading: text for heading, text in facts.items() if text} | notes


def _rule_in(path: Path) -> DecisionRule | None:
    """The rule in a system's folder, where no adapter lies on this machine; None if it was chosen on other answers than those."""
    if (rule := read_rule(path)) is None:
        return None
    answers = path / (CALIBRATION if rule.answers.get("split") == "calibration" else PREDICTIONS)
    return rule if answers.is_file() and rule.answers.get("digest") == file_digest(answers) else None


def _adapter_folder(path: str) -> Path:
    """The folder of an adapter that is named by itself or by its run; it may not exist."""
    return next((p for p in (Path(path), Path(path) / ADAPTER) if (p / WEIGHTS).is_file()), Path(path))


def _training_label(config: Mapping[str, Any]) -> str:
    """How a run was trained, in a few words; empty if the configuration is not that of a training run."""
    if (stage := _class_name(config.get("model"))) not in ("SFTModule", "DPOModule"):
        return ""
    how = "SFT" if stage == "SFTModule" else f"SFT + {_class_name(model_settings(config, 'loss')) or 'DPO'}"
    noise = (config.get("data") or {}).get("noise") or {}
    levels = _class_name(noise.get("levels")).removesuffix("Levels").lower()
    kinds = [str(kind).replace("_", " ") for kind, weight in (noise.get("kinds") or {}).items() if weight]
    return ", ".join(filter(None, (how, levels and f"{levels} levels", " + ".join(kinds))))


def _class_name(settings: Any) -> str:
    return str(settings.get("class_path", "") if isinstance(settings, Mapping) else "").rsplit(".", 1)[-1]


def model_settings(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A group of the model's settings; empty if the configuration lacks it."""
    return ((config.get("model") or {}).get("init_args") or {}).get(name) or {}


def summarize_predictions(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Every metric over all predictions, and as `METRIC/GROUP` over each part of their categories; NaN if undefined.

    Further estimators that all predictions have are scored as `METRIC@ESTIMATOR`, their probes as in `probe_values`.
    """
    groups: dict[str, list[Prediction]] = {"": list(predictions)}
    for prediction in predictions:
        for group in category_groups(prediction.category):
            groups.setdefault(f"/{group}", []).append(prediction)
    probes = probes_of(predictions)
    values: dict[str, float] = {}
    for suffix, members in sorted(groups.items()):
        values |= {f"{name}{suffix}": value for name, value in metrics_of(members).items()}
        for name in estimators_of(predictions)[1:]:
            values |= table_values(table_of(members, name), REPORTED[1:], f"@{name}{suffix}")
        values |= probe_values_of(members, probes, suffix)
    return values


def metrics_of(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The metrics of answers and of their stated confidence by name, NaN if undefined."""
    counts = count_answers(
        [p.predicted for p in predictions], [p.answer for p in predictions], [p.correct for p in predictions]
    )
    return {**table_values(table_of(predictions), REPORTED), **task_scores(counts)}


def probe_values_of(predictions: Answers, probes: Sequence[str], suffix: str = "") -> dict[str, float]:
    return probe_values(count_probes((p.probes for p in predictions), probes), probes, suffix)


def table_of(predictions: Sequence[Prediction], estimator: str = VERBALIZED) -> ConfidenceTable:
    confidences = [p.confidence_of(estimator) for p in predictions]
    return ConfidenceTable.from_predictions(confidences, [p.correct for p in predictions], None)
