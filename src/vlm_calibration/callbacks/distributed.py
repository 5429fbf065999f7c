"""Exchanges values between the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import lightning as L

from vlm_calibration.records import DataError

T = TypeVar("T")


def broadcast_from_first(trainer: L.Trainer, compute: Callable[[], T]) -> T:
    """The value that the first process computes, in all processes, or the DataError or OSError that it raises; every process must call this."""
    value: T | DataError | OSError | None = None
    if trainer.is_global_zero:
        try:
            value = compute()
        except (DataError, OSError) as error:
            value = error
    value = trainer.strategy.broadcast(value)
    if isinstance(value, DataError | OSError):
        raise value
    return value  # type: ignore[return-value]
