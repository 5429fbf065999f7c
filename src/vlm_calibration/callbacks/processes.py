"""What one process knows, brought together from all of them."""

from __future__ import annotations

from typing import TypeVar

import lightning as L
import torch

T = TypeVar("T")


def of_all(trainer: L.Trainer, value: T) -> list[T]:
    """This value of every process, in the order of their ranks; every process must call it."""
    if trainer.world_size == 1:
        return [value]
    gathered: list[T] = [value] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered
