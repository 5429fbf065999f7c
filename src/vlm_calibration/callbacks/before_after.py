"""Compares the validation before training with the one after it, and warns if accuracy fell."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from vlm_calibration.stages.scoring import HasResults


class BeforeAfterCheck(L.Callback):
    """Keeps the validation results before and after training, which `ResultsTable` prints, and warns if accuracy fell.

    The validation before training is Lightning's sanity check over all batches: `trainer.num_sanity_val_steps: -1`.

    Args:
        tolerance: warn if accuracy fell by more than this, in [0, 1].
    """

    def __init__(self, tolerance: float = 0.01) -> None:
        self.tolerance = tolerance
        self.before: dict[str, float] | None = None
        self.after: dict[str, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The results so far, since a resumed run has no validation before training."""
        return {"before": self.before, "after": self.after}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.after = state_dict["before"], state_dict["after"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.before = self.after = None

    def on_sanity_check_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # A run resumed after its last step validates the trained model here.
        if self.before is None and trainer.num_sanity_val_steps == float("inf"):
            self.before = dict(cast(HasResults, module).results[""])

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.after = dict(cast(HasResults, module).results[""])

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.before is None or not trainer.is_global_zero or trainer.interrupted:
            return
        if self.after is None:
            rank_zero_warn("training ended without a validation to compare with the one before it")
            return
        lost = self.before["accuracy"] - self.after["accuracy"]
        if lost > self.tolerance:
            rank_zero_warn(
                f"accuracy on the validation queries fell by {lost:.1%} in training: fewer steps, a lower learning rate, a "
                "larger loss.beta or a larger model.nll_weight preserve it"
            )
