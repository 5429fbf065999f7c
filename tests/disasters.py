"""Callbacks that kill or spoil a run at a given step, or record it. They are importable because `cli_server.py` is in this folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch


class KillAt(L.Callback):
    """Sends a signal to this process, or to its process group, at a batch of an epoch.

    Args:
        epoch, batch: the position, counted from 0.
        when: "before" the batch, "between" the backward pass and the optimizer step, "after" the batch,
            "validating": in the validation that follows it, or "ending": when training ends, at any batch.
        number: the signal.
        group: send it to the process group instead of this process.
        rank: the process that sends it.
    """

    def __init__(
        self, epoch: int, batch: int, when: str = "before", number: int = 9, group: bool = True, rank: int = 0
    ) -> None:
        self.position = (epoch, batch)
        self.when = when
        self.number = number
        self.group = group
        self.rank = rank
        self.armed = False

    def _at(self, when: str) -> None:
        if self.armed and when == self.when:
            if self.group:
                os.killpg(0, self.number)
            else:
                os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.armed = (trainer.current_epoch, batch_idx) == self.position and trainer.global_rank == self.rank
        self._at("before")

    def on_after_backward(self, *_: Any) -> None:
        self._at("between")

    def on_train_batch_end(self, *_: Any) -> None:
        self._at("after")

    def on_validation_batch_start(self, *_: Any) -> None:
        self._at("validating")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.armed = trainer.global_rank == self.rank
        self._at("ending")


class Spoil(L.Callback):
    """Sets a trained weight to NaN before a batch in process `rank`, so that the loss is NaN."""

    def __init__(self, batch: int, rank: int = 0) -> None:
        self.batch = batch
        self.rank = rank

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            with torch.no_grad():
                next(p for p in module.parameters() if p.requires_grad).fill_(torch.nan)


class SpoilGradient(L.Callback):
    """Sets a gradient to infinity after the backward pass of a batch; the loss is finite."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.armed = False

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.armed = batch_idx == self.batch

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.armed:
            next(p.grad for p in module.parameters() if p.grad is not None).fill_(torch.inf)


class WriteLosses(L.Callback):
    """Writes the loss of each batch, one per line, to `losses-RANK.txt` in the run directory."""

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        path = Path(trainer.default_root_dir) / f"losses-{trainer.global_rank}.txt"
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{float(outputs['loss'])!r}\n")


class WriteTeacher(L.Callback):
    """Writes a preference stage's fitted teacher to `teacher-RANK.json` in the run directory when training starts."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / f"teacher-{trainer.global_rank}.json"
        path.write_text(json.dumps(asdict(module.target.fitted)), encoding="utf-8")


class KillTest(L.Callback):
    """Sends a signal to the process group during an evaluation, or a prediction ("answered"), from process `rank`.

    Args:
        batch: the batch, counted from 0.
        when: "asked": before the batch is answered; "answered": after it.
        number: the signal.
        rank: the process that sends it.
    """

    def __init__(self, batch: int, when: str, number: int = 9, rank: int = 0) -> None:
        self.position = (when, batch)
        self.number = number
        self.rank = rank

    def _at(self, trainer: L.Trainer, when: str, batch: int) -> bool:
        return self.position == (when, batch) and trainer.global_rank == self.rank

    def on_test_batch_start(
        self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._at(trainer, "asked", batch_idx):
            os.killpg(0, self.number)

    def on_test_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._at(trainer, "answered", batch_idx):
            os.killpg(0, self.number)

    on_predict_batch_end = on_test_batch_end


class WriteAsked(L.Callback):
    """Appends the id of each query that an evaluation asks to a file.

    Args:
        path: the file without the rank, which each process appends to the name.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_test_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, *_: Any) -> None:
        with Path(f"{self.path}{trainer.global_rank}").open("a", encoding="utf-8") as file:
            file.writelines(f"{query.id}\n" for query in batch.queries)
