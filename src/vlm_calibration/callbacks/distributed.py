"""What one process knows, brought together from all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import lightning as L
import torch

from vlm_calibration.records import DataError

T = TypeVar("T")


def all_gather(trainer: L.Trainer, value: T) -> list[T]:
    """This value of every process, in the order of their ranks; every process must call it."""
    if trainer.world_size == 1:
        return [value]
    gathered: list[T] = [value] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def broadcast_from_first(trainer: L.Trainer, find: Callable[[], T]) -> T:
    """What the first process finds, in all of them; every process must call it.

    Raises:
        DataError, OSError: the first process does; in all of them, so that none waits for it.
    """
    found: T | DataError | OSError | None = None
    if trainer.is_global_zero:
        try:
            found = find()
        except (DataError, OSError) as error:
            found = error
    found = trainer.strategy.broadcast(found)
    if isinstance(found, DataError | OSError):
        raise found
    return found  # type: ignore[return-value]
