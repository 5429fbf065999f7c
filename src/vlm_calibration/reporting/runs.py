"""Run directories as their small files describe them; neither torch nor Lightning is imported."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from vlm_calibration.files import is_held, write_json
from vlm_calibration.models.base import read_object
from vlm_calibration.progress import stage_name
from vlm_calibration.records import DataError
from vlm_calibration.settings import digest

CONFIG, RECORD, PAGE = "config.yaml", "run.json", "report.html"
METRICS, NOTES = "metrics.json", "notes.json"
"""Files of a system's metrics, and of the evaluation's notes on it."""
HEADLINE = ("n", "accuracy", "ece", "brier", "auroc")  # metrics of the stated confidence that a list shows


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` holds: what was run, from which inputs, and whether it has finished.

    Attributes:
        command: "fit", "test", "predict" or "levels fit".
        stage: class of the module.
        settings: dotted name -> value, of every setting that can change the result.
        inputs: setting -> digest of the content that it names.
        results: path of each result outside the run directory -> digest of its content when the run ended.
        versions: "Python" and packages -> version that the run began with.
    """

    command: str
    stage: str
    finished: bool
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of what was run, in whatever state it is."""
        return digest([json.dumps([self.command, self.settings, self.inputs, self.versions])])

    def write(self, folder: Path) -> None:
        """Write the record into a run directory, atomically; DataError if it cannot be written."""
        write_json(folder / RECORD, asdict(self))


def read_record(folder: Path) -> RunRecord | None:
    """The record in a run directory, None without one; raises a DataError if the file is not such a record."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return RunRecord(**read_object(path))
    except TypeError as error:
        again = "remove the folder to start again"
        raise DataError(f"{path}: not the record of a run ({error}): {again}") from error


@dataclass
class Run:
    """A run directory.

    Attributes:
        when: time of the last change of the record.
        stage: "sft", "dpo", "levels", "evaluation" or "regions".
        detail: what is damaged.
        model: name or folder of the base model; empty if the record does not say it.
        figures: system, "" for the run itself -> figure -> value, None if it is undefined.
        command: resumes an interrupted run; empty for another one.
    """

    folder: Path
    when: datetime
    stage: str = ""
    state: Literal["finished", "running", "interrupted", "damaged"] = "damaged"
    detail: str = ""
    model: str = ""
    figures: dict[str, dict[str, float | None]] = field(default_factory=dict)
    command: str = ""


def find_runs(folder: Path) -> list[Run]:
    """All runs with a record in and below a folder, by path; one that cannot be read is damaged. DataError without the folder."""
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: give the folder that holds the run directories")
    return [_read_run(path) for path in sorted(record.parent for record in folder.rglob(RECORD))]


def _read_run(folder: Path) -> Run:
    run = Run(folder, datetime.fromtimestamp((folder / RECORD).stat().st_mtime).astimezone())
    try:
        record = read_record(folder)
        assert record is not None
        run.stage = stage_name(record.stage)
        run.model = record.settings.get("model.init_args.base.name_or_path") or ""
        for path in (folder / METRICS, *sorted(folder.glob(f"*/{METRICS}"))):
            system = "" if path.parent == folder else path.parent.name
            # A folder with a record of its own is another run.
            if path.is_file() and not (system and (path.parent / RECORD).exists()):
                metrics = read_object(path)
                run.figures[system] = {name: metrics[name] for name in HEADLINE if name in metrics}
        is_running = not record.finished and is_held(folder / CONFIG)
        run.state = "finished" if record.finished else "running" if is_running else "interrupted"
        if run.state == "interrupted":
            config = shlex.quote(str(folder / CONFIG))
            run.command = f"vlm-calibration {record.command} --config {config} --resume"
    except (DataError, OSError, TypeError, AttributeError) as error:
        run.detail = " ".join(str(error).split())
    return run


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a run; empty without a file. DataError if it is not such a configuration."""
    if not path.is_file():
        return {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a configuration: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise DataError(f"{path}: not the configuration of a run: no section `model`")
    return config


def systems_of(config: Mapping[str, Any]) -> list[str]:
    """The systems that the configuration of an evaluation names, in the order of its tables; empty for another run."""
    model = config.get("model") or {}
    if stage_name(str(model.get("class_path") or "")) != "evaluation":
        return []
    settings = model.get("init_args") or {}
    return [
        *(["base"] if settings.get("with_base", True) else []),
        *(settings.get("adapters") or {}),
        *(settings.get("endpoints") or {}),
        *(["oracle"] if settings.get("oracle_levels") else []),
    ]


def commands_with(adapter: str | None) -> list[str]:
    """Commands that use a trained adapter; without one, the command that lists the runs."""
    if adapter is None:
        return ["vlm-calibration runs"]
    name = shlex.quote(adapter)
    # In a checkout, make installs Gradio first.
    is_checkout = Path("src/vlm_calibration").is_dir()
    return [
        f'make app ARGS="--adapter {name}"' if is_checkout else f"vlm-calibration app --adapter {name}",
        f'vlm-calibration ask photo.jpg "Is there a dog in the image?" --adapter {name}',
        f"vlm-calibration export {name} --out my_adapter",
    ]
