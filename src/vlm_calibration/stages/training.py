"""What both training stages do alike: which parameters are trained, saved and optimised, and what validation logs."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from vlm_calibration.records import DataError
from vlm_calibration.stages.optimization import OptimizerSettings, adamw_with_schedule
from vlm_calibration.stages.scoring import Results

SHOWN = ("accuracy", "ece")


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def keep_trained(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Leave only what is trained in a checkpoint; the frozen rest comes from where it came from."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}


def check_trained(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint holds what is trained here, before any of it is loaded.

    Raises:
        DataError: it is one of another model or adapter.
    """
    wanted = {name: list(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    found = {name: list(weight.shape) for name, weight in checkpoint["state_dict"].items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        there, here = (shapes.get(wrong[0], "missing") for shapes in (found, wanted))
        raise DataError(
            f"--ckpt_path: a checkpoint of another model or adapter: {len(wrong)} of its and this model's trained weights "
            f"differ, the first is {wrong[0]}, there {there}, here {here}; give the settings of the run that wrote it"
        )


def optimizers_of(module: L.LightningModule, settings: OptimizerSettings) -> dict[str, Any]:
    """AdamW over what is trained, and its schedule over the whole of this training."""
    return adamw_with_schedule(
        trained_parameters(module), settings, module.trainer.estimated_stepping_batches
    )


def seed_batch(module: L.LightningModule, batch_idx: int) -> None:
    """Make dropout a function of (seed, epoch, batch, process): the same after a restart, whatever ran in between."""
    trainer = module.trainer
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    words = np.random.SeedSequence([seed, trainer.current_epoch, batch_idx, trainer.global_rank])
    torch.manual_seed(int(words.generate_state(1, np.uint64)[0]))


def no_loss(module: nn.Module) -> Tensor:
    """A loss of zero that reaches every trained parameter, for a batch without samples: it keeps processes in step."""
    return sum(p.sum() * 0.0 for p in trained_parameters(module))  # type: ignore[return-value]


def log_results(module: L.LightningModule, results: Results) -> None:
    """Log the run's own results of a validation."""
    for name, value in results[""].items():
        module.log(f"val/{name}", value, prog_bar=name in SHOWN, rank_zero_only=True)


def warn_of_skipped(module: L.LightningModule, skipped: int) -> None:
    """Say how many samples all processes together have left out."""
    total = module.trainer.strategy.reduce(
        torch.tensor(float(skipped), device=module.device), reduce_op="sum"
    )
    if total > 0:
        rank_zero_warn(f"left out {int(total)} samples that were longer than data.max_length")
