"""The comparison of validations before and after training, in a real Trainer: what is kept, and when it warns."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from vlm_calibration.callbacks.before_after import BeforeAfterCheck
from vlm_calibration.reporting.tables import COLUMNS


def _results(accuracy: float, ece: float = 0.25) -> dict[str, float]:
    return {**dict.fromkeys(COLUMNS, 0.5), "n": 40.0, "accuracy": accuracy, "ece": ece}


class Scored(L.LightningModule):
    """A module that trains nothing, and reports the given accuracies, one a validation."""

    def __init__(self, *accuracies: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.accuracies: Iterator[float] = iter(accuracies)
        self.results: dict[str, dict[str, float]] = {}

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.weight * batch.sum()

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.results = {"": _results(next(self.accuracies))}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit(
    folder: Path, module: Scored, guard: BeforeAfterCheck | None = None, **settings: Any
) -> BeforeAfterCheck:
    guard = BeforeAfterCheck() if guard is None else guard
    plain = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": -1,
        "max_epochs": 2,
        "default_root_dir": folder,
    }
    batches: DataLoader[Any] = DataLoader([torch.ones(1), torch.ones(1)])  # type: ignore[arg-type]
    L.Trainer(callbacks=[guard], **{**plain, **settings}).fit(module, batches, batches)
    return guard


def test_the_first_and_the_last_validation_are_kept(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*accuracy on the validation queries fell.*")
        guard = _fit(tmp_path, Scored(0.5, 0.125, 0.75))
    assert (guard.before, guard.after) == (_results(0.5), _results(0.75))


@pytest.mark.parametrize(
    ("tolerance", "after", "warns"),
    [(0.01, 0.79, True), (0.01, 0.7925, False), (0.01, 0.9, False), (0.05, 0.76, False), (0.05, 0.74, True)],
)
def test_a_loss_of_accuracy_above_the_tolerance_is_warned_of(
    tmp_path: Path, tolerance: float, after: float, warns: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _fit(tmp_path, Scored(0.8, after), BeforeAfterCheck(tolerance), max_epochs=1)
    said = [str(w.message) for w in caught if "accuracy on the validation queries" in str(w.message)]
    assert len(said) == warns
    if warns:
        assert said[0].startswith(f"accuracy on the validation queries fell by {0.8 - after:.1%} in training")


@pytest.mark.parametrize("steps", [0, 1])
def test_without_a_whole_validation_before_there_is_nothing_to_say(tmp_path: Path, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*accuracy on the validation queries fell.*")
        guard = _fit(tmp_path, Scored(0.9, 0.1, 0.1), num_sanity_val_steps=steps)
    assert guard.before is None


def test_without_a_validation_after_training_there_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="training ended without a validation to compare with"):
        _fit(tmp_path, Scored(0.9), max_epochs=1, check_val_every_n_epoch=2)


def test_without_validation_queries_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert _fit(tmp_path, Scored(), limit_val_batches=0).before is None


@pytest.mark.parametrize(("first", "interrupted"), [(True, True), (False, False)])
def test_interrupted_runs_and_other_processes_are_silent(first: bool, interrupted: bool) -> None:
    trainer: Any = SimpleNamespace(
        num_sanity_val_steps=float("inf"),
        is_global_zero=first,
        interrupted=interrupted,
        sanity_checking=False,
    )
    guard, module = BeforeAfterCheck(), Scored(0.9, 0.1)
    module.on_validation_epoch_end()
    guard.on_sanity_check_end(trainer, module)
    module.on_validation_epoch_end()
    guard.on_validation_end(trainer, module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.on_fit_end(trainer, module)


def test_what_was_found_before_is_kept_as_it_was(tmp_path: Path) -> None:
    module = Scored(0.9, 0.8)
    guard = _fit(tmp_path, module, BeforeAfterCheck(1.0), max_epochs=1)
    module.results[""]["accuracy"] = 0.0
    assert guard.before == _results(0.9)
