"""Checkpoints from which a run goes on as if it had never stopped: when they are written, how, and what a signal does."""

from __future__ import annotations

import io
import pickle
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from vlm_calibration.files import clear_leftovers, replacing
from vlm_calibration.hub import first_line
from vlm_calibration.records import DataError

LAST = "last.ckpt"
FOLDER = "checkpoints"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(SystemExit):
    """A signal has ended a run, whose checkpoint has been written; the exit status is 128 + the signal's number."""

    code: int

    def __init__(self, number: signal.Signals, checkpoint: Path) -> None:
        super().__init__(128 + number)
        self.message = f"stopped by {number.name}; `--ckpt_path last` goes on from {checkpoint}"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then renames it: whatever happens, a whole one lies there."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a local checkpoint.

        Raises:
            DataError: it cannot be written, e.g. since the disk is full. One that was there before is left as it was.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def load_checkpoint(self, path: str | Path, *arguments: Any, **settings: Any) -> dict[str, Any]:
        """Read a checkpoint; what is raised is that of `reading`."""
        with reading(path):
            return super().load_checkpoint(path, *arguments, **settings)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """A checkpoint is read inside.

    Raises:
        DataError: it is damaged, or holds objects that could run code when they are read.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the object {found[1]}" if found else "what is no tensor, number, text or list of them"
        raise DataError(
            f"--ckpt_path {path}: refused as unsafe: it holds {what}, and reading that could run code; give a checkpoint "
            "that this program wrote"
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError) as error:
        raise DataError(
            f"--ckpt_path {path}: not a whole checkpoint ({first_line(error)}); give another one"
        ) from error


class RunCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` in `checkpoints/` of the run directory, with a `last.ckpt` that a stopped run goes on from.

    `last.ckpt` is written after every epoch and its validation, every so many steps, and at SIGTERM or SIGUSR1, which end
    the run once the optimiser has stepped: gradients that wait for more batches are in no checkpoint. A signal that
    arrives in the last step of an epoch, or in validation, waits for the end of validation.

    Args:
        every_n_train_steps: optimiser steps between two `last.ckpt` within an epoch; None: none there.
        settings: as in `ModelCheckpoint`, for the checkpoints beside it.
    """

    def __init__(self, every_n_train_steps: int | None = None, **settings: Any) -> None:
        super().__init__(**{"enable_version_counter": False, **settings})
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise DataError(f"every_n_train_steps must be at least 1, found {every_n_train_steps}")
        self.interval = every_n_train_steps
        self._stepped = False
        self._told: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def last(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath) / LAST

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir) / FOLDER)
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.is_global_zero:
            clear_leftovers(Path(self.dirpath))

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._listen()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._stepped = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        stepped, self._stepped = self._stepped, False
        # Lightning leaves out an epoch's validation when it goes on from behind the epoch's last batch.
        if not stepped or trainer.is_last_batch:
            return
        self._stop_if_told(trainer)
        if self.interval and trainer.global_step % self.interval == 0:
            trainer.save_checkpoint(self.last)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._stop_if_told(trainer)
        trainer.save_checkpoint(self.last)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # A process that ends on a signal goes on ignoring it: the launcher of its siblings sends more.
        if self._told is None:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers = {}

    def _listen(self) -> None:
        if not self._handlers and threading.current_thread() is threading.main_thread():
            # In place of Lightning's handlers, which talk to other processes, or save, in the middle of a step.
            self._handlers = {number: signal.signal(number, self._hear) for number in SIGNALS}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._told = signal.Signals(number)

    def _stop_if_told(self, trainer: L.Trainer) -> None:
        """Processes stop at the same step, whichever of them was told to."""
        anywhere: Callable[..., bool] = trainer.strategy.reduce_boolean_decision
        if anywhere(self._told is not None, all=False):
            trainer.save_checkpoint(self.last)
            self._told = self._told or signal.SIGTERM
            raise Stopped(self._told, self.last)
