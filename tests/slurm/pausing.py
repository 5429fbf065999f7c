"""A callback that pauses a run until it receives a signal. Jobs have this folder in PYTHONPATH."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning as L


class PauseAt(L.Callback):
    """Writes the file `paused` to the run directory and waits for a signal, in the first process and once in a run."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.position = (epoch, batch)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        paused = Path(trainer.default_root_dir) / "paused"
        here = (trainer.current_epoch, batch_idx) == self.position and trainer.is_global_zero
        if here and not paused.exists():
            paused.touch()
            signal.pause()
