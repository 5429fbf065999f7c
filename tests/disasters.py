"""Callbacks that end a run where a test wants it to end, or watch it; the command line finds them beside `cli_server.py`."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch


class KillAt(L.Callback):
    """Sends a signal to this process, or to its whole group, in a batch of an epoch (both from 0).

    Args:
        when: "before" the batch is trained on, "between" backward pass and optimiser step, "after" the batch,
            "validating" behind it, or "ending": when training has ended, whatever the batch.
        rank: the process that does it.
    """

    def __init__(
        self, epoch: int, batch: int, when: str = "before", number: int = 9, group: bool = True, rank: int = 0
    ) -> None:
        self.place = (epoch, batch)
        self.when = when
        self.number = number
        self.group = group
        self.rank = rank
        self.now = False

    def _at(self, when: str) -> None:
        if self.now and when == self.when:
            if self.group:
                os.killpg(0, self.number)
            else:
                os.kill(os.getpid(), self.number)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.now = (trainer.current_epoch, batch_idx) == self.place and trainer.global_rank == self.rank
        self._at("before")

    def on_after_backward(self, *_: Any) -> None:
        self._at("between")

    def on_train_batch_end(self, *_: Any) -> None:
        self._at("after")

    def on_validation_batch_start(self, *_: Any) -> None:
        self._at("validating")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.now = trainer.global_rank == self.rank
        self._at("ending")


class KillPrediction(L.Callback):
    """Sends SIGKILL to the whole group behind a batch of `predict` (from 0) of one of the processes."""

    def __init__(self, batch: int, rank: int = 0) -> None:
        self.batch = batch
        self.rank = rank

    def on_predict_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            os.killpg(0, 9)


class Spoil(L.Callback):
    """Makes a weight NaN before a batch, so that what is computed with it is NaN too; in one of the processes."""

    def __init__(self, batch: int, rank: int = 0) -> None:
        self.batch = batch
        self.rank = rank

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            with torch.no_grad():
                next(p for p in module.parameters() if p.requires_grad).fill_(torch.nan)


class SpoilGradient(L.Callback):
    """Makes a gradient infinite, of a loss that is sound."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.now = False

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.now = batch_idx == self.batch

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.now:
            next(p.grad for p in module.parameters() if p.grad is not None).fill_(torch.inf)


class FillDisk(L.Callback):
    """From a batch on, no file of this process may grow beyond a number of bytes."""

    def __init__(self, batch: int, limit: int) -> None:
        self.batch = batch
        self.limit = limit

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


class WriteLosses(L.Callback):
    """Writes each batch's loss, one a line, to `losses-RANK.txt` of the run directory."""

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        path = Path(trainer.default_root_dir) / f"losses-{trainer.global_rank}.txt"
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{float(outputs['loss'])!r}\n")


class WriteMap(L.Callback):
    """Writes the map that a preference stage was given when training starts to `map-RANK.json` of the run directory."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / f"map-{trainer.global_rank}.json"
        path.write_text(json.dumps(module.recalibration.knots), encoding="utf-8")


class KillTest(L.Callback):
    """Sends a signal to the whole group in an evaluation, from one of its processes.

    Args:
        batch: in which batch (from 0). when: "asked", before the batch is answered; "answered", behind it; "writing", in
            the middle of what this process writes down of it, with SIGXFSZ to itself; "ending", behind the last batch.
    """

    def __init__(self, batch: int, when: str, number: int = 9, rank: int = 0) -> None:
        self.place = (when, batch)
        self.number = number
        self.rank = rank

    def _at(self, trainer: L.Trainer, when: str, batch: int) -> bool:
        return self.place == (when, batch) and trainer.global_rank == self.rank

    def on_test_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._at(trainer, "asked", batch_idx):
            os.killpg(0, self.number)
        if self._at(trainer, "writing", batch_idx):
            file = Path(trainer.default_root_dir) / f".answered.{trainer.global_rank}.jsonl"
            limit = file.stat().st_size + 100
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    def on_test_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._at(trainer, "answered", batch_idx):
            os.killpg(0, self.number)

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._at(trainer, "ending", 0):
            os.killpg(0, self.number)


class WriteAsked(L.Callback):
    """Appends the id of each query that an evaluation asks to a file.

    Args:
        path: of the file; each process has its own, with its rank behind this.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_test_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, *_: Any) -> None:
        with Path(f"{self.path}{trainer.global_rank}").open("a", encoding="utf-8") as file:
            file.writelines(f"{query.id}\n" for query in batch.queries)
