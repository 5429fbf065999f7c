"""Prints the comparison of systems at the end of an evaluation."""

from __future__ import annotations

from typing import cast

import lightning as L

from vlm_calibration.reporting.tables import print_results
from vlm_calibration.stages.scoring import HasResults


class ResultsTable(L.Callback):
    """Prints a table of the metrics of all systems when an evaluation ends."""

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            print_results(cast(HasResults, module).results)
