"""The record of a run, `run.json` in its directory: the command, whether it has finished, digests of its inputs, and versions.

`config.yaml` beside it has the settings. Together they tell `--resume` whether a directory holds the run that is asked for.
Inputs are compared by content, so that e.g. a level table that was measured again is another input at the same path.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L

from vlm_calibration.data.module import PerturbedQueryDataModule, setting_of
from vlm_calibration.data.sources.base import QuerySource, queries_digest
from vlm_calibration.files import read_json, write_json
from vlm_calibration.models.base import adapter_digest, find_adapter, read_object
from vlm_calibration.models.loading import model_identity
from vlm_calibration.records import DataError
from vlm_calibration.settings import digest, file_digest
from vlm_calibration.stages.level_fit import LevelFitModule

RECORD = "run.json"
SOURCES = ("train", "validation", "test", "calibration", "levels", "predict")
"""Settings of `data` that are sources, or named splits of them."""
ADAPTERS = ("adapter", "adapters")
"""Settings of `model` that name an adapter, or several."""
PACKAGES = ("vlm-calibration", "torch", "transformers", "peft", "lightning", "scikit-learn", "numpy")
"""Packages whose versions are recorded."""


@runtime_checkable
class ResultWriter(Protocol):
    """A callback or module that writes the results of a run."""

    def outputs(self, folder: Path, module: L.LightningModule, data: PerturbedQueryDataModule) -> list[Path]:
        """The files and folders that a finished run has in its directory `folder`."""

    def progress(self, folder: Path) -> list[Path]:
        """The existing files in `folder` from which an interrupted run resumes."""


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` holds.

    Attributes:
        command: "fit", "test", "predict" or "levels fit".
        finished: whether the run has ended and all its results are written.
        processes: number of processes of a training; None for other commands, whose results do not depend on it.
        precision: the trainer's precision by its full name, e.g. "32-true".
        inputs: setting -> digest of the content that it names.
        results: path of each result outside the run directory -> digest of its content when the run ended.
        versions: "Python" and packages -> version that the run began with; empty in records of versions that did not record it.
    """

    command: str
    finished: bool
    processes: int | None
    precision: str
    inputs: dict[str, str]
    results: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the record into a run directory, atomically.

        Raises:
            DataError: it cannot be written.
        """
        write_json(folder / RECORD, asdict(self))


def read_record(folder: Path) -> RunRecord | None:
    """The record in a run directory; None without one.

    Raises:
        DataError: the file is not such a record.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    content = read_object(path)
    try:
        record = RunRecord(**content)
    except TypeError as error:
        raise DataError(
            f"{path}: not the record of a run ({error}): --overwrite starts again in this folder"
        ) from error
    return record


def new_record(
    command: str, trainer: L.Trainer, settings: Mapping[str, Any], data: PerturbedQueryDataModule
) -> RunRecord:
    """The record of a run that begins.

    Args:
        command: as `command_of` gives it.
        settings: the settings that can change the result, as `resume.deciding_settings` selects them.
        data: has the sources that `settings` describes.
    """
    processes = trainer.num_devices * trainer.num_nodes if command == "fit" else None
    inputs = run_inputs(settings, data, with_regions=command != "predict")
    return RunRecord(command, False, processes, str(trainer.precision), inputs, {}, installed_versions())


def installed_versions() -> dict[str, str]:
    """The versions of Python and of `PACKAGES`; a package that runs from a source tree has none."""
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def command_of(subcommand: str, module: L.LightningModule) -> str:
    """The command as the user gives it: `levels fit` is a `test` to the Trainer."""
    return "levels fit" if isinstance(module, LevelFitModule) else subcommand


def run_inputs(
    settings: Mapping[str, Any], data: PerturbedQueryDataModule, *, with_regions: bool
) -> dict[str, str]:
    """Digests of the content behind the settings of a run: setting, with dots -> digest.

    The queries of a source count, but not the bytes of its images; of models and adapters the weights and configurations; of
    other files the whole content. A setting whose content is not on this machine is left out.

    Args:
        settings: the sections `model` and `data`.
        data: has the sources that `settings` describes.
        with_regions: whether the run reads the sources with the regions in `data.regions`.
    """
    content = dict(_contents("model", settings.get("model", {})))
    for name, value in settings.get("data", {}).items():
        if name in SOURCES:
            sources = _sources(name, data, with_regions)
            content |= {f"data.{setting}": queries_digest(source) for setting, source in sources.items()}
        else:
            content |= dict(_contents(f"data.{name}", value))
    return content


def _sources(name: str, data: PerturbedQueryDataModule, with_regions: bool) -> dict[str, QuerySource]:
    """The sources of a setting of `data`: setting below `data` -> source."""
    if name == "predict":
        return {name: data.predict} if data.predict is not None else {}
    splits = data.read_splits(name) if with_regions else data.splits.get(name, {})
    return {setting_of(name, split): settings.source for split, settings in splits.items()}


def _contents(name: str, value: Any, revision: str | None = None) -> Iterator[tuple[str, str]]:
    """Name and digest of every setting at and below `name` that names a model, an adapter or a file."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _contents(f"{name}.{key}", part, value.get("revision"))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _contents(f"{name}.{number}", part)
    elif isinstance(value, str) and (content := _content(name.split("."), value, revision)) is not None:
        yield name, content


def _content(name: list[str], value: str, revision: str | None) -> str | None:
    if name[-1] == "name_or_path":
        return model_identity(value, revision)
    if name[-1] in ADAPTERS or name[-2] in ADAPTERS:
        return adapter_digest(find_adapter(value))
    path = Path(value)
    if path.is_file():
        # The same JSON in another layout is the same.
        return digest([json.dumps(read_json(path))]) if path.suffix == ".json" else file_digest(path)
    return model_identity(value) if (path / "config.json").is_file() else None


def outputs_of(trainer: L.Trainer, module: L.LightningModule, data: PerturbedQueryDataModule) -> list[Path]:
    """The files and folders that this run has when it is finished."""
    folder = Path(trainer.default_root_dir)
    return [p for writer in _writers(trainer, module) for p in writer.outputs(folder, module, data)]


def progress_of(trainer: L.Trainer, module: L.LightningModule) -> list[Path]:
    """The existing files from which this run resumes if it was interrupted."""
    folder = Path(trainer.default_root_dir)
    return [path for writer in _writers(trainer, module) for path in writer.progress(folder)]


def _writers(trainer: L.Trainer, module: L.LightningModule) -> list[ResultWriter]:
    return [w for w in (module, *trainer.callbacks) if isinstance(w, ResultWriter)]  # type: ignore[attr-defined]


def results_outside(folder: Path, outputs: list[Path]) -> dict[str, str]:
    """Path -> digest, of the results outside a run directory, which another run may replace."""
    outside = [path for path in outputs if not path.resolve().is_relative_to(folder.resolve())]
    return {str(path): file_digest(path) for path in outside if path.is_file()}
