"""What a run directory holds for a command that is to run in it, and the beginning of a run.

A run that fails before its model is loaded and its checkpoint is read leaves the directory unchanged, and starts no logger.
"""

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn

from vlm_calibration.callbacks.adapter import ADAPTER
from vlm_calibration.callbacks.checkpoint import FOLDER
from vlm_calibration.callbacks.predictions import broadcast_from_first
from vlm_calibration.callbacks.regions import SHARDS, SUMMARY
from vlm_calibration.data.module import PerturbedQueryDataModule, setting_of
from vlm_calibration.data.sources.base import queries_digest
from vlm_calibration.endpoint.client import DECIDING
from vlm_calibration.files import MAX_NAMED, hold, read_json, release, remove, replacing
from vlm_calibration.models.base import adapter_digest, find_adapter
from vlm_calibration.models.loading import model_identity
from vlm_calibration.records import DataError
from vlm_calibration.reporting.runs import CONFIG, METRICS, RunRecord, read_record
from vlm_calibration.settings import digest, file_digest, flat
from vlm_calibration.stages.answer_log import EVALUATED
from vlm_calibration.stages.level_fit import LevelFitModule

SOURCES = ("train", "validation", "teacher", "test", "calibration", "levels", "predict")
"""Settings of `data` that are sources, or named splits of them."""
PACKAGES = ("vlm-calibration", "torch", "transformers", "peft", "lightning", "scikit-learn", "numpy")
"""Packages whose versions are recorded; those of the first four may not change within an evaluation or measurement."""
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
    "fit": (("train", "validation", "teacher"), STEPS, f"{LOADING}|eval_batch_size"),
    "test": (("test", "calibration"), TESTING, f"{LOADING}|eval_batch_size|{TRAINING}"),
    "levels fit": (("levels", "train"), TESTING, f"{LOADING}|eval_batch_size|{TRAINING}"),
    "predict": (SOURCES, "", f"{LOADING}|{TRAINING}|noise|prompt|grading"),
}
"""Command -> the sources that it reads; the settings of `trainer` that can change its result, beside the precision and the number of
processes; and those of `data` that cannot, beside the sources that it does not read.

An extraction looks at the queries of a batch together. The batch size of training counts as `BATCH`, regions by their content."""
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
    command: str, parser: ArgumentParser, config: Any, trainer: L.Trainer, data: PerturbedQueryDataModule
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
    # How a model computes and how requests are sent changes no answer; results are compared by content, and a server may have moved.
    unused = rf"gradient_checkpointing|out|likelihoods|endpoints\.[^.]+\.(?!({'|'.join(DECIDING)})\b)"
    deciding = re.compile(
        rf"seed_everything|ckpt_path|trainer\.({of_trainer})"
        rf"|model\.(?!init_args\.({unused})\b).*|data\.(?!({ignored})\b).*"
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
    for name in PACKAGES[:4] if now.command in ("test", "levels fit") and not before.finished else ():
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


TRAINED = (ADAPTER, FOLDER, METRICS, "predictions.jsonl")
"""Files of `fit` other than its configuration and logs; `--overwrite` removes them."""
PROGRESS = (f"{FOLDER}/*.ckpt", EVALUATED.format("*"), f"{SHARDS}/*.jsonl")
"""Files that are not empty where an interrupted run can resume."""
ANOTHER_FOLDER = "another folder (--runs, or --trainer.default_root_dir) leaves it as it is"
REMEDIES = f"--overwrite starts again in this folder, {ANOTHER_FOLDER}"


class Prior(NamedTuple):
    """What a run directory holds: nothing to resume, or a run with its record."""

    state: Literal["none", "interrupted", "finished"]
    record: RunRecord | None = None


def find_prior(cli: LightningCLI) -> Prior:
    """Find out what the run directory holds for this command line, whose classes are instantiated; alike in every process.

    `--overwrite` replaces a run of the same command. `--resume` resumes the same run if it was interrupted, and does nothing if it is
    finished. Without either, trainings and finished evaluations are refused. A training resumes from a checkpoint of its own directory
    (`--ckpt_path`) with whatever settings. Another run is a DataError, and one that would overwrite what it starts from.
    """
    trainer, module, subcommand = cli.trainer, cli.model, str(cli.subcommand)
    config, folder = cli.config[subcommand], Path(trainer.default_root_dir)
    command, checkpoint = command_of(subcommand, module), config.get("ckpt_path")
    resumes_own = is_own_checkpoint(folder, checkpoint)
    if resumes_own and config.overwrite:
        removed = f"{checkpoint}, from which --ckpt_path resumes"
        raise DataError(f"--overwrite would remove {removed}: give one of the two")
    adapter = (config.model.get("init_args") or {}).get("adapter")
    if adapter is not None and Path(adapter).resolve() == (folder / ADAPTER).resolve():
        replaced = f"the run in {folder} would replace {adapter}, from which it starts"
        raise DataError(f"model.adapter: {replaced}: choose another trainer.default_root_dir")
    starts_anyway = resumes_own or config.overwrite
    if (record := read_record(folder)) is None:
        results = (ADAPTER, FOLDER, SUMMARY, METRICS)
        if not starts_anyway and any((folder / name).exists() for name in results):
            raise DataError(f"{folder} holds results without the record of a run: {REMEDIES}")
        return Prior("none")
    if record.command != command:
        raise DataError(f"{folder} holds a run of `{record.command}`: {ANOTHER_FOLDER}")
    outputs = [] if starts_anyway else outputs_of(trainer, module, cli.datamodule)
    has_progress = any(path.stat().st_size for pattern in PROGRESS for path in folder.glob(pattern))
    if starts_anyway or not (has_progress or any(path.exists() for path in outputs)):
        return Prior("none")
    are_there = all(path.exists() for path in outputs)
    is_finished = record.finished and are_there and record.results == results_outside(folder, outputs)
    prior = Prior("finished" if is_finished else "interrupted", record)
    if not config.resume and (command == "fit" or (is_finished and command == "test")):
        does = "does nothing if it is the one that is asked for" if is_finished else "resumes it"
        held = f"{folder} holds a run of `{command}` that is {prior.state}"
        raise DataError(f"{held}: --resume {does}, {REMEDIES}")
    now = new_record(command, cli._parser(subcommand), config, trainer, cli.datamodule)
    if differing := differences(record, now):
        held = f"{folder} holds a run that was {prior.state} with other settings or inputs"
        more = [f"and {len(differing) - MAX_NAMED} more"] if len(differing) > MAX_NAMED else []
        raise DataError(f"{held}: {'; '.join(differing[:MAX_NAMED] + more)}: {REMEDIES}")
    return prior if is_finished or has_progress else Prior("none")


def is_own_checkpoint(folder: Path, checkpoint: str | None) -> bool:
    """Whether starting from this checkpoint resumes the run in this directory."""
    is_inside = checkpoint is not None and Path(checkpoint).resolve().is_relative_to(folder.resolve())
    return is_inside or checkpoint in ("best", "hpc")


def outputs_of(trainer: L.Trainer, module: L.LightningModule, data: PerturbedQueryDataModule) -> list[Path]:
    """The files and folders that this run has when it is finished, of the module and the callbacks with a method `outputs`."""
    folder = Path(trainer.default_root_dir)
    writers: list[Any] = [w for w in (module, *trainer.callbacks) if hasattr(w, "outputs")]  # type: ignore[attr-defined]
    return [path for writer in writers for path in writer.outputs(folder, module, data)]


def results_outside(folder: Path, outputs: list[Path]) -> dict[str, str]:
    """Path -> digest, of the results outside a run directory, which another run may replace."""
    outside = [path for path in outputs if not path.resolve().is_relative_to(folder.resolve())]
    return {str(path): file_digest(path) for path in outside if path.is_file()}


class SaveRunConfig(SaveConfigCallback):
    """Begins a run: writes its record, the full configuration to `config.yaml`, removes overwritten files, and starts the loggers.

    The first process holds `config.yaml` while the run goes on, from which `vlm-calibration runs` sees that it is running.
    """

    record: RunRecord | None = None
    """Of the run, in the first process; of one that resumes, the record that it began with."""
    _lock: FileIO | None = None
    _loggers: Sequence[Logger] = ()

    def hold(self, trainer: L.Trainer) -> None:
        """Keep the loggers from the trainer until the run begins, and make this the first callback."""
        trainer.callbacks.sort(key=lambda callback: callback is not self)  # type: ignore[attr-defined]
        self._loggers, trainer.loggers = trainer.loggers, []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the record, by whose digest the module tells its own answers from those of another run; a validation has none."""
        if (subcommand := trainer.state.fn) is None or subcommand == TrainerFn.VALIDATING:
            return

        def digest() -> str:
            if self.record is None:
                config = self._repeating(Path(trainer.default_root_dir))
                command, data = command_of(subcommand.value, pl_module), trainer.datamodule  # type: ignore[attr-defined]
                self.record = new_record(command, self.parser, config, trainer, data)
            return self.record.digest

        pl_module.run_digest = broadcast_from_first(trainer, digest)  # type: ignore[assignment]

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the run, at whichever of these hooks comes first."""
        if self.already_saved:
            return
        self.already_saved = True
        broadcast_from_first(trainer, lambda: self.save_config(trainer, pl_module, ""))
        trainer.loggers = [*self._loggers]
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / CONFIG
            self._lock = hold(path)
            for logger in trainer.loggers:
                logger.log_hyperparams(yaml.safe_load(path.read_text(encoding="utf-8")))

    on_train_start = on_validation_start = on_test_start = on_predict_start = on_sanity_check_start
    on_fit_end = on_sanity_check_start  # A run that resumes after its last step does not train.

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Release `config.yaml`, and record that the run has finished; a run that ends early does not reach this."""
        if self._lock is not None:
            release(self._lock)
            self._lock = None
        if self.record is None or not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        outputs = outputs_of(trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        # Of an extraction in several parts, the last to end writes the results.
        if all(path.exists() for path in outputs):
            replace(self.record, finished=True, results=results_outside(folder, outputs)).write(folder)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write `run.json` and `config.yaml`, and remove overwritten files; for the first process."""
        folder = Path(trainer.default_root_dir)
        options: dict[str, Any] = {"skip_none": False, "overwrite": True, "multifile": self.multifile}
        with replacing(folder / CONFIG) as temporary:
            self.parser.save(self._repeating(folder), temporary, **options)
            if self.record is not None:
                # Before anything changes: from now on, the directory does not hold a finished run.
                replace(self.record, finished=False).write(folder)
            fits = trainer.state.fn == TrainerFn.FITTING
            for name in TRAINED if self.config.get("overwrite") and fits else ():
                remove(folder / name)

    def _repeating(self, folder: Path) -> Namespace:
        """The configuration that repeats the run from its beginning."""
        config = self.config.clone()
        for option in ("overwrite", "resume", "no_table"):
            config.pop(option, None)
        if is_own_checkpoint(folder, config.get("ckpt_path")):
            config.ckpt_path = None
        return config
