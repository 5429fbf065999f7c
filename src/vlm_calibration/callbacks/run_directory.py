"""What a run directory holds for a command that is to run in it, and the beginning of a run.

A run that fails before its model is loaded and its checkpoint is read leaves the directory unchanged, and starts no logger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn

from vlm_calibration.callbacks.adapter import ADAPTER
from vlm_calibration.callbacks.checkpoint import FOLDER
from vlm_calibration.callbacks.distributed import broadcast_from_first
from vlm_calibration.callbacks.regions import SHARDS, SUMMARY
from vlm_calibration.callbacks.run_record import command_of, differences, new_record
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.files import MAX_NAMED, hold, release, remove, replacing
from vlm_calibration.records import DataError
from vlm_calibration.reporting.runs import CONFIG, METRICS, RunRecord, read_record
from vlm_calibration.settings import file_digest
from vlm_calibration.stages.answer_log import EVALUATED

TRAINED = (ADAPTER, FOLDER, METRICS, "predictions.jsonl")
"""Files of `fit` other than its configuration and logs; `--overwrite` removes them."""
UNRECORDED = (ADAPTER, FOLDER, SUMMARY, METRICS)
"""Results of a run; in a folder without a record nobody knows of which."""
PROGRESS = (f"{FOLDER}/*.ckpt", EVALUATED.format("*"), f"{SHARDS}/*.jsonl")
"""Files that are not empty where an interrupted run can resume."""
ANOTHER_FOLDER = "another folder (--runs, or --trainer.default_root_dir) leaves it as it is"
REMEDIES = f"--overwrite starts again in this folder, {ANOTHER_FOLDER}"


@runtime_checkable
class ResultWriter(Protocol):
    def outputs(self, folder: Path, module: L.LightningModule, data: PerturbedQueryDataModule) -> list[Path]:
        """The files and folders that a finished run has; `folder` is its directory."""


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
        raise DataError(
            f"--overwrite would remove {checkpoint}, from which --ckpt_path resumes: give one of the two"
        )
    adapter = (config.model.get("init_args") or {}).get("adapter")
    if adapter is not None and Path(adapter).resolve() == (folder / ADAPTER).resolve():
        raise DataError(
            f"model.adapter: the run in {folder} would replace {adapter}, from which it starts: choose another "
            "trainer.default_root_dir"
        )
    starts_anyway = resumes_own or config.overwrite
    record = read_record(folder)
    if record is None:
        if not starts_anyway and any((folder / name).exists() for name in UNRECORDED):
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
        raise DataError(
            f"{folder} holds a run of `{command}` that is {prior.state}: --resume {does}, {REMEDIES}"
        )
    now = new_record(command, cli._parser(subcommand), config, trainer, cli.datamodule)
    if differing := differences(record, now):
        named = "; ".join(differing[:MAX_NAMED])
        more = f"; and {len(differing) - MAX_NAMED} more" if len(differing) > MAX_NAMED else ""
        raise DataError(
            f"{folder} holds a run that was {prior.state} with other settings or inputs: {named}{more}: {REMEDIES}"
        )
    return prior if is_finished or has_progress else Prior("none")


def is_own_checkpoint(folder: Path, checkpoint: str | None) -> bool:
    """Whether starting from this checkpoint resumes the run in this directory."""
    is_inside = checkpoint is not None and Path(checkpoint).resolve().is_relative_to(folder.resolve())
    return is_inside or checkpoint in ("best", "hpc")


def outputs_of(trainer: L.Trainer, module: L.LightningModule, data: PerturbedQueryDataModule) -> list[Path]:
    """The files and folders that this run has when it is finished."""
    folder = Path(trainer.default_root_dir)
    writers = [w for w in (module, *trainer.callbacks) if isinstance(w, ResultWriter)]  # type: ignore[attr-defined]
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

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "save_to_log_dir": False})

    def hold(self, trainer: L.Trainer) -> None:
        """Keep the loggers from the trainer until the run begins, and make this the first callback."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.sort(key=lambda callback: callback is not self)
        self._loggers, trainer.loggers = trainer.loggers, []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the record, by whose digest the module tells its own answers from those of another run; a validation has none."""
        subcommand = trainer.state.fn
        if subcommand is None or subcommand == TrainerFn.VALIDATING:
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
        with replacing(folder / CONFIG) as temporary:
            self.parser.save(
                self._repeating(folder), temporary, skip_none=False, overwrite=True, multifile=self.multifile
            )
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
