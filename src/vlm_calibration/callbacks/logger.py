"""The logger of a run: W&B, in the run directory, without a login and without a network."""

from __future__ import annotations

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
from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from vlm_calibration.files import writing
from vlm_calibration.reporting.wandb_login import PROJECT, logged_in

TIMEOUTS = {"init_timeout": 30.0, "finish_timeout": 900.0}
"""Seconds to wait for the server at the start and the end: a run that has no network, or has lost it, must end all the same."""
ROOM = 1 << 20
"""Bytes that must be free for W&B to log. It does not say so where it cannot write, and what was logged is lost."""
STAGING = "WANDB_DATA_DIR"
"""The variable that names the folder where W&B puts copies of what it is to upload."""


class LearningRate(LearningRateMonitor):
    """A `LearningRateMonitor` that has nothing to say where nothing is logged, instead of refusing to run."""

    def on_train_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.loggers:
            super().on_train_start(trainer, *args, **kwargs)


class RunLogger(WandbLogger):
    """A `WandbLogger` that is offline unless someone is logged in, and so never prompts.

    It goes offline as well where the server cannot be reached, or refuses. `wandb sync` uploads an offline run later. WANDB_MODE, where
    set, decides instead; WANDB_RUN_ID continues a run.

    Args:
        save_dir: folder of the run; the command line gives the run directory.
        project: by default WANDB_PROJECT, or `vlm-calibration`.
        entity, group, job_type, tags: as W&B has them.
        name: of the run; by default WANDB_NAME, or the name of `save_dir`.
        settings: further arguments of `wandb.init`.

    Attributes:
        waiting: no run is begun yet, and nothing is logged; the command line ends this once a stage begins.
    """

    def __init__(
        self,
        save_dir: str | None = None,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        **settings: Any,
    ) -> None:
        mode = os.environ.get("WANDB_MODE")
        # "dryrun" is W&B's older word, which Lightning still sets.
        offline = mode in ("offline", "dryrun") if mode else not logged_in()
        directory = save_dir or "runs"
        self.waiting = False
        self._warned = False
        super().__init__(
            save_dir=directory,
            project=project or os.environ.get("WANDB_PROJECT") or PROJECT,
            entity=entity,
            name=name or os.environ.get("WANDB_NAME") or Path(directory).resolve().name,
            offline=offline,
            group=group,
            job_type=job_type,
            tags=tags,
            **{**settings, "settings": _settings(settings.get("settings"))},
        )
        # Lightning passes it on even if nobody has set it, of which W&B then complains.
        if self._wandb_init.get("anonymous") is None:
            self._wandb_init.pop("anonymous", None)
        if offline:
            self._go_offline()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `wandb.Run`, offline where the server cannot be reached or refuses; one that does nothing while `waiting`."""
        from wandb.errors import CommError

        if self.waiting:
            return _DummyExperiment()
        if self._experiment is None:
            with writing(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                if self._is_full():
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._experiment is None and not self._offline:
            try:
                return super().experiment
            except CommError as error:
                cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
                rank_zero_warn(
                    f"W&B cannot be used ({cause}): this run is logged offline, and `wandb sync` uploads it"
                )
                self._go_offline()
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log to the run, and say so once if there is no room for it."""
        if not (self.waiting or self._warned) and self._is_full():
            self._warned = True
            rank_zero_warn(
                f"cannot write {self._folder / 'wandb'}: {os.strerror(errno.ENOSPC)}; what is logged from here on is lost"
            )
        super().log_metrics(metrics, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if status == "failed" and self._experiment is not None and self._is_full():
            # W&B would wait for what it cannot write, and print tracebacks all the while.
            logging.raiseExceptions = False
            atexit.register(_leave)

    @property
    def _folder(self) -> Path:
        return Path(self.save_dir or ".")

    def _is_full(self) -> bool:
        return self._folder.is_dir() and shutil.disk_usage(self._folder).free < ROOM

    def _go_offline(self) -> None:
        self._offline = True
        # Not through the environment alone, which a session that has begun no longer reads.
        self._wandb_init["mode"] = "offline"


def _leave() -> None:
    """End this process, which has failed, without the functions that others have registered for its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _settings(given: Any) -> Any:
    """Ours, overridden by what the user gives, a mapping or a `wandb.Settings`."""
    if given is not None and not isinstance(given, Mapping):
        return given
    import wandb

    return wandb.Settings(**{**TIMEOUTS, **(given or {})})


def wandb_logger(trainer: L.Trainer) -> WandbLogger | None:
    """The trainer's W&B logger, on the first process; None on others and where there is none."""
    found = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    return found[0] if found and trainer.is_global_zero else None


@contextmanager
def staged(logger: WandbLogger) -> Iterator[None]:
    """A block in which W&B copies what it is to upload into the run directory instead of the home directory.

    An offline run is then whole on its own. WANDB_DATA_DIR, where set, decides instead.

    Raises:
        DataError: the copies cannot be written.
    """
    if STAGING in os.environ:
        with writing(Path(os.environ[STAGING])):
            yield
        return
    os.environ[STAGING] = str(Path(logger.save_dir or ".").resolve() / "wandb")
    try:
        with writing(Path(os.environ[STAGING])):
            yield
    finally:
        del os.environ[STAGING]
