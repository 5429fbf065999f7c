"""The validation before training beside the one after it, on the same queries: did accuracy pay for calibration?"""

from __future__ import annotations

from typing import cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from vlm_calibration.reporting.results import print_results
from vlm_calibration.stages.scoring import HasResults, Results


class BeforeAndAfter(L.Callback):
    """Prints the results of the validation queries before and after training, side by side.

    The validation before is Lightning's sanity check over all batches: `trainer.num_sanity_val_steps: -1`.

    Args:
        tolerance: warn if accuracy fell by more than this, in [0, 1].
    """

    def __init__(self, tolerance: float = 0.01) -> None:
        self.tolerance = tolerance
        self.before: dict[str, float] | None = None

    def on_sanity_check_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.num_sanity_val_steps == float("inf"):
            self.before = dict(cast(HasResults, module).results[""])

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.before is None or not trainer.is_global_zero or trainer.interrupted:
            return
        after = cast(HasResults, module).results[""]
        results: Results = {"before": self.before, "after": after}
        print_results(results)
        lost = self.before["accuracy"] - after["accuracy"]
        if lost > self.tolerance:
            rank_zero_warn(
                f"accuracy on the validation queries fell by {lost:.1%} in training: fewer steps, a lower learning rate, a "
                "larger loss.beta or model.nll_weight hold on to it"
            )
