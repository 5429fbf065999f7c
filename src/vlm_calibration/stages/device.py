"""Where a stage's model is loaded to."""

from __future__ import annotations

import lightning as L
import torch


def device_of(module: L.LightningModule) -> torch.device:
    """The device that the module's trainer runs it on; its own where it has no trainer."""
    # A quantised model is loaded onto its device before Lightning moves anything there.
    attached = module._trainer is not None
    return module.trainer.strategy.root_device if attached else module.device
