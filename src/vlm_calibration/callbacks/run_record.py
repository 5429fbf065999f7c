"""What makes the record of a run, and in what two records differ: a level table that was measured again is another input."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentParser, Namespace

from vlm_calibration.data.module import PerturbedQueryDataModule, setting_of
from vlm_calibration.data.sources.base import queries_digest
from vlm_calibration.endpoint.client import DECIDING
from vlm_calibration.files import read_json
from vlm_calibration.models.base import adapter_digest, find_adapter
from vlm_calibration.models.loading import model_identity
from vlm_calibration.reporting.runs import RunRecord
from vlm_calibration.settings import digest, file_digest, flat
from vlm_calibration.stages.level_fit import LevelFitModule

SOURCES = ("train", "validation", "test", "calibration", "levels", "predict")
"""Settings of `data` that are sources, or named splits of them."""
PACKAGES = ("vlm-calibration", "torch", "transformers", "peft", "lightning", "scikit-learn", "numpy")
"""Packages whose versions are recorded."""
ANSWERING_PACKAGES = PACKAGES[:4]
"""Those whose versions may not change within an evaluation or measurement."""
BATCH = "data.batch_size x processes"
"""The queries of a step of training, among the settings of a record, e.g. "4 x 2"."""
STEPS = (
    r"(max|min)_.*|accumulate_grad_batches|gradient_clip_\w+|limit_(train|val)_batches|overfit_batches|\w*val_\w+"
    r"|sync_batchnorm|callbacks.*"
)
TESTING = r"limit_test_batches|overfit_batches"
LOADING = "batch_size|parts|part|workers|regions"
TRAINING = "augment|candidates|max_length|on_too_long"
COMMANDS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "fit": (("train", "validation"), STEPS, f"{LOADING}|eval_batch_size"),
    "test": (("test", "calibration"), TESTING, f"{LOADING}|eval_batch_size|{TRAINING}"),
    "levels fit": (("levels", "train"), TESTING, f"{LOADING}|eval_batch_size|{TRAINING}"),
    "predict": (SOURCES, "", f"{LOADING}|{TRAINING}|noise|prompt|grading"),
}
"""Command -> the sources that it reads; the settings of `trainer` that can change its result, beside the precision and the number of
processes; and those of `data` that cannot, beside the sources that it does not read.

An extraction looks at the queries of a batch together. The batch size of training counts as `BATCH`, regions by their content."""
IGNORED_MODEL = "gradient_checkpointing|out|likelihoods"
"""Settings of the model that do not count: how it computes, and where its results go, which are compared by content."""
PASSIVE = re.compile(
    r"vlm_calibration\.callbacks\..*|lightning\.pytorch\.callbacks\.(.*\.)?(DeviceStatsMonitor|LearningRateMonitor|ModelCheckpoint"
    r"|ModelSummary|OnExceptionCheckpoint|ProgressBar|RichModelSummary|RichProgressBar|ThroughputMonitor|TQDMProgressBar)"
)
"""Callbacks that only observe a run: all of ours, and some of Lightning's."""
TYPED = ("limit_", "overfit_batches", "val_check_interval")
"""Settings of which 1 is a number of batches, and 1.0 is all of them."""


def command_of(subcommand: str, module: L.LightningModule) -> str:
    """The command as the user gives it: `levels fit` is a `test` to the Trainer."""
    return "levels fit" if isinstance(module, LevelFitModule) else subcommand


def new_record(
    command: str,
    parser: ArgumentParser,
    config: Namespace,
    trainer: L.Trainer,
    data: PerturbedQueryDataModule,
) -> RunRecord:
    """The record of a run that begins, from its configuration, the configuration's parser, and what was made from it."""
    values = yaml.safe_load(parser.dump(config, skip_none=False))
    settings = deciding_settings(command, values)
    inputs = run_inputs(settings, data, with_regions=command != "predict")
    settings["trainer.precision"] = str(trainer.precision)
    if command == "fit":
        settings[BATCH] = f"{values['data']['batch_size']} x {trainer.num_devices * trainer.num_nodes}"
    if command in ("test", "levels fit"):
        settings["trainer.accelerator"] = trainer.strategy.root_device.type
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        # A package that runs from a source tree has no version.
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    stage = values["model"]["class_path"].rpartition(".")[-1]
    return RunRecord(command, stage, False, settings, inputs, versions=versions)


def deciding_settings(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that can change the result of a command, by dotted name, of a configuration with all defaults filled in."""
    trainer, data, model = (settings.get(name) or {} for name in ("trainer", "data", "model"))
    sources, of_trainer, of_loading = COMMANDS[command]
    if command == "predict" and data.get("predict"):
        sources = ("predict",)
    if command == "levels fit" and (model.get("init_args") or {}).get("likelihoods") is None:
        sources = ("levels",)
    ignored = "|".join([*(name for name in SOURCES if name not in sources), of_loading])
    # How requests are sent to an endpoint changes no answer, and a server may have moved.
    sending = rf"endpoints\.[^.]+\.(?!({'|'.join(DECIDING)})\b)"
    deciding = re.compile(
        rf"seed_everything|ckpt_path|trainer\.({of_trainer})"
        rf"|model\.(?!init_args\.({IGNORED_MODEL}|{sending})\b).*|data\.(?!({ignored})\b).*"
    )
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    active = [c for c in callbacks if not PASSIVE.fullmatch(c["class_path"])] or None
    values = flat({**settings, "trainer": {**trainer, "callbacks": active}})
    return {name: value for name, value in values if deciding.fullmatch(name)}


def run_inputs(
    settings: Mapping[str, Any], data: PerturbedQueryDataModule, *, with_regions: bool
) -> dict[str, str]:
    """Dotted name of a setting -> digest of the content behind it, if that is on this machine.

    The queries of a source count, but not the bytes of its images; of models and adapters the weights and configurations; of
    other files the whole content. `with_regions`: whether the run reads the sources with the regions in `data.regions`.
    """
    inputs: dict[str, str] = {}
    sources: list[str] = []
    for setting, value in settings.items():
        section, *names = setting.split(".")
        if section == "data" and names[0] in SOURCES:
            sources.append(names[0])
        elif section in ("model", "data") and isinstance(value, str):
            revision = settings.get(f"{setting.rpartition('.')[0]}.revision")
            if (content := _content(names, value, revision)) is not None:
                inputs[setting] = content
    for name in dict.fromkeys(sources):
        if name != "predict":
            splits = data.read_splits(name) if with_regions else data.splits.get(name, {})
            for split, of_split in splits.items():
                inputs[f"data.{setting_of(name, split)}"] = queries_digest(of_split.source)
        elif data.predict is not None:
            inputs["data.predict"] = queries_digest(data.predict)
    return inputs


def _content(names: list[str], value: str, revision: str | None) -> str | None:
    """The digest of what a setting names: a model, an adapter or a file; None for another text."""
    if names[-1] == "name_or_path":
        return model_identity(value, revision)
    if names[-1] == "adapter" or names[-2:-1] == ["adapters"]:
        return adapter_digest(find_adapter(value))
    path = Path(value)
    if path.is_file():
        # The same JSON in another layout is the same.
        return digest([json.dumps(read_json(path))]) if path.suffix == ".json" else file_digest(path)
    return model_identity(value) if (path / "config.json").is_file() else None


def differences(before: RunRecord, now: RunRecord) -> list[str]:
    """One line for each setting, input and version by which the results can differ; empty if it is the same run."""
    lines: list[str] = []
    for name in {**before.settings, **now.settings, **now.inputs}:
        was, found = before.settings.get(name), now.settings.get(name)
        contents = before.inputs.get(name), now.inputs.get(name)
        same_name = _is_same(name, was, found, before.finished)
        same_content = None in contents or contents[0] == contents[1]
        # The images of a source at another path may be others, which no digest covers.
        decided = None not in contents and name.split(".")[1] not in SOURCES
        if same_content and (decided or same_name):
            continue
        if same_name:
            lines.append(f"the content of {name} has changed" + (f" ({found})" if found else ""))
        else:
            lines.append(f"{name} was {was!r} and is {found!r}")
    for name in ANSWERING_PACKAGES if now.command in ("test", "levels fit") and not before.finished else ():
        if (version_was := before.versions.get(name)) != (version_is := now.versions.get(name)):
            lines.append(f"the version of {name} was {version_was} and is {version_is}")
    return lines


def _is_same(name: str, was: Any, found: Any, finished: bool) -> bool:
    """Whether two values of a setting are one; a training that has not ended may go on with another number of processes."""
    if name == BATCH:
        sizes, processes = zip(*(map(int, batch.split(" x ")) for batch in (was, found)), strict=True)
        same_product = sizes[0] * processes[0] == sizes[1] * processes[1]
        return bool(same_product or (sizes[0] == sizes[1] and not finished))
    if isinstance(was, str) and isinstance(found, str):
        return was == found or os.path.realpath(was) == os.path.realpath(found)
    is_typed = isinstance(was, bool) or isinstance(found, bool) or any(text in name for text in TYPED)
    return bool(was == found) and (not is_typed or type(was) is type(found))
