"""Prints the results at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from vlm_calibration.callbacks.adapter import AdapterWriter
from vlm_calibration.models.base import ADAPTER
from vlm_calibration.reporting.tables import print_results
from vlm_calibration.stages.scoring import HasResults


class ResultsTable(L.Callback):
    """Prints a table of the main metrics when a run ends.

    Its rows are the systems of an evaluation, or of a training the validations that `AdapterWriter` puts into the card. Below it are
    the notes on systems and the folder of what was written. Place it after `AdapterWriter`.
    """

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            results = cast(HasResults, module).results
            notes = getattr(module, "notes", {})
            words = "\n".join(
                f"{s}, {name}: {note}" for s, by_name in notes.items() for name, note in by_name.items()
            )
            print_results(results, words=words, files={"answers": Path(trainer.default_root_dir)})

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.VALIDATING:
            print_results({"validation": cast(HasResults, module).results[""]})

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        writers = [c for c in trainer.callbacks if isinstance(c, AdapterWriter)]  # type: ignore[attr-defined]
        if writers and trainer.is_global_zero and not trainer.interrupted:
            adapter = Path(trainer.default_root_dir) / ADAPTER
            print_results(writers[0].validated(trainer), files={"adapter": adapter})
