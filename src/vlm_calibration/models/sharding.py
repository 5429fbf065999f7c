"""Fully sharded data parallelism (FSDP2, arXiv 2304.11277): each process stores a shard of every weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vlm_calibration.models.forward import unwrap_peft


def shard(model: Any, mesh: DeviceMesh) -> None:
    """Shard the model over a mesh of processes, in place; a forward gathers one transformer block at a time."""
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def transformer_blocks(model: Any) -> list[nn.Module]:
    """The modules that transformers never splits between devices, in the language model and the tower."""
    base = unwrap_peft(model)
    names = {n for m in base.modules() for n in getattr(m, "_no_split_modules", None) or ()}
    return [m for m in base.modules() if type(m).__name__ in names]


def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """Gather all trained and adapter weights; every process must call it. None if the model is not sharded."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    return {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad or "lora_" in name
    }
