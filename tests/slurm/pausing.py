"""A callback that holds a run up until it is stopped; jobs find it on their path."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L


class PauseAt(L.Callback):
    """Says so in `paused` of the run directory, then waits for a signal; in the first process, and not when requeued."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.place = (epoch, batch)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        here = (trainer.current_epoch, batch_idx) == self.place and trainer.is_global_zero
        if here and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            (Path(trainer.default_root_dir) / "paused").touch()
            signal.pause()
