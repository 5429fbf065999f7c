"""The progress bar of all stages: training steps, answers or queries done, the time left, and the loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from vlm_calibration.data.loading import QueryLoader
from vlm_calibration.data.raw import RawBatches
from vlm_calibration.progress import ProgressLine, stage_name
from vlm_calibration.progress.line import EVERY
from vlm_calibration.records import DataError

VALIDATION = "validation"


class Workload(NamedTuple):
    """What an evaluation has to do, over all processes.

    Attributes:
        done: how much an earlier run did, for each dataloader.
        total: how much there is, with what was done, for each dataloader.
        batches: number of batches that this process has, for each dataloader.
        unit: of `done` and `total`.
    """

    done: list[float]
    total: list[float]
    batches: list[int]
    unit: str

    def after(self, batch: int, loader: int) -> float:
        """How much is done after a batch of a dataloader, both from 0; other processes are taken to be as fast."""
        earlier = sum(self.total[:loader]) + sum(self.done[loader + 1 :])
        share = (batch + 1) / self.batches[loader]
        return earlier + self.done[loader] + share * (self.total[loader] - self.done[loader])


class ValidationPlan(NamedTuple):
    """When Lightning validates in training.

    Attributes:
        per_epoch: training batches of an epoch.
        every_batches: batches from one validation to the next.
        every_epochs: epochs from one with validation to the next; None: batches are counted across epochs.
    """

    per_epoch: int
    every_batches: int
    every_epochs: int | None

    def before(self, batches: int) -> int:
        """Number of validations in the first `batches` batches of training."""
        if self.every_epochs is None:
            return batches // self.every_batches
        epochs, rest = divmod(batches, self.per_epoch)
        complete = epochs // self.every_epochs * (self.per_epoch // self.every_batches)
        return complete + ((epochs + 1) % self.every_epochs == 0) * (rest // self.every_batches)


class Progress(ProgressBar):
    """Shows one line of progress a stage: live on a terminal, plain lines in a log file (see `progress.ProgressLine`).

    The time left is that of the remaining steps or answers at the speed of this run. In training it includes the remaining
    validations once one has been timed; until then "+ validation" follows it. What an earlier run answered counts as done.
    Only the first process prints.

    Args:
        every: seconds between two lines in a log file.
    """

    def __init__(self, every: float = EVERY) -> None:
        super().__init__()
        if every <= 0:
            raise DataError(f"every must be more than 0 seconds, found {every}")
        self.every = every
        self._enabled = True
        self._line: ProgressLine | None = None
        self._workload: Workload | None = None
        self._validation_begun = 0.0
        self._batch_seconds: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The time of a validation batch, since a resumed run may validate late."""
        return {"batch_seconds": self._batch_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batch_seconds = state_dict["batch_seconds"]

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    # --- Training ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        self._begin(
            _stage(pl_module), total if 0 < total < float("inf") else None, "steps", done=trainer.global_step
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._line is not None:
            # The validation that follows this batch is still to come.
            self._update_training(trainer, _validations_after(trainer, _trained(trainer) - 1))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close(note=lambda: _loss(trainer))

    def _update_training(self, trainer: L.Trainer, remaining: float, validated: float | None = None) -> None:
        """Report the steps done.

        Args:
            remaining: validations that are to come.
            validated: how much of the one in progress is done, in [0, 1]; None: there is none. `remaining` includes the rest.
        """
        assert self._line is not None
        extra, beyond = 0.0, VALIDATION if remaining else ""
        if (seconds := self._validation_seconds(trainer, validated)) is not None:
            extra, beyond = remaining * seconds, ""

        def note() -> str:
            loss = _loss(trainer)
            return (
                loss if validated is None else ", ".join(filter(None, [f"validating {validated:.0%}", loss]))
            )

        self._line.update(_steps_done(trainer), note, extra=extra, beyond=beyond)

    def _validation_seconds(self, trainer: L.Trainer, validated: float | None) -> float | None:
        """Seconds of a validation, as the last one took or else at the speed of the one in progress; None: not known yet."""
        if self._batch_seconds is not None:
            return self._batch_seconds * sum(_batches(trainer.num_val_batches))
        return (time.monotonic() - self._validation_begun) / validated if validated else None

    # --- Validation -------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_begun = time.monotonic()
        sanity = trainer.sanity_checking
        batches = trainer.num_sanity_val_batches if sanity else trainer.num_val_batches
        self._workload = _workload(trainer.val_dataloaders, batches, 1, trainer.world_size)
        if not _is_within_training(trainer):
            name = f"{VALIDATION} before training" if sanity else VALIDATION
            self._begin_evaluation(f"{_stage(pl_module)}: {name}", passing=sanity)
        elif self._line is not None:
            self._line.pause()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if _is_within_training(trainer):
            assert self._workload is not None
            if self._line is None:
                return
            done = self._workload.after(batch_idx, dataloader_idx) / max(1, sum(self._workload.total))
            self._update_training(trainer, _validations_after(trainer, _trained(trainer)) + 1 - done, done)
        else:
            self._update_evaluation(batch_idx, dataloader_idx)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._workload is not None
        seconds = time.monotonic() - self._validation_begun
        self._batch_seconds = seconds / max(1, sum(self._workload.batches))
        if not _is_within_training(trainer):
            self._close()
        elif self._line is not None:
            self._line.unpause()
            self._update_training(trainer, _validations_after(trainer, _trained(trainer)))

    # --- Evaluations and predictions --------------------------------------------------------------------------------

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        systems = len(getattr(pl_module, "answering", [""]))
        batches = trainer.num_test_batches
        self._workload = _workload(trainer.test_dataloaders, batches, systems, trainer.world_size)
        self._begin_evaluation(_stage(pl_module))

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        batches = trainer.num_predict_batches
        self._workload = _workload(trainer.predict_dataloaders, batches, 1, trainer.world_size)
        self._begin_evaluation(_stage(pl_module))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._update_evaluation(batch_idx, dataloader_idx, lambda: _tokens_used(pl_module))

    on_predict_batch_end = on_test_batch_end

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close(note=lambda: _tokens_used(pl_module))

    on_predict_epoch_end = on_test_epoch_end

    # --- The line ---------------------------------------------------------------------------------------------------

    def _begin(
        self, name: str, total: float | None, unit: str, *, done: float = 0, passing: bool = False
    ) -> None:
        self._close(finished=False)
        if self._enabled:
            self._line = ProgressLine(name, total, unit, done=done, every=self.every, passing=passing)

    def _begin_evaluation(self, name: str, *, passing: bool = False) -> None:
        assert self._workload is not None
        self._begin(
            name,
            sum(self._workload.total),
            self._workload.unit,
            done=sum(self._workload.done),
            passing=passing,
        )

    def _update_evaluation(self, batch: int, loader: int, note: Callable[[], str] | None = None) -> None:
        if self._line is not None:
            assert self._workload is not None
            self._line.update(self._workload.after(batch, loader), note)

    def _close(self, *, finished: bool = True, note: Callable[[], str] | None = None) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close(finished=finished, note=note)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close(finished=False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close(finished=False)


def _stage(module: L.LightningModule) -> str:
    return stage_name(type(module).__name__)


def _is_within_training(trainer: L.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _tokens_used(module: L.LightningModule) -> str:
    """The tokens that endpoints have counted as text, empty without endpoints."""
    endpoints = getattr(module, "endpoints", None) or {}
    return f"{sum(e.client.used for e in endpoints.values()):,} tokens" if endpoints else ""


def _loss(trainer: L.Trainer) -> str:
    """The training loss as text, empty if it is not in the progress bar. Waits until the device has computed it."""
    value = trainer.progress_bar_metrics.get("train/loss")
    return "" if value is None else f"loss {value:.3g}"


def _batches(batches: float | Sequence[float]) -> list[int]:
    """Batches of each dataloader."""
    return [int(n) for n in (batches if isinstance(batches, list | tuple) else [cast(float, batches)])]


def _workload(loaders: Any, batches: float | Sequence[float], systems: int, processes: int) -> Workload:
    """The work of these dataloaders if `batches` of each are used and `systems` models answer each query."""
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    done, total, unit = [], [], "batches"
    for loader, used in zip(loaders, _batches(batches), strict=True):
        counted = loader if isinstance(loader, QueryLoader) else getattr(loader, "dataset", None)
        if isinstance(counted, QueryLoader | RawBatches):
            unit = "answers" if isinstance(counted, QueryLoader) else "queries"
            share = used / max(1, len(loader))
            done.append(float(systems * counted.done))
            total.append(done[-1] + round(share * (systems * counted.total - done[-1])))
        else:
            done.append(0.0)
            total.append(float(used * processes))
    return Workload(done, total, _batches(batches), unit)


def _trained(trainer: L.Trainer) -> int:
    """Number of training batches so far, those of an earlier run included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def _steps_done(trainer: L.Trainer) -> float:
    """Number of optimiser steps so far; of a step of accumulated batches, the part that is done."""
    per_epoch = trainer.num_training_batches
    if per_epoch == float("inf"):
        return trainer.global_step
    # The last step of an epoch may have fewer batches, so that a batch is the more exact measure of time.
    return min(_trained(trainer) * _steps_per_epoch(trainer) / per_epoch, trainer.global_step + 0.99)


def _steps_per_epoch(trainer: L.Trainer) -> int:
    return -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)


def _validations_after(trainer: L.Trainer, batches: int) -> int:
    """Number of validations after the first `batches` training batches; 0 if it is not known."""
    steps, per_epoch, every = (
        trainer.estimated_stepping_batches,
        trainer.num_training_batches,
        trainer.val_check_batch,
    )
    if not trainer.enable_validation or not all(
        n is not None and 0 < n < float("inf") for n in (steps, per_epoch, every)
    ):
        return 0
    plan = ValidationPlan(int(per_epoch), int(cast(float, every)), trainer.check_val_every_n_epoch)
    epochs, rest = divmod(int(steps), _steps_per_epoch(trainer))
    last = epochs * plan.per_epoch + min(plan.per_epoch, rest * trainer.accumulate_grad_batches)
    return plan.before(last) - plan.before(batches)
