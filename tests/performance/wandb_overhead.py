"""Overhead of logging to W&B: steps of the demo's stages with and without logging, alternating in one training.

Run with `python -m tests.performance.wandb_overhead`. Every ten steps, the interval of logging, the logger and all logging callbacks
are removed from the trainer or restored, so that both cases have the same model, data and machine. Target: less than 2% of a step.
The demo's step takes a fraction of a second, which is the hardest case.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", WANDB_MODE="offline", WANDB_SILENT="true")

import argparse
import contextlib
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import transformers
import yaml
from tests.performance.machine import processor, setting

from vlm_calibration.callbacks.artifacts import Artifacts
from vlm_calibration.callbacks.figures import CalibrationFigures
from vlm_calibration.callbacks.logger import LearningRate
from vlm_calibration.callbacks.throughput import Throughput
from vlm_calibration.commands.lightning_cli import lightning_command

LOGGING = (LearningRate, Throughput, CalibrationFigures, Artifacts)
STAGES = ("sft", "dpo")
WINDOW = 10
TARGET = 0.02
TRAINING_HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
VALIDATION_HOOKS = ("on_validation_start", "on_validation_batch_end", "on_validation_end")
QUERIES = 3
"""Questions per scene of the demo."""


class Window(NamedTuple):
    """Seconds of ten steps.

    Attributes:
        wall: wall-clock time.
        cpu: processor time of this process.
    """

    wall: float
    cpu: float


def now() -> Window:
    return Window(time.perf_counter(), time.process_time())


class Switch(L.Callback):
    """Removes or restores logging every ten steps and measures the time between; must be the first callback."""

    def __init__(self) -> None:
        self.windows: dict[bool, list[Window]] = {True: [], False: []}
        self.shares: list[float] = []
        self.inside = 0.0
        self.validating = 0.0
        self.logs = True
        self.since: Window | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
        self.loggers = list(trainer.loggers)
        for callback in self.callbacks:
            if isinstance(callback, LOGGING):
                for hook in TRAINING_HOOKS:
                    setattr(callback, hook, self._timed(getattr(callback, hook), "inside"))
                for hook in VALIDATION_HOOKS:
                    setattr(callback, hook, self._timed(getattr(callback, hook), "validating"))
        for logger in self.loggers:
            logger.log_metrics = self._timed(logger.log_metrics, "inside")

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % WINDOW:
            return
        end = now()
        if self.since is not None and batch_idx > 2 * WINDOW:  # the first windows are a warm-up
            self.shares += [self.inside / (end.wall - self.since.wall)] if self.logs else []
            self.windows[self.logs].append(Window(end.wall - self.since.wall, end.cpu - self.since.cpu))
        self._set(trainer, batch_idx // WINDOW % 2 == 0)
        self.inside, self.since = 0.0, now()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:  # the following validation is logged
            self._set(trainer, True)

    def _set(self, trainer: L.Trainer, logs: bool) -> None:
        self.logs = logs
        trainer.loggers = self.loggers if logs else []
        trainer.callbacks = [  # type: ignore[attr-defined]
            c for c in self.callbacks if logs or not isinstance(c, LOGGING)
        ]

    def _timed(self, hook: Callable[..., None], total: str) -> Callable[..., None]:
        """Wrap a hook so that its seconds are added to the attribute `total`."""

        def timed(*arguments: Any, **settings: Any) -> None:
            start = time.perf_counter()
            hook(*arguments, **settings)
            setattr(self, total, getattr(self, total) + time.perf_counter() - start)

        return timed


def measure(stage: str, rounds: int, folder: Path) -> Switch:
    """Train for `rounds` pairs of windows, and validate once."""
    config = yaml.safe_load(Path("configs", f"{stage}.yaml").read_text(encoding="utf-8"))
    trainer, data = config["trainer"], config["data"]
    switch = {"class_path": "tests.performance.wandb_overhead.Switch"}
    excluded = ("RunCheckpoint", "Progress")
    callbacks = [c for c in trainer["callbacks"] if not c["class_path"].endswith(excluded)]
    scenes = (rounds + 1) * 2 * WINDOW * data["batch_size"] // QUERIES + 1
    data["train"]["init_args"]["scenes"] = scenes
    trainer.update(
        callbacks=[switch, *callbacks],
        default_root_dir=str(folder / stage),
        accelerator="cpu",
        num_sanity_val_steps=0,
        log_every_n_steps=WINDOW,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if stage == "dpo":
        config["model"]["init_args"]["adapter"] = str(folder / "sft" / "adapter")
    path = folder / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        cli = lightning_command(["fit", "--config", str(path)])
    # By name: the configuration's class path imports this module a second time.
    [result] = [c for c in cli.trainer.callbacks if type(c).__name__ == "Switch"]  # type: ignore[attr-defined]
    return result  # type: ignore[return-value]


def ratios(windows: dict[bool, list[Window]], clock: str) -> list[float]:
    """Time with logging relative to time without, for each pair of windows."""
    pairs = zip(windows[True], windows[False], strict=False)
    return [getattr(on, clock) / getattr(off, clock) for on, off in pairs]


def row(stage: str, switch: Switch) -> str:
    """The table row of one stage."""
    cells = [stage, f"{statistics.median(w.wall for w in switch.windows[False]) / WINDOW * 1000:.0f}"]
    medians = []
    for clock in ("wall", "cpu"):
        values = sorted(ratios(switch.windows, clock))
        quarter = len(values) // 4
        medians.append(statistics.median(values) - 1)
        cells.append(f"{medians[-1]:+.1%} ({values[quarter] - 1:+.1%} to {values[-1 - quarter] - 1:+.1%})")
    cells.append(f"{statistics.median(switch.shares):.2%}")
    cells += ["met" if medians[0] < TARGET else "missed", f"{switch.validating:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="pairs of ten steps with and without logging")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(
        f"{processor()}, one thread, {arguments.rounds} interleaved pairs of {WINDOW} steps, "
        f"{setting('torch', 'lightning', 'wandb')}\n"
    )
    print(
        "| stage | step without logging (ms) | overhead, wall time | overhead, processor time | share of wall time in logging "
        "code | less than 2% | per validation (s) |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            print(row(stage, measure(stage, arguments.rounds, Path(folder))), flush=True)
    print("\nMedians and quartiles over pairs. Processor time excludes the effect of other programs.")


if __name__ == "__main__":
    main()
