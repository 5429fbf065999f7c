"""AdamW with linear warm-up and cosine decay, for both training stages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from torch import nn

from vlm_calibration.records import DataError


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv 1711.05101) and its schedule.

    Args:
        name: "adamw", or with 8-bit states through bitsandbytes (arXiv 2110.02861): "adamw_8bit", and
            "paged_adamw_8bit", which moves states out of GPU memory when it runs short. Tensors of fewer than 4,096
            elements keep float32 states.
        lr: highest learning rate.
        weight_decay: decoupled weight decay.
        betas: decay rates of the first and second moments.
        eps: term added to the denominator for numerical stability.
        warmup_fraction: share of all steps, in [0, 1), in which the rate rises linearly.
        final_fraction: final learning rate as a share of `lr`, in [0, 1].
    """

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_fraction: float = 0.05
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        for name, is_valid, rule in (
            ("lr", 0 < self.lr < math.inf, "a finite number above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0"),
            ("warmup_fraction", 0 <= self.warmup_fraction < 1, "in [0, 1)"),
            ("final_fraction", 0 <= self.final_fraction <= 1, "in [0, 1]"),
        ):
            if not is_valid:
                raise DataError(f"optimizer.{name} must be {rule}, found {getattr(self, name)}")


def learning_rate_factor(step: int, total: int, settings: OptimizerSettings) -> float:
    """Learning rate of optimiser step `step` (from 0) of `total`, as a share of `lr`."""
    warmup = round(settings.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.final_fraction + (1.0 - settings.final_fraction) * cosine


def adamw_with_schedule(
    parameters: Iterable[nn.Parameter], settings: OptimizerSettings, total_steps: float
) -> dict[str, Any]:
    """The return value of a LightningModule's `configure_optimizers`; raises a DataError if the number of steps is not finite."""
    if not 0 < total_steps < math.inf:
        raise DataError(
            "the learning rate schedule needs an end: set trainer.max_epochs or trainer.max_steps"
        )
    classes = {
        "adamw": torch.optim.AdamW,
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    }
    optimizer = classes[settings.name](
        parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, int(total_steps), settings)
    )
    # `name` is the key that the rate is logged under.
    scheduled = {"scheduler": schedule, "interval": "step", "name": "train/learning_rate"}
    return {"optimizer": optimizer, "lr_scheduler": scheduled}
