"""Where a stage's model is loaded to, and how it is spread over processes."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.sharding import shard


def device_of(module: L.LightningModule) -> torch.device:
    """The device that the module's trainer runs it on; its own where it has no trainer."""
    # A quantised model is loaded onto its device before Lightning moves anything there.
    attached = module._trainer is not None
    return module.trainer.strategy.root_device if attached else module.device


def ready_to_train(module: L.LightningModule, model: Any, gradient_checkpointing: bool) -> Any:
    """The model, with its adapter, in train mode, sharded if the strategy asks for that.

    from_pretrained leaves eval mode and Lightning keeps it; checkpointing and dropout need train mode.
    """
    if gradient_checkpointing:
        base = unwrap_peft(model)
        base.gradient_checkpointing_enable({"use_reentrant": False})
        # For checkpointing of the other kind, inputs now require gradients, those of a frozen tower too, which would be
        # computed twice and gone through backwards.
        base.disable_input_require_grads()
    if module.device_mesh is not None:
        shard(model, module.device_mesh["data_parallel"])
    return model.train()
