"""The W&B logger of a run: it writes to the run directory, and needs neither a login nor a network."""

import atexit
import errno
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from vlm_calibration.files import first_line, writing
from vlm_calibration.reporting.dashboard import PROJECT, logged_in

STAGING = "WANDB_DATA_DIR"


class LearningRate(LearningRateMonitor):
    """A `LearningRateMonitor` that does nothing in a run without loggers, instead of raising."""

    def on_train_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.loggers:
            super().on_train_start(trainer, *args, **kwargs)


class RunLogger(WandbLogger):
    """A `WandbLogger` that is offline unless the user is logged in and the server answers, and so never prompts.

    `wandb sync` uploads an offline run later. WANDB_MODE takes precedence; WANDB_RUN_ID continues a run. Of what W&B prints only
    warnings and errors appear, unless WANDB_SHOW_INFO=true.

    Args:
        save_dir: folder of the run; the command line gives the run directory.
        project: by default WANDB_PROJECT, or `vlm-calibration`.
        name: of the run; by default WANDB_NAME, or the name of `save_dir`.
        settings: of `wandb.Settings`; the others as in `wandb.init`.
    """

    def __init__(
        self,
        save_dir: str | None = None,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE")
        # "dryrun" is an older name, which Lightning still sets.
        offline = mode in ("offline", "dryrun") if mode else not logged_in()
        self._folder = Path(save_dir or "runs")
        self._warned = False
        # Seconds to wait for the server, so that a run without network ends too.
        timeouts = {"init_timeout": 30.0, "finish_timeout": 900.0}
        super().__init__(
            save_dir=str(self._folder),
            project=project or os.environ.get("WANDB_PROJECT") or PROJECT,
            entity=entity,
            name=name or os.environ.get("WANDB_NAME") or self._folder.resolve().name,
            offline=offline,
            group=group,
            tags=tags,
            settings=wandb.Settings(**{**timeouts, **(settings or {})}),
        )
        # Lightning passes it even if it is not set, and W&B then warns.
        self._wandb_init.pop("anonymous", None)
        if offline:
            self._go_offline()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `wandb.Run`, offline if the server cannot be reached or refuses."""
        from wandb.errors import CommError

        if self._experiment is not None:
            return super().experiment
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._is_full():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # A setting of the session, which begins before W&B reads those of the run.
        os.environ.setdefault("WANDB_SHOW_INFO", "false")
        try:
            run = super().experiment
        except CommError as error:
            problem = f"W&B cannot be used ({first_line(error)})"
            rank_zero_warn(f"{problem}: this run is logged offline, and `wandb sync` uploads it")
            self._go_offline()
            run = super().experiment
        if not self._offline and run.url:
            print(f"W&B: {run.url}", file=sys.stderr)
        return run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log to the run; warn once if the disk is full."""
        if not self._warned and self._is_full():
            self._warned = True
            why = os.strerror(errno.ENOSPC)
            rank_zero_warn(f"cannot write {self._folder / 'wandb'}: {why}; metrics from here on are lost")
        super().log_metrics(metrics, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if status == "failed" and self._experiment is not None and self._is_full():
            # W&B would keep trying to write, and print tracebacks.
            logging.raiseExceptions = False
            # End this failed process without running the other `atexit` functions.
            atexit.register(lambda: (sys.stdout.flush(), sys.stderr.flush(), os._exit(1)))

    def _is_full(self) -> bool:
        """Whether less than 1 MiB is free: W&B loses data on a full disk without an error."""
        return self._folder.is_dir() and shutil.disk_usage(self._folder).free < 1 << 20

    def _go_offline(self) -> None:
        self._offline = True
        # A W&B session that has begun no longer reads the environment variable.
        self._wandb_init["mode"] = "offline"


def wandb_logger(trainer: L.Trainer) -> WandbLogger | None:
    """The trainer's W&B logger, in the first process; None in others and without one."""
    loggers = (logger for logger in trainer.loggers if isinstance(logger, WandbLogger))
    return next(loggers, None) if trainer.is_global_zero else None


@contextmanager
def staged(logger: WandbLogger) -> Iterator[None]:
    """Make W&B stage copies of files to upload in the run directory, so that an offline one is complete, within a block.

    WANDB_DATA_DIR takes precedence. Raises DataError if the copies cannot be written.
    """
    given = os.environ.get(STAGING)
    os.environ[STAGING] = given or str(Path(logger.save_dir or ".").resolve() / "wandb")
    try:
        with writing(Path(os.environ[STAGING])):
            yield
    finally:
        if given is None:
            del os.environ[STAGING]
