"""Fully sharded data parallelism (FSDP2, arXiv 2304.11277): each process holds a part of every weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vlm_calibration.models.forward import unwrap_peft


def shard(model: Any, mesh: DeviceMesh) -> None:
    """Shard the model over a mesh of processes, in place; one transformer block at a time is put together to be run."""
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def transformer_blocks(model: Any) -> list[nn.Module]:
    """The blocks that transformers does not split between devices, of the language model and of the tower."""
    base = unwrap_peft(model)
    names = {n for m in base.modules() for n in getattr(m, "_no_split_modules", None) or ()}
    return [m for m in base.modules() if type(m).__name__ in names]


def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """All trained and adapter weights put together, for every process to call; None if the model is not sharded."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return None
    wanted = ((n, p) for n, p in model.named_parameters() if p.requires_grad or "lora_" in n)
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in wanted}
