"""The run directory: refuses to mix two runs in it, and starts writing only when a run begins.

Nothing is written and no logger starts before all checks have passed, the model is loaded and a checkpoint is read, so a run
that fails earlier leaves the directory unchanged.
"""

from __future__ import annotations

from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

from vlm_calibration.callbacks.adapter import ADAPTER
from vlm_calibration.callbacks.checkpoint import FOLDER, LAST
from vlm_calibration.callbacks.distributed import broadcast_from_first
from vlm_calibration.callbacks.logger import RunLogger
from vlm_calibration.callbacks.regions import SUMMARY
from vlm_calibration.callbacks.resume import ANOTHER_FOLDER, RUN_CONFIG, deciding_settings, resolved_settings
from vlm_calibration.callbacks.run_record import (
    RunRecord,
    command_of,
    new_record,
    outputs_of,
    read_record,
    results_outside,
)
from vlm_calibration.files import hold, release, remove, replacing
from vlm_calibration.records import DataError

CONFIG = RUN_CONFIG
TRAINED = (ADAPTER, FOLDER, "metrics.json", "predictions.jsonl")
"""Files of `fit` other than its configuration and logs; `--overwrite` removes them."""


SUBCOMMANDS: dict[Any, str] = {
    TrainerFn.FITTING: "fit",
    TrainerFn.TESTING: "test",
    TrainerFn.PREDICTING: "predict",
}
"""State of the Trainer -> subcommand with results; `validate` only reads a run."""


class SaveRunConfig(SaveConfigCallback):
    """Begins a run: writes the full configuration to `config.yaml`, removes overwritten files, and starts the loggers.

    `run.json` records when it begins and ends. The first process holds `config.yaml` while the run goes on, from which
    `vlm-calibration runs` sees that it is running.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "save_to_log_dir": False})
        self._record: RunRecord | None = None
        self._lock: FileIO | None = None

    def hold(self, trainer: L.Trainer) -> None:
        """Keep the trainer's loggers waiting until the run begins, and make this the first callback."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.sort(key=lambda callback: callback is not self)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.waiting = True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Do nothing; Lightning's callback would save the configuration here."""

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A run that resumes after its last step does not train.
        self._begin(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Release `config.yaml`, and record that the run has finished; a run that ends early does not reach this."""
        release(self._lock)
        if self._record is None or not trainer.is_global_zero:
            return
        folder, data = Path(trainer.default_root_dir), trainer.datamodule  # type: ignore[attr-defined]
        outputs = outputs_of(trainer, pl_module, data)
        # Of an extraction in several parts, the last to end writes the results.
        if all(path.exists() for path in outputs):
            replace(self._record, finished=True, results=results_outside(folder, outputs)).write(folder)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.already_saved:
            return
        self.already_saved = True
        broadcast_from_first(trainer, lambda: self.save_config(trainer, pl_module, ""))
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.waiting = False
        if trainer.is_global_zero:
            self._lock = hold(Path(trainer.default_root_dir) / CONFIG)
            config = yaml.safe_load((Path(trainer.default_root_dir) / CONFIG).read_text(encoding="utf-8"))
            for logger in trainer.loggers:
                logger.log_hyperparams(config)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write `config.yaml` and remove overwritten files; for the first process."""
        folder, config = Path(trainer.default_root_dir), self.config.clone()
        overwrite = config.pop("overwrite", False)
        for option in ("resume", "no_table"):
            config.pop(option, None)
        if is_own_checkpoint(folder, config.get("ckpt_path")):
            # The saved configuration repeats the run from its beginning.
            config.ckpt_path = None
        self._record = self._begin_record(trainer, pl_module, config)
        with replacing(folder / CONFIG) as temporary:
            self.parser.save(
                config,
                temporary,
                skip_none=False,
                overwrite=True,
                multifile=self.multifile,
            )
            for name in TRAINED if overwrite and trainer.state.fn == TrainerFn.FITTING else ():
                remove(folder / name)

    def _begin_record(
        self, trainer: L.Trainer, module: L.LightningModule, config: Namespace
    ) -> RunRecord | None:
        """Write the record first: from then on, the directory does not hold a finished run."""
        subcommand = SUBCOMMANDS.get(trainer.state.fn)
        if subcommand is None:
            return None
        command = command_of(subcommand, module)
        settings = deciding_settings(command, resolved_settings(self.parser, config))
        data = trainer.datamodule  # type: ignore[attr-defined]
        record = new_record(command, trainer, settings, data)
        record.write(Path(trainer.default_root_dir))
        return record


def is_own_checkpoint(folder: Path, checkpoint: str | None) -> bool:
    """Whether starting from this checkpoint resumes the run in this directory."""
    if checkpoint is None:
        return False
    return checkpoint in ("best", "hpc") or Path(checkpoint).resolve().is_relative_to(folder.resolve())


def check_run_directory(
    folder: Path, checkpoint: str | None, overwrite: bool, adapter: str | None = None
) -> None:
    """Refuse to train in a directory that holds a run, unless that run is resumed or overwritten.

    Args:
        folder: the run directory.
        checkpoint: the checkpoint that training starts from.
        overwrite: whether a run in the directory may be replaced.
        adapter: the adapter that training starts from.

    Raises:
        DataError: the directory holds another run, or the new run would overwrite a file that it starts from.
    """
    resumed = is_own_checkpoint(folder, checkpoint)
    if resumed and overwrite:
        raise DataError(
            f"--overwrite would remove {checkpoint}, from which --ckpt_path resumes: give one of the two"
        )
    if adapter is not None and Path(adapter).resolve() == (folder / ADAPTER).resolve():
        raise DataError(
            f"model.adapter: the run in {folder} would replace {adapter}, from which it starts: choose another "
            "trainer.default_root_dir"
        )
    if resumed:
        return
    another = "another --trainer.default_root_dir leaves it as it is"
    if (folder / CONFIG).exists() and (any(folder.glob("*/metrics.json")) or (folder / SUMMARY).exists()):
        raise DataError(f"{folder} holds the results of `test` or `predict`: {another}")
    run = _find_run(folder)
    if run is not None and not overwrite:
        kind, checkpoint = run
        resume = f"--ckpt_path {checkpoint} resumes it, " if checkpoint else ""
        raise DataError(f"{folder} holds {kind}: {resume}--overwrite replaces it, {another}")


def check_evaluation_directory(folder: Path, overwrite: bool) -> None:
    """Refuse to evaluate in a directory that holds a training or an extraction, or a finished run that is not overwritten.

    Raises:
        DataError: it does.
    """
    if any((folder / name).exists() for name in (ADAPTER, FOLDER, SUMMARY)):
        raise DataError(f"{folder} holds a run of `fit` or `predict`: {ANOTHER_FOLDER}")
    record = None if overwrite else read_record(folder)
    if record is not None and record.finished:
        raise DataError(
            f"{folder} holds a finished run of `{record.command}`: --resume does nothing if it is the one that is asked for, "
            f"--overwrite replaces it, {ANOTHER_FOLDER}"
        )


def _find_run(folder: Path) -> tuple[str, str | None] | None:
    """The kind of the run in a directory, and the checkpoint to resume it from; None without a run."""
    checkpoints = sorted((folder / FOLDER).glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    resumable = "last" if (folder / FOLDER / LAST).exists() else str(checkpoints[-1]) if checkpoints else None
    if (folder / ADAPTER).exists():
        return "a finished run", resumable
    if resumable:
        return "a run that was interrupted", resumable
    return ("the results of a run", None) if (folder / "metrics.json").exists() else None
