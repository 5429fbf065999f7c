"""The peak of memory of training: from the allocator of a GPU, elsewhere by counting the bytes of live tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(L.Callback):
    """Measures the peak from the first to the last training step.

    Attributes:
        peak: bytes beside those that exist when training starts, the model's weights.
    """

    peak = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._live: LiveBytes | None = None
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()
        else:
            self._live = LiveBytes([*pl_module.parameters(), *pl_module.buffers()])
            self._live.__enter__()

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

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.sizes = {t.untyped_storage()._cdata: 0 for t in existing}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
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
