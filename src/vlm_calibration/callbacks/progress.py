"""Progress of all stages: Lightning's Rich bar on a terminal, and plain lines in a log file."""

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

    The time left is at the speed so far, validations included.

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

    def disable(self) -> None:
        """The first process alone has lines, see `_begin`."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("", trainer.estimated_stepping_batches, "steps", trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            self._begin(": validation before training", trainer.num_sanity_val_batches)
        elif trainer.state.fn != TrainerFn.FITTING:
            self._begin(": validation", trainer.num_val_batches)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("", trainer.num_test_batches)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("", trainer.num_predict_batches)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # Not in the middle of an accumulation.
        if self._lines is not None and trainer.global_step > self._lines.done:
            self._lines.update(trainer.global_step, self._note)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        # A validation within training has no lines of its own.
        if self._lines is not None and self._lines.unit == "batches":
            self._lines.update(self._lines.done + 1, self._note)

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end  # type: ignore[assignment]

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._lines is not None and self._lines.unit == "batches":
            self._close()

    on_validation_epoch_end = on_predict_epoch_end = on_test_epoch_end

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close(finished=False)

    def _begin(self, part: str, total: Any, unit: str = "batches", done: int = 0) -> None:
        if self.trainer.is_global_zero:
            total = sum(total) if isinstance(total, list) else total
            name = stage_name(type(self.trainer.lightning_module).__name__) + part
            known = total if 0 < total < float("inf") else None
            self._lines = LogLines(name, known, unit, done=done, every=self.every)

    def _close(self, *, finished: bool = True) -> None:
        if self._lines is not None:
            self._lines.close(self._note() if finished else "", finished=finished)
            self._lines = None

    def _note(self) -> str:
        """The loss of a training, or the tokens that endpoints have counted. Waits until the device has computed the loss."""
        loss = self.trainer.progress_bar_metrics.get("train/loss")
        endpoints = getattr(self.trainer.lightning_module, "endpoints", None) or {}
        tokens = f"{sum(e.client.used for e in endpoints.values()):,} tokens" if endpoints else ""
        return tokens if loss is None else f"loss {loss:.3g}"


def _leave_display() -> None:
    """Let a forked data worker write to the streams themselves: Rich's lock may have been held when it was forked."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, getattr(stream, "rich_proxied_file", stream))


os.register_at_fork(after_in_child=_leave_display)
