"""Begins a run in its directory.

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
from vlm_calibration.callbacks.checkpoint import FOLDER
from vlm_calibration.callbacks.distributed import broadcast_from_first
from vlm_calibration.callbacks.logger import RunLogger
from vlm_calibration.callbacks.resume import is_own_checkpoint, outputs_of, results_outside
from vlm_calibration.callbacks.run_record import RunRecord, command_of, new_record
from vlm_calibration.files import hold, release, remove, replacing

CONFIG = "config.yaml"
TRAINED = (ADAPTER, FOLDER, "metrics.json", "predictions.jsonl")
"""Files of `fit` other than its configuration and logs; `--overwrite` removes them."""
SUBCOMMANDS: dict[Any, str] = {
    TrainerFn.FITTING: "fit",
    TrainerFn.TESTING: "test",
    TrainerFn.PREDICTING: "predict",
}
"""State of the Trainer -> subcommand with results; `validate` only reads a run."""


class SaveRunConfig(SaveConfigCallback):
    """Begins a run: writes its record, the full configuration to `config.yaml`, removes overwritten files, and starts the loggers.

    The first process holds `config.yaml` while the run goes on, from which `vlm-calibration runs` sees that it is running.

    Attributes:
        record: of the run, in the first process; of one that resumes, the record that it began with.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "save_to_log_dir": False})
        self.record: RunRecord | None = None
        self._lock: FileIO | None = None

    def hold(self, trainer: L.Trainer) -> None:
        """Keep the trainer's loggers waiting until the run begins, and make this the first callback."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.sort(key=lambda callback: callback is not self)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.waiting = True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the record, by whose digest the module tells its own answers from those of another run."""
        if subcommand := SUBCOMMANDS.get(trainer.state.fn):

            def digest() -> str:
                if self.record is None:
                    command, data = command_of(subcommand, pl_module), trainer.datamodule  # type: ignore[attr-defined]
                    config = self._repeating(Path(trainer.default_root_dir))
                    self.record = new_record(command, self.parser, config, trainer, data)
                return self.record.digest

            pl_module.run_digest = broadcast_from_first(trainer, digest)  # type: ignore[assignment]

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the run, at whichever of these hooks comes first."""
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

    on_train_start = on_validation_start = on_test_start = on_predict_start = on_sanity_check_start
    on_fit_end = on_sanity_check_start  # A run that resumes after its last step does not train.

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Release `config.yaml`, and record that the run has finished; a run that ends early does not reach this."""
        release(self._lock)
        if self.record is None or not trainer.is_global_zero:
            return
        folder, data = Path(trainer.default_root_dir), trainer.datamodule  # type: ignore[attr-defined]
        outputs = outputs_of(trainer, pl_module, data)
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
