"""Lightning's Trainer as tests use it: on the CPU, without a logger, bars and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L


def plain_trainer(folder: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """A Trainer of one process that writes to a folder."""
    plain = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **{**plain, **settings})
