"""Progress of the stages in a log file and on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch.utils.data import DataLoader

from vlm_calibration import progress
from vlm_calibration.callbacks import progress as callback
from vlm_calibration.callbacks.progress import Progress
from vlm_calibration.records import DataError

from ..trainers import Line, plain_trainer


class Clock(L.Callback):
    """A clock that a training batch moves by two seconds and a batch of answers by seven."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def on_train_batch_end(self, *_: Any) -> None:
        self.now += 2

    def on_validation_batch_end(self, *_: Any) -> None:
        self.now += 7

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class SFTModule(Line):
    """Logs its loss."""

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        self.log("train/loss", loss, prog_bar=True)
        if index == 5:
            raise ZeroDivisionError
        return loss


def _trainer(clock: Clock, folder: Path, **settings: Any) -> L.Trainer:
    return plain_trainer(folder, clock, Progress(every=10), enable_progress_bar=True, **settings)


def _loaders(*lengths: int) -> Any:
    return [DataLoader(range(n), batch_size=1) for n in lengths]  # type: ignore[arg-type]


def _lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("sft")]


def test_the_log_of_a_training(clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [training, validation] = _loaders(4, 3)
    _trainer(clock, tmp_path, max_epochs=3, num_sanity_val_steps=-1).fit(SFTModule(), training, validation)
    assert _lines(capsys) == [
        "sft: validation before training: 1 of 3 batches (33%), 0:14 left",
        "sft: validation before training: 3 of 3 batches (100%), 0:00 left",
        "sft: validation before training: 3 of 3 batches (100%), took 0:21",
        "sft: 3 of 12 steps (25%), 0:18 left, loss 0.562",
        # A validation took 21 seconds.
        "sft: 5 of 12 steps (41%), 0:43 left, loss 0.0352",
        "sft: 9 of 12 steps (75%), 0:20 left, loss 0.000137",
        "sft: 12 of 12 steps (100%), took 1:27, loss 2.15e-06",
    ]


def test_an_exception_ends_the_line(clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        _trainer(clock, tmp_path, max_epochs=1).fit(SFTModule(), _loaders(9)[0])
    assert _lines(capsys)[-1] == "sft: stopped, 5 of 9 steps (55%), after 0:10"


@pytest.mark.parametrize("stage", ["test", "predict", "validate"])
def test_the_log_of_an_evaluation(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    getattr(_trainer(clock, tmp_path), stage)(SFTModule(), _loaders(2, 3))
    name = "sft: validation" if stage == "validate" else "sft"
    assert _lines(capsys) == [
        f"{name}: 1 of 5 batches (20%), 0:28 left",
        f"{name}: 3 of 5 batches (60%), 0:14 left",
        f"{name}: 5 of 5 batches (100%), 0:00 left",
        f"{name}: 5 of 5 batches (100%), took 0:35",
    ]


def test_a_terminal_has_lightning_s_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="every"):
        Progress(every=0)
    monkeypatch.setattr(callback, "is_terminal", lambda: True)
    assert type(Progress(every=3)) is RichProgressBar
