"""What the Trainer's strategy changes in the memory of one GPU: DDP's copy of the gradients, and the shares of sharded training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from vlm_calibration.models.memory import MemoryEstimate


class Sharing(NamedTuple):
    """How processes share a model.

    Attributes:
        copies_gradients: whether each has a second copy of the gradients, for communication.
        shares: among how many processes weights, gradients and optimizer states are divided; 1 is not at all.
        note: what an estimate does not include; empty for nothing.
    """

    copies_gradients: bool = False
    shares: int = 1
    note: str = ""


def sharing_of(trainer: Any) -> Sharing:
    """How the processes of a run share its model.

    Args:
        trainer: settings of the Trainer.
    """
    strategy, processes = trainer.get("strategy") or "auto", _processes(trainer)
    name = strategy if isinstance(strategy, str) else strategy.class_path.rpartition(".")[-1]
    settings = {} if isinstance(strategy, str) else strategy.get("init_args") or {}
    if name == "ModelParallelStrategy":
        size = settings.get("data_parallel_size")
        n = size if isinstance(size, int) else processes
        if settings.get("tensor_parallel_size") not in (1, None):
            return Sharing(note="tensor parallelism is not included")
        if n is None:
            return Sharing(
                note="the shares of weights, gradients and optimizer states are not included: set trainer.devices to the number of GPUs"
            )
        return Sharing(shares=n)
    if name.lower().startswith("ddp") or (name == "auto" and processes != 1):
        return Sharing(copies_gradients=not settings.get("gradient_as_bucket_view"))
    if name in ("auto", "single_device", "SingleDeviceStrategy"):
        return Sharing()
    return Sharing(note=f"what trainer.strategy {name} adds or saves is not included")


def on_each_gpu(estimate: MemoryEstimate, trainer: Any) -> MemoryEstimate:
    """The estimate for one of a run's GPUs.

    Args:
        estimate: of training or answers on a single GPU.
        trainer: settings of the Trainer.
    """
    sharing = sharing_of(trainer)
    return replace(
        estimate,
        weights={dtype: size // sharing.shares for dtype, size in estimate.weights.items()},
        gradients=estimate.gradients // sharing.shares,
        optimizer=estimate.optimizer // sharing.shares,
        buckets=estimate.gradients if sharing.copies_gradients else 0,
        gathered=estimate.largest_gathered if sharing.shares > 1 else 0,
    )


def _processes(trainer: Any) -> int | None:
    """Number of processes; None if the configuration leaves it to the machine."""
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes") or 1
    if isinstance(devices, str):
        listed = [part for part in devices.split(",") if part.strip()]
        if len(listed) > 1 or devices.endswith(","):
            return len(listed) * nodes
        devices = int(devices) if devices.lstrip("-").isdigit() else -1
    if isinstance(devices, list):
        return len(devices) * nodes
    return devices * nodes if isinstance(devices, int) and devices > 0 else None
