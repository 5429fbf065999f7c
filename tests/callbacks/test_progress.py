"""Progress of the stages: counts, and the time left against the time that a run then takes, on a fake clock."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from vlm_calibration.callbacks import progress as callback
from vlm_calibration.callbacks.progress import Progress, Workload
from vlm_calibration.data.loading import EpochSampler, QueryLoader
from vlm_calibration.data.raw import RawBatches, shards_of
from vlm_calibration.progress import line as progress
from vlm_calibration.records import DataError, Query

STEP, ANSWERS = 2.0, 7.0
"""Seconds of a training batch and of a validation batch."""


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (progress, callback):
        monkeypatch.setattr(module, "time", clock)
    return clock


class SFTModule(L.LightningModule):
    """One weight; logs a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(3.0))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.weight**2
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        pass

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.25)


class Told(NamedTuple):
    """What the line told: when, of which steps, and the time left with what it does not include."""

    now: float
    done: float
    total: float | None
    left: float | None
    beyond: str


class Hands(L.Callback):
    """Moves the clock at the end of a batch."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.now += STEP

    def on_validation_batch_end(self, *_: Any) -> None:
        self.clock.now += ANSWERS

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end


class Reader(L.Callback):
    """Reads the line after every batch; raises after some, as a process that ends early."""

    def __init__(self, clock: Clock, bar: Progress, stop_after: int | None = None) -> None:
        self.clock = clock
        self.bar = bar
        self.stop_after = stop_after
        self.told: list[Told] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        assert self.bar._line is not None
        status = self.bar._line.status()
        self.told.append(Told(self.clock.now, status.done, status.total, status.left, status.beyond))
        if len(self.told) == self.stop_after:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "stopped.ckpt")
            raise RuntimeError("stopped")

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.on_train_batch_end(trainer)


def _fit(
    clock: Clock,
    folder: Path,
    *,
    stop_after: int | None = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Reader:
    """Fit on six batches, three validation batches."""
    bar = Progress()
    reader = Reader(clock, bar, stop_after)
    plain = {
        "accelerator": "cpu",
        "logger": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
        "default_root_dir": folder,
    }
    trainer = L.Trainer(callbacks=[Hands(clock), bar, reader], **{**plain, **settings})
    loaders = [DataLoader(range(n), batch_size=1) for n in (6, 3)]  # type: ignore[var-annotated,arg-type]
    trainer.fit(SFTModule(), *loaders, ckpt_path=ckpt_path)
    return reader


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 6),
        ({"max_epochs": 4}, 24),
        ({"max_epochs": 4, "accumulate_grad_batches": 4}, 8),
        ({"max_epochs": 4, "accumulate_grad_batches": 2, "val_check_interval": 3}, 12),
        ({"max_epochs": 4, "max_steps": 15, "val_check_interval": 2}, 15),
        ({"max_epochs": None, "max_steps": 5, "accumulate_grad_batches": 2}, 5),
        ({"max_epochs": 3, "limit_train_batches": 4, "limit_val_batches": 2}, 12),
        ({"max_epochs": 5, "check_val_every_n_epoch": 2}, 30),
        ({"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 5}, 18),
        ({"max_epochs": 2, "val_check_interval": 0.5, "num_sanity_val_steps": 1}, 12),
        ({"max_epochs": 2, "limit_val_batches": 0}, 12),
    ],
)
def test_the_time_left_is_the_time_that_it_then_takes(
    clock: Clock, tmp_path: Path, settings: dict[str, Any], steps: int
) -> None:
    told = _fit(clock, tmp_path, **settings).told
    end = clock.now
    assert {row.total for row in told} == {steps}
    complete = [row for row in told if not row.beyond]
    for now, _, _, left, _ in complete:
        assert left == pytest.approx(end - now, abs=STEP)
    # Only before the first validation is its time unknown.
    assert all(row.beyond == "validation" for row in told[: len(told) - len(complete)])
    assert len(complete) >= len(told) / 3


def test_what_is_left_before_the_first_validation_is_the_training(clock: Clock, tmp_path: Path) -> None:
    first = _fit(clock, tmp_path, max_epochs=2).told[2]
    assert first == Told(1000 + 3 * STEP, 3, 12, 9 * STEP, "validation")


def test_steps_of_accumulated_batches_are_done_in_parts(clock: Clock, tmp_path: Path) -> None:
    told = _fit(clock, tmp_path, accumulate_grad_batches=3, limit_val_batches=0).told
    assert [row.done for row in told] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])


@pytest.mark.parametrize("stop_after", [4, 9])
def test_after_a_resume_the_rate_is_new_and_the_total_old(
    clock: Clock, tmp_path: Path, stop_after: int
) -> None:
    settings = {"max_epochs": 3, "limit_val_batches": 0}
    with pytest.raises(RuntimeError, match="stopped"):
        _fit(clock, tmp_path, stop_after=stop_after, **settings)
    clock.now += 5000
    told = _fit(clock, tmp_path, ckpt_path=tmp_path / "stopped.ckpt", **settings).told
    assert [row.done for row in told] == list(range(stop_after + 1, 19))
    for now, _, total, left, _ in told:
        assert (total, left) == (18, pytest.approx(clock.now - now))


def test_the_log_of_a_training(clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _fit(clock, tmp_path, max_epochs=4, num_sanity_val_steps=-1)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sft: ")]
    assert lines == [
        "sft: validation before training: 1 of 3 batches (33%), 0:14 left",
        "sft: validation before training: 3 of 3 batches (100%), 8.6 batches/min, took 0:21",
        "sft: 3 of 24 steps (12%), 30.0 steps/min, 2:06 left, loss 0.562",
        # 16 steps of 2 s and 3 validations of 21 s.
        "sft: 8 of 24 steps (33%), 30.0 steps/min, 1:35 left, loss 0.000549",
        "sft: 13 of 24 steps (54%), 30.0 steps/min, 1:04 left, loss 5.36e-07",
        "sft: 18 of 24 steps (75%), 0:33 left, validating 100%, loss 5.24e-10",
        "sft: 24 of 24 steps (100%), 0:00 left, validating 100%, loss 1.28e-13",
        "sft: 24 of 24 steps (100%), 30.0 steps/min, took 2:12, loss 1.28e-13",
    ]


def test_an_exception_ends_the_line(clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        _fit(clock, tmp_path, stop_after=5, limit_val_batches=0)
    assert capsys.readouterr().err.splitlines()[-1].startswith("sft: stopped, 5 of 6 steps (83%), after 0:10")


def test_other_processes_print_nothing(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = SimpleNamespace(
        is_global_zero=False, estimated_stepping_batches=9, global_step=0, state=SimpleNamespace(fn="fit")
    )
    bar = Progress()
    bar.setup(trainer, SFTModule(), "fit")
    bar.on_train_start(trainer, SFTModule())
    clock.now += 100
    bar.on_train_batch_end(trainer, SFTModule(), None, None, 0)
    bar.on_train_end(trainer, SFTModule())
    assert capsys.readouterr().err == ""


def test_the_interval_must_be_positive() -> None:
    with pytest.raises(DataError, match="every"):
        Progress(every=0)


# --- Evaluations ----------------------------------------------------------------------------------------------------


class Queries(list[int]):
    """A dataset of numbers that load without problems."""


def _loader(length: int, *, done: int = 0, rank: int = 0, processes: int = 1, batch: int = 4) -> QueryLoader:
    sampler = EpochSampler(
        length, rank=rank, num_replicas=processes, shuffle=False, even=False, done=range(done)
    )
    log: Any = SimpleNamespace(dataset=Queries(range(length)))
    if not len(sampler):
        return QueryLoader(log, list, batch_sampler=[[]])
    return QueryLoader(log, list, batch_size=batch, sampler=sampler)


def _loads(loaders: list[QueryLoader], systems: int = 1, limit: int | None = None) -> Workload:
    batches = [min(len(loader), limit or len(loader)) for loader in loaders]
    return callback._workload(loaders, batches, systems, 1)  # type: ignore[arg-type]


def test_answers_of_all_systems_and_of_the_calibration_set_count_and_earlier_ones_are_done() -> None:
    load = _loads([_loader(20, done=8), _loader(10, done=0)], systems=3)
    assert (sum(load.done), sum(load.total), load.unit) == (3 * 8, 3 * 30, "answers")
    assert load.after(0, 0) == 3 * (8 + 4)
    assert load.after(2, 0) == 3 * 20
    assert load.after(1, 1) == 3 * (20 + 10 * 2 / 3)
    assert load.after(2, 1) == 3 * 30


@pytest.mark.parametrize("processes", [2, 3])
def test_one_process_speaks_for_all(processes: int) -> None:
    load = _loads([_loader(31, done=9, processes=processes)])
    assert (load.done, load.total) == ([9], [31])
    assert load.after(load.batches[0] - 1, 0) == 31


def test_a_process_with_nothing_left_reports_all() -> None:
    load = _loads([_loader(9, done=8, rank=1, processes=2)])
    assert (load.done, load.total, load.after(0, 0)) == ([9], [9], 9)


def test_a_limited_evaluation_has_the_answers_of_its_batches() -> None:
    load = _loads([_loader(40)], systems=2, limit=3)
    assert (load.total, load.after(2, 0)) == ([24], 24)


class Source:
    def queries(self) -> list[Query]:
        return [Query(f"q{n}", "a.jpg", "Is it?", "Yes", "yes_no") for n in range(23)]


def test_shards_of_an_earlier_extraction_are_done() -> None:
    """23 queries in shards of 5: the last has 3."""
    source: Any = Source()
    shards = shards_of([23], 5)
    batches = RawBatches([source], [shards[2], shards[4]], 2, done=10, total=23)
    loader = DataLoader(batches, batch_size=None)
    load = callback._workload([loader], [len(loader)], 1, 2)
    assert (load.done, load.total, load.unit) == ([10], [23], "queries")
    assert load.after(len(loader) - 1, 0) == 23


@pytest.mark.parametrize("stage", ["test", "predict", "validate"])
def test_the_log_of_an_evaluation(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[Hands(clock), Progress(every=10)],
        default_root_dir=tmp_path,
    )
    loaders = [DataLoader(range(n), batch_size=1) for n in (2, 3)]  # type: ignore[var-annotated,arg-type]
    module = SFTModule()
    module.predict_step = module.test_step = module.validation_step = lambda *_: None  # type: ignore[method-assign]
    getattr(trainer, stage)(module, loaders)
    name = "sft: validation" if stage == "validate" else "sft"
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("sft: ")] == [
        f"{name}: 1 of 5 batches (20%), 8.6 batches/min, 0:28 left",
        f"{name}: 3 of 5 batches (60%), 8.6 batches/min, 0:14 left",
        f"{name}: 5 of 5 batches (100%), 8.6 batches/min, 0:00 left",
        f"{name}: 5 of 5 batches (100%), 8.6 batches/min, took 0:35",
    ]
