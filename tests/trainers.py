"""Lightning's Trainer as tests use it: on the CPU, without a logger, bars and checkpoints; and a module that it trains at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch


def plain_trainer(folder: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """A Trainer of one process that writes to a folder."""
    off = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "use_distributed_sampler")
    plain: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, **dict.fromkeys(off, False)}
    plain |= {"num_sanity_val_steps": 0, "default_root_dir": folder, "log_every_n_steps": 1}
    return L.Trainer(callbacks=list(callbacks), **{**plain, **settings})


def fake_trainer(folder: Path, **settings: Any) -> Any:
    """What callbacks ask a Trainer of one process about, for hooks that are called without a run."""
    plain = {"is_global_zero": True, "interrupted": False, "sanity_checking": False, "global_step": 3}
    strategy = SimpleNamespace(barrier=lambda name: None)
    plain |= {"default_root_dir": str(folder), "strategy": strategy, "callbacks": [], "loggers": []}
    return SimpleNamespace(**{**plain, **settings})


class Line(L.LightningModule):
    """One weight, 3 at first; the loss is its square."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(3.0))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.weight**2

    def validation_step(self, *_: Any) -> None:
        pass

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.25)
