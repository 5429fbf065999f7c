"""What a run prints at its end, and the validations before and after training, in a real Trainer: which are kept, and when it warns."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from vlm_calibration.callbacks.adapter import AdapterWriter
from vlm_calibration.callbacks.results_table import ResultsTable
from vlm_calibration.reporting.tables import COLUMNS

from ..trainers import Line, plain_trainer

FELL = "accuracy on the validation queries fell by"


def _results(accuracy: float) -> dict[str, float]:
    return {**dict.fromkeys(COLUMNS, 0.5), "n": 40.0, "accuracy": accuracy}


class Scored(Line):
    """A module that reports the given accuracies, one a validation."""

    def __init__(self, *accuracies: float) -> None:
        super().__init__()
        self.accuracies: Iterator[float] = iter(accuracies)
        self.results: dict[str, dict[str, float]] = {}

    def on_validation_epoch_end(self) -> None:
        # In place: what is kept of a validation does not change with the next one.
        self.results.setdefault("", {}).update(_results(next(self.accuracies)))


class Kept(AdapterWriter):
    """Keeps the validations, and writes nothing."""

    def on_fit_start(self, *_: Any) -> None:
        pass

    on_fit_end = on_fit_start


def _fit(folder: Path, *accuracies: float, **settings: Any) -> tuple[Any, list[str]]:
    """Train; returns the validations that were kept, and the warnings about them."""
    settings = {"num_sanity_val_steps": -1, "max_epochs": len(accuracies) - 1, **settings}
    batches: DataLoader[Any] = DataLoader([torch.ones(1), torch.ones(1)])  # type: ignore[arg-type]
    keeper = Kept()
    trainer = plain_trainer(folder, keeper, ResultsTable(), **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Scored(*accuracies), batches, batches)
    return keeper.validations, [str(w.message) for w in caught if "validation" in str(w.message)]


def _rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Name, mean confidence and accuracy of each row that was printed."""
    rows = [line.split("│")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_first_and_the_last_validation_are_kept_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validations, warned = _fit(tmp_path, 0.5, 0.125, 0.75)
    assert validations == {"before": _results(0.5), "after": _results(0.75)}
    assert not [text for text in warned if text.startswith(FELL)]
    assert _rows(capsys) == [["before", "0.500", "0.500"], ["after", "0.500", "0.750"]]


def test_a_validation_by_itself_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches: DataLoader[Any] = DataLoader([torch.ones(1)])  # type: ignore[arg-type]
    plain_trainer(tmp_path, ResultsTable()).validate(Scored(0.25), batches, verbose=False)
    assert _rows(capsys) == [["validation", "0.500", "0.250"]]


@pytest.mark.parametrize(("after", "says"), [(0.79, ["1.0%", 0]), (0.75, ["5.0%", 2]), (0.7925, [])])
def test_a_loss_of_accuracy_by_more_than_a_point_is_warned_of(
    tmp_path: Path, after: float, says: list[Any]
) -> None:
    _, warned = _fit(tmp_path, 0.8, after)
    said = [text.partition(":")[0] for text in warned if FELL in text]
    assert said == [f"{FELL} {says[0]} in training ({says[1]} of 40 answers)" for _ in says[:1]]


@pytest.mark.parametrize("steps", [0, 1])
def test_without_a_whole_validation_before_there_is_nothing_to_compare(tmp_path: Path, steps: int) -> None:
    validations, warned = _fit(tmp_path, 0.9, 0.1, 0.1, num_sanity_val_steps=steps)
    assert "before" not in validations
    assert not [text for text in warned if FELL in text]


def test_without_a_validation_after_training_there_is_nothing_to_compare(tmp_path: Path) -> None:
    _, warned = _fit(tmp_path, 0.9, max_epochs=1, check_val_every_n_epoch=2)
    assert [text for text in warned if text.startswith("training ended without a validation to compare with")]


@pytest.mark.parametrize(("first", "interrupted"), [(True, True), (False, False)])
def test_interrupted_runs_and_other_processes_are_silent(
    capsys: pytest.CaptureFixture[str], first: bool, interrupted: bool
) -> None:
    keeper = Kept()
    keeper.validations = {"before": _results(0.9), "after": _results(0.1)}
    trainer: Any = SimpleNamespace(callbacks=[keeper], is_global_zero=first, interrupted=interrupted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ResultsTable().on_fit_end(trainer, Scored())
        if not first:
            ResultsTable().on_test_end(trainer, Scored())
    assert capsys.readouterr().out == ""
