"""Speed, waiting, gradient norm and memory of training, and progress of the stages in a log file, on a fake clock."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from vlm_calibration import progress
from vlm_calibration.callbacks import progress as progress_callback
from vlm_calibration.callbacks import throughput
from vlm_calibration.callbacks.progress import Progress
from vlm_calibration.callbacks.throughput import Throughput, peak_memory, tokens_of
from vlm_calibration.data.candidates import Candidate, CandidateBatch
from vlm_calibration.records import DataError

from ..trainers import Line, plain_trainer

COMPUTING, WAITING, VALIDATING = 3.0, 1.0, 100.0
"""Seconds of a step, between two steps, and of a validation."""


class Batch(NamedTuple):
    """Two queries of 5 and 3 tokens."""

    inputs: dict[str, torch.Tensor]
    queries: tuple[str, ...]


class Clock(L.Callback):
    """A clock, placed before the tested callback, that a training batch and a batch of answers move by some seconds."""

    now = 1000.0

    def __init__(self, training: float, answering: float) -> None:
        self.training = training
        self.answering = answering

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def on_train_batch_end(self, *_: Any) -> None:
        self.now += self.training

    def on_validation_batch_end(self, *_: Any) -> None:
        self.now += self.answering

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end


def _rows(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[dict[str, float]]:
    """The metrics that a training of six batches logs."""
    clock = Clock(COMPUTING, VALIDATING)
    monkeypatch.setattr(throughput, "time", clock)
    logged: list[dict[str, float]] = []
    logger = CSVLogger(folder)
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step=None: logged.append(dict(metrics)))
    plain = {"logger": logger, "num_sanity_val_steps": 1, "max_epochs": 1, "log_every_n_steps": 2}
    plain["gradient_clip_val"] = 0.1
    waiting = LambdaCallback(on_train_batch_end=lambda *_: setattr(clock, "now", clock.now + WAITING))
    trainer = plain_trainer(folder, clock, Throughput(), waiting, **{**plain, **settings})
    batch = Batch({"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}, ("a", "b"))
    loader: DataLoader[Any] = DataLoader(range(6), batch_size=1, collate_fn=lambda _: batch)  # type: ignore[arg-type]
    trainer.fit(Line(), loader, loader)
    return [row for row in logged if "train/data_wait" in row]


def test_speed_is_over_the_steps_since_the_last_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *later = _rows(tmp_path, monkeypatch)
    # Two steps and the wait between them; then two steps and a wait before each.
    assert first["train/samples_per_second"] == pytest.approx(4 / (2 * COMPUTING + WAITING))
    assert first["train/data_wait"] == pytest.approx(WAITING / (2 * COMPUTING + WAITING))
    assert len(later) == 2
    for row in later:
        assert row["train/samples_per_second"] == pytest.approx(4 / (2 * COMPUTING + 2 * WAITING))
        assert row["train/tokens_per_second"] == pytest.approx(16 / (2 * COMPUTING + 2 * WAITING))
        assert row["train/data_wait"] == pytest.approx(WAITING / (COMPUTING + WAITING))


def test_validation_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    within = _rows(tmp_path, monkeypatch, val_check_interval=3)
    without = _rows(tmp_path, monkeypatch, limit_val_batches=0)
    for name in ("train/samples_per_second", "train/tokens_per_second", "train/data_wait"):
        assert [row[name] for row in within] == [row[name] for row in without]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_norm_is_that_of_the_step_before_clipping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulated: int
) -> None:
    first, second, third, *_ = _rows(
        tmp_path, monkeypatch, log_every_n_steps=1, accumulate_grad_batches=accumulated
    )
    assert first["train/grad_norm"] == pytest.approx(6.0), "the mean over the batches of a step"
    if accumulated == 2:
        assert first["train/samples_per_second"] == pytest.approx(4 / (2 * COMPUTING + WAITING))
        assert second["train/data_wait"] == third["train/data_wait"] == pytest.approx(0.25)


def test_nothing_is_measured_where_nothing_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *_: pytest.fail("measured"))
    assert _rows(tmp_path, monkeypatch, logger=False, gradient_clip_val=None) == []


def test_tokens_of_pairs_count_the_prompt_once_and_every_response() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    candidates = ((Candidate((1, 2, 3), 1, 0, 0.5, False), Candidate((1, 2), 1, 0, 0.4, False)),) * 2
    nothing: tuple[Any, ...] = (SimpleNamespace(), SimpleNamespace())
    facts = (torch.tensor([4, 2]), candidates, (0.5, 0.5), (True, True), (0, 0), nothing, ())
    batch = CandidateBatch({"attention_mask": mask}, *facts)
    assert int(tokens_of(batch)) == 6 + 2 * 5
    assert tokens_of(batch._replace(inputs={})) == 0, "every sample was too long"


def test_memory_of_the_process_where_there_is_no_gpu() -> None:
    assert peak_memory(torch.device("cpu")) > 100 * 2**20


# --- Progress ---


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(training=2.0, answering=7.0)
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


def test_a_step_of_many_batches_has_one_line(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock.training = 20.0
    _trainer(clock, tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(SFTModule(), _loaders(4)[0])
    counts = [line.partition(" (")[0] for line in _lines(capsys)]
    assert counts == ["sft: 1 of 2 steps", "sft: 2 of 2 steps", "sft: 2 of 2 steps"]


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
    monkeypatch.setattr(progress_callback, "is_terminal", lambda: True)
    assert type(Progress(every=3)) is RichProgressBar
