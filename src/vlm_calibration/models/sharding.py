"""Fully sharded data parallelism (FSDP2, arXiv 2304.11277): each process stores a shard of every weight.

A pass gathers one transformer block at a time, and all processes take part. So each of them must run the same passes: a training step on
given responses does, the generation of answers does not, since their lengths differ.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vlm_calibration.models.forward import unwrap_peft


def shard(model: Any, mesh: DeviceMesh) -> None:
    """Shard the model over a mesh of processes, in place. Every process must then run the same passes."""
    base = unwrap_peft(model)
    blocks = {name for m in base.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    for unit in [*(m for m in base.modules() if type(m).__name__ in blocks), base]:
        # The rest of the model too: every unit is sharded between passes.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """Gather all trained and adapter weights; every process must call it. None if the model is not sharded."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    return {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad or "lora_" in name
    }
