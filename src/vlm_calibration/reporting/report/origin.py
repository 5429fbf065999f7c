"""What a system of a report is: its base model, adapter and training, and the versions of the software that ran it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vlm_calibration.estimators.decision import DecisionRule, read_rule, rule_of_adapter
from vlm_calibration.estimators.predictions import CALIBRATION, PREDICTIONS
from vlm_calibration.files import read_json
from vlm_calibration.models.base import ADAPTER, read_object
from vlm_calibration.models.base import CONFIG as WEIGHTS
from vlm_calibration.records import DataError
from vlm_calibration.reporting.card import Card, load_card
from vlm_calibration.reporting.runs import CONFIG, RECORD
from vlm_calibration.settings import file_digest

BASE, ORACLE = "base", "oracle"
NOTES = "notes.json"
RECORDED = {"stage": "stage", "steps": "steps", "adapter": "adapter settings"}
"""Facts of an adapter's card that are shown -> their headings."""


class Origin(NamedTuple):
    """What a system is.

    Attributes:
        label: how it was trained, in a few words; empty if that is not known.
        facts: heading -> text: base model, adapter, the training as far as the adapter's card and its run recorded it, the
            guarantee of the thresholds beside the weights, and the notes of the evaluation.
    """

    label: str = ""
    facts: Mapping[str, str] = {}


def origin_of(path: Path, folder: Path, config: Mapping[str, Any] | None) -> Origin:
    """Read what a system is.

    Args:
        path: folder of its predictions.
        folder: folder of the whole evaluation, or of the run if `path` is the same.
        config: configuration in `folder`, None if there is none.

    Raises:
        DataError: the card of its adapter, its thresholds, the notes on it, or the configuration of its training, cannot be read.
    """
    origin, notes = _origin(path, folder, config), path / NOTES
    return origin._replace(facts={**origin.facts, **read_object(notes)}) if notes.is_file() else origin


def _origin(path: Path, folder: Path, config: Mapping[str, Any] | None) -> Origin:
    adapters = adapters_of(config)
    base = _model_settings(config, "base").get("name_or_path")
    if path == folder:
        has_adapter = (folder / ADAPTER / WEIGHTS).is_file()
        name = str(folder / ADAPTER) if has_adapter else ""
        return _trained(folder / ADAPTER, name, base, rule_of_adapter(folder / ADAPTER))
    if path.name in adapters:
        adapter = _adapter_folder(adapters[path.name])
        return _trained(adapter, adapters[path.name], base, rule_of_adapter(adapter) or _rule_in(path))
    base = base or _base_of(adapters)
    known = {"base model": str(base)} if base else {}
    known |= _guarantee(_rule_in(path))
    if path.name == BASE:
        return Origin("the base model, not fine-tuned", known)
    if path.name == ORACLE:
        label = "the base model's answers, stated with its measured accuracy at the true kind and strength of perturbation"
        return Origin(label, known)
    return Origin()


def _trained(folder: Path, name: str, base: str | None, rule: DecisionRule | None) -> Origin:
    """An adapter and its training, and the rule that decides about its answers; both may be gone, or on the Hub, and then only the names are known."""
    card, config = load_card(folder), read_config(folder.parent / CONFIG)
    base = base or (card.base if card else None) or _model_settings(config, "base").get("name_or_path")
    facts = {
        "base model": base,
        "adapter": name,
        **_training(card, _model_settings(config, "optimizer")),
        **_guarantee(rule),
    }
    return Origin(_training_label(config), {heading: text for heading, text in facts.items() if text})


def _rule_in(path: Path) -> DecisionRule | None:
    """The rule in a system's folder, where no adapter lies on this machine; None if it was chosen on other answers than those."""
    rule = read_rule(path)
    if rule is None:
        return None
    answers = path / (CALIBRATION if rule.answers.get("split") == "calibration" else PREDICTIONS)
    return rule if answers.is_file() and rule.answers.get("digest") == file_digest(answers) else None


def _guarantee(rule: DecisionRule | None) -> dict[str, str]:
    """What the thresholds of a model promise."""
    return {"guarantee": rule.guarantee} if rule is not None else {}


def _training(card: Card | None, optimizer: Mapping[str, Any]) -> dict[str, str]:
    """The training in short, from the card of the adapter and the optimizer settings of its run."""
    recorded = card.training if card else {}
    facts = {heading: recorded[name] for name, heading in RECORDED.items() if name in recorded}
    if "name" in optimizer and "lr" in optimizer:
        facts["optimizer"] = f"{optimizer['name']}, learning rate {optimizer['lr']}"
    return facts


def _adapter_folder(path: str) -> Path:
    """The folder of an adapter that is named by itself or by its run; it may not exist."""
    return next((p for p in (Path(path), Path(path) / ADAPTER) if (p / WEIGHTS).is_file()), Path(path))


def _base_of(adapters: Mapping[str, str]) -> str | None:
    """The base model by the card of the first adapter that has one."""
    cards = (load_card(_adapter_folder(path)) for path in adapters.values())
    return next((card.base for card in cards if card), None)


def _training_label(config: Mapping[str, Any] | None) -> str:
    """How a run was trained, in a few words; empty if the configuration is not that of a training run."""
    model, data = (config or {}).get("model") or {}, (config or {}).get("data") or {}
    stage, settings = _class_name(model), model.get("init_args") or {}
    if stage not in ("SFTModule", "DPOModule"):
        return ""
    how = "SFT" if stage == "SFTModule" else f"SFT + {_class_name(settings.get('loss') or {}) or 'DPO'}"
    noise = data.get("noise") or {}
    levels = _class_name(noise.get("levels") or {}).removesuffix("Levels").lower()
    kinds = [str(kind).replace("_", " ") for kind, weight in (noise.get("kinds") or {}).items() if weight]
    return ", ".join(
        [how, *([f"{levels} levels"] if levels else []), *([" + ".join(kinds)] if kinds else [])]
    )


def _class_name(settings: Any) -> str:
    path = settings.get("class_path", "") if isinstance(settings, Mapping) else ""
    return str(path).rsplit(".", 1)[-1]


def adapters_of(config: Mapping[str, Any] | None) -> dict[str, str]:
    """The adapters of an evaluation by its configuration: system -> folder or name."""
    return {str(name): str(path) for name, path in _model_settings(config, "adapters").items()}


def _model_settings(config: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """A group of the model's settings; empty if the configuration lacks it."""
    return (((config or {}).get("model") or {}).get("init_args") or {}).get(name) or {}


def read_config(path: Path) -> dict[str, Any] | None:
    """Read the configuration of a run; None without one.

    Raises:
        DataError: the file is not YAML.
    """
    if not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a configuration: {error}") from error
    return config if isinstance(config, dict) else None


def read_versions(folder: Path) -> dict[str, str]:
    """The versions in the record of a run, name -> version; empty if it has none.

    Raises:
        DataError: the record is not JSON.
    """
    path = folder / RECORD
    record = read_json(path) if path.is_file() else {}
    versions = record.get("versions") if isinstance(record, dict) else None
    return {str(name): str(number) for name, number in versions.items()} if isinstance(versions, dict) else {}
