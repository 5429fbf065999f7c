"""Writing to a full disk ends in one line that names the file, and leaves existing files as they were.

A limit on the size of files replaces the full disk, since it needs no privileges; only the system's error differs.
"""

from __future__ import annotations

import os
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlm_calibration.callbacks import logger as logging
from vlm_calibration.callbacks.logger import RunLogger, staged
from vlm_calibration.callbacks.regions import SCHEMA, write_rows
from vlm_calibration.files import AppendLog
from vlm_calibration.perturbation.level_table import write_likelihoods
from vlm_calibration.perturbation.levels import AnchoredLevels
from vlm_calibration.records import DataError

from .command_line import Arguments, Run, Server, callback, run_python
from .level_tables import measured_likelihoods, noise_counts

LARGEST = 20_000
"""Limit of a file's size in bytes."""


def _assert_names(error: str, path: Path) -> None:
    assert str(path) in error
    assert "File too large" in error


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_training(run: Run, server: Server, start: Arguments, tmp_path: Path) -> None:
    """A run that was killed at the end of training: its configuration, its adapter and its next checkpoint."""

    def error(*arguments: str) -> str:
        return server.wait(server.start(list(arguments), tmp_path, largest=LARGEST)).error()

    kill = callback("disasters.KillAt", epoch=0, batch=0, when="ending")
    run(*start("run", kill, max_epochs=1)).checked(-9)
    folder = tmp_path / "run"
    before = _contents(folder)
    tags = callback("logger.RunLogger", tags=["x" * 60] * 400)
    _assert_names(error(*start("run", logger=tags), "--overwrite"), folder / "config.yaml")
    assert _contents(folder) == before
    _assert_names(error(*start("run", max_epochs=1), "--ckpt_path", "last"), folder / "adapter")
    after = _contents(folder)
    for name in ("config.yaml", "run.json"):
        assert after.pop(name) != before.pop(name), "KillAt is no longer in it"
    assert after == before
    _assert_names(error(*start("run"), "--ckpt_path", "last"), folder / "checkpoints/last.ckpt")
    checkpoints = {name: content for name, content in before.items() if name.startswith("checkpoints")}
    assert _contents(folder).items() >= checkpoints.items()


def _levels(folder: Path) -> None:
    rows = [(i / 500, 100, 50) for i in range(501)]
    AnchoredLevels.fit({"yes_no": noise_counts(*rows)}).save(folder / "levels.json")


def _likelihoods(folder: Path) -> None:
    provenance = {"weights": "w", "prompt": "p", "max_pixels": None}
    likelihoods = measured_likelihoods({os.urandom(8).hex(): 0.5 for _ in range(5_000)})
    write_likelihoods(folder / "likelihoods.parquet", likelihoods, provenance)


def _regions(folder: Path) -> None:
    noise = os.urandom(50_000).hex()
    row: dict[str, Any] = {**dict.fromkeys(SCHEMA.names), "id": "one", "question": noise}
    write_rows(folder / "queries.parquet", [[row]])


def _asked(folder: Path) -> None:
    AppendLog(folder / "answers.jsonl", {}, "").append({"id": "q", "text": "Yes" * 10_000}, sync=True)


WRITTEN: dict[str, tuple[Callable[[Path], None], bool]] = {
    "levels.json": (_levels, True),
    "likelihoods.parquet": (_likelihoods, True),
    "queries.parquet": (_regions, True),
    "answers.jsonl": (_asked, False),
}
"""File -> the function that writes it, and whether that replaces an existing file."""


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file(tmp_path: Path, name: str) -> None:
    write, replaces = WRITTEN[name]
    if replaces:
        (tmp_path / name).write_text("kept")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, hard))
    try:
        with pytest.raises(DataError) as caught:
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _assert_names(str(caught.value), tmp_path / name)
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} <= {name}, "no temporary files"
    assert not replaces or (tmp_path / name).read_text() == "kept"


@pytest.mark.slow
def test_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B itself drops what it cannot write without a warning."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = RunLogger(save_dir=str(tmp_path / "run"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.log_metrics({"train/loss": 1.5}, step=0)
    monkeypatch.setattr(logging.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.warns(UserWarning, match="wandb: No space left on device"):
        logger.log_metrics({"train/loss": 1.5}, step=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.log_metrics({"train/loss": 1.5}, step=2)
    logger.experiment.finish()
    with pytest.raises(DataError, match=r"/other: No space left on device"):
        RunLogger(save_dir=str(tmp_path / "other")).log_metrics({"train/loss": 1.5}, step=0)


FAILED = """
import shutil
from types import SimpleNamespace
from vlm_calibration.callbacks.logger import RunLogger
logger = RunLogger(save_dir="run")
logger.log_metrics({"train/loss": 1.5}, step=0)
shutil.disk_usage = lambda _: SimpleNamespace(free=0)
logger.finalize("failed")
"""


@pytest.mark.slow
def test_a_failed_run_does_not_wait_for_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    """W&B waits for the log when the process ends, and then prints its location."""
    ended = run_python("-c", FAILED, cwd=tmp_path, WANDB_MODE="offline").checked(1)
    assert "Traceback" not in ended.err
    assert "wandb sync" not in ended.out + ended.err


def test_copies_for_an_upload(tmp_path: Path) -> None:
    logger = RunLogger(save_dir=str(tmp_path / "run"))
    with pytest.raises(DataError, match=r"/run/wandb: No space left on device"), staged(logger):
        raise OSError(28, "No space left on device")
