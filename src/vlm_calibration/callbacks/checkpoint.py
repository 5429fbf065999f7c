"""Checkpoints from which a run resumes exactly: when and how they are written, and how signals stop a run."""

import io
import pickle
import re
import signal
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from vlm_calibration.files import clear_leftovers, first_line, replacing
from vlm_calibration.records import DataError

LAST = "last.ckpt"
FOLDER = "checkpoints"


class Stopped(SystemExit):
    """Ends a run on a signal, after its checkpoint was written; the exit status is 128 + the signal's number."""

    code: int

    def __init__(self, number: signal.Signals, checkpoint: Path) -> None:
        super().__init__(128 + number)
        self.message = f"stopped by {number.name}; `--ckpt_path last` resumes from {checkpoint}"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file and renames it; if e.g. the disk is full, an earlier checkpoint stays as it is."""

    def save_checkpoint(self, checkpoint: Any, path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def load_checkpoint(self, path: str | Path, *arguments: Any, **settings: Any) -> dict[str, Any]:
        with reading(path):
            return super().load_checkpoint(path, *arguments, **settings)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Explain errors of reading a checkpoint, as a DataError: it is damaged, or contains objects that could run code when read."""
    try:
        yield
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, KeyError) as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        if match or (isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path)):
            what = f"the object {match[1]}" if match else "an object other than tensors, numbers and texts"
            advice = "which could run code when read; give a checkpoint that this program wrote"
            raise DataError(f"--ckpt_path {path}: refused as unsafe: it contains {what}, {advice}") from error
        others = set(Path(path).parent.glob("*.ckpt")) - {Path(path)}
        other = max(others, key=lambda p: p.stat().st_mtime) if others else "with another one"
        problem = f"not a complete checkpoint ({first_line(error)})"
        advice = f"give --ckpt_path {other}, or --overwrite to start again (and leave out --resume)"
        raise DataError(f"--ckpt_path {path}: {problem}: {advice}") from error


class RunCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` in `checkpoints/` of the run directory, with a `last.ckpt` from which a stopped run resumes.

    `last.ckpt` is written after every epoch and its validation, every `every_n_train_steps` steps, and on SIGTERM or SIGUSR1, which
    end the run after the next optimiser step, since a checkpoint holds no accumulated gradients, or after the validation.

    Args:
        every_n_train_steps: optimiser steps between two `last.ckpt` within an epoch; None: only at the end of epochs.
        settings: arguments of `ModelCheckpoint`, for the other checkpoints.
    """

    def __init__(self, every_n_train_steps: int | None = None, **settings: Any) -> None:
        super().__init__(**{"enable_version_counter": False, **settings})
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise DataError(f"every_n_train_steps must be at least 1, found {every_n_train_steps}")
        self.interval = every_n_train_steps
        self._stepped = False
        self._signal: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir) / FOLDER
        self.dirpath = str(folder)
        super().setup(trainer, pl_module, stage)
        self.last = Path(self.dirpath) / LAST  # the path that the first process has
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.is_global_zero:
            clear_leftovers(folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.on_sanity_check_start()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._stepped = True

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, *arguments)
        stepped, self._stepped = self._stepped, False
        # Lightning skips an epoch's validation when it resumes after the epoch's last batch.
        if not stepped or trainer.is_last_batch:
            return
        self._stop_on_signal(trainer)
        if self.interval and trainer.global_step % self.interval == 0:
            trainer.save_checkpoint(self.last)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._stop_on_signal(trainer)
        trainer.save_checkpoint(self.last)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # A process that ends on a signal ignores further ones, which the launcher of the other processes sends.
        if self._signal is None:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers = {}

    def on_sanity_check_start(self, *_: Any) -> None:
        def on_signal(number: int, frame: FrameType | None) -> None:
            self._signal = signal.Signals(number)

        if not self._handlers and threading.current_thread() is threading.main_thread():
            # Replace Lightning's handlers, which communicate with other processes or save in the middle of a step.
            self._handlers = {n: signal.signal(n, on_signal) for n in (signal.SIGTERM, signal.SIGUSR1)}

    def _stop_on_signal(self, trainer: L.Trainer) -> None:
        """Stop all processes at the same step if any of them received a signal."""
        if trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            trainer.save_checkpoint(self.last)
            self._signal = self._signal or signal.SIGTERM
            raise Stopped(self._signal, self.last)
