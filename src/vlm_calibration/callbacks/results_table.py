"""The comparison of systems at the end of an evaluation."""

from __future__ import annotations

from typing import cast

import lightning as L

from vlm_calibration.reporting.tables import COLUMNS, print_results
from vlm_calibration.stages.scoring import HasResults

__all__ = ["COLUMNS", "ResultsTable", "print_results"]


class ResultsTable(L.Callback):
    """Prints the comparison when an evaluation ends."""

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            print_results(cast(HasResults, module).results)
