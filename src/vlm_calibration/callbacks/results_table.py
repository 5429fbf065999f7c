"""Prints the results at the end of a run."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from vlm_calibration.callbacks.adapter import AdapterWriter
from vlm_calibration.models.base import ADAPTER
from vlm_calibration.reporting.tables import print_results


class ResultsTable(L.Callback):
    """Prints a table of the main metrics when a run ends, the notes on systems, and the folder of what was written.

    The rows are the systems of an evaluation, or the `validations` that an `AdapterWriter` before this callback has kept. It warns if
    accuracy on the validation queries fell by more than a point in training.
    """

    def on_test_end(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            notes = getattr(module, "notes", {})
            lines = [f"{system}, {name}: {note}" for system in notes for name, note in notes[system].items()]
            files = {"answers": Path(trainer.default_root_dir)}
            print_results(module.results, words="\n".join(lines), files=files)

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.VALIDATING:
            print_results({"validation": module.results[""]})

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        writers = [c for c in trainer.callbacks if isinstance(c, AdapterWriter)]  # type: ignore[attr-defined]
        if not writers or not trainer.is_global_zero or trainer.interrupted:
            return
        validations = writers[0].validations
        files = {"adapter": Path(trainer.default_root_dir) / ADAPTER}
        print_results(validations, about=" to perturbed validation queries", files=files)
        before, after = validations.get("before"), validations.get("after")
        if before is not None and after is None:
            rank_zero_warn("training ended without a validation to compare with the one before it")
        elif before and after and (lost := before["accuracy"] - after["accuracy"]) > 0.01:
            answers = f"{round(lost * after['n'])} of {int(after['n'])} answers"
            loss = f"accuracy on the validation queries fell by {lost:.1%} in training ({answers})"
            rank_zero_warn(f"{loss}: fewer steps or a lower learning rate preserve it")
