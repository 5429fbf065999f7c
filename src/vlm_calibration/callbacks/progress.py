"""Progress of all stages: Lightning's Rich bar on a terminal, and plain lines in a log file."""

from __future__ import annotations

import os
import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from vlm_calibration.progress import EVERY, LogLines, is_terminal, stage_name
from vlm_calibration.records import DataError


class Progress(ProgressBar):
    """Prints steps or batches done, the time left and the loss once in a while; on a terminal it is Lightning's `RichProgressBar` instead.

    Only the first process prints. The time left is at the speed so far, validations included.

    Args:
        every: seconds between two lines in a log file.
    """

    def __new__(cls, every: float = EVERY) -> Any:
        if is_terminal():
            return RichProgressBar(refresh_rate=2, console_kwargs={"stderr": True})
        return super().__new__(cls)

    def __init__(self, every: float = EVERY) -> None:
        super().__init__()
        if every <= 0:
            raise DataError(f"every must be more than 0 seconds, found {every}")
        self.every = every
        self._lines: LogLines | None = None
        self._batches = 0

    def disable(self) -> None:
        """The first process alone has lines, see `_begin`."""

    enable = disable

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("", trainer.estimated_stepping_batches, "steps", trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self._lines is not None:
            self._lines.update(trainer.global_step, lambda: _loss(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close(_loss(trainer))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            self._begin(": validation before training", trainer.num_sanity_val_batches)
        elif trainer.state.fn != TrainerFn.FITTING:
            self._begin(": validation", trainer.num_val_batches)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("", trainer.num_test_batches)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("", trainer.num_predict_batches)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        is_within_training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self._lines is not None and not is_within_training:
            self._batches += 1
            self._lines.update(self._batches, lambda: _tokens_used(pl_module))

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end  # type: ignore[assignment]

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close(_tokens_used(pl_module))

    on_predict_epoch_end = on_test_epoch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            self._close()

    def on_exception(self, *_: Any) -> None:
        self._close(finished=False)

    def teardown(self, *_: Any, **__: Any) -> None:
        self._close(finished=False)

    def _begin(self, part: str, total: Any, unit: str = "batches", done: int = 0) -> None:
        if self.trainer.is_global_zero:
            total = sum(total) if isinstance(total, list) else total
            name = stage_name(type(self.trainer.lightning_module).__name__) + part
            known = total if 0 < total < float("inf") else None
            self._lines = LogLines(name, known, unit, done=done, every=self.every)
            self._batches = done

    def _close(self, note: str = "", *, finished: bool = True) -> None:
        if self._lines is not None:
            self._lines.close(note, finished=finished)
            self._lines = None


def _loss(trainer: L.Trainer) -> str:
    """The training loss as text, empty if it is not in the progress bar. Waits until the device has computed it."""
    value = trainer.progress_bar_metrics.get("train/loss")
    return "" if value is None else f"loss {value:.3g}"


def _tokens_used(module: L.LightningModule) -> str:
    """The tokens that endpoints have counted as text, empty without endpoints."""
    endpoints = getattr(module, "endpoints", None) or {}
    return f"{sum(e.client.used for e in endpoints.values()):,} tokens" if endpoints else ""


def _leave_display() -> None:
    """Let a forked data worker write to the streams themselves: Rich's lock may have been held when it was forked."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, getattr(stream, "rich_proxied_file", stream))


os.register_at_fork(after_in_child=_leave_display)
