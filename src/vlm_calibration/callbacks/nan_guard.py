"""Stops a run whose loss or gradient is not finite before the optimiser steps, and names the records."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from vlm_calibration.records import DataError
from vlm_calibration.stages.training import gather


class NanGuard(L.Callback):
    """Raises if a loss or the norm of the gradients is infinite or NaN; adapter and checkpoints stay as they were.

    All processes stop together. Under float16 only the loss counts, since the scaler skips steps whose gradients overflow.
    """

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._losses: list[tuple[Tensor, list[str]]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, *_: Any) -> None:
        self._ids = [query.id for query in batch.queries]

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        self._losses.append((loss.detach(), self._ids))

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        batches, self._losses = self._losses, []
        finite = torch.stack([loss for loss, _ in batches]).isfinite()
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        scaled = isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler
        sound = finite.all() if scaled else finite.all() & torch.nn.utils.get_total_norm(gradients).isfinite()
        if not trainer.strategy.reduce_boolean_decision(bool(sound), all=True):
            all_finite = zip(finite.tolist(), batches, strict=True)
            culprits = [i for is_finite, (_, ids) in all_finite if not is_finite for i in ids]
            gathered = gather([(culprits, [i for _, ids in batches for i in ids])])
            what, records = "loss", [i for ids, _ in gathered for i in ids]
            if not records:
                what, records = "gradient", [i for _, ids in gathered for i in ids]
            raise DataError(
                f"the {what} is not finite at step {trainer.global_step}, in a batch of the records {', '.join(records)}: look at "
                "their images and answers, or lower the learning rate; checkpoints are as they were before this step"
            )
