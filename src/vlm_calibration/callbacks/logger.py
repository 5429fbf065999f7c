"""The logger of a run: W&B, in the run directory, without a login."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import WandbLogger


def logged_in() -> bool:
    """Whether W&B has credentials: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        _, _, key = netrc.netrc(os.environ.get("NETRC")).authenticators(host) or (None, None, None)
        return bool(key)
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return False


class LearningRate(LearningRateMonitor):
    """A `LearningRateMonitor` that has nothing to say where nothing is logged, instead of refusing to run."""

    def on_train_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.loggers:
            super().on_train_start(trainer, *args, **kwargs)


class RunLogger(WandbLogger):
    """A `WandbLogger` that is offline unless someone is logged in, and so never prompts.

    `wandb sync` uploads an offline run later. WANDB_MODE, where set, decides instead.

    Args:
        save_dir: folder of the run; the command line gives the run directory.
        project, name, group, tags: as W&B has them.
        settings: further arguments of `wandb.init`.
    """

    def __init__(
        self,
        save_dir: str | None = None,
        project: str = "vlm-calibration",
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        **settings: Any,
    ) -> None:
        mode = os.environ.get("WANDB_MODE")
        # "dryrun" is W&B's older word, which Lightning still sets.
        offline = mode in ("offline", "dryrun") if mode else not logged_in()
        directory = save_dir or "runs"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            Path(directory).mkdir(parents=True, exist_ok=True)
        super().__init__(
            save_dir=directory,
            project=project,
            name=name,
            offline=offline,
            group=group,
            tags=tags,
            **settings,
        )
