"""What training steps cost: speed, waiting for data, gradient norm and memory."""

from __future__ import annotations

import resource
import sys
import time
import weakref
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm_calibration.data.candidates import CandidateBatch


class Throughput(L.Callback):
    """Logs metrics of the steps since the last log, every `trainer.log_every_n_steps` steps:

    - `train/samples_per_second` and `train/tokens_per_second`: of all processes, assuming all are as fast as the first.
      Padding is not counted, image tokens are; a prompt that several responses share counts once. Validation does not count.
    - `train/data_wait`: the share of the time spent waiting for data, in [0, 1].
    - `train/grad_norm`: L2 norm of the gradients of that step before clipping.
    - `memory/peak_gib`: peak memory so far, of the GPU or else of this process.
    """

    _tokens: Tensor | int
    _norm: Tensor | None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._last_end = time.perf_counter()
        self._begin()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            pause = time.perf_counter() - self._paused
            self._began += pause
            self._last_end += pause

    def on_train_batch_start(self, *_: Any) -> None:
        self._waited += time.perf_counter() - self._last_end

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self._due = bool(trainer.loggers) and trainer._logger_connector.should_update_logs
        gradients = [p.grad for p in module.parameters() if p.grad is not None] if self._due else []
        if gradients:
            norm = torch.nn.utils.get_total_norm(gradients)
            # The norm of sharded gradients is gathered; all processes take part.
            self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self._samples += len(batch.queries)
        self._tokens = self._tokens + tokens_of(batch)
        if self._due:
            # Reading a value waits until the device has finished the steps.
            tokens = float(self._tokens)
            seconds = time.perf_counter() - self._began
            values: dict[str, Any] = {
                "train/samples_per_second": self._samples * trainer.world_size / seconds,
                "train/tokens_per_second": tokens * trainer.world_size / seconds,
                "train/data_wait": self._waited / seconds,
                "memory/peak_gib": peak_memory(module.device) / 2**30,
            }
            if self._norm is not None:
                values["train/grad_norm"] = self._norm
            module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
            self._begin()
        self._last_end = time.perf_counter()

    def _begin(self) -> None:
        self._began = time.perf_counter()
        self._samples, self._waited, self._due = 0, 0.0, False
        self._tokens, self._norm = 0, None


def tokens_of(batch: Any) -> Tensor | int:
    """Tokens of a training batch that are not padding, on its device, with all responses of a `CandidateBatch`; own answers do not count."""
    if not batch.inputs:
        return 0
    tokens: Tensor = batch.inputs["attention_mask"].sum()
    if isinstance(batch, CandidateBatch):
        tokens = tokens + sum(len(c.tokens) for candidates in batch.candidates for c in candidates)
    return tokens


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on a CUDA device, or the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class PeakMemory(L.Callback):
    """Measures the `peak` of a training, in bytes beside the model's weights, by the allocator of a GPU, or else as `LiveBytes`."""

    peak = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._live: LiveBytes | None = None
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()
        else:
            self._live = LiveBytes([*pl_module.parameters(), *pl_module.buffers()]).__enter__()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._live is None:
            self.peak = torch.cuda.max_memory_allocated() - self._held
        else:
            self._live.__exit__(None, None, None)
            self.peak = self._live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes `now` of live tensors created in this context, real or fake, and their `peak`.

    The tensors `existing` and their views are not counted, nor is memory that a kernel allocates and frees within one operation.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.sizes = {t.untyped_storage()._cdata: 0 for t in existing}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if not isinstance(value, Tensor) or (storage := value.untyped_storage())._cdata in self.sizes:
                continue
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
